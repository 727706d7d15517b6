"""The probe of a GPU's decoders, with decoders of the CPU in their place: what each fault leads to."""

import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("nvidia.dali")

from fastdeit.pipelines import open_files
from fastdeit.pipelines.bad_files import DecodeError
from fastdeit.pipelines.decode import DECODINGS, probe
from fastdeit.pipelines.decode.graph import window_graph, window_inputs

HERE = "tests.pipelines.in_child"


def probed(index, regions, whole="right", seconds=30.0):
    decoders = {"regions": f"{HERE}:{regions}", "whole": f"{HERE}:{whole}"}
    return probe.probe(index, None, 1, decoders=decoders, seconds=seconds)


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(probe, "IMAGES", 4)


def test_the_fastest_decoding_needs_no_word_where_it_is_right(photos, few_images):
    assert probed(photos, "right") == ("regions", None)


@pytest.mark.parametrize(
    "regions, words",
    [
        ("crashes_in_decoding", ["ends its process with SIGSEGV", "nvImageCodec/issues/55"]),
        ("moved_by_a_pixel", ["levels on average", "2.5 are tolerated"]),
    ],
)
def test_a_fault_of_regions_leads_to_whole_images_and_a_sentence(photos, few_images, regions, words):
    decoding, sentence = probed(photos, regions)
    assert decoding == "whole" and "\n" not in sentence
    for word in ["decoding of regions on the GPU", "decoding of whole images on the GPU is used", *words]:
        assert word in sentence, sentence


def test_a_gpu_that_lets_no_second_process_in_is_no_fault_of_its_decoder(photos, few_images):
    decoding, sentence = probed(photos, "cannot_enter", "crashes_in_decoding")
    assert decoding == "whole" and "no second process" in sentence


@pytest.mark.parametrize(
    "change, nvjpeg, word",
    [
        (lambda image: image ^ 1, [13, 3], None),
        (lambda image: image, [13, 2], None),
        (lambda image: image, None, None),
        (lambda image: image, [13, 1], "nvJPEG 13.1"),
        (lambda image: image, [12, 9], "nvJPEG 12.9"),
        (lambda image: image[1:], [13, 3], "other sizes"),
        (lambda image: image[:, ::-1], [13, 3], "levels on average"),
        (lambda image: np.where(image < 128, image + 3, image - 3), [13, 3], "by 3.0 levels on average"),
    ],
)
def test_what_is_tolerated_of_pixels_and_of_nvjpeg(photos, few_images, tmp_path, change, nvjpeg, word):
    expected = probe.write_samples(photos, tmp_path / "samples.npz")
    reason = probe.reason_against("regions", nvjpeg, [*expected[:-1], change(expected[-1])], expected)
    assert reason is None if word is None else word in reason


def test_what_hangs_is_stopped_and_two_faults_lead_to_the_cpu(photos, few_images):
    decoding, sentence = probed(photos, "hangs_in_decoding", "raises_in_decoding", seconds=1.0)
    assert decoding == "cpu"
    for word in ("not finished after 1 s", "'#8'", "nvImageCodec/issues/55", "decoding on the CPU is used"):
        assert word in sentence, sentence


def test_samples_are_from_all_over_the_index_twice_each(photos, tmp_path):
    pixels = probe.write_samples(photos, tmp_path / "samples.npz")
    samples = probe.Samples(tmp_path / "samples.npz")
    assert len(samples) == len(pixels) == 2 * probe.IMAGES
    chosen = np.linspace(0, len(photos) - 1, probe.IMAGES).round().astype(int)
    for row, i in enumerate(np.tile(chosen, 2)):
        assert np.array_equal(samples.encoded(row), photos.encoded(i))
        top, left, height, width = samples.windows[row]
        whole = np.asarray(Image.open(photos.path(i)).convert("RGB"))
        assert np.array_equal(pixels[row], whole[top : top + height, left : left + width])
        assert height * width < whole[..., 0].size if row < probe.IMAGES else whole.shape == pixels[row].shape
    assert len(np.unique(samples.windows[: probe.IMAGES, 0])) > probe.IMAGES / 2


def test_images_that_cannot_be_read_are_left_out_and_large_ones_are_few(photos, tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(bytes(photos.encoded(number)))
    index = open_files([tmp_path])
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:5000])
    assert len(probe.write_samples(index, tmp_path / "samples.npz")) == 4
    monkeypatch.setattr(probe, "BYTES", 10)
    assert len(probe.write_samples(index, tmp_path / "samples.npz")) == 1
    for file in tmp_path.glob("*.jpg"):
        file.unlink()
    assert probed(index, "crashes_in_decoding") == ("regions", None)  # the run reports its bad files itself


def test_an_index_is_probed_once_in_a_process(photos, monkeypatch):
    probes = []
    monkeypatch.setattr(probe, "_found", {})
    monkeypatch.setattr(probe, "probe", lambda *arguments: probes.append(arguments) or probe.Choice("whole", "why"))
    assert [probe.trusted(photos, 0, 3) for _ in range(2)] == [("whole", "why")] * 2
    probe.trusted(photos, 1)
    assert [arguments[1:] for arguments in probes] == [(0, 3), (1, 4)]


@pytest.mark.parametrize("decoding", DECODINGS)
def test_every_decoding_gives_the_same_windows_and_refuses_the_same_images(photos, decoding):
    """On the CPU, where the graphs are those of a GPU but for the decoder."""
    indices, graph = np.arange(8), window_graph(photos, 8, 2, decoding=decoding)
    H, W = photos.heights[:8].astype(int), photos.widths[:8].astype(int)
    inputs = window_inputs(photos, indices, np.stack([H // 4, W // 3, H // 2, W // 2], 1))
    graph.submit(inputs)
    (windows,) = graph.collect()
    for i, window in enumerate(windows):
        whole = np.asarray(Image.open(io.BytesIO(bytes(photos.encoded(i)))))
        part = whole[H[i] // 4 : H[i] // 4 + H[i] // 2, W[i] // 3 : W[i] // 3 + W[i] // 2]
        assert np.array_equal(np.asarray(window), part)
    for name, wrong in (("encoded_bytes", inputs["encoded_bytes"] + 1), ("start", inputs["start"] + 600)):
        graph.submit(inputs | {name: wrong})
        with pytest.raises(DecodeError):
            graph.collect()
    graph.submit(inputs)
    graph.collect()


def test_the_version_of_nvjpeg_is_that_of_the_library():
    """NVIDIA's package numbers nvJPEG as the library does itself: 13.3.2.43 is 13.3."""
    from importlib import metadata

    files = metadata.files("nvidia-nvjpeg") if _installed("nvidia-nvjpeg") else None
    if files is None:
        pytest.skip("needs the package nvidia-nvjpeg")
    library = next(file for file in files if file.name.startswith("libnvjpeg.so"))
    version = [int(part) for part in metadata.version("nvidia-nvjpeg").split(".")[:2]]
    assert probe.version_of_nvjpeg(str(library.locate())) == version


def _installed(name):
    from importlib import metadata

    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.gpu
def test_a_gpu_is_probed_with_its_own_decoders(photos):
    choice = probe.probe(photos, 0, 4)
    assert choice.decoding in DECODINGS and (choice.sentence is None) == (choice.decoding == "regions")
