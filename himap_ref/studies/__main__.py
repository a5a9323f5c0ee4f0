"""Runs a study by its name: `python -m himap_ref.studies sweep --quick`; without one, lists them."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path

from ..commands import ranks
from ..commands.manners import run_command
from ..errors import HimapError

ROOMS = ("accuracy", "paper", "speed", "questions", "weights")
ALONE = ("speed", "questions", "weights")  # whose studies share nothing out


def studies() -> dict[str, Path]:
    """Name -> file of every module in the rooms that is a command."""
    files = (path for room in ROOMS for path in sorted((Path(__file__).parent / room).glob("*.py")))
    return {path.stem: path for path in files if "\ndef main() " in path.read_text("utf-8")}


def listing(found: dict[str, Path]) -> str:
    lines = ["usage: python -m himap_ref.studies NAME ... (with --help: its options)"]
    for name, path in found.items():
        first = str(ast.get_docstring(ast.parse(path.read_text("utf-8")))).split("\n")[0]
        lines.append(f"  {name:12}{first}")
    return "\n".join(lines)


def main() -> None:
    found = studies()
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(listing(found))
        return
    name = sys.argv.pop(1)
    if name not in found:
        raise HimapError(f"study {name!r} is unknown: expected {', '.join(found)}")
    if found[name].parent.name in ALONE and ranks.size() > 1:
        raise HimapError(f"{name} runs in one process: start it without torchrun")
    sys.argv[0] = f"python -m himap_ref.studies {name}"
    import_module(f"{__package__}.{found[name].parent.name}.{name}").main()


if __name__ == "__main__":
    run_command(main)
