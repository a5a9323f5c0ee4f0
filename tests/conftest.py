"""Shared fixtures: the golden data of the official code, small random models, and commands."""

import json
import os
import runpy
import shutil
import subprocess
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
from himap_ref.studies.questions.drawing import draw
from himap_ref.studies.questions.scenes import UNSEEN, make_scene

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


@pytest.fixture
def pixels():
    """(2, 3, 20, 20): two random pictures for `tiny_llava`."""
    return torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(3))


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
    return draw(make_scene(UNSEEN + 3861))


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


FORKS = """
import gc, json, os, runpy, sys
import himap_ref.commands.ask  # torch with it, which takes seconds
gc.freeze()  # or a child would copy all of it on its way out
for line in sys.stdin:
    command = json.loads(line)
    if not (child := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
sys.stdin, sys.argv = open(os.devnull), command["argv"]
for number, path in zip((1, 2), command["streams"]):
    if path is None:  # a pipe whose reader has gone away
        read, file = os.pipe()
        os.close(read)
    else:
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, number)
os.chdir(command["cwd"])
exec(command["before"])
(runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module)(sys.argv[0], run_name="__main__")
"""  # and the child ends as any interpreter does


@pytest.fixture(scope="session")
def forks():
    """A process that has everything imported and forks for each command."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    with subprocess.Popen([sys.executable, "-c", FORKS], stdin=-1, stdout=-1, text=True, env=env) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def forked(forks, tmp_path_factory):
    """run.py or a module, and its words -> a process of its own, done. A stream may go to a path, or with None to a
    pipe that nobody reads; `before` is Python code that runs first."""

    def call(file, *words, before="", cwd=ROOT, **streams):
        folder = tmp_path_factory.mktemp("streams")
        streams = {name: folder / name for name in ("stdout", "stderr")} | streams
        argv = [str(ROOT / file) if file == "run.py" else file, *map(str, words)]
        paths = [path and str(path) for path in streams.values()]
        command = {"argv": argv, "streams": paths, "cwd": str(cwd), "before": before}
        print(json.dumps(command), file=forks.stdin, flush=True)
        status = int(forks.stdout.readline())
        texts = [path.read_text() if path and path.parent == folder else "" for path in streams.values()]
        return subprocess.CompletedProcess(argv, status, *texts)

    return call
