"""Options that commands share: which weights, and where they run."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from ..assistant import Llava
from ..checkpoint.files import find_device, find_folder
from ..prompt import TEMPLATES

EMBEDDED = Path(__file__).parents[2] / "weights" / "shapes"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", default=EMBEDDED, help="folder, hub id, llava-1.5-7b, llava-1.5-13b; "
                        "default: the embedded model")  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="default: float32, bfloat16 for other --weights")  # fmt: skip
    parser.add_argument("--pad", action="store_true", help="pad pictures to a square instead of cropping them")
    parser.add_argument("--template", help="vicuna_v1, llava-hf, shapes, or text with <image> and {question}")


def is_embedded(weights: str | Path) -> bool:
    """Whether these are the repository's own."""
    return os.path.realpath(weights) == os.path.realpath(EMBEDDED)


def load_model(args: argparse.Namespace) -> tuple[Llava, Path]:
    """The model that `add_model_arguments` (or arguments of the same names) ask for, and its folder."""
    dtype = getattr(torch, args.dtype or ("float32" if is_embedded(args.weights) else "bfloat16"))
    device = find_device(args.device, dtype)  # before gigabytes are downloaded
    folder = find_folder(args.weights, args.revision)
    model = Llava.from_pretrained(folder, dtype, device)
    if args.pad:
        model.image_processor = replace(model.image_processor, do_pad=True)
    if args.template is not None:
        model.template = TEMPLATES.get(args.template, args.template)
    return model, folder


def revision_of(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache holds (`.../snapshots/COMMIT`); None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None
