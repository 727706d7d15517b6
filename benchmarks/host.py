"""What the host does beside the training steps: before and after it was taken off the thread that launches them.

    python -m benchmarks.host [--rounds 5]

- feeding, from files and from tar shards: CPU time of the thread that asks for batches, a batch. Before: it drew the
  plans, read the images and handed them to DALI itself, as pages of the shards. Both use the decoder of a GPU on the
  CPU, whose own threads do not count; the copy of the views out of it does, which a GPU makes by itself. All pages are
  in memory: what a disk takes, which is where the thread gains, is not measured.
- order: what the first plan of an epoch of 1,281,167 images takes. Before: its order was made then.
- evaluation of two models: CPU time of the process. Before: each image was decoded for either.

Interleaved, medians of --rounds. "Before" is made of the same code: a feeder that works at once, in the thread of its
caller; plans that are told of no epoch in advance; two passes. Writes records/cpu/host.csv.
"""

import argparse
import csv
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastdeit.cli import FoldedHelp
from fastdeit.data import prepare
from fastdeit.distributed.world import World
from fastdeit.evaluation.metrics import accuracies
from fastdeit.models.deit import create_model
from fastdeit.models.heads import logits_by_head
from fastdeit.pipelines import Augmentation, SyntheticIndex, eval_loader, open_index, train_loader
from fastdeit.pipelines.decode import graph
from fastdeit.pipelines.decode.gpu import GpuDecoder

BATCH, BATCHES, SIZE = 64, 4, 224
RECORD = Path(__file__).parent / "records" / "cpu" / "host.csv"
Seconds = dict[str, float]


class AtOnce(Executor):
    """Works in the thread of its caller."""

    def submit(self, work, /, *arguments, **options) -> Future:
        future: Future = Future()
        future.set_result(work(*arguments, **options))
        return future


def make_images(root: Path) -> None:
    """BATCHES batches of JPEGs of about 110 kB, as ImageNet's: root/files/train/CLASS/*.jpg and root/shards/*.tar."""
    random = np.random.default_rng(0)
    (root / "shards").mkdir(parents=True)
    with tarfile.open(root / "shards" / "train-000000.tar", "w") as tar:
        for i in range(BATCH * BATCHES):
            smooth = Image.fromarray(random.integers(0, 256, (8, 10, 3), np.uint8)).resize((500, 400))
            pixels = np.clip(np.asarray(smooth) + random.normal(0, 14, (400, 500, 3)), 0, 255).astype(np.uint8)
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG", quality=92)
            file = root / "files" / "train" / str(i % 4) / f"{i:06d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(stream.getvalue())
            for name, contents in ((f"{i:06d}.jpg", stream.getvalue()), (f"{i:06d}.cls", str(i % 4).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(contents)
                tar.addfile(info, io.BytesIO(contents))


def feeding(path: Path, *, before: bool) -> Callable[[], float]:
    """Measures seconds of this thread's CPU time a batch, in an epoch."""
    index, augmentation = open_index(path, "train"), Augmentation(repeats=1)
    loader = train_loader(index, batch_size=BATCH, input_size=SIZE, augmentation=augmentation)
    loader.worker = None  # as on a GPU: the caller collects
    loader.prefetcher.decoder = GpuDecoder(index, BATCH, loader.plans.size, 2, torch.device("cpu"), augmentation)
    if before:
        loader.prefetcher.feeder = AtOnce()

    def measured() -> float:
        read = graph._encoded
        if before:
            graph._encoded = lambda index, i: index.encoded(i)
        try:
            loader.set_epoch(0)
            since = time.thread_time()
            for _ in loader:
                pass
            return (time.thread_time() - since) / BATCHES
        finally:
            graph._encoded = read

    return measured


def order(*, before: bool) -> Callable[[], float]:
    """Measures seconds until the first plan of an epoch, after the one before it."""
    plans = train_loader(SyntheticIndex(), batch_size=256, input_size=8).plans

    def measured() -> float:
        plans.set_epoch(0)
        plans[plans.steps - 1]
        if before:
            plans.orders.pop(1).result()
        else:
            plans.orders[1].result()  # the second half of an epoch takes longer
        plans.set_epoch(1)
        since = time.perf_counter()
        plans[0]
        return time.perf_counter() - since

    return measured


def evaluation(path: Path, *, before: bool) -> Callable[[], float]:
    """Measures seconds of the process's CPU time, all threads, an image."""
    index = open_index(path, "train").take(np.arange(BATCH // 4))
    loader = eval_loader(index, batch_size=len(index), input_size=SIZE)
    models = [create_model("deit_tiny_distilled_patch16_224", num_classes=4).eval() for _ in range(2)]
    sources = {str(i): (lambda images, model=model: logits_by_head(model, images)) for i, model in enumerate(models)}
    passes = [{name: source} for name, source in sources.items()] if before else [sources]

    def measured() -> float:
        since = time.process_time()
        for each in passes:
            accuracies(each, loader, lambda batch: prepare(batch, (0.5,) * 3, (0.5,) * 3, torch.float32),
                       World(torch.device("cpu")))  # fmt: skip
        return (time.process_time() - since) / len(index)

    return measured


def contestants(root: Path) -> dict[str, dict[str, Callable[[], float]]]:
    """{what: {"before": measures it, "after": ...}}, in seconds."""
    states = {"before": True, "after": False}
    return {
        "feeding from files, calling thread, CPU s a batch of 64": {
            name: feeding(root / "files", before=state) for name, state in states.items()
        },
        "feeding from shards, calling thread, CPU s a batch of 64": {
            name: feeding(root / "shards", before=state) for name, state in states.items()
        },
        "first plan of an epoch of 1,281,167 images, s": {name: order(before=state) for name, state in states.items()},
        "evaluation of two DeiT-Ti, CPU s an image": {
            name: evaluation(root / "files", before=state) for name, state in states.items()
        },
    }


def measure(root: Path, rounds: int) -> dict[str, Seconds]:
    result = {}
    for what, states in contestants(root).items():
        seconds: dict[str, list[float]] = {name: [] for name in states}
        for _ in range(rounds + 1):
            for name, measured in states.items():
                seconds[name].append(measured())
        result[what] = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up
        print(f"{what:60}" + "".join(f"  {name} {value:9.5f}" for name, value in result[what].items()), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FoldedHelp)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder))
        result = measure(Path(folder), arguments.rounds)
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    with RECORD.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "before", "after", "before_over_after", "rounds", "cores"])
        for what, seconds in result.items():
            before, after = seconds["before"], seconds["after"]
            cores = len(os.sched_getaffinity(0))
            writer.writerow([what, f"{before:.6f}", f"{after:.6f}", f"{before / after:.2f}", arguments.rounds, cores])


if __name__ == "__main__":
    main()
