"""Damaged files: a share of fuzz.py's cases, every case that has ever failed, and whether the fuzzer would see a fault.

500 cases are among the default tests. 20,000, others with another seed:

    HIMAP_CASES=20000 HIMAP_SEED=0 python -m pytest tests/faults/test_fuzz.py -k cases
"""

import base64
import json
import os
import pickle
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import fuzz
import hypothesis
import pytest
from fuzz import FILES, INDEX, QUESTIONS, Worker, Workspace, damaged
from hypothesis import HealthCheck, Phase
from toys import join_safetensors, split_safetensors

from himap_ref import HimapError, Llava
from himap_ref.checkpoint.config import build
from himap_ref.methods import schedules
from himap_ref.studies.accuracy.precision import threads
from himap_ref.studies.questions.question_files import parse_questions

CASES, SEED = int(os.environ.get("HIMAP_CASES", 500)), int(os.environ.get("HIMAP_SEED", 0))
KEPT = [json.loads(line) for line in Path(__file__).with_name("fuzz_cases.jsonl").read_text().splitlines()]
GOOD = ("fine", "refused")
WEIGHTS = "model/model.safetensors"
QUERIES = [f"language_model.model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's accounting"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    with threads(1):
        yield Workspace(tmp_path_factory.mktemp("fuzz") / "files")


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    return Worker(lambda: tmp_path_factory.mktemp("worker"))


def each_case(workspace, seed, cases, test, *phases):
    """Calls test(file, contents) so often, in runs of ten: after ten hypothesis begins to copy parts of a case over
    each other, which makes most cases heavily damaged and many the same."""
    settings = hypothesis.settings(
        max_examples=10, phases=(Phase.generate, *phases), database=None, deadline=None,
        suppress_health_check=list(HealthCheck), verbosity=hypothesis.Verbosity.quiet,
    )  # fmt: skip
    ten = settings(hypothesis.given(damaged(workspace))(lambda case: test(*case)))
    for number in range(cases // 10):
        hypothesis.seed(10**6 * seed + number)(ten)()


def test_whole_files_are_fine(workspace):
    """Every case refused for what is wrong with the file that it is made of."""
    outcomes = {name: workspace.attempt(name, workspace.whole[name]) for name in FILES}
    assert outcomes == dict.fromkeys(FILES, "fine") | {"original/config.json": "refused"}


def test_cases(workspace, worker):
    """A traceback, a hang, gigabytes, or a tensor that is not what the file says. Shown is the smallest of its kind."""
    outcomes = Counter()

    def test(file, data):
        outcome = worker.attempt(file, data)
        outcomes[outcome] += 1
        if outcome not in GOOD:
            kept = base64.b85encode(zlib.compress(data, 9)).decode()
            line = json.dumps({"file": file, "was": outcome[:120], "data": kept})
            raise AssertionError(f"case {outcomes.total()}; for fuzz_cases.jsonl:\n{line}")

    each_case(workspace, SEED, CASES, test, Phase.shrink)
    assert set(outcomes) == set(GOOD) and min(outcomes.values()) > CASES / 10  # damage never, or always, found is none


@pytest.mark.parametrize("kept", KEPT, ids=[f"{kept['file']}-{kept['was']:.40}" for kept in KEPT])
def test_kept_case(worker, kept):
    """What has gone wrong once."""
    assert worker.attempt(kept["file"], zlib.decompress(base64.b85decode(kept["data"]))) in GOOD


# ---------------------------------------------------------------- the fuzzer itself


def test_cases_follow_from_the_seed(workspace):
    """A failure that nobody can see again; a file that is never damaged."""
    runs = [[], [], []]
    for drawn, seed, cases in zip(runs, (3, 3, 4), (20, 20, 300), strict=True):
        each_case(workspace, seed, cases, lambda *case, drawn=drawn: drawn.append(case))
    assert runs[0] == runs[1] != runs[2][:20]
    assert {file for file, _ in runs[2]} == set(FILES)


def test_a_header_that_names_other_places_is_read_as_it_says(workspace):
    """Two tensors of one shape exchanged by the header: another file, read as such. An overlap is refused."""
    header, body = split_safetensors(workspace.whole[WEIGHTS])
    first, second = QUERIES
    header[first], header[second] = header[second], header[first]
    assert workspace.attempt(WEIGHTS, join_safetensors(header, body)) == "fine"
    header[first] = header[second]
    assert workspace.attempt(WEIGHTS, join_safetensors(header, body)) == "refused"


def reads_elsewhere():
    """And fails then, as most such files will."""
    Path("/etc/hostname").read_bytes()
    raise HimapError("not a picture")


def writes_elsewhere():
    path = Path(tempfile.gettempdir()) / "himap-fuzz-test"
    path.write_bytes(b"")
    path.unlink()


def swallow():
    try:
        raise MemoryError
    except MemoryError:
        raise HimapError("broken file") from None


@pytest.mark.parametrize("fault, outcome", [
    (lambda: b"x" * (300 * 2**20), "took 30"), (swallow, "Wrong: HimapError"), ({}.popitem, "KeyError: "),
    (reads_elsewhere, "reached open '/etc/hostname'"), (writes_elsewhere, "reached open "),
    (lambda: os.system("true"), "reached os.system"),
    (lambda: pickle.loads(b"cos\ngetcwd\n(tR."), "reached pickle.find_class 'os'"),
])  # fmt: skip
def test_faults_are_noticed(workspace, monkeypatch, fault, outcome):
    """A fuzzer that finds nothing because it looks away."""
    monkeypatch.setattr(fuzz, "BYTES", 200 * 2**20)
    monkeypatch.setattr(Workspace, "_use", lambda *_: fault())
    assert workspace.attempt("questions.json", b"").startswith(outcome)


@pytest.mark.parametrize("fault", [lambda: os._exit(3), lambda: time.sleep(99)], ids=["dies", "hangs"])
def test_a_process_that_dies(monkeypatch, tmp_path_factory, fault):
    """A case that takes its process down, and with it the rest of the run."""
    monkeypatch.setattr(fuzz, "SECONDS", 2)
    monkeypatch.setattr(Workspace, "_use", lambda _, path: fault() if path.suffix == ".jsonl" else None)
    worker = Worker(lambda: tmp_path_factory.mktemp("worker"), "fork")
    outcomes = [worker.attempt(name, b"") for name in ("questions.json", "questions.jsonl", "questions.json")]
    assert outcomes == ["fine", "the process died, or was ended after 2 s", "fine"]


def loading(change):
    """A `load_state_dict` before which the tensors are changed."""
    load = Llava.load_state_dict
    return lambda self, tensors, **options: load(self, change(tensors, *map(fuzz.rename, QUERIES)), **options)


def built(**changes):
    """A `build` that takes some entries for others, and does not hear of those that are None here."""
    return lambda cls, data: build(cls, {k: v for k, v in (data | changes).items() if v is not None})


ELSEWHERE = json.dumps([QUESTIONS[1] | {"image": "/etc/hostname"}]).encode()
OUTSIDE = json.dumps({"weight_map": {"a": "../model/model.safetensors"}}).encode()
FUNCTION = json.dumps({"stages": "1:2:os:getcwd"}).encode()
LOAD, BUILD, PARSE = "himap_ref.Llava.load_state_dict", "himap_ref.checkpoint.config.build", "fuzz.parse_questions"
WHITE = "Wrong: image_std is (1.0, 1.0, 1.0), the file says (0.5, 0.5, 0.5)"
MIXED = "Wrong: language_model.model.layers.0.self_attn.q_proj.weight is not what model.safetensors holds"
GUARDS = {  # what is lost: (its place, what stands there instead, file, contents or None for the whole ones, outcome)
    "a picture from elsewhere": ("himap_ref.studies.questions.question_files._inside",
                                 lambda folder, name: folder / name, "questions.json", ELSEWHERE,
                                 "reached open '/etc/hostname'"),
    "a shard from elsewhere": ("fuzz.tensor_files", lambda folder: [folder / "../model/model.safetensors"],
                               INDEX, OUTSIDE, "Wrong: a shard in another folder"),
    "a function from elsewhere": ("himap_ref.methods.schedules._find_score", lambda name, _: schedules._own_score(name),
                                  "model/himap.json", FUNCTION, "Wrong: a score that is not one of ours"),
    "two tensors exchanged": (LOAD, loading(lambda t, a, b: t | {a: t[b], b: t[a]}), WEIGHTS, None, MIXED),
    "a tensor twice": (LOAD, loading(lambda t, a, b: t | {a: t[b]}), WEIGHTS, None, MIXED),
    "a last bit": (LOAD, loading(lambda t, a, b: t | {a: t[a] * (1 + 2**-23)}), WEIGHTS, None, MIXED),
    "a field": (BUILD, built(rms_norm_eps=None), "model/config.json", None,
                "Wrong: rms_norm_eps is 1e-06, the file says 1e-05"),
    "a step of the pixels": (BUILD, built(image_std=(1.0,) * 3), "model/preprocessor_config.json", None, WHITE),
    "the same in the newer file": (BUILD, built(image_std=(1.0,) * 3), "newer/processor_config.json", None, WHITE),
    "a question": (PARSE, lambda *args: parse_questions(*args)[:2], "questions.jsonl", None, "Wrong: 2 of 6 "),
    "the order of questions": (PARSE, lambda *args: parse_questions(*args)[::-1], "questions.jsonl", None,
                               "Wrong: entry '3' is not what the file holds"),
}  # fmt: skip


@pytest.mark.parametrize("place, fault, file, data, outcome", GUARDS.values(), ids=GUARDS)
def test_lost_guards_are_noticed(workspace, monkeypatch, place, fault, file, data, outcome):
    """What a file can do when a check is gone, and a loader that confuses: it ends as if all were well."""
    whole = workspace.whole[file] if data is None else data
    assert workspace.attempt(file, whole) == ("fine" if data is None else "refused")
    monkeypatch.setattr(place, fault)
    assert workspace.attempt(file, whole).startswith(outcome)
