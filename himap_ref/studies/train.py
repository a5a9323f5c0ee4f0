"""Trains the small LLaVA in `weights/` on drawn scenes, from random weights, on a CPU.

    python -m himap_ref.studies.train

Two phases, as for LLaVA itself, both at full depth and with nothing frozen but the word vectors in the first:

1. *align*: encoder and projector learn to put each patch of a thing near the decoder's own vectors of the words for its
   colour, shape, row and column;
2. *answer*: everything learns to answer questions; scenes of few things first.

One sequence holds a picture and several questions about it. A question sees the picture and itself, not the others, and
its positions start right after the picture: each is trained exactly as it will be asked, and the picture is paid once.

Seeded; resumes from the last 250th step (the state is in `--state`); same code as inference for every module.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..assistant import Llava
from ..commands.files import check_writable, write_whole
from ..commands.manners import run_command
from ..config import LlavaConfig, TextConfig, VisionConfig
from ..decoder import DecoderLayer, rope
from ..errors import HimapError
from ..image import ImageProcessor
from ..prompt import TEMPLATES
from .hub_layout import folder_files
from .scenes import COLORS, COLUMNS, KINDS, PATCH, ROWS, SHAPES, SIZE, UNSEEN, Scene, draw, make_questions, make_scene

GRID = SIZE // PATCH
TEMPLATE = TEMPLATES["shapes"]
SYSTEM = TEMPLATE.split("<image>")[0]
NOTE = (
    "this small model knows only drawn scenes of coloured shapes; for other pictures: "
    "python run.py --weights llava-1.5-7b --image FILE --prompt QUESTION"
)
SCHEDULE = "4:0.5:text_to_image,8:0.5:image_to_image"  # himap.json: what the sweep found to suit this model best
EXAMPLE_SEED = UNSEEN + 10
TEXT_BUDGET = 112  # tokens of questions and answers per picture
MEAN, STD = 0.5, 0.5
# Counting and multiple choice come last: from this step on they weigh double. The last entry is </s>.
SLOW_KINDS_FROM = 1500
SLOW_KINDS = torch.tensor([2.0 if kind in ("count", "choice") else 1.0 for kind in KINDS] + [1.0])


# ---------------------------------------------------------------- tokenizer and shape of the model


def build_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """Byte-level BPE over the questions' own words: any text has ids, common words have one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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
        for question in make_questions(make_scene(seed), 8):
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
    max_things: tuple[tuple[int, int], ...]  # (from step, most things in a scene)
    batch: int

    def things(self, index: int) -> int:
        return [most for step, most in self.max_things if index // self.batch >= step][-1]


class Scenes(Dataset):
    """Sample -> pixels, ids of the packed questions, and for each id its segment, place, target and kind."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, length: int):
        self.plan, self.tokenizer, self.length = plan, tokenizer, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = make_scene(self.plan.seed + index, self.plan.things(index))
        pixels = torch.frombuffer(bytearray(draw(scene).tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3)
        return {"pixels": pixels, "words": patch_words(scene), **self.pack(scene)}

    def pack(self, scene: Scene) -> dict[str, Tensor]:
        """As many questions as fit the budget, one after the other; segment 0 is padding, a question 1, 2, ..."""
        columns: dict[str, list[int]] = {name: [] for name in ("ids", "segment", "place", "target", "kind")}
        questions = make_questions(scene, 14, seed=scene.seed)
        for number, question in enumerate(questions, 1):
            asked = self.tokenizer.encode(f"\n{question.text} ASSISTANT:", add_special_tokens=False).ids
            answer = self.tokenizer.encode(f" {question.answer}", add_special_tokens=False).ids
            ids = asked + answer  # </s> is a target only: nothing follows it
            if len(columns["ids"]) + len(ids) > TEXT_BUDGET:
                continue
            eos = cast(int, self.tokenizer.token_to_id("</s>"))  # build_tokenizer made it
            columns["ids"] += ids
            columns["segment"] += [number] * len(ids)
            columns["place"] += range(len(ids))
            columns["target"] += [-100] * (len(asked) - 1) + answer + [eos]
            columns["kind"] += [-1] * (len(asked) - 1) + [KINDS.index(question.kind)] * len(answer) + [len(KINDS)]
        padding = TEXT_BUDGET - len(columns["ids"])
        fill = {"ids": 0, "segment": 0, "place": 0, "target": -100, "kind": -1}
        return {name: torch.tensor(values + [fill[name]] * padding) for name, values in columns.items()}


WORDS = (tuple(COLORS), SHAPES, ROWS, COLUMNS)


def patch_words(scene: Scene) -> Tensor:
    """(GRID * GRID, 4): which colour, shape, row and column word each patch shows; -100 where less than a quarter of it
    lies within a thing's box."""
    words = torch.full((GRID, GRID, 4), -100)
    for thing in scene.things:
        x0, y0, x1, y1 = thing.box
        own = (thing.color, thing.shape, thing.row, thing.column)
        values = torch.tensor([group.index(word) for group, word in zip(WORDS, own, strict=True)])
        for row in range(GRID):
            for column in range(GRID):
                wide = min(x1, (column + 1) * PATCH) - max(x0, column * PATCH)
                high = min(y1, (row + 1) * PATCH) - max(y0, row * PATCH)
                if wide > 0 and high > 0 and wide * high >= PATCH * PATCH / 4:
                    words[row, column] = values
    return words.flatten(0, 1)


def to_pixel_values(pixels: Tensor) -> Tensor:
    """(B, S, S, 3) bytes -> (B, 3, S, S), as `preprocessor_config.json` says."""
    return ((pixels.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


# ---------------------------------------------------------------- the two losses


def align_loss(model: Llava, batch: dict, vectors: list[Tensor]) -> Tensor:
    """Each patch picks its words by cosine, one cross-entropy for each of the four groups of `WORDS`."""
    embeds = F.normalize(model.embed_image(to_pixel_values(batch["pixels"])), dim=-1)  # (B, N, d)
    logits = [(embeds @ F.normalize(group, dim=-1).T * 20).flatten(0, 1) for group in vectors]
    targets = batch["words"].flatten(0, 1).unbind(-1)
    return cast(Tensor, sum(F.cross_entropy(x, y, ignore_index=-100) for x, y in zip(logits, targets, strict=True)))


StepLayer = Callable[[DecoderLayer, Tensor, Tensor, Tensor, Tensor], Tensor]


def layer_forward(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
    """One decoder layer with softmax written out: on a CPU its backward is faster than the fused kernel's."""
    parts = layer.self_attn.qkv(layer.input_layernorm(x), cos, sin)
    q, k, v = (part.transpose(1, 2) for part in parts)  # (B, h, T, c)
    a = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(dim=-1)
    x = x + layer.self_attn.o_proj((a @ v).transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def answer_loss(
    model: Llava, batch: dict, prefix: Tensor, step_layer: StepLayer = layer_forward, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the answers' tokens, `weights` by kind. Returns loss, hit per target and kind per target."""
    decoder, B = model.language_model, len(batch["ids"])
    image = model.embed_image(to_pixel_values(batch["pixels"]))
    before = decoder.embed_tokens(prefix).expand(B, -1, -1)
    x = torch.cat((before, image, decoder.embed_tokens(batch["ids"])), dim=1)  # (B, T, d)
    start = before.shape[1] + image.shape[1]
    positions = torch.cat((torch.arange(start).expand(B, -1), start + batch["place"]), dim=1)
    segment = F.pad(batch["segment"], (start, 0), value=-1)  # -1: system and image, seen by all
    order = torch.arange(x.shape[1])
    visible = (segment[:, None, :] == -1) | (segment[:, None, :] == segment[:, :, None])
    visible &= order[:, None] >= order
    bias = torch.zeros(visible.shape).masked_fill_(~visible, -1e9)[:, None]
    cos, sin = rope(positions, decoder.config, x.dtype)
    for layer in decoder.layers:
        x = step_layer(layer, x, cos, sin, bias)
    where = batch["target"] >= 0
    logits = decoder.logits(decoder.norm(x[:, start:][where]))
    target, kind = batch["target"][where], batch["kind"][where]
    weight = torch.ones(len(target)) if weights is None else weights[kind]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    return loss, logits.argmax(-1) == target, kind


# ---------------------------------------------------------------- optimiser


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Nearly the closest orthogonal matrix to each of (k, rows, columns), by Newton-Schulz (Muon, K. Jordan 2024)."""
    x = update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised. torch's own rounds to bf16, slow on CPUs without bf16 units;
    this one stays in fp32 and takes all matrices of one shape at once."""

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


def export(model: Llava, tokenizer: Tokenizer, folder: Path) -> None:
    """A folder in llava-hf's layout, with the tensor names of its files on the hub, which every transformers reads."""
    model.tokenizer = tokenizer
    model.image_processor = ImageProcessor(
        shortest_edge=SIZE, crop_size=(SIZE, SIZE), image_mean=(MEAN,) * 3, image_std=(STD,) * 3
    )
    palette = " ".join(f"#{bytes(color).hex()}" for color in COLORS.values())
    model.settings = {"template": TEMPLATE, "note": NOTE, "palette": palette, "stages": SCHEDULE}
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


def save_state(path: Path, phase: str, step: int, model: nn.Module, opts: Sequence[torch.optim.Optimizer]) -> None:
    """Written beside and renamed, so that a kill leaves the old state or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"phase": phase, "step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in opts]}
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
        return {name: state[name] for name in ("phase", "step", "model", "optimizers")}
    except Exception as error:  # whatever torch and its unpickler make of other bytes
        reason = str(error).split("\n")[0] or type(error).__name__
        raise HimapError(f"{path}: no state of a training ({reason}): remove it, or choose another --state") from None


@torch.no_grad()
def evaluate(model: Llava, loader: DataLoader, prefix: Tensor, step_layer: StepLayer) -> dict[str, float]:
    """Share of the answers' tokens that would be chosen greedily, by kind of question, on unseen scenes."""
    hits, total = torch.zeros(len(KINDS) + 1), torch.zeros(len(KINDS) + 1)  # the last one: </s>
    for batch in loader:
        _, hit, kind = answer_loss(model, batch, prefix, step_layer)
        hits.index_add_(0, kind, hit.float())
        total.index_add_(0, kind, torch.ones_like(hit, dtype=torch.float))
    return {name: round((hits[i] / total[i]).item(), 4) for i, name in enumerate(KINDS)}


def run_phase(
    phase: Phase, model: Llava, tokenizer: Tokenizer, loss_of: Callable[[dict, int], Tensor],
    check: Callable[[int], None], state_path: Path, state: dict | None,
) -> None:  # fmt: skip
    """Trains from the saved step, or from 0, to the phase's end; `check` is called after each save."""
    opts, first = optimizers(model, phase.lr), 0
    if state and state["phase"] == phase.name:
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        first = state["step"]
    data = Scenes(phase.plan, tokenizer, phase.steps * phase.batch)
    rest = range(first * phase.batch, len(data))
    loader = DataLoader(data, phase.batch, sampler=rest, num_workers=1, prefetch_factor=4)
    progress = tqdm(loader, phase.name, initial=first, total=phase.steps, unit="step")
    for step, batch in enumerate(progress, first):
        for group in (group for opt in opts for group in opt.param_groups):
            group["lr"] = phase.lr * learning_rate(step, phase.steps)
        loss = loss_of(batch, step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == phase.steps:
            save_state(state_path, phase.name, step + 1, model, opts)
            check(step + 1)


def train(args: argparse.Namespace) -> None:
    state = read_state(args.state)
    check_writable(args.out / "example.png")  # rather than after hours
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = Llava(shapes_config(tokenizer.get_vocab_size(), cast(int, tokenizer.token_to_id("<image>"))))
    init_weights(model, args.seed)
    vectors, prefix = word_vectors(model, tokenizer), torch.tensor(tokenizer.encode(SYSTEM).ids)
    if state:
        model.load_state_dict(state["model"])
    step_layer = torch.compile(layer_forward) if args.compile else layer_forward
    if args.compile:
        for layer in model.vision_tower.layers:
            layer.compile()
    unseen = DataLoader(Scenes(Plan(UNSEEN, ((0, 5),), 32), tokenizer, 256), batch_size=32)

    def align(batch: dict, step: int) -> Tensor:
        return align_loss(model, batch, vectors)

    def answer(batch: dict, step: int) -> Tensor:
        return answer_loss(model, batch, prefix, step_layer, SLOW_KINDS if step >= SLOW_KINDS_FROM else None)[0]

    def check(step: int) -> None:
        print(json.dumps({"step": step, "unseen": evaluate(model, unseen, prefix, step_layer)}), flush=True)

    if state is None or state["phase"] == "align":
        phase = Phase("align", args.align_steps, 32, 2e-3, Plan(0, ((0, 5),), 32))
        run_phase(phase, model, tokenizer, align, lambda step: None, args.state, state)
    phase = Phase("answer", args.steps, 32, args.lr, Plan(100_000_000, ((0, 2), (300, 3), (600, 5)), 32))
    run_phase(phase, model, tokenizer, answer, check, args.state, state)
    export(model.eval(), tokenizer, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("weights/shapes"), help="where the finished model goes")
    parser.add_argument("--state", type=Path, default=Path("runs/train.pt"), help="saved every 250 steps, resumed from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--align-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=1.5e-3)
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
