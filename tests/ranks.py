"""Runs a test function on several gloo ranks: `run_ranks(function, 4, *args)` -> the list of what they returned."""

import datetime
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from commands import SERVER


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Calls `function(rank, *args)` on every rank of a process group; an error on any rank fails the test.

    The function must be defined at the top of a module. Its result must be picklable and hold no tensors.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [SERVER.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            SERVER.Process(target=_rank, args=(rank, world_size, f"{folder}/store", pipe[1], timeout, function, args))
            for rank, pipe in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for pipe in pipes:
            pipe[1].close()
        try:
            results = [_receive(pipe[0], rank, timeout) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(5)
                process.kill()
                process.join()
    errors = [f"rank {rank}: {value}" for rank, (good, value) in enumerate(results) if not good]
    assert not errors, "\n".join(errors)
    return [value for _, value in results]


def _receive(pipe: Any, rank: int, timeout: float) -> tuple[bool, Any]:
    try:
        return pipe.recv() if pipe.poll(timeout) else (False, f"no result after {timeout} s")
    except EOFError:
        return False, "ended without a result"


def _rank(rank: int, world_size: int, store: str, pipe: Any, timeout: float, function: Any, args: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=Path(store).as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        pipe.send((True, function(rank, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    # After the result is sent: a rank that leaves early breaks connections that other ranks still use.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
