"""Images as plain files: class folders, or any files without labels."""

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastdeit.pipelines.bad_files import BadFile, printable

from .inspection import BadHeader, Inspected, columns, inspect
from .labels import UNLABELLED, class_name
from .records import Listing, Names, Records

# Files with these extensions (in either case) are indexed, others are ignored. GIF, AVIF, HEIC and JPEG XL cannot be
# decoded; they are listed as bad, because users expect them to be used.
IMAGE_EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .gif .avif .heic .heif .jxl".split()
)

# Folders of operating systems and network storage, with thumbnails and deleted files; ignored, as hidden ones are.
_SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "@tmp", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "lost+found",
     "$RECYCLE.BIN", "RECYCLER", "System Volume Information", "__pycache__")
)  # fmt: skip

THREADS = 16  # for network disks with high latency; a local disk is as fast with one
CHUNK = 512  # files per task

Found = tuple[str, int, int]  # path relative to the folder, bytes, mtime in ns


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden or belongs to the operating system. name: without its folder"""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def list_class_folders(root: str, split_folder: str) -> Listing:
    """root/split_folder/CLASS/**: the label is the position of CLASS among the sorted class folders, as in torchvision.

    Folders may be nested, and links are followed, except to a folder that contains them; hidden and system names are
    ignored. A class folder without images keeps its label. Two folders whose names differ only in Unicode form are one
    class. Raises ValueError for a link to a missing folder: it may be a class.
    """
    base = os.path.join(root, split_folder)
    folders, strays, endless = _class_folders(base)
    classes = tuple(dict.fromkeys(map(class_name, folders)))
    label_of = {name: label for label, name in enumerate(classes)}
    around = _ancestors(base)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: sorted(_walk(os.path.join(base, name), "", around)), folders))
    files = [os.path.join(split_folder, name, f[0]) for name, per_class in zip(folders, found) for f in per_class]
    labels = np.repeat([label_of[class_name(name)] for name in folders], [len(per_class) for per_class in found])
    stats = [f[1:] for per_class in found for f in per_class]
    files += [os.path.join(split_folder, name) for name in endless]
    stats += [(0, 0)] * len(endless)
    labels = np.concatenate([labels, np.full(len(endless), UNLABELLED)]).astype(np.int64)
    notes = (*_stray_images(strays), *_empty_classes(base, folders, classes, labels))
    return Listing("folder", root, files, *stat_columns(stats), classes, labels, notes=notes)


def holds_no_images(base: str) -> bool:
    """Whether a folder has no class folder with an image in it."""
    return not any(next(_walk(os.path.join(base, name), "", frozenset()), None) for name in _class_folders(base)[0])


def _class_folders(base: str) -> tuple[list[str], list[str], list[str]]:
    """(sorted names of the folders in `base`, images beside them, links that lead to themselves)"""
    folders, strays, endless = [], [], []
    around = _ancestors(base)
    for entry in os.scandir(base):
        if is_ignored(entry.name):
            continue
        if _is_folder(entry):
            here = os.stat(entry.path)
            if (here.st_dev, here.st_ino) not in around:  # a link to a folder that contains it is no class
                folders.append(entry.name)
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS:
            strays.append(entry.name)
        elif entry.is_symlink() and not re.search(r"\.[A-Za-z]\w{1,4}$", entry.name):
            try:
                entry.stat()
            except FileNotFoundError:
                target = os.readlink(entry.path)
                raise ValueError(
                    f"{entry.path} links to {target}, which does not exist: mount it, or remove the link"
                ) from None
            except OSError:
                endless.append(entry.name)
    return sorted(folders), sorted(strays), sorted(endless)


def _ancestors(folder: str) -> frozenset[tuple[int, int]]:
    """(device, inode) of a folder and its parents."""
    path = Path(folder).resolve()
    return frozenset((seen.st_dev, seen.st_ino) for seen in (os.stat(place) for place in (path, *path.parents)))


def _stray_images(names: list[str]) -> tuple[str, ...]:
    few = ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")
    what = f"{len(names)} images" if len(names) > 1 else "1 image"
    return (f"{what} beside the class folders not used ({few})",) if names else ()


def _empty_classes(base: str, folders: list[str], classes: tuple[str, ...], labels: np.ndarray) -> tuple[str, ...]:
    filled = {classes[label] for label in np.unique(labels[labels >= 0]).tolist()}
    empty = [name for name in folders if class_name(name) not in filled]
    if not empty:
        return ()
    files = [file for _, _, some in os.walk(os.path.join(base, empty[0])) for file in some]
    others = f"{len(files)} other files" if len(files) > 1 else "1 other file"
    held = f"; the first holds {others} ({printable(min(files))}, ...)" if files else ""
    few = ", ".join(map(printable, empty[:5])) + (", ..." if len(empty) > 5 else "")
    return (f"{len(empty)} of its {len(classes)} classes without images ({few}){held}",)


def list_folder(root: str) -> Listing:
    """All images under `root`, without labels."""
    found = _walk_sorted(root)
    return Listing("folder", root, [f[0] for f in found], *stat_columns([f[1:] for f in found]))


def list_files(paths: Sequence[str]) -> Listing:
    """Files (any ending) and folders (walked, images only), without labels, in the order given."""
    files, stats = [], []
    for path in paths:
        if os.path.isdir(path):
            found = _walk_sorted(path)
            files += [os.path.join(path, f[0]) for f in found]
            stats += [f[1:] for f in found]
        elif os.path.exists(path):
            seen = os.stat(path)
            files.append(path)
            stats.append((seen.st_size, seen.st_mtime_ns))
        else:
            raise ValueError(f"there is no file or folder {path}: check the path")
    return Listing("folder", "", files, *stat_columns(stats))


def _walk_sorted(folder: str) -> list[Found]:
    here = os.stat(folder)
    return sorted(_walk(folder, "", _ancestors(folder) - {(here.st_dev, here.st_ino)}))


def _walk(folder: str, below: str, ancestors: frozenset[tuple[int, int]]) -> Iterator[Found]:
    """Images under folder/below; `ancestors` (device, inode) stop the recursion at a link to a parent folder.

    Broken links that may be to an image or a folder of images are listed too, and found bad when they are read.
    """
    here = os.stat(os.path.join(folder, below))
    identity = (here.st_dev, here.st_ino)
    if identity in ancestors:
        return
    with os.scandir(os.path.join(folder, below)) as entries:
        for entry in entries:
            if is_ignored(entry.name):
                continue
            relative = os.path.join(below, entry.name)
            ending = os.path.splitext(entry.name)[1].lower()
            if _is_folder(entry):
                yield from _walk(folder, relative, ancestors | {identity})
            elif ending in IMAGE_EXTENSIONS or (not ending and entry.is_symlink() and not os.path.exists(entry.path)):
                yield relative, *size_and_mtime(entry)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def size_and_mtime(entry: os.DirEntry | Path) -> tuple[int, int]:
    """Bytes and nanoseconds; both 0 for a broken link."""
    try:
        seen = entry.stat()
        return seen.st_size, seen.st_mtime_ns
    except OSError:
        return 0, 0


def stat_columns(stats: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    columns = np.array(stats, np.int64).reshape(-1, 2)
    return columns[:, 0].copy(), columns[:, 1].copy()


def read_records(listing: Listing) -> Records:
    """Read the header of every file."""
    starts = range(0, len(listing.files), CHUNK)
    with ThreadPoolExecutor(THREADS) as pool:
        chunks = pool.map(lambda s: [_inspect_or_cause(listing.root, f) for f in listing.files[s : s + CHUNK]], starts)
        results = [result for chunk in chunks for result in chunk]
    good = np.array([not isinstance(result, str) for result in results], bool)
    labels = np.full(len(results), UNLABELLED, np.int64) if listing.labels is None else listing.labels
    return Records(
        names=Names.pack(file for file, ok in zip(listing.files, good) if ok),
        sizes=listing.sizes[good],
        labels=labels[good],
        **columns([result for result in results if not isinstance(result, str)]),
        classes=listing.classes,
        classes_are_declared=True,
        bad=tuple(BadFile(file, cause) for file, cause in zip(listing.files, results) if isinstance(cause, str)),
    )


def _inspect_or_cause(root: str, file: str) -> Inspected | str:
    try:
        descriptor = open_file(os.path.join(root, file))
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


def open_file(path: str) -> int:
    """A descriptor for reading. Raises OSError for what is not a regular file; does not block on a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor


def _read_at(descriptor: int, offset: int, count: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size - offset if count < 0 else count, offset)


class FolderReader:
    """Reads plain files."""

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
