"""Methods by name: HiMAP beside its baselines, and schedules as text ("2:0.5:text_to_image,8:72:image_to_image").

A baseline in the decoder is a score function like HiMAP's own two (scores.py), one before it a reducer (reducers.py):
all run through the same loop and are counted the same way.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from ..anyres import Size, most_image_tokens, num_image_tokens
from ..config import LlavaConfig
from ..errors import HimapError
from ..model import LlavaModel
from ..pruning import HIMAP, HIMAP_CAPTION, METHODS, LayerView, Score, Stage
from .peers import DivPrune, Downsample, VisionZip
from .plan import tokens_per_layer
from .reducers import AveragePool, ClsAttention, ImageReducer, check_grid
from .scores import SCORES, last_to_image, random


def _source(score: Score | None) -> str | None:
    """A hash of the file that a function of one's own is written in; None for those of this package."""
    module = inspect.getmodule(getattr(score, "func", score))
    if module is None or module.__name__.startswith(__package__.split(".")[0]):
        return None
    try:
        return sha256(inspect.getsource(module).encode()).hexdigest()[:8]
    except (OSError, TypeError):  # built in, or typed at a prompt
        return "unknown"


@dataclass(frozen=True)
class Method:
    """Stages in the decoder, or a reducer before it, or neither (vanilla). name: the text it was made from."""

    name: str
    stages: tuple[Stage, ...] = ()
    reducer: ImageReducer | None = None

    def num_image_tokens(self, config: LlavaConfig, image: Size | None = None) -> int:
        """Those of a picture that enter the decoder; without its size the most that a picture has (LLaVA-NeXT)."""
        if self.reducer:
            check_grid(config, f"method {self.name!r}", "take stages")
            return self.reducer.num_image_tokens(config)
        return num_image_tokens(image, config) if image else most_image_tokens(config)

    def settings(self) -> dict:
        """By which a results file recognises it: a name, or a function of one's own, may mean another one tomorrow."""
        stages = [[stage.layer, stage.keep, stage.name, _source(stage.score)] for stage in self.stages]
        return {"method": self.name, "stages": stages, "reducer": repr(self.reducer) if self.reducer else None}

    def tokens_per_layer(self, config: LlavaConfig, pictures: int = 1) -> list[int]:
        """Image tokens in each layer, as papers count; raises HimapError if the stages do not fit the model."""
        N = pictures * self.num_image_tokens(config)
        return tokens_per_layer(self.stages, N, config.text_config.num_hidden_layers)


FASTV = (Stage(2, 0.5, last_to_image),)

# name -> stages for a decoder of so many layers; the decoder, too, takes these names for stages
METHODS.update({
    "himap": lambda layers: HIMAP,  # or what the weights recommend for themselves: `LlavaModel.himap`
    "himap-paper": lambda layers: HIMAP,
    "himap-caption": lambda layers: HIMAP_CAPTION,
    "fastv": lambda layers: FASTV,
    "vtw": lambda layers: (Stage(15 * layers // 32, 0, None),),  # arXiv 2405.05803: layer 15 of 32
    # arXiv 2410.17247: layers 8, 16, 24 of 32, half of the tokens each time. Its code ranks by layer K's own attention
    # and renumbers the positions of what is left; here, as for every method, K-1's, and positions stay.
    "pyramiddrop": lambda layers: tuple(
        Stage(quarter * layers // 4, 0.5, last_to_image) for quarter in (1, 2, 3)
    ),
    "random": lambda layers: (Stage(2, 0.5, random),),
    "none": lambda layers: (),
})  # fmt: skip
REDUCERS: dict[str, Callable[[int], ImageReducer]] = {
    "cls": ClsAttention, "pool": AveragePool, "divprune": DivPrune, "visionzip": VisionZip, "down": Downsample,
}  # fmt: skip


def parse_method(text: str, model: LlavaModel) -> Method:
    """A name of `METHODS`, one of `REDUCERS` with its number (cls:TOKENS, pool:SIDE, ...), or stages as text.

    "himap" is the schedule that the weights recommend for themselves (himap.json), if they do; "random7" is chance with
    seed 7. Raises HimapError that quotes what is at fault.
    """
    method = _parse_method(text, model)
    try:
        method.tokens_per_layer(model.config)
    except HimapError as error:
        if text not in METHODS:
            raise
        fit = ", ".join(name for name in METHODS if name != text and _fits(name, model))
        raise HimapError(f"method {text!r} does not fit this model ({error}): choose {fit} or own stages") from None
    return method


def _fits(name: str, model: LlavaModel) -> bool:
    try:
        return bool(_parse_method(name, model).tokens_per_layer(model.config))
    except HimapError:
        return False


def _parse_method(text: str, model: LlavaModel) -> Method:
    kind, _, number = text.partition(":")
    if kind in REDUCERS:
        if not re.fullmatch(r"\d{1,9}", number):
            raise HimapError(f"method {text!r}: expected {kind}:NUMBER, such as {kind}:9")
        return Method(text, reducer=REDUCERS[kind](int(number)))
    if text == "himap":
        return Method(text, tuple(model.himap))
    if re.fullmatch(r"random\d{1,99}", text):
        return Method(text, (Stage(2, 0.5, _find_score(text, trusted=False)),))
    if text in METHODS:
        return Method(text, tuple(METHODS[text](model.config.text_config.num_hidden_layers)))
    if ":" not in text:
        before = "divprune:TOKENS, visionzip:TOKENS, down:SIDE, cls:TOKENS, pool:SIDE"
        raise HimapError(f"method {text!r} is unknown: expected {', '.join(METHODS)}, {before} or stages")
    return Method(text, parse_stages(text))


def parse_stages(text: str, trusted: bool = True) -> tuple[Stage, ...]:
    """LAYER:KEEP:SCORE, comma-separated, to stages; a keep with a point is a share, without one a count.

    A score is a name of `SCORES`, random7 (seed 7), none (with keep 0: the whole picture goes) or, if `trusted` (typed
    by the user, not read from a file), `module:function`. Raises HimapError that quotes the stage at fault.
    """
    if not text.strip():
        raise HimapError("stages: none are given: expected LAYER:KEEP:SCORE,...; to prune nothing: --method none")
    stages = []
    for part in text.split(","):
        try:
            where, left, score = part.split(":", 2)
            layer, keep = int(where), float(left) if "." in left else int(left)
        except ValueError:
            raise HimapError(f"stage {part!r}: expected LAYER:KEEP:SCORE, such as 2:0.5:text_to_image") from None
        stages.append(Stage(layer, keep, _find_score(score.strip(), trusted)))
    return tuple(stages)


def _find_score(name: str, trusted: bool) -> Score | None:
    if name == "none":
        return None
    if name in SCORES:
        return SCORES[name]
    if seeded := re.fullmatch(r"random(\d{1,99})", name):
        return partial(random, seed=int(seeded[1]))
    if not (trusted and ":" in name):
        raise HimapError(f"score {name!r} is unknown: expected {', '.join(SCORES)} or module:function")
    return _own_score(name)


def _own_score(name: str) -> Score:
    """module:function, as the user typed it."""
    module, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # not before: libraries try imports that would be found there, too
        sys.path.append(here)
    try:
        score = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise HimapError(f"score {name!r} cannot be imported ({type(error).__name__}: {error})") from error
    return tell_errors(name, score) if callable(score) else score  # `Stage` says what it is


def tell_errors(name: str, score: Score) -> Score:
    """Somebody's own score; whatever goes wrong in it is told in one line, with its place."""

    @wraps(score)
    def told(view: LayerView) -> Tensor:
        try:
            return score(view)
        except (HimapError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[:2][-1]  # behind this function: the user's own
            place = f"{Path(at.filename).name}, line {at.lineno}"
            raise HimapError(f"score {name!r} failed at {place} ({type(error).__name__}: {error})") from error

    return told
