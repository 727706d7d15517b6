"""WebDataset tars: found, read, labelled, and never the end of a run when they are damaged."""

import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import odd_images
import pytest
import shards
from shards import IMAGES, assert_holds, labelled, write_tar

from fastdeit.pipelines.bad_files import BadFiles, TooManyBadFiles
from fastdeit.pipelines.index import webdataset
from fastdeit.pipelines.index.image_index import open_index

tars_fixture, parquet_fixture = shards.two_tars, shards.two_parquet_files


def test_webdataset(tars):
    index = open_index(tars)
    assert_holds(index, IMAGES, [0, 0, 1, 2, 0, 2])
    assert index.classes == ("0", "1", "2")
    assert index.name(4) == f"{tars}/train-000001.tar:a/4.jpg"
    assert not index.encoded(0).flags.writeable


def test_webdataset_with_class_names(tars):
    (tars / "classes.txt").write_text("ant\nbee\ncat\n")
    assert open_index(tars).classes == ("ant", "bee", "cat")
    (tars / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match="hold the label 2, but only 2 class names"):
        open_index(tars)


@pytest.mark.parametrize("place", ["val/0.tar", "val.tar", "validation-00.tar", "imagenet1k-val-07.tar"])
def test_labels_of_a_validation_shard(tars, place):
    write_tar(tars / place, labelled(["v"], [2], IMAGES[:1]))
    classes = open_index(tars).classes
    assert_holds(open_index(tars, "val", classes=classes), IMAGES[:1], [2])
    with pytest.raises(ValueError, match="has 2, unknown to training"):
        open_index(tars, "val", classes=("0", "1"))


def test_labels_in_json_and_as_names(tmp_path):
    parts = [
        ("0.jpg", IMAGES[0]),
        ("0.json", json.dumps({"label": "dog"}).encode()),
        ("1.cls", b"cat\n"),
        ("1.seg.png", b"a mask"),
        ("1.jpg", IMAGES[1]),
        ("2.txt", b"a caption without an image"),
    ]
    write_tar(tmp_path / "train.tar", parts)
    index = open_index(tmp_path)
    assert_holds(index, IMAGES[:2], [1, 0])
    assert index.classes == ("cat", "dog")
    write_tar(tmp_path / "val.tar", labelled(["0", "1"], ["dog", "cat"]))
    assert open_index(tmp_path, "val", classes=("dog", "cat")).labels.tolist() == [0, 1]


def names_of(index):
    return [index.records.names[i] for i in range(len(index))]


@pytest.mark.parametrize(
    "members, samples",
    [
        # keys with dots
        ("v1.5.jpg v1.5.cls=1 v1.6.jpg v1.6.cls=0", {"v1.5.jpg": 1, "v1.6.jpg": 0}),
        ("img.1.jpg img.2.jpg img.2.json=0 img.1.json=1", {"img.1.jpg": 1, "img.2.jpg": 0}),
        ("7.left.jpg 7.cls=1 8.left.jpg 8.cls=0", {"7.left.jpg": 1, "8.left.jpg": 0}),
        ("7.jpg 7.cls=0 7.1.jpg 7.1.cls=1", {"7.jpg": 0, "7.1.jpg": 1}),
        # a key twice, in any order
        ("7.jpg 7.cls=0 7.jpg 7.cls=1", {"7.jpg": [0, 1]}),
        ("7.cls=0 7.jpg 7.cls=1 7.png", {"7.jpg": 0, "7.png": 1}),
        ("7.jpg 7.cls=0 7.png 7.cls=1", {"7.jpg": 0, "7.png": 1}),
        ("7.l.jpg 7.cls=0 7.l.jpg 7.cls=1", {"7.l.jpg": [0, 1]}),
        # upper case, folders, links, hidden files
        ("./a/7.JPG ./a/7.CLS=1 b/7.jpg b/7.cls=0", {"./a/7.JPG": 1, "b/7.jpg": 0}),
        ("7.jpg 7.cls=1 8.jpg>7.jpg 8.cls>7.cls", {"7.jpg": 1, "8.jpg": 1}),
        ("7.jpg 7.cls=1 7.jpg>7.jpg 7.cls>7.cls", {"7.jpg": [1, 1]}),  # as GNU tar writes a file it is given twice
        ("._7.jpg ._7.cls=9 7.jpg 7.cls=1 __MACOSX/7.jpg __MACOSX/7.cls=1", {"7.jpg": 1}),
    ],
)
def test_samples_by_their_names(tmp_path, members, samples):
    write_members(tmp_path / "train.tar", members)
    index = open_index(tmp_path)
    found = {}
    for name, label in zip(names_of(index), index.labels.tolist()):
        found.setdefault(name, []).append(int(index.classes[label]))
    assert found == {name: labels if isinstance(labels, list) else [labels] for name, labels in samples.items()}
    assert index.bad == ()


@pytest.mark.parametrize(
    "members, bad",
    [
        ("7.jpg 7.png 7.cls=1", {"7.png": "a second image under the key 7"}),
        ("7.cls=1 7.jpg 7.png", {"7.png": "a second image under the key 7"}),
        ("7.left.jpg 7.right.jpg 7.cls=1", {"7.right.jpg": "a second image under the key 7"}),
        ("7.jpg 7.cls=1 8.cls=1", {"8.cls": "no image of this name"}),
        ("7.jpg 7.cls=1 8.json=1", {"8.json": "no image of this name"}),
        ("7.jpg 7.cls=1 8.jpg>9.jpg 8.cls=1", {"8.jpg": "a link to 9.jpg, which is not in this shard"}),
        ("7.jpg 7.cls=1 8.jpg 8.cls>9.cls", {"8.jpg": "its label 8.cls: a link to 9.cls, which is not in this shard"}),
        ("7.jpg 7.cls=1 7.mask.png 8.mask.png 8.cls=1", {"8.cls": "no image of this name"}),
    ],
)
def test_what_is_no_sample_is_named(tmp_path, members, bad):
    write_members(tmp_path / "train.tar", members)
    index = open_index(tmp_path)
    assert len(index) == 1
    assert {one.name.partition(".tar:")[2]: one.cause.split(", which may")[0] for one in index.bad} == bad


def test_masks_are_counted_and_ignored(tmp_path, caplog):
    write_members(tmp_path / "train.tar", "7.jpg 7.cls=1 7.mask.png 8.jpg 8.cls=0 8.mask.png 8.txt 8.json")
    for _ in range(2):  # the second time from the cache
        index = open_index(tmp_path, cache_dir=tmp_path / "cache")
        assert names_of(index) == ["7.jpg", "8.jpg"] and index.bad == ()
    said = "2 further images of samples, such as KEY.mask.png beside KEY.jpg, are not used"
    assert caplog.messages == [f"the 'train' split of {tmp_path}: {said}"] * 2


def write_members(path, members):
    """NAME, NAME=LABEL or LINK>NAME"""
    with tarfile.open(path, "w") as tar:
        for member in members.split():
            name, _, label = member.partition("=")
            name, linked, target = name.partition(">")
            contents = (
                f'{{"label": {label or "null"}}}'.encode() if name.endswith("json") else label.encode() or IMAGES[0]
            )
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.LNKTYPE, target) if linked else (tarfile.REGTYPE, "")
            info.size = 0 if linked else len(contents)
            tar.addfile(info, io.BytesIO(contents))


def test_bad_members_and_a_shard_that_breaks_off(tars):
    parts = [("0.jpg", b""), ("0.cls", b"1"), ("1.jpg", IMAGES[0]), ("2.jpg", b"text"), ("2.json", b"{}")]
    write_tar(tars / "train-000002.tar", parts)
    whole = (tars / "train-000001.tar").read_bytes()
    (tars / "train-000001.tar").write_bytes(whole[: whole.index(IMAGES[4]) + 10])
    (tars / "train-000003.tar").write_bytes(b"x" * 2000)
    (tars / "train-000004.tar").write_bytes(b"")
    (tars / "train-000005.tar").write_bytes(b"\x1f\x8b" + b"x" * 2000)
    (tars / "train-000006.tar").symlink_to("gone.tar")
    index = open_index(tars)
    assert_holds(index, IMAGES[:4], [0, 0, 1, 2])
    no_label = "no label: neither .cls nor .json with 'label'"
    # 3 images are in each of the two whole shards; a sample takes about 2 KiB, and a shard 10 KiB
    assert [(name.removeprefix(f"{tars}/train-00000"), *rest) for name, *rest in index.bad] == [
        ("1.tar", "breaks off in the member a/4.jpg; the members before it are used; counted as 2 images", 2),
        ("3.tar", "no tar header at byte 0", 1),
        ("4.tar", "empty file; counted as 3 images", 3),
        ("5.tar", "compressed (gzip), which does not allow random access: decompress it", 1),
        ("6.tar", "cannot be opened (No such file or directory); counted as 3 images", 3),
        ("2.tar:0.jpg", "empty file", 1),
        ("2.tar:1.jpg", no_label, 1),
        ("2.tar:2.jpg", no_label, 1),
    ]
    with pytest.raises(TooManyBadFiles, match=r"13 of 17 images \(76.47%\)"):
        BadFiles.of(index, limit=0.76)


def test_an_unreadable_shard_counts_with_its_samples(tmp_path):
    for shard in range(4):
        write_tar(tmp_path / f"train-{shard}.tar", labelled(map(str, range(6)), range(6)))
    broken = tmp_path / "train-2.tar"
    broken.write_bytes(bytes(1000) + broken.read_bytes()[1000:])  # its start was never downloaded
    index = open_index(tmp_path)
    assert len(index) == 23 and index.bad[0].images == 1
    broken.write_bytes(os.urandom(broken.stat().st_size))
    index = open_index(tmp_path)
    assert len(index) == 18 and index.bad[0].images == 6
    with pytest.raises(TooManyBadFiles, match=r"6 of 24 images \(25.00%\)"):
        BadFiles.of(index, limit=0.2)


def test_a_shard_cut_after_indexing_raises_oserror(tars):
    index = open_index(tars)
    (tars / "train-000001.tar").write_bytes((tars / "train-000001.tar").read_bytes()[:600])
    with pytest.raises(OSError, match="truncated after it was indexed"):
        index.encoded(5)


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    for shard in range(12):
        write_tar(tmp_path / f"train-{shard:02d}.tar", labelled(["0"], [0], [IMAGES[shard % 6]]))
    monkeypatch.setattr(webdataset.resource, "getrlimit", lambda which: (8, 8))
    index = open_index(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    held = [index.encoded(i % 12) for i in range(24)]
    assert all(image.tobytes() == IMAGES[i % 6] for i, image in enumerate(held))
    del held
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_two_layouts_of_one_split_are_refused(tars):
    odd_images.write(tars / "train/cat", {"0.jpg": IMAGES[0]})
    with pytest.raises(ValueError, match=r"more than once, as folder .* and webdataset"):
        open_index(tars)


@pytest.mark.parametrize(
    "labels, classes, positions",
    [
        (["7", "50000", "12"], ("7", "12", "50000"), [0, 2, 1]),
        (["dog", "Cat", "dog"], ("Cat", "dog"), [1, 0, 1]),
        (["007", "010", "008"], ("007", "008", "010"), [0, 2, 1]),  # no numbers: str() does not write them so
        (["\ufeff1", "0\r\n", " 1 "], ("0", "1"), [1, 0, 1]),
    ],
)
def test_classes_are_the_labels_that_occur(tmp_path, labels, classes, positions):
    write_tar(tmp_path / "train.tar", labelled("abc", labels))
    index = open_index(tmp_path)
    assert index.classes == classes and index.labels.tolist() == positions
    write_tar(tmp_path / "val.tar", labelled("a", labels[2:]))
    assert open_index(tmp_path, "val", classes=index.classes).labels.tolist() == positions[2:]


def test_a_number_is_the_place_of_a_class_whose_name_is_another_number(tmp_path):
    """prepare writes such shards for the class folders 0 to 10."""
    (tmp_path / "classes.txt").write_text("0\n1\n10\n2\n")
    write_tar(tmp_path / "train.tar", labelled("abc", [2, 3, 1]))
    index = open_index(tmp_path)
    assert [index.classes[label] for label in index.labels] == ["10", "2", "1"]


@pytest.mark.parametrize(
    "label, message", [("-1", "negative label -1"), ("9" * 30, "does not fit 64 bits"), ("x", "mix")]
)
def test_labels_that_are_none(tmp_path, label, message):
    parts = [*labelled("a", [label]), ("b.jpg", IMAGES[1]), ("b.json", b'{"label": 1}')]
    write_tar(tmp_path / "train.tar", parts)
    with pytest.raises(ValueError, match=message):
        open_index(tmp_path)


@pytest.mark.parametrize("text", ["ant\nbee\ncat", "\ufeffant\r\nbee\r\ncat\r\n\r\n", "ant \nbee\ncat\n\n\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_class_names_however_an_editor_saves_them(tars, text, encoding):
    (tars / "classes.txt").write_bytes(text.encode(encoding))
    assert open_index(tars).classes == ("ant", "bee", "cat")


@pytest.mark.parametrize(
    "text, message",
    [
        (b"ant\n\ncat\n", "line 2 is empty"),
        (b"ant\nant\n", "ant more than once"),
        (b"caf\xe9\n", "not a text file in UTF-8"),
    ],
)
def test_class_names_that_would_shift_the_labels(tars, text, message):
    (tars / "classes.txt").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        open_index(tars)


def test_shards_without_samples(tmp_path):
    write_tar(tmp_path / "train.tar", [("readme.txt", b"hello")])
    with pytest.raises(ValueError, match="holds no images"):
        open_index(tmp_path)


# Tars and Parquet files


@pytest.mark.parametrize("source", ["tars", "parquet"])
def test_cache_pickle_and_threads(source, request, tmp_path):
    root = request.getfixturevalue(source)
    first, cached = (open_index(root, cache_dir=tmp_path / "cache") for _ in range(2))
    assert first.fingerprint == cached.fingerprint
    first.encoded(0)  # opens what does not pickle
    for index in (cached, pickle.loads(pickle.dumps(first))):
        with ThreadPoolExecutor(4) as pool:
            wanted = np.random.default_rng(0).integers(0, 6, 200)
            for i, data in zip(wanted, pool.map(index.encoded, wanted)):
                assert data.tobytes() == IMAGES[i]
