"""Evaluations shared out over several processes (torchrun, gloo on CPUs): one run's results, whoever dies in it.

By default the kills that each say something else. Fifty at random moments, and every study that records:

    HIMAP_KILLS=50 python -m pytest tests/studies/test_distributed.py
"""

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from launch import ROOT, TORCHRUN, launch
from toys import noise, write_small_model

from himap_ref import HimapError
from himap_ref.commands import ranks
from himap_ref.commands.options import EMBEDDED
from himap_ref.commands.ranks import LOST
from himap_ref.studies.accuracy import bias, blind, precision, recall, sweep
from himap_ref.studies.common.records import Records
from himap_ref.studies.paper import disruption, flow

KILLS = int(os.environ.get("HIMAP_KILLS", 0))
QUESTIONS = ("--scenes", 2, "--batch", 2)
ASKED = """
import himap_ref.studies.accuracy.evaluate as evaluate
def answer(model, examples, *rest, real=evaluate.answer):
    with open(f"{job['folder']}/asked{rank}", "a") as file:
        print(*(example.key for example in examples), sep="\\n", file=file)
    return real(model, examples, *rest)
evaluate.answer = answer
"""
TORN = (
    ASKED
    + """
def write(fd, data, real=os.write, done=[]):
    if data.startswith(b'{"id"') and rank == RANK:
        done.append(data)
        if len(done) == LINE:
            real(fd, data[:20])
            os.kill(os.getpid(), signal.SIGKILL)
    return real(fd, data)
os.write = write
"""
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random model's folder."""
    write_small_model(folder := tmp_path_factory.mktemp("model") / "small")
    return folder


@pytest.fixture
def share(small, tmp_path):
    """Factory: a study in so many processes -> statuses, outputs, errors, and who asked what."""

    def call(number, out, name="evaluate", *options, before=ASKED):
        words = ("--weights", small, "--out", out, *(options or (*QUESTIONS, "--max-new-tokens", 4)))
        for rank in range(3):
            (tmp_path / f"asked{rank}").unlink(missing_ok=True)
        statuses, outs, errors = launch(number, tmp_path, "himap_ref.studies", name, *words, before=before)
        asked = [tmp_path / f"asked{rank}" for rank in range(number)]
        return statuses, outs, errors, [path.read_text().split("\n")[:-1] if path.exists() else [] for path in asked]

    return call


def lines_of(path):
    """What is recorded, in order, but for what depends on the clock."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("seconds", "peak_bytes")} for row in rows]


def by_id(path):
    """The same of questions that may have been asked in other batches. Fails on a line twice."""
    rows = {row["id"]: row for row in lines_of(path)[1:]}
    assert len(rows) == len(lines_of(path)) - 1
    return {id: {k: v for k, v in row.items() if "batch" not in k and k != "decode_steps"} for id, row in rows.items()}


def plain(table):
    """What a command prints, without what depends on the clock."""
    return re.sub(r"(?m)^(seconds|peak memory|results|.*every column).*\n", "", table)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The file that one process writes, and what it prints."""
    folder = tmp_path_factory.mktemp("whole")
    words = ("--weights", small, "--out", folder / "a.jsonl", *QUESTIONS, "--max-new-tokens", 4)
    statuses, outs, _ = launch(1, folder, "himap_ref.studies", "evaluate", *words)
    assert statuses == [0]
    return folder / "a.jsonl", outs[0]


@pytest.mark.parametrize("number", [2, 3])
def test_as_one(share, whole, tmp_path, number):
    """A question left out, or asked by two; another order, other batches, another total; a table for each process."""
    out = tmp_path / "a.jsonl"
    statuses, outs, errors, asked = share(number, out)
    assert statuses == [0] * number and lines_of(out) == lines_of(whole[0])
    assert plain(outs[0]) == plain(whole[1]) and outs[1:] == errors[1:] == [""] * (number - 1)
    every = [key for keys in asked for key in keys]
    assert sorted(every) == sorted(by_id(out)) and all(asked)
    assert sorted(path.name for path in tmp_path.iterdir() if "jsonl" in path.name) == [".a.jsonl.lock", "a.jsonl"]
    assert number == 2 or (share(1, out)[1][0], share(2, out)[3]) == (outs[0], [[], []])  # nothing is asked again


def deaths():
    """(who dies, writing which line, of how many, and how many go on)."""
    yield from ((1, 3, 2, 3), (0, 1, 3, 1))
    for seed in range(KILLS):
        chosen = random.Random(seed)
        number = chosen.choice((2, 3))
        yield chosen.randrange(number), chosen.randint(1, 4), number, chosen.choice((1, 2, 3))


@pytest.mark.parametrize("killed, line, number, after", [*deaths()])
def test_killed(share, whole, tmp_path, killed, line, number, after):
    """A rank's death that hangs the others or ends in a trace; what was recorded lost or asked again, by however many
    processes go on; a torn line taken for a result."""
    out, before = tmp_path / "a.jsonl", TORN.replace("RANK", str(killed)).replace("LINE", str(line))
    statuses, outs, errors, _ = share(number, out, before=before)
    assert statuses == [-9 if rank == killed else 2 for rank in range(number)] and outs == [""] * number
    assert re.findall(r"(?m)^error: .*", "\n".join(errors)) == [f"error: {LOST}"] and "Traceback" not in str(errors)
    recorded = [row["id"] for part in sorted(tmp_path.glob("a.jsonl.parts/*.jsonl")) for row in whole_rows(part)]
    assert len(recorded) >= line - 1
    statuses, outs, _, asked = share(after, out)
    assert statuses == [0] * after and by_id(out) == by_id(whole[0])
    assert sorted([*recorded, *(key for keys in asked for key in keys)]) == sorted(by_id(out))


def whole_rows(part):
    """Of a file that may be torn, the results."""
    return [json.loads(line) for line in part.read_bytes().split(b"\n")[1:-1]]


@pytest.mark.parametrize("number", [1, 2] if KILLS else [1])
def test_killed_while_taking_in(share, whole, tmp_path, number):
    """The first process killed between the file and its parts: results twice in it, or gone."""
    out, before = tmp_path / "a.jsonl", "import shutil; shutil.rmtree = lambda _: os.kill(os.getpid(), signal.SIGKILL)"
    statuses, *_ = share(2, out, before=before)
    assert statuses == [-9, 2] and len(list(tmp_path.glob("a.jsonl.parts/*.jsonl"))) == 2
    statuses, outs, _, asked = share(number, out)
    assert asked == [[]] * number and plain(outs[0]) == plain(whole[1]) and lines_of(out) == lines_of(whole[0])


def test_parts_of_other_settings(share, tmp_path):
    """Parts that somebody's other run left, mixed in."""
    with Records(tmp_path / "a.jsonl.parts" / "0.jsonl", {"weights": "others"}) as part:
        part.add("0", {})
    statuses, _, errors, _ = share(2, tmp_path / "a.jsonl")
    assert statuses == [2, 2] and "parts/0.jsonl: holds results with" in (told := "".join(errors))
    assert told.count("error: ") == 1


def test_errors(share, tmp_path):
    """A question that only another process knows to be wrong, told by nobody, or by all."""
    noise(28, 28).save(tmp_path / "a.png")
    entries = [{"id": i, "image": "a.png" if i < 4 else f"{i}.png", "text": "Where?", "label": "a"} for i in range(7)]
    (tmp_path / "q.json").write_text(json.dumps(entries))
    options = ("--questions", tmp_path / "q.json", "--image-folder", tmp_path)
    statuses, outs, errors, _ = share(2, tmp_path / "a.jsonl", "evaluate", *options)
    assert statuses == [0, 0] and "4 answered, 3 could not be asked" in outs[0] and errors[1] == ""
    assert all(len(re.findall(rf"(?m)^{i}: .*{i}.png", errors[0].replace("\r", "\n"))) == 1 for i in (4, 5, 6)), errors


def test_bad_input(share, tmp_path):
    """As many error lines as processes, or none, as the first to end has the others ended."""
    statuses, outs, errors, _ = share(3, tmp_path / "a.jsonl", "evaluate", "--no-such-option")
    assert statuses == [2, 2, 2] and outs == [""] * 3 and "".join(errors).count("error: ") == 1
    statuses, outs, errors, _ = share(2, tmp_path / "a", "train")
    assert statuses == [2, 2] and "".join(errors) == "error: train runs in one process: start it without torchrun\n"


def test_no_shared_folder(share, tmp_path):
    """Machines that each write into a folder of their own: results that are there and missing."""
    before = "os.chdir(os.environ.setdefault('HERE', job['folder'])); os.mkdir(str(rank)); os.chdir(str(rank))"
    statuses, _, errors, _ = share(2, "a.jsonl", before=before)
    assert statuses == [2, 2] and "recorded by another machine: --out must be where all write" in "".join(errors)


def test_own_device(monkeypatch):
    """Every process on the first GPU; one alone, or one that was sent elsewhere, on a GPU that it did not ask for."""
    assert ranks.own_device("cuda") == "cuda"
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert [ranks.own_device(name) for name in ("cuda", "cuda:0", "cpu", "mps")] == ["cuda:1", "cuda:0", "cpu", "mps"]
    with pytest.raises(HimapError, match="--device mps: 4 processes can share a model on cuda or cpu"):
        ranks.mesh(torch.device("mps"))


FEW = ("--scenes", 1, "--batch", 2)
STUDIES = {  # and what says that a run of several processes is a run of one
    sweep: (*FEW, "--methods", "himap", "random7"),
    **({
        recall: ("--weights", EMBEDDED, *FEW), bias: (*FEW, "--schedule", "1:0.5,2:0.5"), flow: ("--scenes", 1),
        blind: ("--scenes", 2, "--others", 20), disruption: (*FEW, "--kinds", "img2txt", "--layers", 1),
        precision: (*FEW, "--methods", "himap", "--dtype", "bfloat16"),
    } if KILLS else {}),
}  # fmt: skip


@pytest.mark.parametrize("module", STUDIES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_study(share, tmp_path, module):
    """A study that writes, prints or asks in each process by itself."""
    results = []
    for number in (1, 2):
        out = tmp_path / f"{number}"
        statuses, outs, _, _ = share(number, out, module.__name__.rpartition(".")[2], *STUDIES[module])
        assert statuses == [0] * number and outs[1:] == [""] * (number - 1)
        files = sorted(path.name for path in out.iterdir())
        tables = [(out / name).read_text() for name in files if name.startswith("table")]
        records = [lines_of(out / name) for name in files if name.endswith(".jsonl")]
        results.append((plain(outs[0]).replace(str(out), ""), files, tables, records))
    assert results[0] == results[1]


def ranks_of(process):
    """{rank: process id} of what torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {int(child): Path(f"/proc/{child}/environ").read_bytes() for child in children}
    found = {child: re.search(rb"(?:^|\0)RANK=(\d+)", environment) for child, environment in environments.items()}
    return {int(match[1]): child for child, match in found.items() if match}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds a rank by its environment")
def test_torchrun(share, small, tmp_path):
    """What torchrun itself does otherwise than the processes above: whom it ends, and when, and with which words."""
    out, options = tmp_path / "a.jsonl", ("--max-new-tokens", 4, "--scenes")
    words = ("2", "-m", "himap_ref.studies", "evaluate", "--weights", small, "--out", out, *options, 60)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*TORCHRUN, *map(str, words)], stdout=-1, stderr=-1, text=True, env=env) as process:
        part, patience = tmp_path / "a.jsonl.parts" / "1.jsonl", time.monotonic() + 120
        while not (part.exists() and len(whole_rows(part)) > 2) and time.monotonic() < patience:
            time.sleep(0.01)
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        printed, errors = process.communicate(timeout=120)
    assert process.returncode and not printed and re.findall(r"(?m)^error: .*", errors) == [f"error: {LOST}"]
    recorded = [row for path in tmp_path.glob("a.jsonl.parts/*.jsonl") for row in whole_rows(path)]
    assert len(recorded) > 2 and share(1, out, "evaluate", *options, 1)[0] == [0]
    rows = whole_rows(out)
    assert all(row in rows for row in recorded) and len({row["id"] for row in rows}) == len(rows)
