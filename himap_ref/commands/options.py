"""Options that commands share: which weights, and where they run."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from ..assistant import Llava
from ..assistant.chat_template import read_template
from ..assistant.device import find_device
from ..checkpoint.files import find_folder
from ..errors import HimapError
from ..prompt import TEMPLATES, split
from . import ranks
from .manners import tell

# In a clone beside the package, in a wheel within it (see pyproject.toml).
PLACES = [Path(__file__).parents[up] / "weights" / "shapes" for up in (2, 1)]
EMBEDDED = next((place for place in PLACES if place.is_dir()), PLACES[0])


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", default=EMBEDDED, help="folder, hub id, llava-1.5-7b, llava-1.5-13b; "
                        "default: the embedded model")  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument("--device", default=best_device(), help="cuda, cuda:1, mps, cpu; default here: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="default: float32, bfloat16 for other --weights")  # fmt: skip
    parser.add_argument("--pad", action="store_true", help="pad pictures to a square instead of cropping them")
    parser.add_argument("--template", help=f"{', '.join(TEMPLATES)}, or text with <image> and {{question}}; default: "
                        "the model's")  # fmt: skip


def best_device() -> str:
    """What there is to compute on."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def is_embedded(weights: str | Path) -> bool:
    """Whether these are the repository's own."""
    return os.path.realpath(weights) == os.path.realpath(EMBEDDED)


def load_model(args: argparse.Namespace, together: bool = False) -> tuple[Llava, Path]:
    """The model that `add_model_arguments` (or arguments of the same names) ask for, and its folder.

    together: torchrun's processes hold one model, each a part of it, rather than one each.
    """
    template = TEMPLATES.get(args.template, args.template)
    if template is not None:
        split(template)
    dtype = getattr(torch, args.dtype or ("float32" if is_embedded(args.weights) else "bfloat16"))
    device = find_device(ranks.own_device(args.device), dtype)  # as `split`: before gigabytes are downloaded
    folder = find_folder(args.weights, args.revision)
    mesh = ranks.mesh(device) if together else None
    model = Llava.from_pretrained(folder, dtype, device, mesh=mesh)
    if args.pad and model.config.image_grid_pinpoints:
        raise HimapError("--pad: LLaVA-NeXT looks at whole pictures as it is: leave it out")
    if args.pad:
        model.image_processor = replace(model.image_processor, do_pad=True)
    if template is not None:
        model.template = template
    elif "template" not in model.settings and read_template(folder) == (None, True):
        names = ", ".join(TEMPLATES)
        tell(f"note: the chat template in {folder} is of no known family; used is vicuna_v1, unless --template names "
             f"another ({names}) or is a text with <image> and {{question}}")  # fmt: skip
    return model, folder


def note_roles(model: Llava, question: str) -> None:
    """A word on standard error if a question brings along what the template puts around it; it is asked as it is."""
    text = " ".join((*TEMPLATES.values(), model.template))
    signs = dict.fromkeys(re.findall(r"<\|.*?\|>|\[/?[A-Z]+\]|\b[A-Z]+:|<image>", text))
    if found := [sign for sign in signs if sign.lower() in question.lower()]:
        tell(f"note: the question holds {', '.join(found)} and is asked so, but the template puts the like around it: "
             "better give the question alone")  # fmt: skip


def revision_of(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache holds (`.../snapshots/COMMIT`); None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None
