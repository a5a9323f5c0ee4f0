"""Imports run one way: reading path <- door, methods, kernels, parallel <- assistant <- commands <- studies, demo,
run.py; among the studies questions <- weights, common <- accuracy <- paper, speed."""

import ast
import re
import sys
from pathlib import Path

import pytest

from himap_ref.errors import HimapError
from himap_ref.studies.__main__ import main, studies

ROOT = Path(__file__).parents[1]
CORE = {"", "checkpoint", "methods", "kernels", "assistant", "commands"}
QUESTIONS, WEIGHTS, COMMON, ACCURACY = (f"studies.{room}" for room in ("questions", "weights", "common", "accuracy"))
MAY = {  # room: the rooms that it may import from, beside itself
    "": set(), "checkpoint": {""}, "methods": {""}, "kernels": {""}, "parallel": {""},
    "assistant": {"", "checkpoint", "methods", "kernels", "parallel"},
    "commands": {"", "checkpoint", "methods", "assistant"},
    "demo": {"", "methods", "assistant", "commands"}, "studies": {"", "commands"},
    QUESTIONS: CORE, WEIGHTS: CORE | {QUESTIONS}, COMMON: CORE | {QUESTIONS}, ACCURACY: CORE | {QUESTIONS, COMMON},
    "studies.paper": CORE | {QUESTIONS, COMMON, ACCURACY}, "studies.speed": CORE | {WEIGHTS, COMMON, ACCURACY},
}  # fmt: skip
FILES = sorted(path.relative_to(ROOT / "himap_ref") for path in (ROOT / "himap_ref").rglob("*.py"))


def imported(path: Path, package: tuple[str, ...]) -> set[str]:
    """Rooms that a file imports from ("" is the reading path), wherever in it the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            names = [(*base, *(node.module or "").split("."), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        for name in ([part for part in name if part] for name in names):
            if name[0] == "himap_ref" and len(name) > 1:
                rooms.add(next((room for room in (".".join(name[1:3]), name[1]) if room in MAY), ""))
    return rooms


@pytest.mark.parametrize("file", FILES, ids=str)
def test_one_way(file):
    """The model that imports what reads files, or a command that needs the studies: nothing that can be read alone."""
    room = ".".join(file.parent.parts)
    rooms = imported(ROOT / "himap_ref" / file, ("himap_ref", *file.parent.parts))
    may = MAY[room] | {room} | {"__init__.py": {"assistant"}, "__main__.py": {"commands"}}.get(str(file), set())
    assert rooms <= may


def test_run_needs_no_study():
    assert imported(ROOT / "run.py", ()) == {"commands"}


def test_every_room_is_installed():
    """A room that a clone has and an installed package lacks."""
    listed = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    rooms = {".".join(("himap_ref", *file.parent.parts)) for file in FILES}
    assert {*re.findall(r'"(\S+?)"', listed)} == rooms | {"himap_ref.weights.shapes"}


def test_studies_by_name(monkeypatch, capsys):
    """A study that README names and nobody finds; a name of none that ends in a trace; options that do not arrive."""
    table = re.search(r"\| `python -m himap_ref.studies`.*?\n\n", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)[1:]
    named = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    assert named == {*studies()}
    for arguments in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["studies", *arguments])
        main()
        assert {*re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE)} == named
    monkeypatch.setattr(sys, "argv", ["studies", "sweeep"])
    with pytest.raises(HimapError, match="study 'sweeep' is unknown: expected .*sweep"):
        main()
    monkeypatch.setattr(sys, "argv", ["studies", "literature", "--image", "0"])
    with pytest.raises(HimapError, match="--image"):
        main()
