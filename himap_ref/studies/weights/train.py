"""Trains the small LLaVA in `weights/` on drawn scenes, from random weights, on a CPU.

    python -m himap_ref.studies train

Two phases, as for LLaVA itself, both at full depth and with nothing frozen but the word vectors in the first:

1. *align*: encoder and projector learn to put each patch of a thing near the decoder's own vectors of the words for its
   colour, shape, row and column, and each digit's patch near that digit's;
2. *answer*: everything learns to answer questions; scenes of few things first.

One sequence holds a picture and several questions about it. A question sees the picture and itself, not the others, and
its positions start right after the picture: each is trained exactly as it will be asked, and the picture is paid once.

Seeded; resumes from the last 250th step (the state is in `--state`). Every module is inference's own; only the order in
which a layer's parts are called is written again here, for the packed questions (`layer_forward`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...assistant import Llava
from ...commands.files import check_writable, write_whole
from ...commands.manners import run_command
from ...config import LlavaConfig, TextConfig, VisionConfig
from ...decoder import DecoderLayer, rope
from ...errors import HimapError
from ...image import ImageProcessor
from ...prompt import TEMPLATES
from ..questions.drawing import INK, draw
from ..questions.scenes import (
    COLORS,
    COLUMNS,
    DIGIT_PITCH,
    DIGIT_WIDTH,
    GRID,
    KINDS,
    PATCH,
    ROWS,
    SHAPES,
    SIZE,
    UNSEEN,
    Box,
    Question,
    Scene,
    make_questions,
    make_scene,
    patches_of,
    question_forms,
)  # fmt: skip
from .hub_layout import folder_files

TEMPLATE = TEMPLATES["shapes"]
SYSTEM = TEMPLATE.split("<image>")[0]
SCHEDULE = "1:0.5:text_to_image,11:0.25:image_to_image"  # himap.json: the paper's shares on layers that suit this model
EXAMPLE_SEED = UNSEEN + 3861
BLOCKS, BLOCK = 4, 58  # of questions and answers per picture; tokens in a block, the longest question is shorter
BATCH = 16  # pictures a step
MEAN, STD = 0.5, 0.5
THINGS = ((0, 1, 2), (250, 1, 3), (500, 1, 5), (1000, 1, 9), (3250, 3, 9), (4250, 1, 9))  # from this step on in a scene
SLOW_WEIGHT = 3  # of questions that are learned last
SAVE_EVERY, CHECKED = 250, 256  # steps; unseen scenes on which it is then checked
ALIGN_WEIGHT = 0.1  # of the first phase's loss in the second
QUESTIONS = 26  # made for a scene, of which about 16 fit
ASKED = (  # from this step on; what is learned last is asked more often
    (0, (*KINDS, "count", "count", "choice", "relation", "relation")),
    (3500, (*KINDS, *6 * ("count",), "relation", "whole", "whole")),
)


# ---------------------------------------------------------------- tokenizer and shape of the model


def build_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """Byte-level BPE over the questions' own words: any text has ids, common words have one."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r" ?\d"), "isolated")  # digit by digit, as LLaMA's tokenizer has numbers
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(4000), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def _corpus(pictures: int) -> Iterator[str]:
    for seed in range(pictures):
        for question in make_questions(make_scene(seed), 12):
            yield TEMPLATE.replace("<image>", "").replace("{question}", question.text) + " " + question.answer


def shapes_config(vocab_size: int, image_token: int) -> LlavaConfig:
    """12 decoder layers, so that K1 = 2 and K2 = 8 lie where the paper puts them: early and past the middle."""
    vision = VisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        image_size=SIZE, patch_size=PATCH, hidden_act="quick_gelu",
    )  # fmt: skip
    text = TextConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=12, num_attention_heads=4,
        max_position_embeddings=512, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlavaConfig(vision, text, image_token_index=image_token, vision_feature_layer=-1)


def init_weights(model: Llava, seed: int) -> None:
    """Scaled-normal matrices; the two matrices that write into the residual stream start small."""
    generator = torch.Generator().manual_seed(seed)
    depth = model.config.text_config.num_hidden_layers
    for name, p in model.named_parameters():
        if p.ndim == 1:
            nn.init.constant_(p, float("norm" in name and name.endswith("weight")))
        elif "embed" in name and "patch" not in name:
            nn.init.normal_(p, std=0.3, generator=generator)
        else:
            std = p[0].numel() ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * depth)
            nn.init.normal_(p, std=std, generator=generator)


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Plan:
    """What scene and questions belong to sample `index` of a phase: a function of the index alone, hence resumable."""

    seed: int
    num_things: tuple[tuple[int, int, int], ...]  # (from step, fewest and most things in a scene)
    batch: int

    def things(self, index: int) -> tuple[int, int]:
        """Most and fewest."""
        return [(most, least) for step, least, most in self.num_things if index // self.batch >= step][-1]

    def kinds(self, index: int) -> tuple[str, ...]:
        return [kinds for step, kinds in ASKED if index // self.batch >= step][-1]


class Scenes(Dataset):
    """Sample -> pixels, ids of the packed questions, and for each id its segment, place, target and kind."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, length: int):
        self.plan, self.tokenizer, self.length = plan, tokenizer, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = make_scene(self.plan.seed + index, *self.plan.things(index))
        pixels = torch.frombuffer(bytearray(draw(scene).tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3)
        return {"pixels": pixels, "words": patch_words(scene), **self.pack(scene, self.plan.kinds(index))}

    def pack(self, scene: Scene, kinds: tuple[str, ...]) -> dict[str, Tensor]:
        """As many questions as fit the blocks, one after the other; segment 0 is padding, a question 1, 2, ..."""
        fill = {"ids": 0, "segment": 0, "place": 0, "target": -100, "kind": -1, "weight": 0}
        blocks: list[dict[str, list[int]]] = [{name: [] for name in fill} for _ in range(BLOCKS)]
        for number, question in enumerate(make_questions(scene, QUESTIONS, kinds=kinds), 1):
            asked = self.tokenizer.encode(f"\n{question.text} ASSISTANT:", add_special_tokens=False).ids
            answer = self.tokenizer.encode(f" {question.answer}", add_special_tokens=False).ids
            ids = asked + answer  # </s> is a target only: nothing follows it
            block = next((block for block in blocks if len(block["ids"]) + len(ids) <= BLOCK), None)
            if block is None:
                continue
            eos = cast(int, self.tokenizer.token_to_id("</s>"))  # build_tokenizer made it
            block["ids"] += ids
            block["segment"] += [number] * len(ids)
            block["place"] += range(len(ids))
            block["target"] += [-100] * (len(asked) - 1) + answer + [eos]
            block["kind"] += [-1] * (len(asked) - 1) + [KINDS.index(question.kind)] * len(answer) + [len(KINDS)]
            block["weight"] += [SLOW_WEIGHT if is_slow(question) else 1] * len(ids)
        rows = {
            name: [block[name] + [each] * (BLOCK - len(block[name])) for block in blocks] for name, each in fill.items()
        }
        return {name: torch.tensor(row).flatten() for name, row in rows.items()}


def is_slow(question: Question) -> bool:
    """Whether it is of those learned last: counts of several things, and comparisons of two counts."""
    return question.answer in ("2", "3", "4", "5", "6", "7", "8", "9") or question.text.startswith("Are there more")


WORDS = (tuple(COLORS), SHAPES, ROWS, COLUMNS, ("thing", "things"), tuple("0123456789"))


def patch_words(scene: Scene) -> Tensor:
    """(GRID * GRID, 6): which colour, shape, row and column word each patch of a thing shows; -100 for all others.

    "thing" is the patch that holds most of its thing, "things" are its others, so that a thing can be counted once. The
    patch that holds most of a digit shows only that digit.
    """
    words = torch.full((GRID * GRID, len(WORDS)), -100)
    for thing in scene.things:
        own = (thing.color, thing.shape, *thing.place.split(), "things")
        values = [group.index(word) for group, word in zip(WORDS, own, strict=False)]
        words[list(thing.patches), : len(values)] = torch.tensor(values)
        words[main_patch(thing.box), 4] = 0
    if scene.number:
        x, top, _, bottom = scene.number.box
        for digit in scene.number.digits:
            words[main_patch((x, top, x + DIGIT_WIDTH, bottom)), 5] = int(digit)
            x += DIGIT_PITCH
    return words


def main_patch(box: Box) -> int:
    """The patch that holds most of it, to the nearest twentieth."""
    return next(patches[0] for share in range(95, 0, -5) if (patches := patches_of(box, share / 100)))


def to_pixel_values(pixels: Tensor) -> Tensor:
    """(B, S, S, 3) bytes -> (B, 3, S, S), as `preprocessor_config.json` says."""
    return ((pixels.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


# ---------------------------------------------------------------- the two losses


def align_loss(image: Tensor, batch: dict, vectors: list[Tensor]) -> Tensor:
    """Each patch's (B, N, d) token picks its words by cosine, one cross-entropy for each of the groups of `WORDS`."""
    embeds = F.normalize(image.float(), dim=-1)
    logits = [(embeds @ F.normalize(group, dim=-1).T * 20).flatten(0, 1) for group in vectors]
    targets = batch["words"].flatten(0, 1).unbind(-1)
    losses = [F.cross_entropy(x, y, reduction="sum") for x, y in zip(logits, targets, strict=True)]
    return torch.stack([loss / (y >= 0).sum().clamp(min=1) for loss, y in zip(losses, targets, strict=True)]).sum()


StepLayer = Callable[[DecoderLayer, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def layer_forward(
    layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, before: Tensor, blocks: Tensor
) -> Tensor:  # fmt: skip
    """One decoder layer over (B, P + BLOCKS * BLOCK, d): the P rows that all share, then the questions.

    A block of questions sees those P rows and itself: half of the work of all rows over all keys. before: (P, P),
    blocks: (B, 1, BLOCKS, BLOCK, P + BLOCK), both added to the logits. Softmax is written out: on a CPU its backward
    is faster than the fused kernel's.
    """
    shared = len(before)
    parts = layer.self_attn.qkv(layer.input_layernorm(x), cos, sin)
    q, k, v = (part.transpose(1, 2).to(before.dtype) for part in parts)  # (B, h, T, c)
    with torch.autocast("cpu", enabled=False):
        q = q * q.shape[-1] ** -0.5
        first = (q[:, :, :shared] @ k[:, :, :shared].mT + before).softmax(dim=-1) @ v[:, :, :shared]
        k, v = (
            torch.cat(
                (t[:, :, None, :shared].expand(-1, -1, BLOCKS, -1, -1), t[:, :, shared:].unflatten(2, (BLOCKS, -1))), 3
            )
            for t in (k, v)
        )  # (B, h, BLOCKS, P + BLOCK, c)
        rest = (q[:, :, shared:].unflatten(2, (BLOCKS, -1)) @ k.mT + blocks).softmax(dim=-1) @ v
        out = torch.cat((first, rest.flatten(2, 3)), dim=2)
    x = x + layer.self_attn.o_proj(out.transpose(1, 2).flatten(2).to(x.dtype))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def answer_loss(
    model: Llava, batch: dict, prefix: Tensor, step_layer: StepLayer = layer_forward
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted cross-entropy of the answers' tokens. Returns loss, hit and kind per target, and the image tokens."""
    decoder, B = model.language_model, len(batch["ids"])
    image = model.embed_image(to_pixel_values(batch["pixels"]))
    before = decoder.embed_tokens(prefix).expand(B, -1, -1)
    x = torch.cat((before, image, decoder.embed_tokens(batch["ids"])), dim=1)  # (B, T, d)
    start = before.shape[1] + image.shape[1]
    positions = torch.cat((torch.arange(start).expand(B, -1), start + batch["place"]), dim=1)
    low = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
    causal = torch.full((start, start), -1e9).triu(1).to(low)
    segment = batch["segment"].view(B, 1, BLOCKS, BLOCK)
    hidden = (segment[..., :, None] != segment[..., None, :]) | torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)
    blocks = F.pad(torch.zeros(hidden.shape).masked_fill_(hidden, -1e9), (start, 0)).to(low)  # all see what is shared
    cos, sin = rope(positions, decoder.config, x.dtype)
    for layer in decoder.layers:
        x = step_layer(layer, x, cos, sin, causal, blocks)
    where = batch["target"] >= 0
    logits = decoder.logits(decoder.norm(x[:, start:][where]))
    target, kind = batch["target"][where], batch["kind"][where]
    weight = batch["weight"][where]
    loss = (F.cross_entropy(logits.float(), target, reduction="none") * weight).sum() / weight.sum()
    return loss, logits.argmax(-1) == target, kind, image


# ---------------------------------------------------------------- optimiser


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Nearly the closest orthogonal matrix to each of (k, rows, columns), by Newton-Schulz (Muon, K. Jordan 2024)."""
    x = (update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised; unlike torch's own, all matrices of one shape at once."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        params = sorted(params, key=lambda p: tuple(p.shape))
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure: nothing here has one
        for group in self.param_groups:
            by_shape: dict[tuple, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(tuple(p.shape), []).append(p)
            for (rows, columns), params in by_shape.items():
                updates = []
                for p in params:
                    m, grad = self.state[p].setdefault("momentum", torch.zeros_like(p)), cast(Tensor, p.grad)
                    m.lerp_(grad, 1 - group["momentum"])
                    updates.append(grad.lerp(m, group["momentum"]))
                scale = 0.2 * max(rows, columns) ** 0.5  # the size of an Adam step
                for p, update in zip(params, orthogonalize(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for vectors, word vectors and the output."""
    inside: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (inside if p.ndim == 2 and "embed" not in name and "lm_head" not in name else rest).append(p)
    return [Muon(inside, lr=lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def learning_rate(step: int, steps: int) -> float:
    """Share of the full rate: warm up, stay, then fall to zero over the last quarter."""
    return min(1.0, (step + 1) / 100, max(0.0, (steps - step) / (0.25 * steps)))


# ---------------------------------------------------------------- export


def settings() -> dict[str, str]:
    """What himap.json says: how to ask the model, and what it knows (`commands.known`), in the scenes' own words."""
    forms, turn = question_forms(), count()

    def one_of(braces: re.Match) -> str:  # another at every turn: "more red things or more green things"
        words = braces[1].split("|")
        return words[next(turn) % len(words)]

    examples = (re.sub(r"\{(.*?)\}", one_of, own[0]) for kind, own in forms.items() if kind != "choice")
    return {
        "template": TEMPLATE,
        "note": "this small model knows only drawn scenes and these kinds of question, in these words: "
        f"{' '.join(examples)} (or with four options to choose from); for others: "
        "python run.py --weights llava-1.5-7b --image FILE --prompt QUESTION",
        "palette": " ".join(f"#{bytes(color).hex()}" for color in (*COLORS.values(), INK)),
        "questions": "\n\n".join(form for own in forms.values() for form in own),
        "stages": SCHEDULE,
    }


def export(model: Llava, folder: Path) -> None:
    """A folder in llava-hf's layout, with the tensor names of its files on the hub, which every transformers reads."""
    model.image_processor = ImageProcessor(
        shortest_edge=SIZE, crop_size=(SIZE, SIZE), image_mean=(MEAN,) * 3, image_std=(STD,) * 3
    )
    model.settings = settings()
    more = {
        "processor_config": {
            "processor_class": "LlavaProcessor", "patch_size": PATCH, "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1, "image_token": "<image>",
        },
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor", "bos_token": "<s>",
            "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>", "model_max_length": 512,
            "clean_up_tokenization_spaces": False,
        },
    }  # fmt: skip
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    for name, content in folder_files(model, tokens, more, lambda _, tensor: tensor.contiguous(), shard=2**62):
        write_whole(folder / name, partial(Path.write_bytes, data=content))
    write_whole(folder / "example.png", draw(make_scene(EXAMPLE_SEED)).save)


# ---------------------------------------------------------------- running it


@dataclass
class Phase:
    name: str
    steps: int
    batch: int
    lr: float
    plan: Plan


def word_vectors(model: Llava, tokenizer: Tokenizer) -> list[Tensor]:
    """The decoder's vectors, as they are now, of the words of each group."""
    vocabulary = model.language_model.embed_tokens.weight.detach()
    ids = [[tokenizer.encode(f" {word}", add_special_tokens=False).ids[0] for word in group] for group in WORDS]
    return [vocabulary[group].clone() for group in ids]


def save_state(path: Path, phase: str, step: int, model: Llava, opts: Sequence[torch.optim.Optimizer]) -> None:
    """Written beside and renamed, so that a kill leaves the old state or the new one.

    The tokenizer is a part of it: one built anew, of questions that have changed since, gives words other ids.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"phase": phase, "step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in opts]}
    state["tokenizer"] = model.tokenizer.to_str()
    try:
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    except (OSError, RuntimeError) as error:  # of a full disk torch makes a RuntimeError
        path.with_suffix(".new").unlink(missing_ok=True)
        raise HimapError(f"{path}: cannot be written ({error})") from None


def read_state(path: Path) -> dict | None:
    """What `save_state` wrote; None if there is nothing yet. Only tensors and plain values are unpickled."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True)
        return {name: state[name] for name in ("phase", "step", "model", "optimizers", "tokenizer")}
    except Exception as error:  # whatever torch and its unpickler make of other bytes
        reason = str(error).split("\n")[0] or type(error).__name__
        raise HimapError(f"{path}: no state of a training ({reason}): remove it, or choose another --state") from None


@torch.no_grad()
def evaluate(model: Llava, loader: DataLoader, prefix: Tensor, step_layer: StepLayer) -> dict[str, float]:
    """Share of the answers' tokens that would be chosen greedily, by kind of question, on unseen scenes."""
    hits, total = torch.zeros(len(KINDS) + 1), torch.zeros(len(KINDS) + 1)  # the last one: </s>
    for batch in loader:
        _, hit, kind, _ = answer_loss(model, batch, prefix, step_layer)
        hits.index_add_(0, kind, hit.float())
        total.index_add_(0, kind, torch.ones_like(hit, dtype=torch.float))
    return {name: round((hits[i] / total[i]).item(), 4) for i, name in enumerate(KINDS)}


def run_phase(
    phase: Phase, model: Llava, loss_of: Callable[[dict], Tensor],
    check: Callable[[int], None], state_path: Path, state: dict | None,
) -> None:  # fmt: skip
    """Trains from the saved step, or from 0, to the phase's end; `check` is called after each save."""
    opts, first = optimizers(model, phase.lr), 0
    if state and state["phase"] == phase.name:
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        first = state["step"]
    data = Scenes(phase.plan, model.tokenizer, phase.steps * phase.batch)
    rest = range(first * phase.batch, len(data))
    loader = DataLoader(data, phase.batch, sampler=rest, num_workers=1, prefetch_factor=4)
    progress = tqdm(loader, phase.name, initial=first, total=phase.steps, unit="step")
    for step, batch in enumerate(progress, first):
        for group in (group for opt in opts for group in opt.param_groups):
            group["lr"] = phase.lr * learning_rate(step, phase.steps)
        loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == phase.steps:
            save_state(state_path, phase.name, step + 1, model, opts)
            check(step + 1)


def train(args: argparse.Namespace) -> None:
    state = read_state(args.state)
    check_writable(args.out / "example.png")  # rather than after hours
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_str(state["tokenizer"]) if state else build_tokenizer()
    model = Llava(shapes_config(tokenizer.get_vocab_size(), cast(int, tokenizer.token_to_id("<image>"))))
    init_weights(model, args.seed)
    model.tokenizer = tokenizer
    vectors, prefix = word_vectors(model, tokenizer), torch.tensor(tokenizer.encode(SYSTEM).ids)
    if state:
        model.load_state_dict(state["model"])
    step_layer = torch.compile(layer_forward) if args.compile else layer_forward
    if args.compile:
        for layer in model.vision_tower.layers:
            layer.compile()
    unseen = DataLoader(Scenes(Plan(UNSEEN, ((0, 1, 9),), 32), tokenizer, CHECKED), batch_size=32)

    def align(batch: dict) -> Tensor:
        return align_loss(model.embed_image(to_pixel_values(batch["pixels"])), batch, vectors)

    def answer(batch: dict) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss, _, _, image = answer_loss(model, batch, prefix, step_layer)
        return loss + ALIGN_WEIGHT * align_loss(image, batch, vectors)

    def check(step: int) -> None:
        print(json.dumps({"step": step, "unseen": evaluate(model, unseen, prefix, step_layer)}), flush=True)

    if state is None or state["phase"] == "align":
        phase = Phase("align", args.align_steps, 32, 2e-3, Plan(0, ((0, 1, 9),), 32))
        run_phase(phase, model, align, lambda step: None, args.state, state)
    phase = Phase("answer", args.steps, BATCH, args.lr, Plan(100_000_000, THINGS, BATCH))
    run_phase(phase, model, answer, check, args.state, state)
    export(model.eval(), args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("weights/shapes"), help="where the finished model goes")
    parser.add_argument("--state", type=Path, default=Path("runs/train.pt"), help="saved every 250 steps, resumed from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--align-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="matrix products, not weights"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if not (0 < args.lr <= 1 and max(args.steps, args.align_steps) <= 10**6 and min(args.steps, args.align_steps) >= 0):
        raise HimapError("--lr: above 0 and at most 1; --steps and --align-steps: 0 to 1000000")
    if not 0 <= args.seed < 2**63:
        raise HimapError(f"--seed {args.seed}: must be in [0, 2^63)")
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU the fused kernel's backward is the slower one
        train(args)


if __name__ == "__main__":
    run_command(main)
