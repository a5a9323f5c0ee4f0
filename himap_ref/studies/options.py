"""Options that the studies share: which weights, where they run, and how a results file names them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from ..model import Llava
from ..prompt import TEMPLATES
from ..weights import find_device, find_folder
from .records import fingerprint

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


def revision_of(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache holds (`.../snapshots/COMMIT`); None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def load_model(args: argparse.Namespace) -> tuple[Llava, dict]:
    """The model, and the settings that a results file records of it."""
    find_device(args.device)  # before gigabytes are downloaded
    folder = find_folder(args.weights, args.revision)
    embedded = folder.resolve() == EMBEDDED.resolve()
    dtype = args.dtype or ("float32" if embedded else "bfloat16")
    model = Llava.from_pretrained(folder, getattr(torch, dtype), args.device)
    if args.pad:
        model.image_processor = replace(model.image_processor, do_pad=True)
    if args.template is not None:
        model.template = TEMPLATES.get(args.template, args.template)
    return model, {
        "weights": fingerprint(folder), "revision": revision_of(folder), "dtype": dtype,
        "device": torch.device(args.device).type, "template": model.template, "pad": args.pad,
    }  # fmt: skip
