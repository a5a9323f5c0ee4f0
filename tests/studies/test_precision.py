"""The precision study: what is compared with what, and whether its figures are those of the rows."""

import pytest
import torch

from himap_ref import HimapError
from himap_ref.studies.accuracy import precision
from himap_ref.studies.accuracy.metrics import wilson
from himap_ref.studies.accuracy.precision import Way, compare, digest, threads, ways_of


def row(kept, answer, correct=1.0, scores="s", logits="l"):
    return {"kept_tokens": kept, "answer": answer, "correct": correct, "scores": scores, "logits": logits}


def test_figures():
    """Stages mixed up, a share of the wrong count, gains taken for losses; questions with errors counted."""
    mine = {
        "a": row([[0, 1, 2, 3], [0, 1]], "x"), "b": row([[0, 1, 2, 9], [2, 9]], "y", scores="t"),
        "c": row([[4, 5, 6, 7], [6, 7]], "z", 0.0, logits="m"), "d": {"error": "long"}, "e": row([[1], [1]], "x"),
    }  # fmt: skip
    others = {
        "a": row([[0, 1, 2, 3], [0, 1]], "x"), "b": row([[0, 1, 2, 3], [1, 2]], "x", 0.0),
        "c": row([[0, 1, 6, 7], [6, 7]], "y"), "d": row([[1], [1]], "x"), "e": {"error": "no picture"},
    }  # fmt: skip
    got = compare(mine, others)
    assert (got["n"], got["left_out"]) == (3, 2)
    assert got["kept_differ"] == pytest.approx([(0 + 1 / 4 + 2 / 4) / 3, (0 + 1 / 2 + 0) / 3])
    same = [got[f"same_{name}"] for name in ("kept_tokens", "answer", "scores", "logits")]
    assert same == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3]) and (got["lost"], got["won"]) == (1, 1)
    assert (got["accuracy"], got["interval"]) == (pytest.approx(2 / 3), wilson(2, 3))
    assert compare(others, mine)["lost"] == 1 and compare({"a": mine["b"]}, {"a": others["b"]})["won"] == 1
    with pytest.raises(HimapError, match="no question could be asked"):
        compare({"d": mine["d"]}, {"d": others["d"]})
    for kept, differ in (([], []), ([[]], [0.0])):  # nothing is ranked; a stage that keeps nothing
        assert compare({"a": row(kept, "x")}, {"a": row(kept, "x")})["kept_differ"] == differ


def test_ways():
    """Half precision compared with itself; a way that is compared with another dtype's; a GPU's threads set."""
    ways, plain = ways_of(("float32", "float16"), 64, "cpu"), Way("float32", 1, 64)
    assert ways == {
        plain: plain, Way("float32", 2, 64): plain, Way("float32", 1, 1): plain, Way("float16", 1, 64): plain,
        Way("float16", 2, 64): Way("float16", 1, 64), Way("float16", 1, 1): Way("float16", 1, 64),
    }  # fmt: skip
    assert [way.threads for way in ways_of(("float32", "float16"), 64, "cuda:1")] == [1] * 4
    assert ways_of(("float32", "float16"), 1, "cuda")[Way("float16", 1, 1)] == Way("float32", 1, 1)


def test_digest():
    """Two numbers that print alike taken for one, or stages that run together."""
    a = torch.tensor([0.1, 0.2, 0.3])
    assert digest([a]) == digest([a.clone()]) != digest([a.nextafter(torch.tensor(1.0))])
    assert digest([a]) != digest([a[:1], a[1:]]) and digest([torch.zeros(1)]) != digest([-torch.zeros(1)])


def test_command(study, small, tmp_path, monkeypatch):
    """Files that another run would not write again; a run on another number of threads than it says, or for ever."""
    seen, before, answer, written = [], torch.get_num_threads(), precision.answer, []
    monkeypatch.setattr(precision, "answer", lambda *args: seen.append(torch.get_num_threads()) or answer(*args))
    usual = "--weights", small, "--limit", 3, "--max-new-tokens", 4, "--methods", "none", "himap", "--dtype", "bfloat16"
    for name in ("a", "b"):
        _, out, _ = study(precision, *usual, "--out", tmp_path / name)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.jsonl")})
    assert written[0] == written[1] and len(written[0]) == 12
    assert {1, 2} == set(seen) and torch.get_num_threads() == before
    table = out.split("\n\n")[0].splitlines()
    assert len(table) == 2 + 12 and sum("bfloat16" in line.split("|")[2] for line in table) == 6
    with threads(before + 1):
        pass
    assert torch.get_num_threads() == before
