"""Several processes that make one run: each reads a share of the text and solves a share of it all.

They are started by torchrun and talk through torch.distributed (gloo on CPUs, NCCL on GPUs). With
one process nothing here does anything.
"""

from __future__ import annotations

import atexit
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import torch
from torch import Tensor, distributed

from llmq.errors import ProcessError

T = TypeVar("T")
_ENDED = (
    "Another process of this run has ended. Its own message says why; the same command goes on "
    "after the last finished block."
)


class OutOfMemoryElsewhere(torch.OutOfMemoryError):
    """Another process has too little memory for what all of them are about to do."""


def join(device: str) -> None:
    """Join the processes that torchrun has started; nothing if it has not.

    If one of them ends, torchrun stops the others with a signal, which becomes a ProcessError: what
    they have finished is kept, and their locks are freed. Of several GPUs, "cuda" means in each
    process the one with its number from now on.

    Raises:
        ProcessError: there are fewer GPUs than processes.
    """
    if distributed.is_available() and distributed.is_torchelastic_launched():
        if not distributed.is_initialized():
            gpu = device.startswith("cuda")
            distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
            atexit.register(_leave)
            if device == "cuda":
                torch.cuda.set_device(own_gpu(torch.cuda.device_count()))
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, _stopped)


def _leave() -> None:
    """The process ends: threads of the group that outlive what they use would abort it."""
    _ending()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def own_gpu(gpus: int) -> int:
    """The GPU of this process, if its machine has so many.

    Raises:
        ProcessError: more processes run there.
    """
    machines = everyones(platform.node())
    here = machines[number()]
    if machines.count(here) > gpus:
        raise ProcessError(f"There are {gpus} GPUs on {here}: use --nproc-per-node {gpus} at most.")
    return machines[: number()].count(here)


def _stopped(*_: object) -> NoReturn:
    _ending()
    raise ProcessError(_ENDED)


def _ending() -> None:
    """From here on torchrun's signal says nothing new: a second error would hide the first."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is _stopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def count() -> int:
    """How many processes there are."""
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def number() -> int:
    """Which of them this one is: 0 is the one that writes."""
    return distributed.get_rank() if count() > 1 else 0


def add_up(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if count() > 1:
        with _others_alive():
            distributed.all_reduce(tensor)
    return tensor


def add_up_number(value: int, device: torch.device) -> int:
    """The sum of a number over all processes."""
    return int(add_up(torch.tensor([value], device=device)))


def highest(value: int) -> int:
    """The largest of the numbers that the processes give."""
    if count() == 1:
        return value
    tensor = torch.tensor([value])
    with _others_alive():
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return int(tensor)


def meet(full: bool = False) -> None:
    """Wait for all processes, before each gives the others something.

    Args:
        full: whether this one will not do so, since it has run out of memory.

    Raises:
        OutOfMemoryElsewhere: that is true of any of them.
    """
    if highest(int(full)):
        raise OutOfMemoryElsewhere("Another process of this run has too little memory.")


def fill_from(owner: int, tensor: Tensor) -> None:
    """Give a contiguous tensor, in all processes, the values that it has in process `owner`."""
    data = tensor.flatten().view(torch.uint8)  # no copy
    with _others_alive():
        distributed.broadcast(data, owner)


def everyones(value: T) -> list[T]:
    """This value of every process, in their order."""
    values: list[T] = [value] * count()
    if count() > 1:
        with _others_alive():
            distributed.all_gather_object(values, value)
    return values


def of_the_first(value: T | None) -> T:
    """The value that process 0 gives."""
    values = [value]
    if count() > 1:
        with _others_alive():
            distributed.broadcast_object_list(values)
    return values[0]  # type: ignore[return-value]


@contextmanager
def _others_alive() -> Iterator[None]:
    """Turn a broken connection into a ProcessError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what gloo and NCCL raise if another process has died
        _ending()
        raise ProcessError(_ENDED) from error
