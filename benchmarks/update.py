"""Claim: an update, with gradient norm, guard and moving average, costs the host less than timm's, which has no guard.

    python -m benchmarks.update [--rounds 15]

The weights are a DeiT-S's, 152 tensors, and those of one of width 12, whose arithmetic takes next to no time: what
remains is the host's, and a GPU waits for no less. Gradients are there already. Contenders:

    fastdeit   Update.apply: norm of the gradient, guard, optimizer, moving average; skips a bad step on the device
    timm       clip_grad_norm_ to a norm that is never reached; its LAMB, PyTorch's AdamW and SGD, by foreach as they
               are on a GPU; ModelEmaV3, by foreach; the weights, the optimizer and the average skip nothing

ms: process time with one thread, interleaved, median. calls: of operators in the step after three; one over lists
starts a few kernels on a GPU, or one a tensor where these differ in shape from their factors, as timm's LAMB's do.
Writes records/cpu/update.csv.
"""

import argparse
import copy
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm.optim
import timm.utils
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdeit.cli import FoldedHelp
from fastdeit.config import Config
from fastdeit.models.architectures import Architecture
from fastdeit.models.deit import DeiT
from fastdeit.training.nonfinite import TERMS, Guard
from fastdeit.training.optimizer import Update, build_optimizer

RECORD = Path(__file__).parent / "records" / "cpu" / "update.csv"
OPTIMIZERS = ("adamw", "lamb", "sgd")
WIDTHS = {12: 2, 384: 6}  # heads
# Operators that only look at memory in another way, or reserve it.
NO_WORK = (
    "view",
    "unbind",
    "as_strided",
    "detach",
    "empty",
    "select",
    "slice",
    "alias",
    "expand",
    "squeeze",
    "split",
)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.count += not name.strip("_").startswith(NO_WORK)
        return func(*args, **(kwargs or {}))


def model_of(width: int) -> nn.Module:
    torch.manual_seed(0)
    shape = Architecture(width=width, depth=12, heads=WIDTHS[width], patch_size=16, img_size=224, distilled=True)
    return DeiT(shape, num_classes=1000, img_size=(224, 224), drop_path=0.0, attention="sdpa")


def with_gradients(model: nn.Module, update: Callable[[], object]) -> Callable[[], None]:
    gradients = [torch.randn_like(parameter) for parameter in model.parameters()]

    def call() -> None:
        for parameter, gradient in zip(model.parameters(), gradients):
            parameter.grad = gradient
        update()

    return call


def ours(name: str, width: int) -> Callable[[], None]:
    model = model_of(width)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = build_optimizer(model, name, lr=1e-6, weight_decay=0.05, eps=1e-8, betas=(0.9, 0.999))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    update = Update(model, ema, optimizer, scaler, Guard(torch.device("cpu"), tolerated=0), Config())
    numbers, losses = torch.tensor([1e5, 1e-6, 0.9999], dtype=torch.float64), torch.ones(len(TERMS))

    def call() -> None:
        update.begin()
        update.apply(numbers, losses, losses)

    return with_gradients(model, call)


def timms(name: str, width: int) -> Callable[[], None]:
    model = model_of(width)
    ema = timm.utils.ModelEmaV3(model, decay=0.9999)
    optimizer = timm.optim.create_optimizer_v2(model, opt=name, lr=1e-6, weight_decay=0.05, foreach=True)

    def call() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        ema.update(model, step=1)
        optimizer.zero_grad()

    return with_gradients(model, call)


CONTENDERS = {"fastdeit": ours, "timm": timms}


def measure(name: str, width: int, rounds: int) -> dict[str, tuple[int, float]]:
    """(calls of operators, milliseconds) of each contender."""
    calls = {contender: build(name, width) for contender, build in CONTENDERS.items()}
    counts, times = {}, {contender: [] for contender in calls}
    for contender, call in calls.items():
        for _ in range(3):
            call()
        with Calls() as counted:
            call()
        counts[contender] = counted.count
    for _ in range(rounds):
        for contender, call in calls.items():
            since = time.process_time()
            call()
            times[contender].append(1e3 * (time.process_time() - since))
    return {contender: (counts[contender], statistics.median(times[contender])) for contender in calls}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.update", description=__doc__, formatter_class=FoldedHelp)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-record", action="store_true", help="leave records/cpu/update.csv as it is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for width in WIDTHS:
        for name in OPTIMIZERS:
            for contender, (count, ms) in measure(name, width, arguments.rounds).items():
                rows.append((width, name, contender, count, f"{ms:.3g}"))
                print(f"width {width:3d}  {name:6s}{contender:10s}{count:5d} calls {ms:8.3g} ms", flush=True)
    if not arguments.no_record:
        with RECORD.open("w", newline="") as file:
            columns = ("width", "optimizer", "contender", "calls", "cpu_ms")
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])


if __name__ == "__main__":
    main()
