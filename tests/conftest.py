"""Shared fixtures: the golden data of the official code, small random models, and commands."""

import json
import os
import runpy
import shutil
import sys
from dataclasses import fields
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait take minutes on a busy machine

import pytest
import torch
from safetensors.torch import load_file
from toys import TINY_CONFIG, random_llava, random_weights, tensors_of, write_folder

from himap_ref import LlamaDecoder, Llava, LlavaConfig, TextConfig, VisionConfig
from himap_ref.checkpoint.config import read_config
from himap_ref.commands.manners import run_command
from himap_ref.studies.drawing import draw
from himap_ref.studies.scenes import UNSEEN, make_scene

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


def tiny_text_config(**changes):
    values = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 5, "num_attention_heads": 4,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return TextConfig(**values | changes)


@pytest.fixture
def tiny_decoder():
    """Factory: changes to the text config -> a random fp32 decoder."""
    return lambda seed=0, **changes: random_weights(LlamaDecoder(tiny_text_config(**changes)), seed)


@pytest.fixture
def tiny_llava():
    """Factory: changes to the text and vision configs and to the config around them -> a random fp32 LLaVA."""

    def build(text=None, vision=None, seed=0, **changes):
        values = {
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 3,
            "image_size": 20, "patch_size": 5,
        }  # fmt: skip
        vision_config = VisionConfig(**values | (vision or {}))
        config = LlavaConfig(vision_config, tiny_text_config(**text or {}), image_token_index=96, **changes)
        return random_llava(config, seed)

    return build


@pytest.fixture
def model():
    """Of TINY_CONFIG."""
    return random_llava(read_config(TINY_CONFIG))


@pytest.fixture
def folder(tmp_path, model):
    """That model's, to damage."""
    return write_folder(tmp_path / "model", tensors_of(model))


@pytest.fixture
def embeddings():
    """Factory: (B, n, d) random prompt."""
    return lambda B, n, d=32, seed=1: torch.randn(B, n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def shapes():
    """The embedded model."""
    return Llava.from_pretrained(ROOT / "weights" / "shapes")


@pytest.fixture
def shapes_folder(tmp_path):
    """A copy of its folder, to change."""
    copy = shutil.copytree(ROOT / "weights" / "shapes", tmp_path / "shapes", ignore=shutil.ignore_patterns("results"))
    return Path(copy)


@pytest.fixture(scope="session")
def scene_picture():
    """A drawn scene that training never saw."""
    return draw(make_scene(UNSEEN + 10))


@pytest.fixture(scope="session")
def official():
    """The decoder whose results under the official code are recorded in golden/."""
    data = json.loads((GOLDEN / "model.config.json").read_text())
    config = TextConfig(**{field.name: data[field.name] for field in fields(TextConfig) if field.name in data})
    decoder = LlamaDecoder(config)
    weights = load_file(GOLDEN / "model.safetensors")
    decoder.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
    return decoder.requires_grad_(False).eval()


@pytest.fixture
def command(monkeypatch, capsys):
    """A command's function and its words -> (exit status, standard output, standard error)."""

    def call(main, *words):
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def study(command):
    """A study's module and its options -> the same, as from a shell, but without seconds for torch to load."""
    return lambda module, *options: command(lambda: run_command(module.main), module.__name__, *options)


@pytest.fixture
def run(command):
    """Arguments of run.py -> the same."""
    return lambda *args: command(lambda: runpy.run_path(str(ROOT / "run.py"), run_name="__main__"), "run.py", *args)
