"""Images as plain files: one folder a class, or any files without labels."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .inspection import BadHeader, Inspected, columns, inspect
from .names import Names
from .records import UNLABELLED, BadFile, Listing, Records

# Files with these endings (in either case) are looked at; all others are passed over in silence. The last line cannot
# be decoded: such files are listed as bad, because somebody expects them to be seen.
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .gif .avif .heic .heif .jxl".split()
)

THREADS = 16  # for disks and networks that answer late; a local disk is as fast with one
CHUNK = 512  # files a task

Found = tuple[str, int, int]  # path below the folder that was walked, bytes, mtime in ns


def list_class_folders(root: str, split_folder: str) -> Listing:
    """root/split_folder/CLASS/**: the label is the place of CLASS among the sorted class folders, as in torchvision.

    Folders may be nested and links are followed; hidden names are passed over. A class folder without images keeps
    its label.
    """
    base = os.path.join(root, split_folder)
    classes = tuple(sorted(e.name for e in os.scandir(base) if e.is_dir() and not e.name.startswith(".")))
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: _walk_sorted(os.path.join(base, name)), classes))
    files = [os.path.join(split_folder, name, f[0]) for name, per_class in zip(classes, found) for f in per_class]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(per_class) for per_class in found])
    stats = [f[1:] for per_class in found for f in per_class]
    return Listing("folder", root, files, *_stat_columns(stats), classes, labels)


def list_folder(root: str) -> Listing:
    """All images under `root`, without labels."""
    found = _walk_sorted(root)
    return Listing("folder", root, [f[0] for f in found], *_stat_columns([f[1:] for f in found]))


def list_files(paths: Sequence[str]) -> Listing:
    """Files (any ending) and folders (walked, images only), without labels, in the order given."""
    files, stats = [], []
    for path in paths:
        if os.path.isdir(path):
            found = _walk_sorted(path)
            files += [os.path.join(path, f[0]) for f in found]
            stats += [f[1:] for f in found]
        elif os.path.exists(path):
            stat = os.stat(path)
            files.append(path)
            stats.append((stat.st_size, stat.st_mtime_ns))
        else:
            raise ValueError(f"there is no file or folder {path}: check the path")
    return Listing("folder", "", files, *_stat_columns(stats))


def _walk_sorted(folder: str) -> list[Found]:
    return sorted(_walk(folder, "", ()))


def _walk(folder: str, below: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[Found]:
    """Images under folder/below; `ancestors` (device, inode) keep a link to a parent folder from running for ever."""
    here = os.stat(os.path.join(folder, below))
    identity = (here.st_dev, here.st_ino)
    if identity in ancestors:
        return
    with os.scandir(os.path.join(folder, below)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            relative = os.path.join(below, entry.name)
            if os.path.splitext(entry.name)[1].lower() in EXTENSIONS and not entry.is_dir():
                yield relative, *_size_and_mtime(entry)
            elif entry.is_dir():
                yield from _walk(folder, relative, (*ancestors, identity))


def _size_and_mtime(entry: os.DirEntry) -> tuple[int, int]:
    try:
        stat = entry.stat()
        return stat.st_size, stat.st_mtime_ns
    except OSError:  # a dangling link: listed, and found bad when it is read
        return 0, 0


def _stat_columns(stats: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    columns = np.array(stats, np.int64).reshape(-1, 2)
    return columns[:, 0].copy(), columns[:, 1].copy()


def read_records(listing: Listing) -> Records:
    """Read the header of every file."""
    starts = range(0, len(listing.files), CHUNK)
    with ThreadPoolExecutor(THREADS) as pool:
        chunks = pool.map(
            lambda s: [_inspected_or_cause(listing.root, f) for f in listing.files[s : s + CHUNK]], starts
        )
        results = [result for chunk in chunks for result in chunk]
    good = np.array([not isinstance(result, str) for result in results], bool)
    labels = np.full(len(results), UNLABELLED, np.int64) if listing.labels is None else listing.labels
    return Records(
        names=Names.pack(file for file, ok in zip(listing.files, good) if ok),
        sizes=listing.sizes[good],
        labels=labels[good],
        **columns([result for result in results if not isinstance(result, str)]),
        classes=listing.classes,
        classes_are_named=True,
        bad=tuple(BadFile(file, cause) for file, cause in zip(listing.files, results) if isinstance(cause, str)),
    )


def _inspected_or_cause(root: str, file: str) -> Inspected | str:
    try:
        descriptor = os.open(os.path.join(root, file), os.O_RDONLY)
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    try:
        return inspect(lambda offset, count: _read_at(descriptor, offset, count))
    except BadHeader as cause:
        return str(cause)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    finally:
        os.close(descriptor)


def _read_at(descriptor: int, offset: int, count: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size - offset if count < 0 else count, offset)


class FolderReader:
    """Encoded bytes and paths of plain files."""

    def __init__(self, root: str, records: Records):
        self.root = root
        self.absolute_root = os.path.abspath(root)
        self.names = records.names

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.names[i])

    def path(self, i: int) -> str:
        return os.path.join(self.absolute_root, self.names[i])

    def encoded(self, i: int) -> np.ndarray:
        return np.fromfile(self.path(i), np.uint8)
