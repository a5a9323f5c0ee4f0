"""Results as JSON lines that survive an interruption: append, find again, go on.

The first line holds the settings, every later one a result with its `id`. A line that a kill tore is cut off at the
next start; results of other settings, and a file that another run is writing, are refused.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import stat
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from filelock import FileLock, Timeout

from ...assistant import Llava
from ...checkpoint.files import tensor_files
from ...commands.options import load_model, revision_of
from ...errors import HimapError


class Records:
    """A results file, open for this run alone. Use with `with`; `rows` maps each id to what was recorded under it."""

    def __init__(self, path: Path, settings: dict):
        self.path = path
        self.rows: dict[str, dict] = {}
        self.settings = settings = json.loads(json.dumps(settings))  # as it will be read back: tuples are lists then
        self._held = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            no_links = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | no_links, 0o644)
        except OSError as error:
            raise HimapError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):  # a pipe would be waited for
                raise HimapError(f"{path}: not a file: choose another --out")
            self._lock()
            self._read(settings)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        self._held.release()

    def __contains__(self, id: str) -> bool:
        return id in self.rows

    def add(self, id: str, row: dict) -> None:
        """Records a result at once; raises HimapError if the disk is full (what was recorded before stays).

        A row with an "error" may be followed by another try's: the last one counts.
        """
        if self.rows.get(id) == row:
            return
        if "error" not in self.rows.get(id, {"error": ""}):
            raise HimapError(f"{self.path}: {id!r} is there already")
        self._write(_line({"id": id, **row}))
        self.rows[id] = row

    def take_in(self, folder: Path, order: Sequence[str]) -> dict[str, dict]:
        """Moves the results of the files in `folder` into this one, in that order; returns all there are now."""
        found: dict[str, dict] = {}
        for path in sorted(folder.glob("*.jsonl")):
            with Records(path, self.settings) as part:
                found |= part.rows
        places = {id: place for place, id in enumerate(order)}
        for id in sorted(found, key=lambda id: places.get(id, len(places))):
            self.add(id, found[id])
        if folder.exists():  # what a kill before this leaves is the same results once more
            shutil.rmtree(folder)
        return self.rows

    def _lock(self) -> None:
        try:
            self._held.acquire(blocking=False)  # the system lifts it when this process ends, however it ends
        except Timeout:
            raise HimapError(f"{self.path}: another run is writing it: wait, or choose another --out") from None
        except (OSError, NotImplementedError):
            pass  # a file system without locks

    def _read(self, settings: dict) -> None:
        data, header = self.path.read_bytes(), _line({"settings": settings})
        whole = data.rfind(b"\n") + 1
        if not whole and not header.startswith(data):  # before anything is cut: it may be somebody's file
            raise self._not_ours(1)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    self._compare(row["settings"], settings)
                else:
                    self.rows[row.pop("id")] = row
            except HimapError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise self._not_ours(number) from None
        if whole < len(data):
            os.ftruncate(self._fd, whole)
        if not whole:
            self._write(header)

    def _not_ours(self, number: int) -> HimapError:
        return HimapError(f"{self.path}: line {number} is no result of ours: choose another --out")

    def _compare(self, theirs: dict, ours: dict) -> None:
        for name in {**theirs, **ours}:
            if theirs.get(name) != ours.get(name):
                raise HimapError(
                    f"{self.path}: holds results with {name} {theirs.get(name)!r}, not {ours.get(name)!r}: "
                    "choose another --out, or remove the file"
                )

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError as error:
            raise HimapError(f"{self.path}: cannot be written ({error.strerror}); run again to go on") from None


def _line(row: dict) -> bytes:
    return json.dumps(row).encode() + b"\n"


def results_path(out: Path, name: str, settings: dict) -> Path:
    """`out` if it is a file's name (with a suffix), else a file in that folder, of its own for these settings."""
    if out.suffix:
        return out
    stem = re.sub(r"[^\w.]+", "-", name)[:60].strip("-.")
    return out / f"{stem}-{sha256(_line(settings)).hexdigest()[:8]}.jsonl"


def fingerprint(folder: Path) -> str:
    """A short hash of the weights: of each file its name, its size and the first and last MiB."""
    digest = sha256()
    for path in tensor_files(folder):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            digest.update(file.read(2**20))
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def load_recorded(args: argparse.Namespace) -> tuple[Llava, dict]:
    """The model that the arguments ask for (`commands.options`), and the settings that a results file records of it."""
    model, folder = load_model(args)
    weight = model.language_model.norm.weight
    return model, {
        "weights": fingerprint(folder), "revision": revision_of(folder), "dtype": str(weight.dtype).split(".")[-1],
        "device": weight.device.type, "template": model.template, "pad": args.pad,
    }  # fmt: skip
