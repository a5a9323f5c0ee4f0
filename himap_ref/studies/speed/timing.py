"""Honest timing: contestants take turns in one run, samples that others disturbed are left out, figures are medians.

*Bare products* are the matrix products that a run executes, replayed on the same weights with nothing between them:
what the run's time is to be compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import trange

from ...generation import clock
from ..accuracy.evaluate import peak_memory

CALM = 0.925  # share of the threads' time that a calm sample must have had of the CPU

# ---------------------------------------------------------------- samples


@dataclass(frozen=True)
class Sample:
    """Seconds; cpu: of all threads together."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Sample) -> Sample:
        return Sample(self.wall + other.wall, self.cpu + other.cpu)


Mark = Callable[[str], None]  # takes the name of the part that has just ended; a part may come in pieces


class Stopwatch:
    """A `Mark` that times the parts."""

    def __init__(self, device: torch.device):
        self.device, self.last = device, (clock(device), time.process_time())
        self.parts: dict[str, Sample] = {}

    def __call__(self, part: str) -> None:
        now = clock(self.device), time.process_time()
        spent = Sample(now[0] - self.last[0], now[1] - self.last[1])
        self.parts[part], self.last = self.parts.get(part, Sample()) + spent, now


def typical(samples: Sequence[Sample], threads: int | None, times: int = 1) -> dict:
    """The median of seconds / times, and half their range as a share of it (spread), without disturbed samples.

    If fewer than 3 were calm, all are used. threads: how many had work all the time; None: that cannot be told, so no
    sample counts as disturbed.
    """
    calm = [s for s in samples if threads is None or s.cpu >= CALM * threads * s.wall]
    seconds = [s.wall / times for s in (calm if len(calm) >= 3 else samples)]
    return {
        "seconds": median(seconds),
        "spread": (max(seconds) - min(seconds)) / 2 / median(seconds),
        "disturbed": len(samples) - len(calm),
        "samples": [(s.wall, s.cpu) for s in samples],
    }


def cores_had(seconds: float = 0.5) -> float:
    """CPU seconds a second that torch's threads get while all of them have work: of N threads, nearly N."""
    x, begun = torch.ones(1024, 1024), (time.perf_counter(), time.process_time())
    while time.perf_counter() - begun[0] < seconds:
        x @ x
    return (time.process_time() - begun[1]) / (time.perf_counter() - begun[0])


def peak(device: torch.device, reset: bool = False) -> int:
    """Bytes held at most since the last reset: on the GPU, or resident. Main memory's peak resets on Linux alone."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    return peak_memory("cpu")


# ---------------------------------------------------------------- contestants


@dataclass
class Contestant:
    """play: does all of it once, marking the end of each part. The other figures are by part."""

    name: str
    play: Callable[[Mark], object]
    threads: int | None = None  # see `typical`
    flops: dict[str, int] = field(default_factory=dict)
    facts: dict[str, dict] = field(default_factory=dict)  # what else is known without a clock
    times: dict[str, int] = field(default_factory=dict)  # a part's figures are divided by this: decode is per token
    sums: dict[str, tuple[str, ...]] = field(default_factory=dict)  # parts made of others
    bare: Contestant | None = None  # its products alone
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    peak_bytes: int = 0
    added_bytes: int = 0  # peak less what was held when its turn began

    def add(self, parts: dict[str, Sample], peak_bytes: int, before: int) -> None:
        """One turn's samples, and the bytes held at most in it and before it."""
        parts = parts | {name: sum((parts[p] for p in of), Sample()) for name, of in self.sums.items()}
        for part, sample in parts.items():
            self.samples.setdefault(part, []).append(sample)
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        self.added_bytes = max(self.added_bytes, peak_bytes - before)

    def typical(self, part: str) -> dict:
        return typical(self.samples[part], self.threads, self.times.get(part, 1))


def take_turns(contestants: Sequence[Contestant], rounds: int, device: torch.device) -> None:
    """Each once a round, after a round to warm up: fills in `samples` and bytes."""
    for turn in trange(-1, rounds, unit="round", disable=None):
        for contestant in contestants:
            before, watch = peak(device, reset=True), Stopwatch(device)
            contestant.play(watch)
            if turn >= 0:
                contestant.add(watch.parts, peak(device), before)


# ---------------------------------------------------------------- bare products


class Products(TorchFunctionMode):
    """A `Mark` that notes the matrix products of each part: the weights themselves, of activations the shapes."""

    KINDS = {
        F.linear, F.scaled_dot_product_attention, torch.conv2d, torch.matmul, torch.bmm, torch.mm, torch.mv,
        torch.addmm, Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.mv, Tensor.addmm,
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.parts, self.calls = {}, []

    def __call__(self, part: str) -> None:
        self.parts.setdefault(part, []).extend(self.calls)
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, given = kwargs or {}, args
        if function in self.KINDS:
            kept = kwargs
            if function is F.scaled_dot_product_attention:  # no mask: masked products are computed, too
                given, kept = args[:3], {"enable_gqa": kwargs.get("enable_gqa", False)}
            self.calls.append((function, [_shape_only(arg) for arg in given], kept))
        return function(*args, **kwargs)


def _shape_only(arg):
    is_activation = isinstance(arg, Tensor) and not isinstance(arg, nn.Parameter)
    return torch.empty(arg.shape, dtype=arg.dtype, device="meta") if is_activation else arg


def replay(parts: dict[str, list], device: torch.device, mark: Mark) -> None:
    """Computes the noted products on random activations; marks "preparing" when these are there."""
    activations: dict[tuple, Tensor] = {}

    def filled(arg):
        if not (isinstance(arg, Tensor) and arg.is_meta):
            return arg
        key = arg.shape, arg.dtype
        if key not in activations:
            activations[key] = torch.randn(arg.shape, dtype=arg.dtype, device=device)
        return activations[key]

    ready = {part: [(f, [filled(arg) for arg in args], kwargs) for f, args, kwargs in parts[part]] for part in parts}
    mark("preparing")
    for part, calls in ready.items():
        for function, args, kwargs in calls:
            function(*args, **kwargs)
        mark(part)


def note_products(contestant: Contestant, device: torch.device) -> Any:
    """Plays it once, to give it its bare products as a contestant; returns what `play` returned."""
    with Products() as products:
        result = contestant.play(products)
    play = partial(replay, products.parts, device)
    contestant.bare = Contestant(contestant.name, play, contestant.threads, times=contestant.times)
    return result
