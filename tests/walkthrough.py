"""Runs docs/walkthrough.md: its Python blocks in order, their output against the text blocks; links against the code.

    python tests/walkthrough.py [--write]
"""

import contextlib
import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "walkthrough.md"
BLOCK = re.compile(r"```python\n(.*?)```\n```text\n(.*?)```", re.DOTALL)
LINK = re.compile(r'\((\.\./[\w/.]+\.py)(?:#L\d+)? "([^"]+)"\)')  # the title is what stands in that line


def rewritten(page: str) -> str:
    """The page with what its blocks print today, and its links at the lines that hold their titles."""
    scope: dict = {}

    def run(block: re.Match) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(block[1], scope)
        return f"```python\n{block[1]}```\n```text\n{printed.getvalue()}```"

    def point(link: re.Match) -> str:
        lines = (PAGE.parent / link[1]).read_text(encoding="utf-8").splitlines()
        return f'({link[1]}#L{next(i for i, line in enumerate(lines, 1) if link[2] in line)} "{link[2]}")'

    return LINK.sub(point, BLOCK.sub(run, page))


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    new = rewritten(page)
    if "--write" in sys.argv:
        PAGE.write_text(new, encoding="utf-8")
    elif new != page:
        sys.exit(f"{PAGE.name} is not what the code does today: python tests/walkthrough.py --write")
