"""Where a model computes."""

import re

import torch

from ..errors import HimapError


def find_device(name: str | torch.device, dtype: torch.dtype = torch.float32) -> torch.device:
    """The device, or a HimapError if this machine or this build of torch does not have it, or it not the dtype."""
    if not isinstance(dtype, torch.dtype):
        raise HimapError(f"dtype {dtype!r}: expected torch.float32, torch.bfloat16 or torch.float16")
    try:
        one = torch.ones(1, 1, device=name, dtype=dtype)
        (one @ one).softmax(dim=-1).item()
        return one.device
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        reason = re.split(r"\. |\n", str(error))[0]  # the first sentence of many
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        why = f"not available for {dtype} ({reason}); there is {', '.join(there)}"
        raise HimapError(f"device {str(name)!r}: {why}") from None
