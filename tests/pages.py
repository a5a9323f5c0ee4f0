"""Pages that cannot lie for long: README.md and docs/walkthrough.md are rewritten from the code and compared.

    python tests/pages.py [--write]

Python blocks with a text block below are run in order, and print what stands there. A link into the code has as its
title what stands in the line that it points to. The map of README has lines as files have them.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "walkthrough.md"]
BLOCK = re.compile(r"```python\n(.*?)```\n```text\n(.*?)```", re.DOTALL)
LINK = re.compile(r'\(([\w/.]+\.py)(?:#L\d+)? "([^"]+)"\)')
COUNT = re.compile(r"\]\(([\w/.]+)\) \| \d+ \|")  # of a file or, of a folder, of all Python files below it


def rewritten(path: Path, page: str) -> str:
    """The page as it would stand at this path, if it were written today."""
    scope: dict = {}

    def run(block: re.Match) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(block[1], scope)
        return f"```python\n{block[1]}```\n```text\n{printed.getvalue()}```"

    def point(link: re.Match) -> str:
        lines = (path.parent / link[1]).read_text(encoding="utf-8").splitlines()
        places = [i for i, line in enumerate(lines, 1) if link[2] in line]
        return f'({link[1]}#L{places[0] if len(places) == 1 else f"{len(places)}-lines"} "{link[2]}")'

    def count(entry: re.Match) -> str:
        return f"]({entry[1]}) | {lines_of(path.parent / entry[1])} |"

    return COUNT.sub(count, LINK.sub(point, BLOCK.sub(run, page)))


def lines_of(place: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in ([place] if place.is_file() else place.rglob("*.py")))


if __name__ == "__main__":
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        new = rewritten(path, page)
        if "--write" in sys.argv:
            path.write_text(new, encoding="utf-8")
        elif new != page:
            sys.exit(f"{path.name} is not what the code does today: python tests/pages.py --write")
