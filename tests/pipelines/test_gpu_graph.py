"""The graph that runs on a GPU, as far as it can be looked at without one: DALI traces it, but does not build it."""

import pytest

pytest.importorskip("nvidia.dali")

import nvidia.dali.backend as dali
from nvidia.dali.pipeline import Pipeline

from fastdeit.pipelines import Augmentation
from fastdeit.pipelines.decode import DECODINGS
from fastdeit.pipelines.decode.graph import view_graph

REGISTERED = {
    "cpu": set(dali.RegisteredCPUOps(internal_ops=True)),
    "gpu": set(dali.RegisteredGPUOps(internal_ops=True)),
    "mixed": set(dali.RegisteredMixedOps(internal_ops=True)),
}
AUGMENTATIONS = {
    "evaluation": None,
    "crop": Augmentation(aa="none", color_jitter=0),
    "rand": Augmentation(),
    "3aug": Augmentation(aa="3aug"),
    "src": Augmentation(aa="none", src=True),
}


class Files:
    def path(self, i):
        return "a.jpg"


class Shards:
    def path(self, i):
        return None


def traced(monkeypatch, augmentation, index, device_id, decoding="regions"):
    """(name of the operator, its device, its description) of each operator, and the devices of the outputs."""
    monkeypatch.setattr(Pipeline, "build", Pipeline._build_graph)
    crop = "centre" if augmentation is None else "padded" if augmentation.src else "window"
    layers = augmentation.layers if augmentation else ()
    settings = {"size": (224, 192), "layers": layers, "crop": crop, "fill": (124, 116, 104), "decoding": decoding}
    pipeline = view_graph(index, 8, 2, device_id, **settings).pipeline
    operators = [(op._op.schema.Name(), op._op.device, op.spec) for op in pipeline._ops]
    return operators, [output.device for output in pipeline._graph_outputs]


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("index", [Files(), Shards()], ids=["files", "shards"])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_operator_exists_for_its_device(monkeypatch, name, index, decoding):
    operators, outputs = traced(monkeypatch, AUGMENTATIONS[name], index, 0, decoding)
    assert outputs == ["gpu"]
    for operator, device, _ in operators:
        assert operator in REGISTERED[device], f"there is no {operator} for device={device!r}"


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_inputs_are_where_the_operators_want_them(monkeypatch, name, decoding):
    operators, _ = traced(monkeypatch, AUGMENTATIONS[name], Files(), 0, decoding)
    for operator, device, spec in operators:
        devices = [spec.InputDevice(i) for i in range(spec.NumInput())]
        images, arguments = devices[: spec.NumRegularInput()], devices[spec.NumRegularInput() :]
        assert set(arguments) <= {"cpu"}, f"{operator} takes its arguments from the CPU"
        if operator == "_Shape":  # reads no pixels, wherever they are
            continue
        if device == "gpu":
            assert images[0] == "gpu"
            assert operator == "Filter" or set(images) == {"gpu"}  # a filter's kernel may come from the CPU
        else:
            assert set(images) <= {"cpu"}, f"{operator} would bring pixels back to the host"


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_go_to_the_gpu_once_and_stay(monkeypatch, name):
    """From the decoder on, the operators on images are those that the other tests run on the CPU."""

    def on_images(device_id):
        operators, _ = traced(monkeypatch, AUGMENTATIONS[name], Files(), device_id)
        decoder = [operator for operator, *_ in operators].index("decoders__ImageSlice")
        assert operators[decoder][1] == ("cpu" if device_id is None else "mixed")
        return [operator for operator, *_ in operators[decoder:]]

    assert on_images(0) == on_images(None)


def test_whole_images_are_decoded_and_cropped_on_the_gpu_or_windows_decoded_on_the_cpu(monkeypatch):
    def from_the_decoder_on(decoding):
        operators = [operator[:2] for operator in traced(monkeypatch, None, Files(), 0, decoding)[0]]
        place = [name.startswith("decoders__") for name, _ in operators].index(True)
        return [operator for operator in operators[place:] if operator != ("ExternalSource", "cpu")]

    after = [("Resize", "gpu"), ("Slice", "gpu"), ("Flip", "gpu")]
    assert from_the_decoder_on("whole") == [("decoders__Image", "mixed"), ("Slice", "gpu"), *after]
    assert from_the_decoder_on("cpu") == [("decoders__ImageSlice", "cpu"), *after]


def test_the_decoder_is_told_how_to_be_reproducible(monkeypatch):
    operators, _ = traced(monkeypatch, None, Files(), 0)
    (decoder,) = [str(spec) for operator, _, spec in operators if operator == "decoders__ImageSlice"]
    for setting in ("hw_decoder_load: 1.000000", "jpeg_fancy_upsampling: True", "adjust_orientation: False"):
        assert f"    {setting}\n" in decoder
