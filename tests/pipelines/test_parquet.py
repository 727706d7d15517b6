"""Parquet files: found, read, labelled, and never the end of a run when they are damaged."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards
from shards import IMAGES, assert_holds, table

from fastdeit.pipelines.index import parquet as parquet_module
from fastdeit.pipelines.index.image_index import open_index

parquet_fixture = shards.two_parquet_files


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


@pytest.mark.parametrize("columns", [{"image_id": pa.array([7])}, {"width": pa.array([7]), "height": pa.array([9])}])
def test_a_number_is_no_label_unless_it_is_called_one(tmp_path, columns):
    pq.write_table(pa.table({**columns, "image": pa.array(IMAGES[:1])}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=f"has the labels; give --label-column one of {', '.join(columns)}"):
        open_index(tmp_path)
    index = open_index(tmp_path, label_column=min(columns))
    assert index.classes == (str(columns[min(columns)][0]),)
    with pytest.raises(ValueError, match="there is no label column 'cat'"):
        open_index(tmp_path, label_column="cat")


def test_the_column_with_class_names_is_the_label_and_that_is_said(tmp_path, caplog):
    pq.write_table(
        table([2], IMAGES[:1], label="species").append_column("id", pa.array([7])), tmp_path / "train.parquet"
    )
    assert open_index(tmp_path).classes == ("ant", "bee", "cat")
    assert caplog.messages == [f"the 'train' split of {tmp_path}: the labels are in the column species"]


def test_class_names_of_each_file_count(parquet):
    pq.write_table(table([0, 2], IMAGES[:2], names=("cat", "bee", "dog")), parquet / "data/train-2.parquet")
    index = open_index(parquet)
    assert index.classes == ("ant", "bee", "cat", "dog")
    assert index.labels.tolist() == [0, 0, 1, 2, 0, 2, 2, 3]
    pq.write_table(table([0], IMAGES[:1], names=None), parquet / "data/train-3.parquet")
    with pytest.raises(ValueError, match=r"train-3\.parquet has numbers as labels and no class names"):
        open_index(parquet)
    pq.write_table(table([-1], IMAGES[:1]), parquet / "data/train-3.parquet")
    with pytest.raises(ValueError, match=r"train-3\.parquet: the label -1 is not among the 3 classes"):
        open_index(parquet)


@pytest.mark.parametrize(
    "labels, classes, positions",
    [
        (pa.array(["b", "a", "b"]).dictionary_encode(), ("a", "b"), [1, 0, 1]),  # a category of pandas
        (pa.array([True, False, True]), ("False", "True"), [1, 0, 1]),
        (pa.array(["10", "9", "10"]), ("9", "10"), [1, 0, 1]),
        (pa.array([50000, 7, 50000]), ("7", "50000"), [1, 0, 1]),
        (pa.array([1.0, 0.0, 1.0]), ("0", "1"), [1, 0, 1]),  # integers of pandas, once one of them was missing
        (pa.array([3, 1, 3], pa.uint8()), ("1", "3"), [1, 0, 1]),
    ],
)
def test_kinds_of_label_columns(tmp_path, labels, classes, positions):
    pq.write_table(pa.table({"image": pa.array(IMAGES[:3]), "label": labels}), tmp_path / "train.parquet")
    index = open_index(tmp_path)
    assert_holds(index, IMAGES[:3], positions)
    assert index.classes == classes


def test_a_row_group_is_read_in_pieces(tmp_path, monkeypatch):
    """Arrow refuses a struct column of more than 2 GiB in one piece."""
    pq.write_table(table([0, 1, 2, 0, 1, 2]), tmp_path / "train.parquet")
    pieces = []
    original = parquet_module._binary
    monkeypatch.setattr(
        parquet_module, "_binary", lambda batch, image: pieces.append(len(batch)) or original(batch, image)
    )
    monkeypatch.setattr(parquet_module, "BATCH_BYTES", sum(map(len, IMAGES)) // 2)
    assert_holds(open_index(tmp_path), IMAGES, [0, 1, 2, 0, 1, 2])
    assert max(pieces) < 4 and sum(pieces) == 12


def test_an_unreadable_row_group_counts_with_its_rows(tmp_path):
    pq.write_table(table([0, 1, 2, 0, 1, 2]), tmp_path / "train.parquet", row_group_size=3, compression="snappy")
    offset = pq.ParquetFile(tmp_path / "train.parquet").metadata.row_group(0).column(0).dictionary_page_offset or 4
    with open(tmp_path / "train.parquet", "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 200)
    index = open_index(tmp_path)
    assert_holds(index, IMAGES[3:], [0, 1, 2])
    (bad,) = index.bad
    assert bad.images == 3 and bad.cause.startswith("row group 0 cannot be read")


def test_bad_rows_and_a_damaged_file(parquet):
    pq.write_table(table([0, None, 1, 1], [None, IMAGES[0], b"", IMAGES[1]]), parquet / "data/train-2.parquet")
    (parquet / "data/train-3.parquet").write_bytes(b"PAR1 cut")
    index = open_index(parquet)
    assert_holds(index, [*IMAGES, IMAGES[1]], [0, 0, 1, 2, 0, 2, 1])
    bad = [(name.removeprefix(f"{parquet}/data/train-"), cause) for name, cause, _ in index.bad]
    assert bad[1:] == [
        ("2.parquet:0", "no bytes in this row (only a path?)"),
        ("2.parquet:1", "no label"),
        ("2.parquet:2", "empty file"),
    ]
    assert bad[0][0] == "3.parquet" and bad[0][1].startswith("cannot be read as Parquet")
    assert index.bad[0].images == 4  # as many as the others usually have


def test_row_groups_leave_the_cache_when_it_is_full(parquet, monkeypatch):
    monkeypatch.setattr(parquet_module, "CACHE_BYTES", 2500)
    index = open_index(parquet)
    for i in [0, 5, 3, 1, 4, 2] * 3:
        assert index.encoded(i).tobytes() == IMAGES[i]
        assert index.reader.cached_bytes <= 2500 or len(index.reader.groups) == 1
    assert len(index.reader.groups) < 3
