"""Faults: kill -9 at any moment of a study, and a second run on the files of a first.

Three kills of an evaluation are among the default tests. Fifty, and ten of each other study that resumes:

    HIMAP_KILLS=50 python -m pytest tests/faults/test_faults.py -k killed -s
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from himap_ref import HimapError
from himap_ref.studies.accuracy import bias, evaluate, precision, sweep
from himap_ref.studies.common.records import Records
from himap_ref.studies.paper import disruption, flow

KILLS = int(os.environ.get("HIMAP_KILLS", 3))
EACH = min(KILLS, 10)  # kills a test
STUDIES = {  # all that resume, each with a few questions, and how many more of them where it is killed
    evaluate: (["--limit", "4", "--method", "himap-paper"], ["--limit", "40"]),
    sweep: (["--limit", "3", "--methods", "fastv"], ["--limit", "20"]),
    bias: (["--limit", "3"], ["--limit", "8"]),
    flow: (["--limit", "3"], ["--limit", "20"]),
    disruption: (["--limit", "4", "--kinds", "img2txt", "--layers", "2", "--batch", "1"], ["--limit", "40"]),
    precision: (["--limit", "3", "--methods", "himap", "--dtype", "bfloat16"], ["--limit", "8"]),
}
OTHERWISE = {  # what the same answer may have another time: the rest of a torn batch is another batch
    "seconds", "peak_bytes", "batch", "batch_flops", "decode_steps", "scores", "logits",
}  # fmt: skip
CRUMBS = """
import os, runpy, sys, time
write = os.write
def crumb(fd, data):  # short writes, which the system may do at any time, and time to be killed between them
    time.sleep(0.005)
    return write(fd, data[:100])
os.write = crumb
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def name(value):
    return getattr(value, "__name__", str(value)).rpartition(".")[2]


@pytest.fixture
def start(monkeypatch):
    """The study's command, in this process."""

    def run(module, args, out):
        monkeypatch.setattr(sys, "argv", [module.__name__, *args, "--out", str(out)])
        module.main()

    return run


def results(out):
    """{file: {id: row}} of the lines that are whole. Fails on a line twice."""
    read = {}
    for path in sorted(out.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")[:-1]
        rows = [json.loads(line) for line in lines[1:]]
        read[path.name] = {row["id"]: {key: row[key] for key in row if key not in OTHERWISE} for row in rows}
        assert len(read[path.name]) == len(rows), f"a line twice in {path.name}"
    return read


def lines_in(out):
    return sum(path.read_bytes().count(b"\n") for path in out.glob("*.jsonl"))


def is_torn(out):
    return any(path.read_bytes()[-1:] not in (b"\n", b"") for path in out.glob("*.jsonl"))


# ---------------------------------------------------------------- in this process: every study


@pytest.mark.parametrize("module", STUDIES, ids=name)
def test_every_study_resumes(tmp_path, monkeypatch, start, module):
    """A study that keeps its results in another way than the one that the kills below are about."""
    (args, _), whole, torn, write = STUDIES[module], tmp_path / "whole", tmp_path / "torn", os.write
    start(module, args, whole)
    last = max(whole.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    settings = json.loads(last.read_text().split("\n")[0])["settings"]
    with Records(last, settings), pytest.raises(HimapError, match="another run is writing it"):
        start(module, args, whole)
    stop = lines_in(whole) // 2 + 1

    def tear(fd, data):
        if lines_in(torn) + 1 == stop:
            write(fd, data[: len(data) // 2])
            raise KeyboardInterrupt
        return write(fd, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "write", tear)
        start(module, args, torn)
    assert is_torn(torn) and lines_in(torn) == stop - 1
    start(module, args, torn)
    assert results(torn) == results(whole) and not is_torn(torn)


# ---------------------------------------------------------------- kill -9


def stopped(process):
    """Whether SIGSTOP came in time: the process still exists, and does nothing any more."""
    process.send_signal(signal.SIGSTOP)
    return os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code == os.CLD_STOPPED


def kill(command, out, lines, delay, second):
    """Starts the command, stops it `delay` seconds after it wrote so many lines, calls `second`, kills it.

    Returns whether it was killed; False if it came to its end before.
    """
    goal = lines_in(out) + lines
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            while process.poll() is None and lines_in(out) < goal:
                time.sleep(0.001)
            time.sleep(delay)
            if process.poll() is None and stopped(process) and lines:  # without lines it may not have locked anything
                second()
        finally:
            process.kill()
        assert process.wait() in (0, -signal.SIGKILL), process.stderr.read().decode()[-2000:]
    return process.returncode != 0


ROUNDS = [(evaluate, seed) for seed in range(KILLS // EACH)]
ROUNDS += [(module, 0) for module in STUDIES if module is not evaluate and KILLS > EACH]


@pytest.mark.parametrize("module, seed", ROUNDS, ids=name)
def test_killed_and_resumed(tmp_path, start, module, seed):
    """kill -9 at a random moment: a result lost, counted twice, or taken from a torn line; a lock that stays behind.

    Every kill is followed by a resume, which is killed again or comes to its end; while it runs, a second is refused.
    """
    few, more = STUDIES[module]
    args, whole, out, dice = [*few, *more], tmp_path / "whole", tmp_path / "out", random.Random(seed)
    start(module, args, whole)
    want, total, kills, torn, ends = results(whole), lines_in(whole), 0, 0, 0
    plain, crumbs = [sys.executable, "-m", module.__name__], [sys.executable, "-c", CRUMBS, module.__name__]

    def second():
        if lines_in(out) == total or len(want) > 1:
            return  # the first is done with its file, or may be between two
        with pytest.raises(HimapError, match="another run is writing it"):
            start(module, args, out)

    while kills < EACH:
        command = [*dice.choice((plain, crumbs, crumbs)), *args, "--out", str(out)]
        if module is evaluate:
            command += ["--batch", dice.choice(("1", "8"))]
        lines = 0 if kills % 4 == 3 else dice.randint(1, total // 2)  # every fourth while it starts, or shortly after
        if kill(command, out, lines, dice.uniform(0, 0.1 if lines else 3), second):
            kills, torn = kills + 1, torn + is_torn(out)
            for file, rows in results(out).items():
                assert all(row == want[file][id] for id, row in rows.items())
        else:
            ends += 1
            assert results(out) == want
            shutil.rmtree(out)
    start(module, args, out)
    assert results(out) == want
    told = f"{kills} kills, {torn} of them within a line; resumed to the end {ends + 1} times"
    print(f"\n{module.__name__}, seed {seed}: {told}")
