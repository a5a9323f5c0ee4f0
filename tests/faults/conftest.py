"""A whole model to ask, or to damage."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from toys import SMALL_CONFIG, noise, write_json, write_small_model

SAID = re.compile(r"\Aweights   .*\npicture   .*\nmethod    .*\nquestion  .*\n")  # what is asked, said beforehand


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A whole folder of weights: 4 image tokens, 3 decoder layers, a context of 200."""
    write_small_model(folder := tmp_path_factory.mktemp("weights") / "whole")
    write_json(folder / "config.json", SMALL_CONFIG)  # says no more than it must
    noise(40, 30).save(folder.parent / "whole.png")
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture(scope="session")
def whole_next(tmp_path_factory):
    """The same of a LLaVA-NeXT."""
    write_small_model(folder := tmp_path_factory.mktemp("weights") / "next", pinpoints=((28, 56), (56, 28), (56, 56)))
    return folder


@pytest.fixture
def next_folder(whole_next, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(whole_next, tmp_path / "next"))


@pytest.fixture
def usual(whole):
    """Arguments of a question that works, unless later ones change it."""
    return "--weights", whole, "--image", whole.parent / "whole.png", "--prompt", "Why?", "--max-new-tokens", 2


@pytest.fixture
def ask(run, usual):
    """More arguments -> (exit status, standard output, standard error without SAID)."""

    def call(*args):
        status, out, err = run(*usual, *args)
        return status, out, SAID.sub("", err)

    return call


@pytest.fixture
def no_hang():
    """To wait for ever, such as for the other side of a pipe, is one failure and not the end of all tests."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120 + 20 * int(os.environ.get("HIMAP_KILLS", 0)))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
