"""Claim: the loader delivers more images per second than its peers, and more per second of CPU time.

    python -m benchmarks pipeline [--data-path DIR] [--rounds 5]

A training epoch of random resized crops of 224 (bicubic), flipped, with and without RandAugment, in shuffled batches of
uint8; nothing else runs, so this is the most that a trainer can get. Ours beside

    timm            its own loader, PIL in worker processes; the same rand-m9-mstd0.5-inc1
    torchvision v2  decode_jpeg and uint8 tensors in worker processes; its RandAugment is another one: 14 operations,
                    always applied, nearest interpolation
    DALI            readers.file, random crop decoding and DALI's resize, all random numbers DALI's own; its RandAugment
                    is another one: about a third of timm's magnitudes, always applied

all with as many worker processes or threads as there are cores. Interleaved, an epoch each a round, medians, in wall
time and in CPU time of all threads and processes (which other work on the machine disturbs less). Without --data-path:
400 JPEGs (on a GPU 4096, in batches of 256) of 500 x 375 cut from two photographs, about the size of ImageNet's; all in
the page cache.

On a GPU also: what decoding alone takes, for shares of it given to the hardware decoder (ours: all) and numbers of CPU
threads, and with chroma interpolated as libjpeg does (ours) or repeated.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from fastdeit.pipelines import Augmentation, open_index, train_loader

from . import charts
from .record import Headline, Record, parser

SIZE, RAND_AUGMENT = 224, "rand-m9-mstd0.5-inc1"
CORES = len(os.sched_getaffinity(0))
Epoch = Callable[[], Iterable[int]]  # one epoch; gives the number of images of each batch


def make_images(root: Path, images: int) -> None:
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in range(images):
        left, top = int(random.integers(140)), int(random.integers(52))
        folder = root / "train" / str(number % 4)
        folder.mkdir(parents=True, exist_ok=True)
        photos[number % 2].crop((left, top, left + 500, top + 375)).save(folder / f"{number}.jpg", quality=95)


def ours(index, batch_size: int, device: str, rand_augment: bool) -> Epoch:
    augmentation = Augmentation(
        aa=RAND_AUGMENT if rand_augment else "none", color_jitter=0, repeats=1, mixup=0, cutmix=0, reprob=0
    )
    loader = train_loader(index, batch_size=batch_size, input_size=SIZE, augmentation=augmentation, device=device)

    def epoch():
        loader.set_epoch(epoch.number)
        epoch.number += 1
        for batch in loader:
            yield len(batch.labels)
        if device != "cpu":
            torch.cuda.synchronize()

    epoch.number = 0
    return epoch


def timm_loader(root: Path, batch_size: int, device: str, **settings):
    """timm's loader over ROOT/train/CLASS/*, a worker for each core."""
    from timm.data import auto_augment, create_dataset, create_loader

    def posterize(image, bits, **_):  # Pillow 13 refuses 0 bits, which timm asks for at the highest magnitude
        return ImageOps.posterize(image, max(1, bits))

    for name in ("Posterize", "PosterizeIncreasing"):
        auto_augment.NAME_TO_OP[name] = posterize
    return create_loader(
        create_dataset("", str(root), split="train"),
        batch_size=batch_size,
        is_training=True,
        color_jitter=None,
        interpolation="bicubic",
        num_workers=CORES,
        pin_memory=device != "cpu",
        device=torch.device(device),
        **settings,
    )


def timm(root: Path, batch_size: int, device: str, rand_augment: bool) -> Epoch:
    loader = timm_loader(
        root, batch_size, device, input_size=(3, SIZE, SIZE), auto_augment=RAND_AUGMENT if rand_augment else None
    )
    if device == "cpu":
        loader = loader.loader  # uint8 as ours: without the normalising on top
    return lambda: (len(labels) for _, labels in loader)


def torchvision(root: Path, batch_size: int, device: str, rand_augment: bool) -> Epoch:
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            *([v2.RandAugment()] if rand_augment else []),
        ]
    )
    images = ImageFolder(
        root / "train", transform, loader=lambda path: decode_jpeg(read_file(path), mode=ImageReadMode.RGB)
    )
    loader = torch.utils.data.DataLoader(
        images,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=CORES,
        persistent_workers=True,
        pin_memory=device != "cpu",
    )

    def epoch():
        for batch, labels in loader:
            batch.to(device, non_blocking=True)
            yield len(labels)

    return epoch


def dali(root: Path, batch_size: int, device: str, rand_augment: bool) -> Epoch:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import rand_augment as auto_rand_augment

    gpu = device != "cpu"

    @pipeline_def(
        batch_size=batch_size, num_threads=CORES, device_id=0 if gpu else None, enable_conditionals=True, seed=0
    )
    def graph():
        encoded, labels = fn.readers.file(file_root=str(root / "train"), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(encoded, device="mixed" if gpu else "cpu", random_area=[0.08, 1.0])
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.flip(images, horizontal=fn.random.coin_flip())
        if rand_augment:
            images = auto_rand_augment.rand_augment(images, n=2, m=9)
        return images, labels

    pipeline = graph()
    pipeline.build()
    steps = pipeline.epoch_size("reader") // batch_size

    def epoch():
        for _ in range(steps):
            images, labels = pipeline.run()
            torch.from_dlpack(images.as_tensor())
            yield len(labels)

    return epoch


def cpu_seconds() -> float:
    """CPU time so far of this process and its children, dead or alive."""
    total = sum(os.times()[:4])
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread, or its child, has just ended
            for child in (task / "children").read_text().split():
                fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
                total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def settle() -> None:
    """Wait for what a contestant prefetches for its next epoch: it is to count for it, and not to slow the next one."""
    before, now = -1.0, cpu_seconds()
    while now - before > 0.01:
        time.sleep(0.1)
        before, now = now, cpu_seconds()


def measure(contestants: dict[str, Epoch], rounds: int, *, warm_up: bool = True) -> dict[str, tuple[float, float]]:
    """Images a second and images a CPU-second, medians of the rounds; each first runs an epoch to warm up."""
    speeds = {name: [] for name in contestants}
    for number in range(0 if warm_up else 1, rounds + 1):
        for name, epoch in contestants.items():
            wall, cpu = time.perf_counter(), cpu_seconds()
            images = sum(epoch())
            wall = time.perf_counter() - wall
            settle()
            cpu = cpu_seconds() - cpu
            if number:
                speeds[name].append((images / wall, images / cpu))
    return {name: tuple(map(statistics.median, zip(*runs))) for name, runs in speeds.items()}


def contestants(root: Path, batch_size: int, device: str) -> dict[str, Epoch]:
    index = open_index(root)
    runs = {}
    for rand_augment in (False, True):
        for peer in ("fastdeit", "timm", "torchvision v2", "DALI"):
            make = {"timm": timm, "torchvision v2": torchvision, "DALI": dali}.get(peer)
            name = f"{peer}, RandAugment" if rand_augment else peer
            where = index if make is None else root
            runs[name] = (make or ours)(where, batch_size, device, rand_augment)
    return runs


def decoders(root: Path, batch_size: int) -> dict[str, Epoch]:
    """Decoding alone, of random crops, on the GPU."""
    runs = {}
    for load in (0.0, 0.5, 0.65, 0.8, 1.0):
        for threads in sorted({4, 8, CORES}):
            runs[f"decode, hw_decoder_load {load}, {threads} threads"] = _decoder(root, batch_size, threads, load, True)
    runs["decode, hw_decoder_load 1.0, chroma repeated"] = _decoder(root, batch_size, CORES, 1.0, False)
    return runs


def _decoder(root: Path, batch_size: int, threads: int, load: float, fancy: bool) -> Epoch:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=0, seed=0)
    def graph():
        encoded, labels = fn.readers.file(file_root=str(root / "train"), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(
            encoded, device="mixed", random_area=[0.08, 1.0], hw_decoder_load=load, jpeg_fancy_upsampling=fancy
        )
        return images, labels

    pipeline = graph()
    pipeline.build()
    steps = pipeline.epoch_size("reader") // batch_size
    return lambda: (len(pipeline.run()[1]) for _ in range(steps))


def ratio_to_timm(speeds: dict[str, tuple[float, float]], name: str) -> float:
    return speeds[name][1] / speeds["timm, RandAugment" if "RandAugment" in name else "timm"][1]


def headlines(speeds: dict[str, tuple[float, float]], device: str) -> Iterable[Headline]:
    """Images a second on a GPU; on the CPU a CPU-second. Of the peers only timm has the same RandAugment."""
    column, unit = (1, "images/CPU-s") if device == "cpu" else (0, "images/s")
    values = {name: speed[column] for name, speed in speeds.items()}
    plain = {name: values[name] for name in ("timm", "torchvision v2", "DALI")}
    equal = {"timm": values["timm, RandAugment"]}
    for what, ours, theirs in (
        (f"loader, random crops of {SIZE}", "fastdeit", plain),
        (f"loader, random crops of {SIZE}, RandAugment", "fastdeit, RandAugment", equal),
    ):
        peer = max(theirs, key=theirs.get)
        ratio = round(values[ours] / theirs[peer], 3)
        yield Headline(what, f"{values[ours]:,.0f} {unit}", peer, f"{theirs[peer]:,.0f} {unit}", ratio)


def needs_dali() -> None:
    """Ends in a sentence and exit code 2 where it is missing."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        print("error: this benchmark reads images, which needs DALI: pip install 'fastdeit[train]'", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--data-path", type=Path, help="a folder DIR/train/CLASS of JPEGs")
    own.add_argument("--images", type=int, help="how many to make without --data-path (400; for a GPU 4096)")
    own.add_argument("--batch-size", type=int, help="32; for a GPU 256")
    own.add_argument("--rounds", type=int, default=5)
    arguments = own.parse_args()
    needs_dali()
    on_gpu = arguments.device != "cpu"  # which takes an epoch of 400 images in too short a time to be measured
    arguments.images = arguments.images or (4096 if on_gpu else 400)
    arguments.batch_size = arguments.batch_size or (256 if on_gpu else 32)
    if arguments.quick:
        arguments.images, arguments.batch_size, arguments.rounds = 8, 4, 1
    columns = ("what", "cores", "images_per_s", "images_per_cpu_s", "cpu_ratio_to_timm")
    record = Record("pipeline", arguments, columns)
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.data_path or Path(folder)
        if arguments.data_path is None:
            make_images(root, arguments.images)
        runs = contestants(root, arguments.batch_size, arguments.device)
        if on_gpu:
            runs |= decoders(root, arguments.batch_size)
        speeds = measure(runs, arguments.rounds, warm_up=not arguments.quick)
    for name, (wall, cpu) in speeds.items():
        ratio = ratio_to_timm(speeds, name)
        record.rows.append([name, CORES, f"{wall:.1f}", f"{cpu:.1f}", f"{ratio:.3f}"])
        figures = f"{wall:8.0f} images/s{cpu:8.0f} per CPU-second{ratio:6.2f} x timm"
        print(f"{name:46}{' runs' if arguments.quick else figures}")
    record.headlines += headlines(speeds, arguments.device)
    record.write()
    if (chart := record.path("pipeline.png")) is not None:
        titles = (f"images/s, {CORES} cores", "images per CPU-second")
        charts.bars({title: {name: v[i] for name, v in speeds.items()} for i, title in enumerate(titles)}, chart)


if __name__ == "__main__":
    main()
