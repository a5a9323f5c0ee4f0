"""The machine and the hub: a full disk, closed streams, too little memory, Ctrl-C; a download that does not come."""

import io
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from toys import make_tokenizer, noise

from himap_ref import HimapError, Llava
from himap_ref.assistant import llava
from himap_ref.checkpoint.files import find_folder
from himap_ref.commands.files import check_writable, write_text, write_whole
from himap_ref.commands.manners import run_command
from himap_ref.commands.options import revision_of
from himap_ref.studies.accuracy import evaluate
from himap_ref.studies.common.records import Records
from himap_ref.studies.weights.train import save_state

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("no_hang")


def python(*words, **options):
    """Python in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    return subprocess.run([sys.executable, *words], check=False, capture_output=True, text=True, env=env, **options)


# ---------------------------------------------------------------- disk and streams


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_disk_full(forked, usual, stream):
    """A traceback from the interpreter on its way out, when the little that was printed is really written; a status of
    1, as after a fault of ours, or 120."""
    done = forked("run.py", *usual, **{stream: Path("/dev/full")})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert stream == "stderr" or done.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_streams(forked, usual, closed):
    """A traceback where a service has closed one of them (Python then has None), or notes among the answers."""
    close = f"os.close({('stdout', 'stderr').index(closed) + 1}); sys.{closed} = sys.__{closed}__ = None"
    done = forked("run.py", *usual, before=close)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert ("FLOPs" in done.stderr, "FLOPs" in done.stdout) == (closed == "stdout", False)


def test_terminal_that_lacks_a_letter(ask, monkeypatch):
    """A traceback in the middle of an answer, or of a study's table."""
    monkeypatch.setattr(llava.Stream, "__call__", lambda stream, token: stream.on_text("\u732b"))
    monkeypatch.setattr(llava.Stream, "finish", lambda stream: None)
    monkeypatch.setattr(sys, "stdout", terminal := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert ask()[0] == 0
    run_command(lambda: print("d\xb2"))
    assert terminal.buffer.getvalue() == b"\\u732b\\u732b\nd\\xb2\n"


def test_printing_into_a_string():
    """A study that only works where standard output is a real file."""
    with redirect_stdout(io.StringIO()) as printed:
        run_command(lambda: print("answer"))
    assert printed.getvalue() == "answer\n"


@pytest.mark.parametrize("there_before", [True, False])
def test_disk_full_for_the_picture(forked, usual, tmp_path, there_before):
    """Half a picture, or the one that was there lost. A limit on a file's size, which root has to heed, too."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    picture, before = tmp_path / "x.png", b"old" if there_before else None
    if there_before:
        picture.write_bytes(before)
    done = forked("run.py", *usual, "--show", picture, before=limit)
    message = f"error: {picture}: cannot be written (File too large): choose another file"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, message)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([before] if there_before else [])


@pytest.mark.parametrize("there_before", [True, False])
def test_disk_full_for_a_table(tmp_path, there_before):
    """The same of what the studies write when they are done."""
    if there_before:
        (tmp_path / "table.json").write_text("old")

    def half(path):
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(HimapError, match=r"table.json: cannot be written \(No space left on device\): choose another"):
        write_whole(tmp_path / "table.json", half)
    assert [path.read_text() for path in tmp_path.iterdir()] == (["old"] if there_before else [])


def test_disk_full_for_a_training(tmp_path):
    """torch's traceback, of a kind of its own, and the state of hours ago lost."""
    (tmp_path / "state.pt").write_text("old")
    (tmp_path / "state.new").symlink_to("/dev/full")
    model = torch.nn.Linear(100, 100)
    model.tokenizer = make_tokenizer("byte-level")
    with pytest.raises(HimapError, match=r"state.pt: cannot be written \(.+\)"):
        save_state(tmp_path / "state.pt", "align", 1, model, [])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("state.pt", "old")]


def test_results_do_not_follow_links(ask, tmp_path):
    """A link that an archive brought along: somebody's file written to under the name of our results."""
    for name in ("evaluate.jsonl", "table.json", "x.png", ".new-x.png"):
        (tmp_path / name).symlink_to(tmp_path / "profile")
    with pytest.raises(HimapError, match="evaluate.jsonl: cannot be written"):
        Records(tmp_path / "evaluate.jsonl", {})
    write_text(tmp_path / "table.json", "{}")
    check_writable(tmp_path / "x.png")
    assert ask("--show", tmp_path / "x.png")[0] == 0
    assert not (tmp_path / "profile").exists()
    assert not (tmp_path / "table.json").is_symlink() and Image.open(tmp_path / "x.png").format == "PNG"


def test_the_current_folder_runs_nothing(tmp_path):
    """`python run.py --weights .` in somebody's folder: Pillow tries to import what it can do without, and finds it."""
    score = "def score(view): return view.hidden[:, view.image, 0]"
    for name in ("numpy", "olefile", "defusedxml", "cffi", "hf_xet", "brotli", "mine"):
        (tmp_path / f"{name}.py").write_text(f"open('ran-{name}', 'w')\n{score}")
    assert python(ROOT / "run.py", "--stages", "2:9:mine:score", cwd=tmp_path).returncode == 0
    assert [path.name for path in tmp_path.glob("ran-*")] == ["ran-mine"]  # what was typed, and no more


# ---------------------------------------------------------------- memory and bugs of ours


def test_memory_is_bounded_by_the_file(forked, usual, tmp_path):
    """A chunk that says of itself that it has 4 GB: as much memory asked for."""
    noise(64, 64).save(path := tmp_path / "x.png")
    data = path.read_bytes()
    path.write_bytes(data[:33] + b"\xff\xff\xff\xffIDAT" + data[41:])
    limit = (
        "import resource; pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30,) * 2)"
    )
    done = forked("run.py", *usual, "--image", path, before=limit)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.99 TiB."), MemoryError(), None,
])  # fmt: skip
def test_out_of_memory(ask, monkeypatch, error):
    """Of a GPU (as its error stands in torch), of Python, and of the CPU: for that one 4 EiB are really asked for."""

    def embed_image(*_):
        if error is not None:
            raise error
        torch.empty(2**60)

    monkeypatch.setattr(Llava, "embed_image", embed_image)
    line = "error: out of memory: fewer questions at a time, --dtype bfloat16 or a smaller model need less\n"
    assert ask() == (2, "", line)


def test_other_errors_keep_their_traceback(ask, monkeypatch):
    """A bug of ours told as if it were the user's."""
    monkeypatch.setattr(Llava, "embed_image", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError):
        ask()


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("where, call", [
    ("model.LlavaModel.embed_image", 1), ("assistant.llava.load_weights", 1), ("decoder.LlamaDecoder.forward", 1),
    ("decoder.LlamaDecoder.forward", 3),
])  # fmt: skip
def test_ctrl_c(ask, monkeypatch, where, call):
    """In the encoder, while loading, in the prefill and in a later token."""
    calls, whole = [], pkgutil.resolve_name(f"himap_ref.{where}")

    def interrupted(*args, **options):
        calls.append(where)
        if len(calls) == call:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(f"himap_ref.{where}", interrupted)
    status, out, err = ask("--max-new-tokens", 5)
    assert (status, err) == (130, "") and out.count("\n") <= 1 and len(calls) == call


KEYS = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
class Keys:
    def find_spec(self, name, *_):
        if name in sys.argv:
            sys.argv.remove(name)
            if len(sys.argv) > 1 and (child := os.fork()):  # which is interrupted here
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            else:
                del sys.argv[1:]
                os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Keys())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ctrl_c_while_libraries_load():
    """A page of traceback for a key pressed in the first seconds: a signal comes when a module is about to load."""
    modules = "torch", "torch.nn", "tokenizers", "himap_ref.vision", "himap_ref.image"
    done = python("-c", KEYS, ROOT / "run.py", *modules)
    assert (done.returncode, done.stdout, done.stderr) == (130, "130\n" * (len(modules) - 1), "")


# ---------------------------------------------------------------- the hub

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository, owner/name, that holds a config.json of 5000 bytes, and with one fault."""

    protocol_version = "HTTP/1.1"
    fault = ""
    asked = []  # paths
    ERRORS = {
        "missing": (404, "RepoNotFound", "Repository not found"),
        "gated": (403, "GatedRepo", "Access to model owner/name is restricted."),
        "no such revision": (404, "RevisionNotFound", "Revision Not Found"),
        "broken": (500, "", ""),
    }
    FILES = {"reaches out": "../../../../out.json", "absolute": "/tmp/himap-absolute.json", "pickle": "model.bin"}

    def log_message(self, *_):
        pass

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "5000" if body.startswith(b"{ ") else str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.wfile.flush()

    def do_GET(self):
        self.asked.append(self.path)
        if self.fault in self.ERRORS:
            status, code, message = self.ERRORS[self.fault]
            self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=message)
        elif self.fault == "drops":
            self.connection.close()
            self.close_connection = True
        elif "/tree/" in self.path:
            file = {"type": "file", "path": self.FILES.get(self.fault, "config.json"), "size": 5000, "oid": "a" * 40}
            self.answer(200, json.dumps([file]).encode(), Content_Type="application/json")
        elif "/api/" in self.path:
            name = self.FILES.get(self.fault, "config.json")
            data = {"id": "owner/name", "sha": SHA, "siblings": [{"rfilename": name}]}
            self.answer(200, json.dumps(data).encode(), Content_Type="application/json")
        else:
            length = 100 if self.fault == "interrupted" else 5000
            self.answer(200, f"{'{ ':{length - 1}}}}".encode(), ETag=f'"{"a" * 40}"', X_Repo_Commit=SHA)
            if self.fault == "interrupted" and self.command == "GET":
                self.connection.shutdown(2)
                self.close_connection = True

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The fake hub in the place of the real one; its fault is set as `hub.fault`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # whatever the environment says
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the client's retries
    yield Hub
    Hub.fault = ""
    Hub.asked.clear()
    server.shutdown()
    server.server_close()


HUB = {  # fault: reason
    "missing": "404 Client Error. Repository Not Found for url: .*",
    "gated": "403 Client Error. Cannot access gated repo for url .*",
    "no such revision": "404 Client Error. Revision Not Found for url: .*",
    **dict.fromkeys(("unreachable", "offline", "broken", "drops", "interrupted"), ".*"),
}


@pytest.mark.parametrize("fault", HUB)
def test_hub(ask, hub, monkeypatch, fault):
    """A page of the client's words, or the exception of the HTTP library that it has come to use."""
    hub.fault = fault
    if fault == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", fault == "offline")
    status, out, err = ask("--weights", "owner/name")
    *progress, line = err.splitlines()  # the client's own, of a download that had begun
    why = rf"no such folder here, nor can the hub's be downloaded \({HUB[fault]}\)"
    assert re.fullmatch(f"error: weights 'owner/name': {why}", line), err
    assert (status, out) == (2, "") and (fault == "interrupted" or not progress)


def test_interrupted_download_goes_on(hub):
    """Half a file taken for the whole one at the next start; another revision than was asked for, or an untold one."""
    hub.fault = "interrupted"
    with pytest.raises(HimapError):
        find_folder("owner/name")
    hub.fault = ""
    for revision in (None, SHA):
        folder = find_folder("owner/name", revision)
        assert revision_of(folder) == SHA and (folder / "config.json").stat().st_size == 5000
    assert revision_of(ROOT) is None


@pytest.mark.parametrize("fault", Hub.FILES)
def test_repository_of_other_files(hub, tmp_path, fault):
    """A repository that writes outside the cache, by what it calls its files; a pickle downloaded."""
    hub.fault = fault
    with suppress(HimapError):
        find_folder("owner/name")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"] and not Path(Hub.FILES["absolute"]).exists()
    assert not {Path(name).name for name in Hub.FILES.values()} & {path.name for path in tmp_path.rglob("*")}


def test_revision_is_asked_for(hub):
    """--revision taken, and the newest commit downloaded."""
    find_folder("owner/name", "v1")
    assert any("/revision/v1" in path for path in hub.asked) and not any("/main" in path for path in hub.asked)


def test_the_commit_is_told(ask, study, whole, tmp_path):
    """Results that nobody can repeat, because the repository has moved on."""
    folder = shutil.copytree(whole, tmp_path / "snapshots" / SHA)  # as it lies in the hub's cache
    assert json.loads(ask("--json", "--weights", folder)[1])["revision"] == SHA
    words = "--weights", folder, "--max-new-tokens", 1, "--scenes", 1, "--out", tmp_path / "a.jsonl"
    assert study(evaluate, *words)[0] == 0
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["settings"]["revision"] == SHA
