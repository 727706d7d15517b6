"""Indexing: layouts, labels, sizes, the cache, and what is said when something is wrong."""

import os
import pickle
import socket
import struct

import numpy as np
import pytest
from PIL import Image

from fastdeit.pipelines.index import image_index as index_module
from fastdeit.pipelines.index.image_index import open_files, open_folder, open_index

SIZES = {"cat/1.jpg": (30, 40), "cat/2.png": (50, 20), "dog/deep/3.JPEG": (33, 31), "dog/4.bmp": (10, 11)}


def write_images(folder, sizes=SIZES):
    for name, (height, width) in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height), (200, 30, 90)).save(folder / name)


@pytest.fixture
def data(tmp_path):
    write_images(tmp_path / "data/train")
    write_images(tmp_path / "data/val", {"cat/v.jpg": (9, 8), "dog/w.jpg": (7, 6)})
    return tmp_path / "data"


def test_folder_of_classes(data):
    index = open_index(data, "train")
    assert index.classes == ("cat", "dog")
    names = [os.path.relpath(index.name(i), data / "train") for i in range(len(index))]
    assert names == ["cat/1.jpg", "cat/2.png", "dog/4.bmp", "dog/deep/3.JPEG"]
    assert index.labels.tolist() == [0, 0, 1, 1] and index.labels.dtype == np.int64
    assert list(zip(index.heights, index.widths)) == [SIZES[name] for name in names]
    assert index.heights.dtype == index.widths.dtype == np.int32
    assert index.path(0) == str(data / "train/cat/1.jpg")
    assert index.encoded(0).tobytes() == (data / "train/cat/1.jpg").read_bytes()
    assert index.bad == ()


def test_hidden_files_and_other_extensions_are_ignored(data):
    (data / "train/cat/.hidden.jpg").write_bytes(b"junk")
    (data / "train/cat/notes.txt").write_text("junk")
    (data / "train/.cache").mkdir()
    index = open_index(data)
    assert len(index) == 4 and index.classes == ("cat", "dog") and index.bad == ()


def test_links_are_followed_and_a_loop_ends(data, tmp_path):
    write_images(tmp_path / "elsewhere", {"linked.jpg": (12, 13)})
    (data / "train/cat/more").symlink_to(tmp_path / "elsewhere")
    (data / "train/cat/loop").symlink_to(data / "train/cat")
    (data / "train/cow").symlink_to(tmp_path / "elsewhere")
    index = open_index(data)
    assert index.classes == ("cat", "cow", "dog")
    assert index.labels.tolist() == [0, 0, 0, 1, 2, 2]


def test_a_link_to_a_folder_around_it_is_no_class(data):
    (data / "train/cat/all").symlink_to(data / "train")
    (data / "train/all").symlink_to(data)
    (data / "train/itself").symlink_to(".")
    index = open_index(data)
    assert index.classes == ("cat", "dog") and index.labels.tolist() == [0, 0, 1, 1] and index.bad == ()
    assert len(open_folder(data / "train/cat")) == 2


def test_links_that_lead_nowhere(data):
    (data / "train/endless").symlink_to("endless")
    (data / "train/cat/endless").symlink_to("endless")
    (data / "train/cat/gone").symlink_to("nowhere")
    (data / "train/cat/notes.txt").symlink_to("nowhere")
    index = open_index(data)
    assert len(index) == 4 and index.classes == ("cat", "dog")
    assert {os.path.relpath(bad.name, data / "train"): bad.cause for bad in index.bad} == {
        "endless": "cannot be opened (Too many levels of symbolic links)",
        "cat/endless": "cannot be opened (Too many levels of symbolic links)",
        "cat/gone": "cannot be opened (No such file or directory)",
    }
    (data / "train/fox").symlink_to("/mnt/disk/fox")
    with pytest.raises(ValueError, match=r"train/fox links to /mnt/disk/fox, which does not exist: mount it"):
        open_index(data)


def test_what_is_no_regular_file_is_not_waited_for(data):
    os.mkfifo(data / "train/cat/pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        directory = os.open(data / "train/cat", os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{directory}/socket.jpg")  # the path itself may be too long for one
        os.close(directory)
    (data / "train/cat/zero.jpg").symlink_to("/dev/zero")
    index = open_index(data)
    assert len(index) == 4
    assert {os.path.basename(bad.name): bad.cause for bad in index.bad} == {
        "pipe.jpg": "cannot be opened (not a regular file)",
        "socket.jpg": "cannot be opened (No such device or address)",
        "zero.jpg": "cannot be opened (not a regular file)",
    }
    with pytest.raises(ValueError, match="not a regular file"):
        open_files([data / "train/cat/pipe.jpg"])


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_shards_that_are_pipes_are_not_waited_for(tmp_path, suffix):
    os.mkfifo(tmp_path / f"train.{suffix}")
    with pytest.raises(ValueError, match="not a regular file"):
        open_index(tmp_path)


@pytest.mark.parametrize("pixels", [(2**32 - 1, 2**32 - 1), (65535, 65535), (2**31, 1)])
def test_a_header_of_billions_of_pixels(data, pixels):
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", *pixels, 8, 2, 0, 0, 0, 0)
    (data / "train/cat/huge.png").write_bytes(header + bytes(100))
    index = open_index(data)
    assert len(index) == 4 and [os.path.basename(bad.name) for bad in index.bad] == ["huge.png"]
    if max(pixels) >= 2**31:
        assert index.bad[0].cause == f"damaged header: {pixels[0]} x {pixels[1]} pixels"


def test_folders_of_the_system_are_no_classes(data):
    for name in ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "cat/@eaDir"):
        write_images(data / "train" / name, {"thumb.jpg": (9, 9)})
    index = open_index(data)
    assert index.classes == ("cat", "dog") and len(index) == 4


@pytest.mark.parametrize("stray", ["n01440764.tar", "index.parquet", "dog/masks.tar"])
def test_archives_do_not_hide_class_folders(data, stray, caplog):
    (data / "train" / stray).write_bytes(b"an archive")
    index = open_index(data)
    assert index.classes == ("cat", "dog") and len(index) == 4 and index.bad == ()
    said = "" if "/" in stray else f"class folders and train/{stray} are both in train/: the class folders are used"
    assert [said] == [message.partition(": ")[2] for message in caplog.messages] or not said


def test_what_is_not_used_is_said(data, caplog):
    write_images(data / "train", {"stray.jpg": (9, 9)})
    (data / "train/eel").mkdir()
    (data / "train/eel/1.npy").touch()
    assert len(open_index(data)) == 4
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "1 image beside the class folders not used (stray.jpg)",
        "1 of its 3 classes without images (eel); the first holds 1 other file (1.npy, ...)",
    ]


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_class_names_in_another_unicode_form_are_the_same(tmp_path):
    write_images(tmp_path / "train", {f"{COMPOSED}/1.png": (9, 9), "tea/1.png": (9, 9)})
    write_images(tmp_path / "val", {f"{DECOMPOSED}/1.png": (9, 9), "tea/1.png": (9, 9)})
    classes = open_index(tmp_path).classes
    assert classes == (COMPOSED, "tea")
    assert open_index(tmp_path, "val", classes=classes).labels.tolist() == [0, 1]
    assert open_index(tmp_path, "val", classes=(DECOMPOSED, "tea")).labels.tolist() == [0, 1]
    write_images(tmp_path / "train", {f"{DECOMPOSED}/2.png": (9, 9)})
    index = open_index(tmp_path)
    assert sorted(index.classes) == [COMPOSED, "tea"] and np.bincount(index.labels).tolist() == [2, 1]


def test_class_names_can_be_written_anywhere(tmp_path):
    for name in (b"\xff", b"a\nb", b"$x_{$"):
        folder = os.fsdecode(os.fsencode(tmp_path / "train") + b"/" + name)
        os.makedirs(folder)
        Image.new("RGB", (9, 8)).save(folder + "/1.png")
    index = open_index(tmp_path)
    assert index.classes == ("$x_{$", "a\\nb", "\\xff")
    assert all(len(index.encoded(i)) for i in range(3))


def test_labels_of_val_follow_the_training_classes(data):
    train = open_index(data, "train")
    assert open_index(data, "val", classes=("dog", "cat")).labels.tolist() == [1, 0]
    assert open_index(data, "val", classes=train.classes).labels.tolist() == [0, 1]


def test_an_empty_class_folder_keeps_its_label(data):
    (data / "train/bat").mkdir()
    index = open_index(data, "train")
    assert index.classes == ("bat", "cat", "dog") and index.labels.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "classes, message",
    [(("cat", "cow", "dog"), "it lacks cow; give it the same"), (("cat",), "it has dog, unknown to training")],
)
def test_other_classes_than_in_training_are_named(data, classes, message):
    with pytest.raises(ValueError, match=message):
        open_index(data, "val", classes=classes)


@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_other_names_of_the_validation_split(data, name, caplog):
    (data / "val").rename(data / name)
    index = open_index(data, "val")
    assert len(index) == 2 and index.split == name
    assert caplog.messages == [f"the 'val' split of {data}: the folder '{name}' is used as 'val', which does not exist"]


def test_wrong_paths_say_what_was_expected(data, tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        open_index(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no split 'train': expected train/CLASS.*it holds cat, dog"):
        open_index(data / "train")
    (tmp_path / "flat/train").mkdir(parents=True)
    (tmp_path / "flat/train/1.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no class folders.*it holds 1\.jpg; open_folder"):
        open_index(tmp_path / "flat")
    (tmp_path / "empty/train/cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"the 1 class folders of .* hold no images"):
        open_index(tmp_path / "empty")


def test_unlabelled_folder_and_files(data):
    index = open_folder(data)
    assert len(index) == 6 and set(index.labels) == {-100} and index.classes == ()
    chosen = open_files([data / "val/dog/w.jpg", data / "train/cat"])
    assert [os.path.basename(chosen.name(i)) for i in range(3)] == ["w.jpg", "1.jpg", "2.png"]
    with pytest.raises(ValueError, match=r"no file or folder .*gone\.jpg"):
        open_files([data / "gone.jpg"])
    with pytest.raises(ValueError, match="there is no folder"):
        open_folder(data / "gone")


def test_no_readable_image_at_all_is_an_error(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image that can be read \(1 bad files: .*a\.jpg: empty file"):
        open_folder(tmp_path)


def test_the_cache_is_used_until_the_files_change(data, tmp_path, monkeypatch):
    reads = []
    original = index_module._KINDS["folder"]
    counted = (lambda listing: reads.append(1) or original[0](listing), original[1])
    monkeypatch.setitem(index_module._KINDS, "folder", counted)
    cache = tmp_path / "cache"
    (data / "train/dog/bad.jpg").write_bytes(b"")

    first = open_index(data, cache_dir=cache)
    again = open_index(data, cache_dir=cache)
    assert len(reads) == 1
    for name in ("labels", "heights", "widths"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert (first.classes, first.bad, first.fingerprint) == (again.classes, again.bad, again.fingerprint)
    assert [first.name(i) for i in range(4)] == [again.name(i) for i in range(4)]
    assert open_index(data, "val", cache_dir=cache).labels.tolist() == [0, 1] and len(reads) == 2

    write_images(data / "train", {"cat/1.jpg": (300, 400)})  # rewritten
    assert open_index(data, cache_dir=cache).heights[0] == 300 and len(reads) == 3
    (data / "train/cat/2.png").unlink()
    assert len(open_index(data, cache_dir=cache)) == 3 and len(reads) == 4
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])  # damaged
    assert len(open_index(data, cache_dir=cache)) == 3 and len(reads) == 5


def test_the_fingerprint_tells_contents_from_times_and_places(data):
    before = open_index(data).fingerprint
    os.utime(data / "train/cat/1.jpg", (1, 1))
    moved = data.rename(data.parent / "moved")
    assert open_index(moved).fingerprint == before
    assert open_index(moved, classes=("dog", "cat")).fingerprint != before
    (moved / "train/cat/1.jpg").rename(moved / "train/cat/0.jpg")
    assert open_index(moved).fingerprint != before


def test_so_does_that_of_a_folder_without_classes(data, monkeypatch):
    before = open_folder(data).fingerprint
    moved = data.rename(data.parent / "moved")
    assert open_folder(moved).fingerprint == before
    monkeypatch.chdir(moved)
    assert open_folder("train/..").fingerprint == before
    (moved / "train/cat/1.jpg").rename(moved / "train/cat/0.jpg")
    assert open_folder(moved).fingerprint != before


def test_an_index_pickles(data):
    index = pickle.loads(pickle.dumps(open_index(data)))
    assert index.classes == ("cat", "dog") and len(index.encoded(3)) > 0


def test_a_name_that_is_not_utf8(data):
    raw = os.fsencode(data / "train/cat") + b"/\xff\xfe.jpg"
    os.rename(data / "train/cat/1.jpg", os.fsdecode(raw))
    index = open_index(data)
    assert os.fsencode(index.path(1)) == raw and len(index.encoded(1)) > 0


def test_a_file_that_vanishes_after_indexing_raises_oserror(data):
    index = open_index(data)
    (data / "train/cat/1.jpg").unlink()
    with pytest.raises(OSError):
        index.encoded(0)
