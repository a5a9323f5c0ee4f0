"""Results files: what survives a kill, a full disk, another run, other settings."""

import json
import os
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from himap_ref import HimapError
from himap_ref.commands.options import EMBEDDED
from himap_ref.studies.common.records import Records, fingerprint

SETTINGS = {"method": "himap", "stages": [(2, 0.5)], "seed": 1}
ROWS = {f"q{number}": {"answer": "a\nb\u2028 \ud800é" * number} for number in range(6)}


def run(path):
    """A whole run: records what is not there yet. Returns the ids that it recorded."""
    with Records(path, SETTINGS) as records:
        new = [id for id in ROWS if id not in records]
        for id in new:
            records.add(id, ROWS[id])
    return new


def test_torn_anywhere(tmp_path):
    """A line torn by a kill counted as a result, joined to the next one, or a result lost with it: at every byte."""
    whole, path = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    run(whole)
    data = whole.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        lines = max(0, data[:length].count(b"\n") - 1)
        assert run(path) == list(ROWS)[lines:]
        assert path.read_bytes() == data


def test_rows_come_back(tmp_path):
    """Text that JSON or a line break inside it changes."""
    run(tmp_path / "a.jsonl")
    with Records(tmp_path / "a.jsonl", SETTINGS) as records:
        assert records.rows == ROWS and "q5" in records and "q6" not in records
        with pytest.raises(HimapError, match="there already"):
            records.add("q5", {})


@pytest.mark.parametrize("settings", [{**SETTINGS, "seed": 2}, {**SETTINGS, "pad": True}, {"method": "himap"}], ids=str)
def test_other_settings_are_refused(tmp_path, settings):
    """Results of two different runs mixed in one file."""
    path = tmp_path / "a.jsonl"
    run(path)
    before = path.read_bytes()
    with pytest.raises(HimapError, match="choose another --out"):
        Records(path, settings)
    assert path.read_bytes() == before


OTHERS = [b"hello", b"hello\n", b"[1]\n", b"{}\n", b'{"settings": 3}\n', b"\n", b"\xff\n", b"[" * 100_000 + b"\n"]


@pytest.mark.parametrize("text", OTHERS, ids=range(len(OTHERS)))
def test_other_files_are_refused(tmp_path, text):
    """Somebody's file appended to, or cut."""
    path = tmp_path / "notes.txt"
    path.write_bytes(text)
    with pytest.raises(HimapError, match="notes.txt"):
        Records(path, SETTINGS)
    assert path.read_bytes() == text


def test_second_run_is_refused(tmp_path):
    """Two runs that write the same file: every result twice. The first one's death must free it."""
    path, context = tmp_path / "a.jsonl", get_context("fork")
    opened = context.Event()

    def hold():
        with Records(path, {}):
            opened.set()
            time.sleep(60)

    other = context.Process(target=hold)
    other.start()
    try:
        assert opened.wait(60)
        with pytest.raises(HimapError, match="another run"):
            Records(path, {})
    finally:
        other.kill()
        other.join()
    with Records(path, {}) as records:
        assert records.rows == {}


def test_full_disk(tmp_path, monkeypatch):
    """A traceback, or half a line that the next start takes for a result."""
    path, write = tmp_path / "a.jsonl", os.write

    def full(fd, data):
        if b"q3" in bytes(data):
            write(fd, data[:5])
            raise OSError(28, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(HimapError, match="No space left on device.*run again"):
        run(path)
    monkeypatch.undo()
    assert run(path) == ["q3", "q4", "q5"]
    assert [json.loads(line).get("id") for line in path.read_text().splitlines()] == [None, *ROWS]


@pytest.mark.parametrize("make, message", [(Path.mkdir, "cannot be written"), (os.mkfifo, "not a file")])
def test_no_file(tmp_path, make, message):
    """A traceback for a folder in the file's place; a run that waits for ever for what a pipe will say."""
    make(tmp_path / "a.jsonl")
    with pytest.raises(HimapError, match=f"a.jsonl: {message}"):
        Records(tmp_path / "a.jsonl", {})


def test_fingerprint(tmp_path):
    """Weights that differ in one number, of which the results are taken for the other's."""
    data, prints = bytearray((EMBEDDED / "model.safetensors").read_bytes()), set()
    for place in (0, 9, -3):
        data[place] ^= place != 0
        (tmp_path / "model.safetensors").write_bytes(data)
        prints.add(fingerprint(tmp_path))
    assert len(prints) == 3
