"""Stored values as labels: what counts as one, and which values must not become one by rounding or guessing."""

import pytest

from fastdeit.pipelines import natural_order
from fastdeit.pipelines.index.labels import label_of, number_labels


@pytest.mark.parametrize(
    "stored, label",
    [
        (3, 3),
        (1.0, 1),
        (0.5, None),
        (float("nan"), None),
        (float("inf"), None),
        (True, "True"),
        (b"ant\n", "ant"),
        ("007", "007"),
        (" \n", None),
        ("cafe\u0301", "caf\u00e9"),  # NFC
        (b"caf\xe9", "caf\\xe9"),  # Latin-1
        (None, None),
        ([1], None),
    ],
)
def test_a_stored_value_as_a_label(stored, label):
    found = label_of(stored)
    assert found == label and type(found) is type(label)


@pytest.mark.parametrize(
    "stored, declared, labels, classes",
    [
        (["10", 9, "10"], (), [1, 0, 1], ("9", "10")),  # numbers sort as numbers
        (["b10", "b9"], (), [0, 1], ("b10", "b9")),  # names as strings, as torchvision does
        (["007", "8"], (), [0, 1], ("007", "8")),  # 007 is a name, so 8 is one too
        ([1, 0], ("ant", "bee", "cat"), [1, 0], ("ant", "bee", "cat")),
        (["bee"], ("ant", "bee"), [1], ("ant", "bee")),
        (["1", "0"], ("1", "0"), [0, 1], ("1", "0")),  # declared names that are digits
    ],
)
def test_labels_and_classes(stored, declared, labels, classes):
    found, names, are_declared = number_labels(stored, declared)
    assert (found.tolist(), names, are_declared) == (labels, classes, bool(declared))


@pytest.mark.parametrize(
    "stored, declared, message",
    [
        ([0, "ant"], (), r"mix labels that are numbers \(0\) and names"),
        ([2], ("ant", "bee"), "the label 2, but only 2 class names"),
        (["cat"], ("ant", "bee"), "the class cat"),
        ([-1, 0], (), "negative label -1"),
    ],
)
def test_labels_that_are_refused(stored, declared, message):
    with pytest.raises(ValueError, match=message):
        number_labels(stored, declared)


def test_natural_order():
    assert natural_order(["n10", "n9", "N2", "a"]) == ["a", "N2", "n9", "n10"]
