"""The study of data efficiency: its data, its record and its table, on made-up images and results."""

import gzip

import numpy as np
import pytest
from PIL import Image

from benchmarks import data_efficiency, fashion_mnist
from benchmarks.data_efficiency import ALONE, Results
from benchmarks.studies import gain_in_words
from fastdeit.errors import UserError


@pytest.fixture
def source(tmp_path):
    """Fashion-MNIST's four files, whose images say which they are: 60 of each class to train on, 2 to test."""
    folder = tmp_path / "source"
    folder.mkdir()
    for part, each in (("train", 60), ("t10k", 2)):
        labels = np.arange(10 * each, dtype=np.uint8) % 10
        images = np.zeros((len(labels), 28, 28), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = labels, np.arange(len(labels)) // 10
        for name, header, data in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + data.tobytes()))
    return folder


def pixels(folder):
    """{(class, number) as the image says: the folder it is in}"""
    found = {}
    for file in sorted(folder.rglob("*.png")):
        image = np.asarray(Image.open(file))
        found[int(image[0, 0]), int(image[0, 1])] = file.parent.name
    return found


def test_training_sets_are_balanced_and_nested_and_share_no_image_with_others(source, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "SIZES", (20, 50, 100))
    monkeypatch.setattr(fashion_mnist, "CHOICE", 50)
    monkeypatch.setattr(fashion_mnist, "UNLABELLED", 80)
    root = fashion_mnist.write(tmp_path / "data", source)
    sets = {size: pixels(root / str(size) / "train") for size in (20, 50, 100)}
    for size, images in sets.items():
        assert len(images) == size and list(images.values()).count("sneaker") == size // 10
        assert all(fashion_mnist.CLASSES[label] == folder for (label, _), folder in images.items())
        assert images.keys() == pixels(root / f"choice-{size}" / "train").keys()
    assert sets[20].keys() < sets[50].keys() < sets[100].keys()
    others = [pixels(root / "choice-20" / "val").keys(), pixels(root / "unlabelled").keys()]
    assert [len(other) for other in others] == [50, 80]
    assert not others[0] & others[1] and not (others[0] | others[1]) & sets[100].keys()
    assert len(list((root / "50" / "val").rglob("*.png"))) == 20
    assert fashion_mnist.write(root, tmp_path / "nowhere") == root


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no train-images"):
        fashion_mnist.write(tmp_path / "data", tmp_path)


def test_the_table_has_paired_gains_and_the_record_is_read_back(tmp_path):
    results = Results(tmp_path / "record.csv")
    for seed, alone, hard in ((0, 0.70, 0.73), (1, 0.75, 0.76), (2, 0.80, 0.85)):
        results.add(1_000, ALONE, seed, {"cls": alone}, "")
        results.add(1_000, "hard", seed, {"cls": 0.1, "dist": 0.2, "both": hard}, 0.9)
    read = Results(tmp_path / "record.csv")
    assert read.has(1_000, "hard", 2) and not read.has(5_000, "hard", 2)
    rows = {line.split(" | ")[0]: line for line in read.table().splitlines()}
    assert rows["| labels alone"] == "| labels alone | 75.0 |  |  |"
    # Gains 3, 1 and 5: mean 3, standard deviation 2, standard error 2 / sqrt(3).
    assert rows["| hard"] == "| hard | 78.0 (+3.0 ± 1.2) |  |  |"
    assert rows["| *the CNN*"] == "| *the CNN* | 90.0 |  |  |"
    assert "mean over 3 seeds" in read.in_words()
    read.summarise()
    assert (tmp_path / "record.md").read_text() == read.table() and (tmp_path / "record.png").stat().st_size > 5_000
    read.add(5_000, ALONE, 0, {"cls": 0.8}, "")
    assert "mean over 1 to 3 seeds" in read.in_words()


def test_gains_of_one_seed_have_no_error():
    assert gain_in_words([-1.26]) == "-1.3"


@pytest.mark.parametrize(("images", "epochs"), [(1_000, 125), (5_000, 24), (20_000, 6), (40_000, 3)])
def test_all_sizes_train_for_about_the_same_number_of_steps(tmp_path, images, epochs):
    flags = data_efficiency.Study(tmp_path, data_efficiency.STEPS, Results(tmp_path / "record.csv")).length(images)
    assert flags.split()[:2] == ["--epochs", str(epochs)]
    assert abs(epochs * (images // data_efficiency.BATCH) - data_efficiency.STEPS) <= 20
