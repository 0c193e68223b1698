"""Several processes for a test. A server imports everything once, and each process is forked from it."""

import io
import multiprocessing
import os
import queue
import socket
import time
import traceback

import torch
from torch import distributed as dist

from lightning_curvature.distributed import Ranks

TIMEOUT = 180  # seconds after which processes that wait for each other are taken for dead


def run(size, work, *args):
    """Run ``work(*args)`` on processes of one group, as torchrun would start them; return what each returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.cells"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    given = (size, port, results, work, args)
    processes = [context.Process(target=_start, args=(rank, *given), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    returned, deadline = {}, time.monotonic() + TIMEOUT
    try:
        while len(returned) < size:
            try:
                rank, error, value = results.get(timeout=1)
            except queue.Empty:
                dead = [p.exitcode for p in processes if p.exitcode]
                if time.monotonic() > deadline or dead:
                    raise AssertionError(
                        f"Processes hang or died ({dead}); {sorted(returned)} of {size} came back."
                    ) from None
                continue
            if error:
                raise AssertionError(f"Process {rank}:\n{error}")
            returned[rank] = torch.load(io.BytesIO(value), weights_only=False)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    return [returned[rank] for rank in range(size)]


def exit_code(work, *args):
    """Run ``work(*args)`` on a process of its own; return its exit code, the negative number of a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.cells"])
    process = context.Process(target=work, args=args, daemon=True)
    process.start()
    process.join(TIMEOUT)
    return process.exitcode


def _start(rank, size, port, results, work, args):
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        GROUP_RANK="0",
        GROUP_WORLD_SIZE="1",
        TORCHELASTIC_RUN_ID="tests",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what goes wrong is told to the test
        os.dup2(quiet, stream)
    try:
        value, error = work(*args), None
    except BaseException:  # noqa: BLE001 (it is told to the test)
        value, error = None, traceback.format_exc()
    content = io.BytesIO()
    torch.save(value, content)  # a queue would share the memory of tensors with a process that ends
    results.put((rank, error, content.getvalue()))
    if dist.is_initialized() and not error:
        dist.destroy_process_group()
    results.close()
    results.join_thread()


def here():
    """Return the ranks of this process, whose data are its own."""
    dist.init_process_group("gloo")
    return Ranks.of_run(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
