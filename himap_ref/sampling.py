"""Sampling: logits become the next token, greedily or by chance with a seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import HimapError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; top_p keeps the likeliest tokens whose probabilities reach it."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise HimapError(f"temperature {self.temperature}: must be 0 (greedy) or more, and finite")
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
    ordered = ordered.where((before < sampling.top_p) | (sampling.top_p == 1), 0.0)  # at 1 rounding must not cut
    return torch.zeros_like(probs).scatter(0, ids, ordered / ordered.sum())


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """(B, vocab) -> (B,). Each prompt has its own generator: a batch draws what its items would draw alone."""
    if not torch.isfinite(logits).all():
        raise HimapError("the model's logits are NaN or infinite: damaged weights, or a dtype too narrow for them")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    each = zip(logits, generators, strict=True)
    picks = [torch.multinomial(probabilities(row, sampling).cpu(), 1, generator=g) for row, g in each]
    return torch.cat(picks).to(logits.device)
