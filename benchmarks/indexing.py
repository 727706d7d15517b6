"""Opening a data set costs microseconds per image, from the cache less: names, labels and sizes of all images.

    python -m benchmarks.indexing [--images 50000]

Ours reads every header (height, width, bad files), of class folders and of tar shards, first without and then with the
cache. Peers: torchvision's ImageFolder and timm's folder reader, which list files but know neither sizes nor bad files;
the standard library's tarfile, which lists members; Pillow's lazy open, for the sizes. Floor: listing the folder and
reading the first 4 KiB of each file.

The files are small generated JPEGs in the page cache: this measures the host, not the disk. Interleaved, medians of
--rounds, of wall time and of the CPU time of all threads (less sensitive to other load); writes
records/cpu/indexing.csv.
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
from pathlib import Path

import numpy as np
from PIL import Image

from fastdeit.cli import FoldedHelp
from fastdeit.pipelines import open_index

CLASSES = 100
SHARDS = 20
RECORD = Path(__file__).parent / "records" / "cpu" / "indexing.csv"


def make_images(root: Path, images: int) -> None:
    """root/folder/train/CLASS/*.jpg and, with the same contents, root/tar/train-*.tar."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    encoded = stream.getvalue()
    (root / "tar").mkdir()
    for name in range(CLASSES):
        (root / f"folder/train/{name:03d}").mkdir(parents=True)
    tars = [tarfile.open(root / f"tar/train-{shard:06d}.tar", "w") for shard in range(SHARDS)]
    for i in range(images):
        (root / f"folder/train/{i % CLASSES:03d}/{i:06d}.jpg").write_bytes(encoded)
        for name, contents in ((f"{i:06d}.jpg", encoded), (f"{i:06d}.cls", str(i % CLASSES).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tars[i * SHARDS // images].addfile(info, io.BytesIO(contents))
    for tar in tars:
        tar.close()


def ours(path: Path, cache: Path | None) -> None:
    open_index(path, "train", cache_dir=cache)


def read_heads(train: Path) -> None:
    for folder in os.scandir(train):
        for file in os.scandir(folder.path):
            file.stat()
            descriptor = os.open(file.path, os.O_RDONLY)
            os.pread(descriptor, 4096, 0)
            os.close(descriptor)


def torchvision_folder(train: Path) -> None:
    from torchvision.datasets import ImageFolder

    ImageFolder(train)


def timm_folder(train: Path) -> None:
    from timm.data.readers import create_reader

    create_reader("", str(train))


def pillow_sizes(train: Path) -> None:
    for file in train.glob("*/*.jpg"):
        with Image.open(file) as image:
            assert image.size == (80, 60)


def tarfile_members(folder: Path) -> None:
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard, "r:") as tar:
            assert tar.getmembers()


def contestants(root: Path) -> dict[str, Callable[[], None]]:
    folder, train, tar, cache = root / "folder", root / "folder/train", root / "tar", root / "cache"
    ours(folder, cache)
    ours(tar, cache)
    return {
        "ours, folder, first": lambda: ours(folder, None),
        "ours, folder, cached": lambda: ours(folder, cache),
        "ours, tar, first": lambda: ours(tar, None),
        "ours, tar, cached": lambda: ours(tar, cache),
        "torchvision ImageFolder (no sizes)": lambda: torchvision_folder(train),
        "timm folder reader (no sizes)": lambda: timm_folder(train),
        "Pillow sizes": lambda: pillow_sizes(train),
        "tarfile members (no sizes)": lambda: tarfile_members(tar),
        "floor: list, read 4 KiB": lambda: read_heads(train),
    }


def measure(root: Path, rounds: int) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds, medians of the rounds."""
    runs = contestants(root)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: tuple(map(statistics.median, zip(*times))) for name, times in seconds.items()}


def write_record(seconds: dict[str, tuple[float, float]], images: int) -> None:
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    with RECORD.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "images", "cores", "seconds", "cpu_seconds", "cpu_us_per_image"])
        for name, (wall, cpu) in seconds.items():
            each = cpu / images * 1e6
            print(f"{name:36}{wall:8.2f} s {cpu:8.2f} CPU s {each:8.1f} CPU us an image")
            cores = len(os.sched_getaffinity(0))
            writer.writerow([name, images, cores, f"{wall:.3f}", f"{cpu:.3f}", f"{each:.2f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FoldedHelp)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), arguments.images)
        write_record(measure(Path(folder), arguments.rounds), arguments.images)


if __name__ == "__main__":
    main()
