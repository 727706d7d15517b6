"""Small WebDataset tars and Parquet files, and what an index of them must hold."""

import io
import json
import tarfile

import odd_images
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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


@pytest.fixture(name="tars")
def two_tars(tmp_path):
    write_tar(tmp_path / "train-000000.tar", labelled(["a/0", "a/1", "b/2"], [0, 0, 1]))
    write_tar(tmp_path / "train-000001.tar", labelled(["c/3", "a/4", "c/5"], [2, 0, 2], IMAGES[3:]))
    return tmp_path


def table(labels, images=IMAGES, names=("ant", "bee", "cat"), label="label"):
    image = pa.array(
        [{"bytes": i, "path": None} for i in images], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    built = pa.table({"image": image, label: pa.array(labels, pa.int64())})
    if names is None:
        return built
    features = {"image": {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    return built.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@pytest.fixture(name="parquet")
def two_parquet_files(tmp_path):
    (tmp_path / "data").mkdir()
    pq.write_table(table([0, 0, 1, 2], IMAGES[:4]), tmp_path / "data/train-00000-of-00002.parquet", row_group_size=3)
    pq.write_table(table([0, 2], IMAGES[4:]), tmp_path / "data/train-00001-of-00002.parquet")
    return tmp_path
