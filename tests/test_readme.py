"""The README's map, links and commands are true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = {  # link text: what stands in the line that it points to
    "`text_to_image`": "def text_to_image",
    "`image_to_image`": "def image_to_image",
    "The loop": "for i, layer in enumerate(self.layers)",
    "score": "stage.evaluate(view)",
    "keep the highest": "def keep_highest",
    "stop here": "take(t, going)",
    "this example": "tokens            bos",
    "one rule": "def causal_mask",
    "layer's cache": "class LayerCache",
    "`LayerView`": "class LayerView",
    "`ImageReducer`": "class ImageReducer",
    "`LlamaDecoder.forward`": "    def forward(",
}


def test_line_counts():
    """A map that stopped being true when the code grew."""
    told = {path: int(lines) for path, lines in re.findall(r"\]\((\S+?)\) \| (\d+) \|", README)}
    files = {path: list((ROOT / path).glob("*.py")) or [ROOT / path] for path in told}  # of a folder, all in it
    assert told == {path: sum(len(f.read_text().splitlines()) for f in files[path]) for path in told}
    core = {path.parent if path.parent.name != "himap_ref" else path for path in (ROOT / "himap_ref").rglob("[!_]*.py")}
    assert {str(path.relative_to(ROOT)) for path in core} - {"himap_ref/studies"} <= set(told)


@pytest.mark.parametrize("text, expected", LINKS.items(), ids=LINKS)
def test_links_into_the_code(text, expected):
    """A link that points beside what it names after an edit above it."""
    path, line = re.search(rf"\[{re.escape(text)}\]\((\S+?)#L(\d+)\)", README).groups()
    assert expected in (ROOT / path).read_text().splitlines()[int(line) - 1]


def test_reading_path():
    """A reading path that is longer than it is said to be, or too long to be read."""
    path = [f for f in (ROOT / "himap_ref").glob("[!_]*.py") if f.name not in ("image.py", "prompt.py")]
    lines = {f.name: len(f.read_text().splitlines()) for f in path}
    assert sum(lines.values()) <= 950 and max(lines.values()) <= 220 and "eleven files, 949 lines" in README
    loop = (ROOT / "himap_ref/decoder.py").read_text().split("for i, layer in enumerate(self.layers):")[1]
    assert len(loop.split("hidden, padded")[0].splitlines()) <= 45


def test_python_example():
    """An example in the README that does not run as written."""
    code = re.search(r"```python\n(import torch.*?)```", README, re.DOTALL)[1]
    more = re.search(r"```python\n(again =.*?)```", README, re.DOTALL)[1]
    printed, scope = [], {"print": lambda *values: printed.append(values)}
    exec(code, scope)
    assert printed[0][0] == "yellow" and len(printed[0][1]) == 10 and 0 < printed[0][2] < 1
    exec(more, scope)
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
