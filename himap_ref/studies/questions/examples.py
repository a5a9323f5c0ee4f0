"""`Example`: one thing to ask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ...assistant.picture import load_image
from ...errors import HimapError
from .drawing import draw
from .scenes import Scene


@dataclass(frozen=True)
class Example:
    """kind: the group it is reported in, "" for none; top5: the official file's `top5_res`."""

    id: str
    question: str
    answers: tuple[str, ...]  # empty: nobody has said what is right
    kind: str
    source: Path | Scene | None  # None: no picture, asked as text
    top5: tuple[int, ...] = ()
    number: int = 1  # among the questions under this id, of which TextVQA has several
    copies: int = 1  # entries of the file that say just this: asked once
    targets: tuple[int, ...] = ()  # of a scene: the patches that show what must be seen to answer
    size: int = 0  # of a scene: how many patches the one thing asked for covers; 0: several things, or none
    place: str = ""  # of a scene: where that thing is
    problem: str = ""  # why it cannot be asked at all, in the same words for all of a kind

    @property
    def key(self) -> str:
        """Under which its result is recorded: the id, from the second question under it on with its number."""
        return self.id if self.number == 1 else f"{self.id} #{self.number}"

    def picture(self) -> Image.Image:
        """RGB; raises HimapError if there is none, or its file is missing or broken, as nothing has read it before."""
        if self.source is None:
            raise HimapError(self.problem or "the question has no picture")
        return draw(self.source) if isinstance(self.source, Scene) else load_image(self.source)
