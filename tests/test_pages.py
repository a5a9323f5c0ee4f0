"""README.md and docs/walkthrough.md say what the code is and does (see pages.py)."""

import re

import pytest
from pages import COUNT, PAGES, ROOT, lines_of, rewritten

BESIDE = ("image.py", "prompt.py", "anyres.py")
README = PAGES[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages(monkeypatch, path):
    """A page about code that is gone: another number, shape or line count, a link beside its line."""
    monkeypatch.chdir(ROOT)
    page = path.read_text(encoding="utf-8")
    assert page == rewritten(path, page)


@pytest.mark.parametrize("lie", ["ids, the image tokens from", "FLOPs, from what was executed"])
def test_lies_are_noticed(monkeypatch, lie):
    """Blocks and links that are not looked at."""
    monkeypatch.chdir(ROOT)
    page = PAGES[1].read_text(encoding="utf-8")
    changed = page.replace('"class LayerTrace"', '"class NoTrace"') if "FLOPs" in lie else page.replace(lie, "x", 1)
    assert rewritten(PAGES[1], changed) != changed


def test_reading_path():
    """A reading path that is longer than it is said to be, or too long to be read; a room that the map leaves out."""
    path = [f for f in (ROOT / "himap_ref").glob("[!_]*.py") if f.name not in BESIDE]
    lines = {f.name: lines_of(f) for f in path}
    assert sum(lines.values()) <= 970 and max(lines.values()) <= 220
    assert f"eleven files, {sum(lines.values())} lines" in README and len(lines) == 11
    assert sum(lines_of(ROOT / "himap_ref" / name) for name in BESIDE) <= 290
    assert lines_of(ROOT / "himap_ref/checkpoint") <= 540 and len(README.splitlines()) <= 200
    loop = (ROOT / "himap_ref/decoder.py").read_text().split("for i, layer in enumerate(self.layers):")[1]
    assert len(loop.split("hidden, padded")[0].splitlines()) <= 45
    files = (ROOT / "himap_ref").rglob("[!_]*.py")
    rooms = {file.relative_to(ROOT).parts[:2] for file in files}
    assert {"/".join(room) for room in rooms} <= {*COUNT.findall(README)}


def test_python_example(monkeypatch):
    """An example in the README that does not run as written."""
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(import torch.*?)```", README, re.DOTALL)[1]
    scope = {"print": lambda *values: printed.append(values)}
    printed = []
    exec(code, scope)
    assert printed[0][0] == "yellow" and len(printed[0][1]) == 18 and 0 < printed[0][2] < 1
    assert len(scope["again"].traces[0].layers) == 12 and scope["again"].trace.stages == []


def test_own_criterion():
    """The README's criterion of one's own does not work."""
    code = re.search(r"```python\n# mine.py\n(.*?)```", README, re.DOTALL)[1]
    scope = {}
    exec(code, scope)
    from himap_ref import Llava, Stage

    model = Llava.from_pretrained(ROOT / "weights/shapes")
    stages = [Stage(2, 40, scope["peak_text_to_image"])]
    answer = model.generate(ROOT / "weights/shapes/example.png", "What color is the star?", stages)
    assert answer.trace.stages[0].score == "peak_text_to_image" and len(answer.trace.stages[0].kept) == 40


def test_figures_of_the_readme():
    """A figure in the README that RESULTS, the model card or the page about FLOPs does not have."""
    measured = README.split("## What is measured")[1].split("- **Trust**")[0]
    pages = ("RESULTS.md", "weights/shapes/README.md", "docs/flops.md")
    known = " ".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    figures = re.findall(r"(?<![\w.#/-])\d[\d,.]*\d(?![\w/])", re.sub(r"\]\(.*?\)", "", measured))
    rounded = {"0.28": "0.284", "0.34": "0.335", "62": "62.2%", "65": "65.1%"}
    assert len(figures) > 12 and [x for x in figures if rounded.get(x, x) not in known] == []
