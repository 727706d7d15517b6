"""WebDataset tars and Parquet files: found, read, labelled, and never the end of a run when they are damaged."""

import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import odd_images
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdeit.pipelines import parquet as parquet_module
from fastdeit.pipelines import webdataset
from fastdeit.pipelines.index import open_index
from fastdeit.pipelines.tar_headers import BadTar, members

IMAGES = [odd_images.encoded(odd_images.picture(20 + i, 30 + i, seed=i)) for i in range(6)]


def write_tar(path, members, format=tarfile.GNU_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))


def labelled(keys, labels, images=IMAGES):
    for key, label, image in zip(keys, labels, images):
        yield f"{key}.jpg", image
        yield f"{key}.cls", str(label).encode()


def assert_holds(index, images, labels):
    assert index.labels.tolist() == labels
    assert [index.encoded(i).tobytes() for i in range(len(index))] == list(images)
    assert list(zip(index.heights, index.widths)) == [(20 + i, 30 + i) for i in map(IMAGES.index, images)]
    assert all(index.path(i) is None for i in range(len(index)))


# --- tar headers


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, format):
    names = ["a.jpg", "deep/" * 25 + "b.jpg", "c" * 99 + "d"]
    if format != tarfile.USTAR_FORMAT:
        names += ["e" * 180 + ".jpg", "é/ü.jpg"]
    write_tar(tmp_path / "x.tar", [(name, bytes(i * 300)) for i, name in enumerate(names)], format)
    contents = (tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert [tuple(m) for m in members(lambda at, n: contents[at : at + n], len(contents))] == expected


def test_folders_and_links_are_no_members(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in [("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE)]:
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    contents = (tmp_path / "x.tar").read_bytes()
    assert list(members(lambda at, n: contents[at : at + n], len(contents))) == []


def test_a_size_beyond_octal():
    header = bytearray(512)
    header[:1], header[124:136], header[156:157] = b"x", b"\x80" + (9 << 30).to_bytes(11, "big"), b"0"
    read = {0: bytes(header)}
    assert list(members(lambda at, n: read.get(at, bytes(512)), 10 << 30)) == [("x", 512, 9 << 30)]


def test_what_is_no_tar_says_so():
    with pytest.raises(BadTar, match="no tar header at byte 0"):
        list(members(lambda at, n: b"x" * n, 5000))


# --- WebDataset


@pytest.fixture
def tars(tmp_path):
    write_tar(tmp_path / "train-000000.tar", labelled(["a/0", "a/1", "b/2"], [0, 0, 1]))
    write_tar(tmp_path / "train-000001.tar", labelled(["c/3", "a/4", "c/5"], [2, 0, 2], IMAGES[3:]))
    return tmp_path


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


def test_bad_members_and_a_shard_that_breaks_off(tars):
    parts = [("0.jpg", b""), ("0.cls", b"1"), ("1.jpg", IMAGES[0]), ("2.jpg", b"text"), ("2.json", b"{}")]
    write_tar(tars / "train-000002.tar", parts)
    whole = (tars / "train-000001.tar").read_bytes()
    (tars / "train-000001.tar").write_bytes(whole[: whole.index(IMAGES[4]) + 10])
    (tars / "train-000003.tar").write_bytes(b"x" * 2000)
    (tars / "train-000004.tar").write_bytes(b"")
    index = open_index(tars)
    assert_holds(index, IMAGES[:4], [0, 0, 1, 2])
    assert [(name.removeprefix(f"{tars}/train-00000"), cause) for name, cause in index.bad] == [
        ("1.tar", "breaks off in the member a/4.jpg; the members before it are used"),
        ("2.tar:0.jpg", "empty file"),
        ("2.tar:1.jpg", "no label: neither .cls nor .json with 'label'"),
        ("2.tar:2.jpg", "no label: neither .cls nor .json with 'label'"),
        ("3.tar", "no tar header at byte 0; the members before it are used"),
    ]


def test_a_shard_cut_after_indexing_raises_oserror(tars):
    index = open_index(tars)
    (tars / "train-000001.tar").write_bytes((tars / "train-000001.tar").read_bytes()[:600])
    with pytest.raises(OSError, match="cut after it was indexed"):
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


def test_shards_without_samples(tmp_path):
    write_tar(tmp_path / "train.tar", [("readme.txt", b"hello")])
    with pytest.raises(ValueError, match="holds no images"):
        open_index(tmp_path)


# --- Parquet


def table(labels, images=IMAGES, names=("ant", "bee", "cat"), label="label"):
    image = pa.array(
        [{"bytes": i, "path": None} for i in images], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    built = pa.table({"image": image, label: pa.array(labels, pa.int64())})
    if names is None:
        return built
    features = {"image": {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    return built.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@pytest.fixture
def parquet(tmp_path):
    (tmp_path / "data").mkdir()
    pq.write_table(table([0, 0, 1, 2], IMAGES[:4]), tmp_path / "data/train-00000-of-00002.parquet", row_group_size=3)
    pq.write_table(table([0, 2], IMAGES[4:]), tmp_path / "data/train-00001-of-00002.parquet")
    return tmp_path


def test_parquet(parquet):
    index = open_index(parquet)
    assert_holds(index, IMAGES, [0, 0, 1, 2, 0, 2])
    assert index.classes == ("ant", "bee", "cat")
    assert index.name(5) == f"{parquet}/data/train-00001-of-00002.parquet:1"
    assert [index.encoded(i).tobytes() for i in (5, 0, 3, 2)] == [IMAGES[i] for i in (5, 0, 3, 2)]


@pytest.mark.parametrize("place", ["validation-0.parquet", "val/0000.parquet", "data/test-00000-of-00001.parquet"])
def test_labels_of_a_validation_file(parquet, place):
    (parquet / place).parent.mkdir(exist_ok=True)
    pq.write_table(table([1, 0], IMAGES[:2], names=("cat", "ant", "bee")), parquet / place)
    assert_holds(open_index(parquet, "val", classes=open_index(parquet).classes), IMAGES[:2], [0, 2])


def test_parquet_of_plain_columns(tmp_path):
    columns = {"id": pa.array([7, 8]), "png": pa.array(IMAGES[:2], pa.large_binary()), "class": pa.array(["b", "a"])}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    index = open_index(tmp_path)
    assert_holds(index, IMAGES[:2], [1, 0])
    assert index.classes == ("a", "b")


def test_parquet_with_unclear_columns(tmp_path):
    columns = {"a": pa.array([7]), "b": pa.array([7]), "image": pa.array(IMAGES[:1])}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"no column is clearly the one of the labels \(columns: a, b, image\)"):
        open_index(tmp_path)


def test_bad_rows_and_a_damaged_file(parquet):
    pq.write_table(table([0, None, 1, 1], [None, IMAGES[0], b"", IMAGES[1]]), parquet / "data/train-2.parquet")
    (parquet / "data/train-3.parquet").write_bytes(b"PAR1 cut")
    index = open_index(parquet)
    assert_holds(index, [*IMAGES, IMAGES[1]], [0, 0, 1, 2, 0, 2, 1])
    bad = [(name.removeprefix(f"{parquet}/data/train-"), cause) for name, cause in index.bad]
    assert bad[:3] == [
        ("2.parquet:0", "no bytes in this row (an image that is only a path?)"),
        ("2.parquet:1", "no label"),
        ("2.parquet:2", "empty file"),
    ]
    assert bad[3][0] == "3.parquet" and bad[3][1].startswith("cannot be read as Parquet")


def test_row_groups_leave_the_cache_when_it_is_full(parquet, monkeypatch):
    monkeypatch.setattr(parquet_module, "CACHE_BYTES", 2500)
    index = open_index(parquet)
    for i in [0, 5, 3, 1, 4, 2] * 3:
        assert index.encoded(i).tobytes() == IMAGES[i]
        assert index.reader.cached_bytes <= 2500 or len(index.reader.groups) == 1
    assert len(index.reader.groups) < 3


# --- all of them


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
