"""Scripts in processes forked from a server that has imported torch already: one starts in tenths of a second instead of seconds."""

import itertools
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = ["torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.utils.tensorboard", "matplotlib.pyplot",
           "sklearn.datasets", "lightningdit.training", "lightningdit.run", "lightningdit.images", "lightningdit.cli",
           "bench.chaos"]
PATIENCE_S = 5  # with the processes that go on when one has failed
NUMBERS = itertools.count()


_server = None


def server():
    """The multiprocessing context whose processes are forked from one that has imported everything and has one thread only."""
    global _server
    if _server is None:
        wanted = dict(OMP_NUM_THREADS="1", GOMP_SPINCOUNT="3000", CUDA_VISIBLE_DEVICES="", TQDM_DISABLE="",
                      PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        _server = multiprocessing.get_context("forkserver")
        _server.set_forkserver_preload(PRELOAD)
        multiprocessing.forkserver.ensure_running()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return _server


def live(command, variables, outputs):
    """In a forked process: `python *command` as the shell would start it."""
    for stream, path in zip((1, 2), outputs, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.stdin, sys.argv = open(os.devnull), command
    if "OMP_NUM_THREADS" in variables:  # OpenMP read it when the server began
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    runpy.run_path(command[0], run_name="__main__")


def start(script, *arguments, outputs=(os.devnull, os.devnull), **variables):
    """`python script *arguments` in the root of the project -> its multiprocessing.Process, which is running.

    It has one thread, or OMP_NUM_THREADS.

    outputs: the files for stdout and stderr. variables: are added to those of this process.
    """
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    process = server().Process(target=live, args=(list(map(str, (script, *arguments))), dict(environment), tuple(map(str, outputs))))
    process.start()
    return process


def run(script, *arguments, folder, processes=None, timeout=300, **variables):
    """As start(), until the end -> subprocess.CompletedProcess.

    Args:
        folder: for files of what is printed, whose names do not collide.
        processes: so many at once, with the variables that torchrun sets. `stdout` and `stderr` are those of all, one after the other;
            `returncode` is that of the first to fail, if any. Once one has failed, the others have PATIENCE_S to end by themselves.
        timeout: in s; then all are killed.
    Raises: subprocess.TimeoutExpired.
    """
    number = next(NUMBERS)
    files = [tuple(Path(folder) / f"{number:05d}.{rank}.{stream}" for stream in ("out", "err")) for rank in range(processes or 1)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for rank, outputs in enumerate(files):
        own = dict(RANK=rank, WORLD_SIZE=processes, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        started.append(start(script, *arguments, outputs=outputs, **(own if processes else {}) | variables))
    deadline, codes = time.monotonic() + timeout, []  # of those that ended, in their order
    while alive := [process for process in started if process.exitcode is None]:
        multiprocessing.connection.wait([process.sentinel for process in alive], timeout=max(0, deadline - time.monotonic()))
        ended = [process for process in alive if process.exitcode is not None]
        for process in alive if not ended else ():  # in time
            process.kill()
            process.join()
        if not ended and not any(codes):
            raise subprocess.TimeoutExpired(str(script), timeout)
        if any(process.exitcode for process in ended) and not any(codes):
            deadline = min(deadline, time.monotonic() + PATIENCE_S)
        codes += [process.exitcode for process in ended]
    for process in started:
        process.join()
    output, errors = ("".join(path.read_text(errors="replace") for path in paths) for paths in zip(*files, strict=True))
    return subprocess.CompletedProcess([str(script), *map(str, arguments)], next(filter(None, codes), 0), output, errors)
