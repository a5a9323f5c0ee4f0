"""Several processes that torchrun started: which of them this is, where it computes, who speaks, how all of them end.

Without torchrun there is one process, which is the first, and nothing here does anything."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import distributed as dist

from ..errors import HimapError

if TYPE_CHECKING:  # which a torch without its distributed engine lacks
    from torch.distributed.device_mesh import DeviceMesh

LOST = ("another process of this run has ended: run the same command again (a study goes on from what it has recorded, "
        "with any number of processes)")  # fmt: skip


class Ended(BaseException):
    """torchrun ends this process, because another one has ended. Not an Exception: no question is to blame for it."""


def _from_torchrun(name: str, alone: int) -> int:
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


def size() -> int:
    """How many processes there are."""
    return _from_torchrun("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this is: 0 is the first, the one that prints and writes."""
    return _from_torchrun("RANK", 0)


def own_device(name: str) -> str:
    """Of several processes "cuda" is each one's own GPU."""
    return f"cuda:{_from_torchrun('LOCAL_RANK', 0)}" if name == "cuda" and size() > 1 else name


@contextmanager
def joined() -> Iterator[None]:
    """Together with the others, of whom the first is heard; an error by whoever has it first, and nobody else.

    Raises HimapError if they cannot reach each other.
    """
    if size() == 1:
        yield
        return
    heard, unheard = sys.stderr, open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    if rank() > 0:
        sys.stdout = sys.stderr = unheard
    try:
        _join()
        yield
    except SystemExit:  # of --help or a wrong option, which end all of them alike
        dist.barrier()  # or torchrun might end the first before it has said so
        raise
    except (Exception, Ended):
        sys.stderr = heard if _is_first_error() else unheard
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends now anyway
        if dist.is_initialized():
            dist.destroy_process_group()  # or its threads abort the interpreter on its way out


def _join() -> None:
    try:  # days: one may wait for another's whole share, and torchrun notices by itself if one has died
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        dist.barrier()  # nobody ends before all have met
    except RuntimeError as error:
        raise HimapError(f"the {size()} processes cannot reach each other ({error})") from None
    signal.signal(signal.SIGTERM, _end)  # only now: joining cannot be interrupted


def _end(*_: object) -> NoReturn:
    raise Ended


def mesh(device: torch.device) -> DeviceMesh | None:
    """All processes, to hold one model together; None for one alone. Raises HimapError for a device that cannot."""
    if size() == 1:
        return None
    if device.type not in ("cuda", "cpu"):
        raise HimapError(f"--device {device.type}: {size()} processes can share a model on cuda or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (size(),))


def from_first(make: Callable[[], Any]) -> Any:
    """What the first process makes, once all have come here; the others are told it."""
    if size() == 1:
        return make()
    dist.barrier()
    box = [make() if rank() == 0 else None]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def is_lost(error: BaseException) -> bool:
    """Whether it says only that another process is gone."""
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    broken = size() > 1 and isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return broken or isinstance(error, Ended)


def _is_first_error() -> bool:
    """Whether no other process has had one. Asks torchrun, which outlives them all, and before this one's end becomes
    an error of the others."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"himap_ref/error/{attempt}", 1) == 1
    except RuntimeError:
        return True
