"""Odd images are indexed, bad ones are left out with their cause, reported once, counted and listed."""

import logging

import odd_images
import pytest
from PIL import Image

from fastdeit.pipelines.bad_files import LOGGED, BadFiles, TooManyBadFiles
from fastdeit.pipelines.index.image_index import open_index
from fastdeit.pipelines.index.inspection import inspect_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    bad = {name: contents for name, (contents, _) in odd_images.bad_by_header().items()}
    odd_images.write(root / "train/bad", bad)
    odd_images.write(root / "train/good", odd_images.odd_but_good() | odd_images.bad_by_body())
    (root / "train/bad/dangling.jpg").symlink_to(root / "nowhere.jpg")
    return root


@pytest.mark.parametrize("name", odd_images.odd_but_good())
def test_size_of_odd_images(name):
    contents = odd_images.odd_but_good()[name]
    assert inspect_bytes(contents)[:2] == (odd_images.HEIGHT, odd_images.WIDTH)
    assert inspect_bytes(memoryview(contents))[:2] == (odd_images.HEIGHT, odd_images.WIDTH)


@pytest.mark.parametrize("size", [(1, 1), (255, 256), (256, 255), (3000, 2)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_sizes_agree_with_pillow(format, size):
    assert inspect_bytes(odd_images.encoded(Image.new("RGB", size[::-1]), format))[:2] == size


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_header_cut_anywhere_gives_a_size_or_a_cause(format):
    contents = odd_images.encoded(odd_images.picture(), format)
    for length in range(0, len(contents), 7):
        try:
            assert inspect_bytes(contents[:length])[:2] == (odd_images.HEIGHT, odd_images.WIDTH)
        except ValueError as cause:
            assert str(cause)


def test_bad_files_are_left_out_with_their_cause(folder):
    index = open_index(folder)
    causes = {name.removeprefix(f"{folder}/train/bad/"): cause for name, cause, _ in index.bad}
    expected = {name: cause for name, (_, cause) in odd_images.bad_by_header().items()}
    assert causes == expected | {"dangling.jpg": "cannot be opened (No such file or directory)"}
    assert len(index) == len(odd_images.odd_but_good()) + len(odd_images.bad_by_body())
    assert index.classes == ("bad", "good") and set(index.labels) == {1}


def test_each_is_reported_once_and_listed(tmp_path, caplog):
    bad_files = BadFiles(1000, path=tmp_path / "run/bad_files.txt")
    with caplog.at_level(logging.WARNING):
        bad_files.report("a.jpg", "truncated\n in the  middle")
        bad_files.report("b.jpg", "vanished")
        bad_files.report("a.jpg", "truncated again")
    assert len(bad_files) == 2 and "a.jpg" in bad_files
    assert caplog.messages == ["bad image a.jpg: truncated in the middle", "bad image b.jpg: vanished"]
    assert (tmp_path / "run/bad_files.txt").read_text() == "a.jpg\ttruncated in the middle\nb.jpg\tvanished\n"


def test_a_resumed_run_adds_to_the_list(tmp_path):
    path = tmp_path / "bad_files.txt"
    BadFiles(1000, path=path).report("a.jpg", "empty")
    resumed = BadFiles(1000, path=path)
    assert len(resumed) == 0
    resumed.report("a.jpg", "empty")
    resumed.report("b\udcff.jpg", "empty")
    assert path.read_bytes() == b"a.jpg\tempty\nb\xff.jpg\tempty\n"


def test_names_that_would_break_the_list(tmp_path):
    names = ["a\tb.jpg", "a\nb\r.jpg", "a\\nb.jpg", "a\\\nb\udcff.jpg"]
    bad_files = BadFiles(1000, path=tmp_path / "bad_files.txt")
    for name in names:
        bad_files.report(name, "empty")
    lines = (tmp_path / "bad_files.txt").read_bytes().splitlines()
    assert lines[0] == b"a\\tb.jpg\tempty" and all(line.count(b"\t") == 1 for line in lines) and len(lines) == 4
    assert BadFiles(1000, path=tmp_path / "bad_files.txt").listed == set(names)


def test_more_than_the_limit_stops(tmp_path):
    bad_files = BadFiles(200, limit=0.01)
    bad_files.report("a", "x")
    bad_files.report("b", "x")
    with pytest.raises(TooManyBadFiles, match=r"3 of 200 images \(1\.50%\).* more than the 1\.00%.*last one is c: x"):
        bad_files.report("c", "x")
    with pytest.raises(ValueError, match="fraction from 0 to 1"):
        BadFiles(10, limit=5)


def test_bad_files_of_an_index(folder, tmp_path):
    index = open_index(folder)
    with pytest.raises(TooManyBadFiles, match=rf"{len(index.bad)} of {len(index) + len(index.bad)} images"):
        BadFiles.of(index, path=tmp_path / "bad_files.txt")
    assert len((tmp_path / "bad_files.txt").read_text().splitlines()) == len(index.bad)
    assert len(BadFiles.of(index, limit=0.5)) == len(index.bad)


def test_the_log_stays_readable(caplog):
    bad_files = BadFiles(10_000, limit=1)
    for i in range(100):
        bad_files.report(str(i), "empty")
    assert len(caplog.messages) == LOGGED + 1 and "not logged" in caplog.messages[-1]
