"""Faults: kill -9 or Ctrl-C at any moment of a study, and a second run on the files of a first.

Four kills of an evaluation are among the default tests. Fifty, and ten of each other study that resumes:

    HIMAP_KILLS=50 python -m pytest tests/faults/test_faults.py -k killed -s
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from toys import write_small_model

from himap_ref import HimapError
from himap_ref.studies.accuracy import bias, evaluate, precision, sweep
from himap_ref.studies.common.records import Records
from himap_ref.studies.paper import disruption, flow

pytestmark = pytest.mark.usefixtures("no_hang")
KILLS = int(os.environ.get("HIMAP_KILLS", 4))
EACH = min(KILLS, 10)  # kills a test
STUDIES = {  # all that resume, each with a few questions, and how many of them where it is killed
    evaluate: ("--max-new-tokens 4 --limit 4", 20),
    sweep: ("--max-new-tokens 4 --limit 3 --methods fastv", 20),
    bias: ("--max-new-tokens 4 --limit 3 --schedule 1:0.5,2:0.5", 8),
    flow: ("--limit 3", 20),
    disruption: ("--max-new-tokens 4 --limit 4 --kinds img2txt --layers 2 --batch 1", 8),
    precision: ("--max-new-tokens 4 --limit 3 --methods himap --dtype bfloat16", 8),
}
OTHERWISE = {  # what the same answer may have another time: the rest of a torn batch is another batch
    "seconds", "peak_bytes", "batch", "batch_flops", "decode_steps", "scores", "logits",
}  # fmt: skip
CRUMBS = """
import time
write = os.write
def crumb(fd, data):  # short writes, which the system may do at any time, and time to be killed between them
    time.sleep(0.005)
    return write(fd, data[:100])
os.write = crumb
"""


def name(value):
    return getattr(value, "__name__", str(value)).rpartition(".")[2]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A study and more words -> what it is asked for, of a model with as many image tokens as the embedded one."""
    write_small_model(folder := tmp_path_factory.mktemp("weights") / "whole", side=168)
    usual = "--scenes", "9", "--weights", str(folder)
    return lambda module, *more: [*STUDIES[module][0].split(), *usual, *more]


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
def test_every_study_resumes(tmp_path, monkeypatch, start, asked, module):
    """A study that keeps its results in another way than the one that the kills below are about."""
    args, whole, torn, write = asked(module), tmp_path / "whole", tmp_path / "torn", os.write
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


# ---------------------------------------------------------------- signals


@contextmanager
def running(forked, tmp_path, *words, before=""):
    """A command in a process of its own: its id, and what becomes of it. At the end it is killed."""
    (file := tmp_path / "pid").write_text("")
    tell = f"open({str(file)!r}, 'w').write(str(os.getpid()))\n"
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(forked, *words, before=before + tell)
        while not (pid := file.read_text()) and not done.done():
            time.sleep(0.001)
        try:
            yield int(pid), done
        finally:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def is_stopped(pid):
    """Whether SIGSTOP came in time: the process still exists, and does nothing any more."""
    try:
        os.kill(pid, signal.SIGSTOP)
        while (state := Path(f"/proc/{pid}/stat").read_text().rsplit(") ")[1][0]) not in "TZ":
            time.sleep(0.001)
        return state == "T"
    except (ProcessLookupError, FileNotFoundError):
        return False


ROUNDS = [(evaluate, seed) for seed in range(KILLS // EACH)]
ROUNDS += [(module, 0) for module in STUDIES if module is not evaluate and KILLS > EACH]


@pytest.mark.parametrize("module, seed", ROUNDS, ids=name)
def test_killed_and_resumed(tmp_path, start, asked, forked, module, seed):
    """kill -9 at a random moment: a result lost, counted twice, or taken from a torn line; a lock that stays behind.

    Every kill is followed by a resume, which is killed again or comes to its end; while it runs, a second is refused.
    """
    args, whole, out = asked(module, "--limit", str(STUDIES[module][1])), tmp_path / "whole", tmp_path / "out"
    start(module, args, whole)
    dice = random.Random(seed)
    want, total, kills, torn, ends = results(whole), lines_in(whole), 0, 0, 0
    while kills < EACH:
        words = [module.__name__, *args, "--out", out]
        if module is evaluate:
            words += ["--batch", dice.choice(("1", "8"))]
        lines = 0 if kills % 4 == 3 else dice.randint(1, total // 2)  # every fourth while it starts, or shortly after
        goal = lines_in(out) + lines
        with running(forked, tmp_path, *words, before=dice.choice(("", CRUMBS, CRUMBS))) as (pid, done):
            while not done.done() and lines_in(out) < goal:
                time.sleep(0.001)
            time.sleep(dice.uniform(0, 0.1 if lines else 1))
            # without lines it may not have locked anything; when all are written, or between two files, it need not
            if not done.done() and is_stopped(pid) and lines and lines_in(out) < total and len(want) == 1:
                with pytest.raises(HimapError, match="another run is writing it"):
                    start(module, args, out)
        assert done.result().returncode in (0, -signal.SIGKILL), done.result().stderr[-2000:]
        if done.result().returncode:
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


def test_a_real_ctrl_c(tmp_path, forked, whole):
    """A signal that torch or a library swallows, or turns into a traceback."""
    out, before = tmp_path / "a.jsonl", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    words = "himap_ref.studies", "evaluate", "--weights", whole, "--scenes", 50, "--out", out
    with running(forked, tmp_path, *words, before=before) as (pid, done):  # in the background it would be ignored
        while not done.done() and not (out.exists() and out.stat().st_size > 3000):
            time.sleep(0.001)
        os.kill(pid, signal.SIGINT)
        done = done.result(timeout=30)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert out.read_bytes().endswith(b"\n")
