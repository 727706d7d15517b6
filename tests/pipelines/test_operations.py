"""Each operation alone over its range, against Pillow through timm's functions: in Pillow, and as a DALI graph."""

from collections.abc import Callable

import numpy as np
import pytest
import timm.data.auto_augment as timm_aa
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images

pytest.importorskip("nvidia.dali")

from nvidia.dali import fn, pipeline_def, types

from fastdeit.pipelines.augment.operations import GEOMETRIC, Operation, affine_matrices
from fastdeit.pipelines.decode.cpu import apply_operations
from fastdeit.pipelines.decode.dali_operations import layer

FILL, SIZE, BATCH = (124, 116, 104), 224, 32
ENHANCE = np.linspace(0.1, 1.9, BATCH)


def _timm(name: str, convert: Callable = float) -> Callable:
    def run(image, arg, resample):
        args = () if timm_aa.LEVEL_TO_ARG[name] is None else (convert(arg),)
        return timm_aa.NAME_TO_OP[name](image, *args, fillcolor=FILL, resample=resample)

    return run


def _blur(image, arg, resample):
    return image.filter(ImageFilter.GaussianBlur(radius=float(arg)))


# operation: (timm's function, its range, DALI's mean error, DALI's largest error); in levels of 255
OPERATIONS = {
    Operation.AUTO_CONTRAST: (_timm("AutoContrast"), np.zeros(BATCH), 0.02, 1),
    Operation.EQUALIZE: (_timm("Equalize"), np.zeros(BATCH), 0.6, 1),
    Operation.INVERT: (_timm("Invert"), np.zeros(BATCH), 0, 0),
    Operation.POSTERIZE: (_timm("Posterize", int), np.arange(BATCH) % 8 + 1, 0, 0),
    Operation.SOLARIZE: (_timm("Solarize", int), np.linspace(0, 256, BATCH).round(), 0, 0),
    Operation.SOLARIZE_ADD: (_timm("SolarizeAdd", int), np.linspace(0, 128, BATCH).round(), 0, 0),
    Operation.COLOR: (_timm("Color"), np.r_[0, ENHANCE[1:]], 0, 0),
    Operation.CONTRAST: (_timm("Contrast"), ENHANCE, 0, 0),
    Operation.BRIGHTNESS: (_timm("Brightness"), ENHANCE, 0, 0),
    Operation.SHARPNESS: (_timm("Sharpness"), ENHANCE, 0.25, 100),  # inside the border exact: tested below
    Operation.BLUR: (_blur, np.linspace(0.1, 2, BATCH), 1.0, 40),
    Operation.ROTATE: (_timm("Rotate"), np.linspace(-30, 30, BATCH), 0.7, 90),
    Operation.SHEAR_X: (_timm("ShearX"), np.linspace(-0.3, 0.3, BATCH), 0.7, 90),
    Operation.SHEAR_Y: (_timm("ShearY"), np.linspace(-0.3, 0.3, BATCH), 0.7, 90),
    Operation.TRANSLATE_X: (_timm("TranslateXRel"), np.linspace(-0.45, 0.45, BATCH), 0.7, 90),
    Operation.TRANSLATE_Y: (_timm("TranslateYRel"), np.linspace(-0.45, 0.45, BATCH), 0.7, 90),
}


@pytest.fixture(scope="module")
def images():
    """(BATCH, SIZE, SIZE, 3) uint8: photographs, some of low contrast, one of a single colour."""
    random = np.random.default_rng(0)
    batch = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)
    for number in range(BATCH):
        photo = load_sample_images().images[number % 2]
        top, left = random.integers(photo.shape[0] - SIZE), random.integers(photo.shape[1] - SIZE)
        batch[number] = photo[top : top + SIZE, left : left + SIZE]
    batch[-4:-1] = batch[-4:-1] // 3 + 40
    batch[-1] = (10, 200, 90)
    return batch


def in_dali(images, op: Operation, args: np.ndarray) -> np.ndarray:
    ops = np.full(len(images), Operation.ROTATE if op in GEOMETRIC else op, np.int32)
    matrices = affine_matrices(np.full(len(images), op), args, images.shape[1:3])

    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None, enable_conditionals=True)
    def graph():
        def one(values, dtype, ndim):
            return fn.external_source(source=lambda: values, batch=True, dtype=dtype, ndim=ndim)

        image = fn.reshape(one(images, types.UINT8, 3), layout="HWC")
        op_node, arg, matrix = one(ops, types.INT32, 0), one(args, types.FLOAT, 0), one(matrices, types.FLOAT, 2)
        return layer(image, op_node, arg, matrix, {op, Operation.IDENTITY}, FILL)

    pipeline = graph()
    pipeline.build()
    return np.stack([np.asarray(image) for image in pipeline.run()[0]])


@pytest.mark.parametrize("op", list(OPERATIONS), ids=lambda op: op.name.lower())
def test_in_pillow_is_timms(op, images):
    function, args, *_ = OPERATIONS[op]
    for image, arg in zip(images[::3], np.float32(args)[::3]):
        ours = apply_operations(image, [int(op)], [float(arg)], FILL)
        theirs = np.asarray(function(Image.fromarray(image), arg, Image.Resampling.BICUBIC))
        # The matrix passes through float32, which may move a sample over a rounding edge.
        assert (np.abs(ours.astype(int) - theirs) > (1 if op in GEOMETRIC else 0)).mean() == 0


@pytest.mark.parametrize("op", list(OPERATIONS), ids=lambda op: op.name.lower())
def test_in_dali_is_timms(op, images):
    function, args, mean, largest = OPERATIONS[op]
    args = args.astype(np.float32)
    theirs = [np.asarray(function(Image.fromarray(i), a, Image.Resampling.BILINEAR)) for i, a in zip(images, args)]
    error = np.abs(in_dali(images, op, args).astype(int) - np.stack(theirs))
    if op == Operation.SHARPNESS:
        assert error[:, 1:-1, 1:-1].max() == 0
    assert error.mean((1, 2, 3)).max() <= mean and error.max() <= largest


def test_identity_leaves_the_image_alone(images):
    assert np.array_equal(in_dali(images, Operation.IDENTITY, np.zeros(BATCH, np.float32)), images)
    assert np.array_equal(apply_operations(images[0], [0, 0], [0.0, 0.0], FILL), images[0])


@pytest.mark.parametrize("op", GEOMETRIC, ids=lambda op: op.name.lower())
def test_on_an_image_that_is_no_square(op, images):
    test_in_pillow_is_timms(op, np.ascontiguousarray(images[:, 20 : 20 + SIZE // 2]))
    test_in_dali_is_timms(op, np.ascontiguousarray(images[:, :, 30 : 30 + 3 * SIZE // 4]))
