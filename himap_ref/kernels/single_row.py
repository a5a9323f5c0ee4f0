"""Decoding multiplies single rows by bf16 weights: on some CPUs `torch.mv` reads these faster than `F.linear`.

Measured at 7B's shape: 1.2 times with matrix units (AMX), 1.6 times where bf16 is only emulated, but 0.6 times where
vector units multiply it (AVX512-BF16 alone). fp32 is alike both ways, fp16 twice as slow. See RESULTS.md, Speed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SingleRowLinear(nn.Linear):
    """Without a bias. Anything but one row, or under autocast, goes the usual way."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.in_features or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return torch.mv(self.weight, x.flatten()).view(*x.shape[:-1], -1)


def mv_is_faster() -> bool:
    """Asks torch about the CPU; both questions are private there, so a version without them is a no."""
    amx, vectors = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return amx is not None and vectors is not None and (amx() or not vectors())


def single_rows(model: nn.Module) -> bool:
    """Changes the bf16 linear layers of a model on the CPU, if that is faster here; returns whether it did."""
    layers = [m for m in model.modules() if type(m) is nn.Linear and m.bias is None]
    layers = [m for m in layers if m.weight.dtype == torch.bfloat16 and m.weight.device.type == "cpu"]
    if faster := bool(layers) and mv_is_faster():
        for layer in layers:
            layer.__class__ = SingleRowLinear
    return faster
