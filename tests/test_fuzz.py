"""Damaged files: a share of the cases of `himap_ref.studies.fuzz`, and every case that has ever failed."""

import json
import os
import pickle
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from himap_ref import HimapError, Llava
from himap_ref.checkpoint import config
from himap_ref.checkpoint.config import build
from himap_ref.methods import schedules
from himap_ref.studies import fuzz, question_files
from himap_ref.studies.fuzz import FILES, Workspace, attempt, case, join_safetensors, split_safetensors, unpack
from himap_ref.studies.question_files import parse_questions

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's accounting")
KEPT = [json.loads(line) for line in (ROOT / "tests/fuzz_cases.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny: on a busy machine threads wait for each other, ten times as long
    yield Workspace(tmp_path_factory.mktemp("fuzz") / "files")
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_whole_files_are_fine(workspace):
    """Every case refused for what is wrong with the file that it is made of."""
    outcomes = {name: attempt(workspace, name, (workspace.root / name).read_bytes()) for name in FILES}
    assert outcomes == dict.fromkeys(FILES, "fine") | {"original/config.json": "refused"}


def test_500_cases(workspace):
    """A traceback, a hang, gigabytes, or a tensor that is not what the file says."""
    outcomes = Counter()
    for number in range(500):
        name, data = case(workspace, 0, number)
        outcome = attempt(workspace, name, data)
        assert outcome in ("fine", "refused"), f"case {number}: {name}: {outcome}"
        outcomes[outcome] += 1
    assert min(outcomes.values()) > 50  # damage that is never, or always, found tests nothing


@pytest.mark.parametrize("kept", KEPT, ids=[f"{kept['file']}-{kept['was']:.40}" for kept in KEPT])
def test_kept_case(workspace, kept):
    """What has gone wrong once."""
    assert attempt(workspace, kept["file"], unpack(kept["data"])) in ("fine", "refused")


# ---------------------------------------------------------------- the fuzzer itself


def test_a_case_follows_from_its_number(workspace):
    """A failure that nobody can see again."""
    assert case(workspace, 3, 14) == case(workspace, 3, 14) != case(workspace, 4, 14)
    files = Counter(case(workspace, 0, number)[0] for number in range(300))
    assert set(files) == set(FILES)


WEIGHTS = "model/model.safetensors"


def swapped(tensors):
    names = [name for name in tensors if name.endswith("q_proj.weight") and "language" in name]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def doubled(tensors):
    names = [name for name in tensors if name.endswith("q_proj.weight") and "language" in name]
    tensors[names[0]] = tensors[names[1]]


def rounded(tensors):
    tensors["language_model.norm.weight"] = tensors["language_model.norm.weight"] + 1e-7


@pytest.mark.parametrize("fault", [swapped, doubled, rounded])
def test_unfaithful_loading_is_noticed(workspace, monkeypatch, fault):
    """A loader that confuses tensors, and a fuzzer that calls it fine."""
    load = Llava.load_state_dict

    def load_state_dict(self, tensors, **options):
        fault(tensors)
        return load(self, tensors, **options)

    monkeypatch.setattr(Llava, "load_state_dict", load_state_dict)
    outcome = attempt(workspace, WEIGHTS, (workspace.root / WEIGHTS).read_bytes())
    assert outcome.startswith("Wrong: ") and "is not what model.safetensors holds" in outcome


def test_a_header_that_names_other_places_is_read_as_it_says(workspace):
    """Two tensors of one shape exchanged by the header: another file, read as such. An overlap is refused."""
    header, body = split_safetensors((workspace.root / WEIGHTS).read_bytes())
    first, second = (f"model.language_model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    header[first], header[second] = header[second], header[first]
    assert attempt(workspace, WEIGHTS, join_safetensors(header, body)) == "fine"
    header[first] = header[second]
    assert attempt(workspace, WEIGHTS, join_safetensors(header, body)) == "refused"


def reads_elsewhere():
    """And fails then, as most such files will."""
    Path("/etc/hostname").read_bytes()
    raise HimapError("not a picture")


def writes_elsewhere():
    path = Path(tempfile.gettempdir()) / "himap-fuzz-test"
    path.write_bytes(b"")
    path.unlink()


def starts_a_program():
    os.system("true")


def unpickles():
    pickle.loads(b"cos\ngetcwd\n(tR.")


def hang():
    time.sleep(9)


def hang_in_a_library():
    """Whose wrapper takes every exception, the alarm's, too."""
    try:
        time.sleep(9)
    except BaseException as error:
        raise HimapError("broken file") from error


def hold():
    return b"x" * (300 * 2**20)


def swallow():
    try:
        raise MemoryError
    except MemoryError:
        raise HimapError("broken file") from None


@pytest.mark.parametrize("fault, outcome", [
    (hang, "Hang: "), (hang_in_a_library, "Wrong: took"), (hold, "Wrong: took"), (swallow, "Wrong: HimapError"),
    ({}.popitem, "KeyError: "), (reads_elsewhere, "Wrong: reached open '/etc/hostname'"),
    (writes_elsewhere, "Wrong: reached open "), (starts_a_program, "Wrong: reached os.system"),
    (unpickles, "Wrong: reached pickle.find_class 'os'"),
])  # fmt: skip
def test_faults_are_noticed(workspace, monkeypatch, fault, outcome):
    """A fuzzer that finds nothing because it looks away."""
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "BYTES", 200 * 2**20)
    monkeypatch.setattr(Workspace, "_use", lambda *_: fault())
    assert attempt(workspace, "questions.json", b"").startswith(outcome)


def test_lost_guards_are_noticed(workspace, monkeypatch):
    """A picture, a shard or a function from elsewhere, whose use ends in one of our errors as if it were refused."""
    elsewhere = json.dumps([fuzz.QUESTIONS[1] | {"image": "/etc/hostname"}]).encode()
    assert attempt(workspace, "questions.json", elsewhere) == "refused"
    monkeypatch.setattr(question_files, "_inside", lambda folder, name: folder / name)
    assert attempt(workspace, "questions.json", elsewhere).startswith("Wrong: reached open '/etc/hostname'")

    index = json.dumps({"weight_map": {"a": "../model/model.safetensors"}}).encode()
    assert attempt(workspace, f"sharded/{fuzz.INDEX}", index) == "refused"
    monkeypatch.setattr(fuzz, "tensor_files", lambda folder: [folder / "../model/model.safetensors"])
    assert attempt(workspace, f"sharded/{fuzz.INDEX}", index) == "Wrong: a shard in another folder"
    monkeypatch.undo()

    function = json.dumps({"stages": "1:2:os:getcwd"}).encode()
    assert attempt(workspace, "model/himap.json", function) == "refused"
    monkeypatch.setattr(schedules, "_find_score", lambda name, trusted: schedules._own_score(name))
    assert attempt(workspace, "model/himap.json", function) == "Wrong: a score that is not one of ours"


def test_misread_files_are_noticed(workspace, monkeypatch):
    """A configuration of which a field is passed over, questions of which one is lost: fine, as far as anybody sees."""

    def all_but_eps(cls, data):
        return build(cls, {name: value for name, value in data.items() if "eps" not in name})

    monkeypatch.setattr(config, "build", all_but_eps)
    outcome = attempt(workspace, "model/config.json", (workspace.root / "model/config.json").read_bytes())
    assert outcome == "Wrong: rms_norm_eps is 1e-06, the file says 1e-05"
    monkeypatch.undo()
    monkeypatch.setattr(config, "build", lambda cls, data: build(cls, data | {"image_std": (1.0, 1.0, 1.0)}))
    for name in ("model/preprocessor_config.json", "newer/processor_config.json"):
        outcome = attempt(workspace, name, (workspace.root / name).read_bytes())
        assert outcome == "Wrong: image_std is (1.0, 1.0, 1.0), the file says (0.5, 0.5, 0.5)"
    monkeypatch.setattr(fuzz, "parse_questions", lambda *args: parse_questions(*args)[:2])
    outcome = attempt(workspace, "questions.jsonl", (workspace.root / "questions.jsonl").read_bytes())
    assert outcome == "Wrong: 2 of 6 entries are there"
    monkeypatch.setattr(fuzz, "parse_questions", lambda *args: parse_questions(*args)[::-1])
    outcome = attempt(workspace, "questions.jsonl", (workspace.root / "questions.jsonl").read_bytes())
    assert outcome == "Wrong: entry '3' is not what the file holds"


def test_command_survives_a_worker(monkeypatch, capsys):
    """A case that takes its process down, and with it the rest of the run."""
    context = fuzz.multiprocessing.get_context
    monkeypatch.setattr(fuzz.multiprocessing, "get_context", lambda _: context("fork"))
    use = Workspace.use
    names = []

    def dies(self, name, data):
        names.append(name)
        if len(names) == 2:
            os._exit(3)
        return use(self, name, data)

    monkeypatch.setattr(Workspace, "use", dies)
    outcomes = sorted(fuzz.run(seed=0, cases=3, jobs=1))
    assert [number for number, _, _ in outcomes] == [0, 1, 2]
    assert [outcome in ("fine", "refused") for _, _, outcome in outcomes] == [True, False, True]
    assert outcomes[1][2] == "the process ended with 3"
