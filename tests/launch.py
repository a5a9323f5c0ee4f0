"""Several processes of one run, as torchrun would start and end them, but forked from one that has torch loaded."""

import atexit
import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

FORKS = """
import gc, json, os, runpy, signal, sys
import himap_ref.commands.ask, himap_ref.studies.accuracy.sweep, himap_ref.studies.paper.flow
import torch.distributed.tensor.parallel
from torch.distributed import TCPStore
gc.freeze()  # or a child would copy all of it on its way out
for line in sys.stdin:
    job, ranks, statuses = json.loads(line), [], {}
    for rank in range(int(job["env"]["WORLD_SIZE"])):
        if not (child := os.fork()):
            break
        ranks.append(child)
    else:
        if len(ranks) > 1:  # torchrun holds what they meet at, so that it outlives them
            store = TCPStore("127.0.0.1", int(job["env"]["MASTER_PORT"]), is_master=True, wait_for_workers=False)
        while len(statuses) < len(ranks):
            child, status = os.wait()
            statuses[child] = os.waitstatus_to_exitcode(status)
            for other in {*ranks} - {*statuses} if status else ():
                os.kill(other, signal.SIGTERM)
        store = None
        print(json.dumps([statuses[child] for child in ranks]), flush=True)
        continue
    break
else:
    sys.exit()
os.environ |= job["env"] | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
sys.stdin, sys.argv = open(os.devnull), job["argv"]
for number, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(os.path.join(job["folder"], f"{name}{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
exec(job["before"])
(runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module)(sys.argv[0], run_name="__main__")
"""


@cache
def forks() -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", FORKS], stdin=-1, stdout=-1, text=True, env=env, cwd=ROOT)
    atexit.register(process.communicate)  # closes its input, which ends it
    return process


def launch(number: int, folder: Path, *argv: object, before: str = "") -> tuple[list[int], list[str], list[str]]:
    """A module's or script's name and its words in `number` processes -> of each its status, stdout and stderr.

    number 1 is no torchrun at all. before: Python code that runs first in each of them, and knows its `rank`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"} if number > 1 else {}
    folder.mkdir(exist_ok=True)
    job = {"env": env, "argv": [*map(str, argv)], "folder": str(folder), "before": before}
    print(json.dumps(job), file=forks().stdin, flush=True)
    statuses = json.loads(forks().stdout.readline())
    streams = [[(folder / f"{name}{i}").read_text() for i in range(number)] for name in ("stdout", "stderr")]
    return statuses, *streams
