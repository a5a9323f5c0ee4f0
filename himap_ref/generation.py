"""Generation: prefill once, then token by token from the cache; or, with reprune, the whole prompt for every token.

Works on embeddings, so it knows the decoder and nothing of pictures or text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .decoder import LlamaDecoder, Prefix
from .errors import HimapError
from .pruning import LayerTrace, Stage, Trace


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; top_p keeps the likeliest tokens whose probabilities reach it."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise HimapError(f"temperature {self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise HimapError(f"top_p {self.top_p}: must be in (0, 1]")
        if not 0 <= self.seed < 2**63:
            raise HimapError(f"seed {self.seed}: must be in [0, 2^63)")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """(vocab,) logits -> (vocab,) probabilities after temperature and nucleus cut."""
    logits = logits.float() - logits.max()  # so that a tiny temperature gives no inf - inf
    probs = (logits / max(sampling.temperature, 1e-30)).softmax(dim=-1)  # fp32 has no smaller ones
    ordered, ids = probs.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # mass of the likelier tokens: the one that crosses top_p stays
    if sampling.top_p < 1:  # at 1 rounding must not cut the tail
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
    return torch.zeros_like(probs).scatter(0, ids, ordered / ordered.sum())


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """(B, vocab) -> (B,). Each prompt has its own generator: a batch draws what its items would draw alone."""
    if not torch.isfinite(logits).all():
        raise HimapError("the model's logits are NaN or infinite: damaged weights, or a dtype too narrow for them")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probs = (probabilities(row, sampling).cpu() for row in logits)
    picks = [torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators, strict=True)]
    return torch.cat(picks).to(logits.device)


@dataclass
class Generated:
    """A batch of answers as ids, and all that is known of how they came about."""

    token_ids: list[list[int]]  # per prompt, an EOS that ended it included
    finish: list[str]  # per prompt: "eos", "length" (max_new_tokens) or "context" (no position left)
    first_logits: Tensor  # (B, vocab)
    traces: list[Trace]  # of the prefill; with reprune, one for every token
    decode_layers: list[list[LayerTrace]]  # per cached decode step, per layer
    seconds: dict[str, float]  # prefill (first token), decode (all later ones)


def clock(device: torch.device) -> float:
    """Seconds, once all that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def generate(
    decoder: LlamaDecoder,
    inputs_embeds: Tensor,
    image_span: tuple[int, int] | None = None,
    stages: Sequence[Stage] = (),
    max_new_tokens: int = 128,
    eos_token_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),
    reprune: bool = False,
    on_token: Callable[[int], None] | None = None,
    prefix: Prefix | None = None,
) -> Generated:
    """(B, n, d) prompts of equal length -> ids.

    Image tokens are ranked once, in the prefill, and the cache stays pruned. reprune=True keeps no cache and ranks anew
    for every token, generated tokens among the text rows: what the official code does. on_token is called with each id
    of prompt 0 as soon as it is chosen. prefix: see `LlamaDecoder.forward`. Raises HimapError if the prompt does not
    fit the context.
    """
    B, n, _ = inputs_embeds.shape
    room = decoder.config.max_position_embeddings - n
    if room < 0:
        raise HimapError(f"the prompt has {n} tokens, the model's context {n + room}: shorten the prompt")
    if max_new_tokens < 1:
        raise HimapError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    limit = min(max_new_tokens, room + 1)  # the last token is never fed back, so it needs no position
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in range(B)]
    answers: list[list[int]] = [[] for _ in range(B)]
    done, decode_layers, embeds, start = [False] * B, [], inputs_embeds, clock(inputs_embeds.device)

    out = decoder(embeds, image_span, stages, prefix=prefix)  # the prefill
    logits, first_logits, traces = out.logits, out.logits, [out.trace]
    for step in range(limit):
        ids = choose(logits, sampling, generators)  # (B,)
        for b, token_id in enumerate(ids.tolist()):
            if not done[b]:
                answers[b].append(token_id)
                done[b] = token_id in eos_token_ids
                if b == 0 and on_token:
                    on_token(token_id)
        if step == 0:
            prefill_end = clock(ids.device)
        if all(done) or step + 1 == limit:
            break
        token = decoder.embed_tokens(ids)[:, None]  # (B, 1, d)
        if reprune:
            embeds = torch.cat((embeds, token), dim=1)
            out = decoder(embeds, image_span, stages, prefix=prefix)
            logits = out.logits
            traces.append(out.trace)
        else:
            logits, layers = decoder.decode(token, n + step, out.cache)
            decode_layers.append(layers)
    seconds = {"prefill": prefill_end - start, "decode": clock(ids.device) - prefill_end}
    cut = "length" if limit == max_new_tokens else "context"
    finish = ["eos" if ended else cut for ended in done]
    return Generated(answers, finish, first_logits, traces, decode_layers, seconds)
