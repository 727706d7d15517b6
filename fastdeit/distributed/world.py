"""The processes of a job: rank, world size and device of this one, and the few collectives that training needs."""

import os
import socket
import sys
import traceback
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from fastdeit.errors import UserError, in_words

from .signals import Stop


@dataclass(frozen=True)
class World:
    """One process of the job: its device and its rank among `world_size` processes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    stop: Stop = field(default_factory=Stop)  # what signals have told this process
    at_end: ExitStack = field(default_factory=ExitStack)  # what is closed when the process leaves

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes; the argument is left alone."""
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over all processes."""
        return self.sum(tensor) / self.world_size

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value) -> list:
        """Every rank's Python object, by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """Rank 0's Python object, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def pick_device(name: str | None) -> torch.device:
    """`name`, or CUDA where present and the CPU elsewhere. Under torchrun, CUDA means this process's own GPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name}: there is no device of this name; choose cuda, cuda:N or cpu") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no CUDA device here; omit the flag to use the CPU")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA device(s)")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes stay the same, so a search for the fastest convolutions pays
    return device


@contextmanager
def join(device_name: str | None, *, listen: bool = True):
    """This process's `World`, listening for signals, which end it; or not, in a program that is not ours. Under
    torchrun (WORLD_SIZE is set) it joins the others."""
    device = pick_device(device_name)
    with Stop() if listen else nullcontext(Stop()) as stop, ExitStack() as at_end:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            yield World(device, stop=stop, at_end=at_end)
            return
        _join_group(device)
        world = World(device, dist.get_rank(), dist.get_world_size(), stop, at_end)
        try:
            yield world
        except Exception as error:
            _die(world, error)
        finally:
            dist.destroy_process_group()


def _join_group(device: torch.device) -> None:
    store, rank, world_size = next(dist.rendezvous("env://"))
    # torchrun keeps its store when it starts the processes again: without a name of its own, this attempt would find
    # the addresses of the last one's processes in it.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    on_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=device if on_cuda else None,
    )


def _die(world: World, error: Exception) -> None:
    """Name the rank and the cause, and end at once: the other ranks wait for this one in some exchange, and so would
    taking the process group down in order."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    sentence, lost = in_words(error), isinstance(error, dist.DistError) or "by peer" in str(error)
    if lost:  # where it waited for the other is no news, least of all from 63 ranks
        told = f", having lost another rank, whose message tells the cause: {' '.join(str(error).split())}"
    else:
        told = f": {sentence or traceback.format_exc()}"
    # For torchrun's closing report: the sentence is enough, where there is one.
    get_error_handler().record_exception(error.with_traceback(None) if lost or sentence else error)
    world.at_end.__exit__(type(error), error, error.__traceback__)
    print(
        f"rank {world.rank} of {world.world_size} on {socket.gethostname()} ({world.device}) ends{told}",
        file=sys.stderr,
    )
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1 if sentence is None else 2)
