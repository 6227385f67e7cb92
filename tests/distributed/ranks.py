"""Run a function on several ranks at once: real processes, gloo between them."""

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

import torch
import torch.distributed as dist

from bigsimclr.world import World

Result = TypeVar("Result")

SECONDS = 120


def on_ranks(
    size: int, function: Callable[[World], Result], *, seconds: int = SECONDS
) -> list[Result]:
    """Return what the function returns on each rank; it must be importable, or a partial of one.

    Tensors come back as they are; a rank that fails shows its traceback.
    """
    # One server imports PyTorch once, and forks a rank in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.ranks", "bigsimclr.stages.pretrain"])
    port = _free_port()
    ends, processes = [], []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, size, port, function, there))
        process.start()
        there.close()
        ends.append(here)
        processes.append(process)
    try:
        answers = [_answer(end, rank, seconds) for rank, end in enumerate(ends)]
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    failures = [text for is_result, text in answers if not is_result]
    assert not failures, "\n".join(failures)
    return [result for _, result in answers]


def _answer(end: Connection, rank: int, seconds: int) -> tuple[bool, object]:
    if not end.poll(seconds):
        return False, f"rank {rank} gave no answer in {seconds} s"
    try:
        return end.recv()
    except EOFError:
        return False, f"rank {rank} died"


def _rank(
    rank: int, size: int, port: int, function: Callable[[World], object], end: Connection
) -> None:
    torch.set_num_threads(1)
    # File descriptors of shared tensors would die with this process.
    torch.multiprocessing.set_sharing_strategy("file_system")
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        end.send((True, function(World(rank, size, torch.device("cpu")))))
    except Exception:  # noqa: BLE001 - shown by the test
        end.send((False, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
