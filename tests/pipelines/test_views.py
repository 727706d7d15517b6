"""Whole views against Pillow and torchvision, replaying what was drawn: the CPU's way, and the graph of the GPU's."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_aa
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms

pytest.importorskip("nvidia.dali")

from fastdeit.pipelines import Augmentation
from fastdeit.pipelines.augment.operations import GEOMETRIC
from fastdeit.pipelines.augment.plan import EvaluationPlans, TrainPlans
from fastdeit.pipelines.decode.cpu import PILLOW_OPERATIONS, CpuDecoder
from fastdeit.pipelines.decode.gpu import GpuDecoder

B, SIZE, CPU = 32, (192, 256), torch.device("cpu")
NONE = Augmentation(aa="none", color_jitter=0)
AUGMENTATIONS = {
    "crop": NONE,
    "rand": Augmentation(),
    "3aug": Augmentation(aa="3aug"),
    "src": Augmentation(aa="none", color_jitter=0, src=True),
}


def train_plans(index, augmentation):
    return TrainPlans(index, batch_size=B, size=SIZE, augmentation=augmentation, seed=0, rank=0, world_size=1)


def on_cpu(index, augmentation):
    return CpuDecoder(index, B, SIZE, 2, augmentation.fill if augmentation else (0, 0, 0))


def as_graph(index, augmentation):
    """What runs on a GPU, built for the CPU."""
    return GpuDecoder(index, B, SIZE, 2, CPU, augmentation)


def made(views, plan) -> np.ndarray:
    views.feed(plan)
    views.start()
    return views.collect(plan).numpy()


def replay(index, plan, row: int, resample) -> np.ndarray:
    """The row of a plan in Pillow, timm and torchvision; `resample` for the geometric operations."""
    views = plan.views
    geometry = [field[row].tolist() for field in views.geometry]
    (top, left, height, width), resized, (y, x) = geometry
    image = Image.open(index.path(int(plan.indices[row]))).convert("RGB")
    image = image.crop((left, top, left + width, top + height)).resize(resized[::-1], Image.Resampling.BICUBIC)
    image = transforms.Pad(4, padding_mode="reflect")(image).crop((x + 4, y + 4, x + 4 + SIZE[1], y + 4 + SIZE[0]))
    if views.flip[row]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for op, arg in zip(views.ops[row].tolist(), views.args[row].tolist()):
        if op in GEOMETRIC:
            name = {12: "Rotate", 13: "ShearX", 14: "ShearY", 15: "TranslateXRel", 16: "TranslateYRel"}[op]
            image = timm_aa.NAME_TO_OP[name](image, arg, fillcolor=(124, 116, 104), resample=resample)
        elif op:
            image = PILLOW_OPERATIONS[op](image, arg)  # these are held against timm's in test_operations.py
    return np.asarray(image)


def mean_errors(index, plan, images, resample) -> np.ndarray:
    replayed = np.stack([replay(index, plan, row, resample) for row in range(B)])
    return np.abs(replayed.astype(int) - images).mean((1, 2, 3))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_train_view_on_the_cpu(photos, name):
    """Oracle: bicubic throughout."""
    plans, views = train_plans(photos, AUGMENTATIONS[name]), on_cpu(photos, AUGMENTATIONS[name])
    errors = np.concatenate(
        [mean_errors(photos, plans[step], made(views, plans[step]), Image.Resampling.BICUBIC) for step in range(2)]
    )
    assert np.median(errors) <= 0.02
    assert np.quantile(errors, 0.9) <= 0.5


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_train_view_as_a_graph(photos, name):
    """Oracle: the geometric operations bilinear, the resize bicubic."""
    plan, views = train_plans(photos, AUGMENTATIONS[name])[0], as_graph(photos, AUGMENTATIONS[name])
    errors = mean_errors(photos, plan, made(views, plan), Image.Resampling.BILINEAR)
    assert np.median(errors) <= (1.0 if name == "3aug" else 0.5)  # DALI's blur is another one
    assert np.quantile(errors, 0.9) <= (2.0 if name in ("rand", "3aug") else 0.5)


@pytest.mark.parametrize("make, bound", [(on_cpu, 0.02), (as_graph, 0.25)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_evaluation_view(photos, make, bound, crop_pct):
    transform = transforms.Compose(
        [
            ResizeKeepRatio([int(side / crop_pct) for side in SIZE], interpolation="bicubic"),
            transforms.CenterCrop(SIZE),
        ]
    )
    plan = EvaluationPlans(photos, batch_size=B, size=SIZE, crop_pct=crop_pct, rank=0, world_size=1)[1]
    images = made(make(photos, None), plan)
    expected = np.stack([np.asarray(transform(Image.open(photos.path(int(i))))) for i in plan.indices])
    error = np.abs(expected.astype(int) - images)
    assert error.mean((1, 2, 3)).max() <= bound and error.max() <= 16


def test_small_images_are_enlarged(tiny):
    plan = EvaluationPlans(tiny, batch_size=B, size=(16, 16), crop_pct=1.0, rank=0, world_size=1)[0]
    expected = [
        Image.open(tiny.path(int(i))).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC) for i in plan.indices
    ]
    for views, bound in (
        (CpuDecoder(tiny, B, (16, 16), 1, (0, 0, 0)), 0.05),
        (GpuDecoder(tiny, B, (16, 16), 1, CPU, None), 1.0),
    ):
        assert np.abs(np.stack(expected).astype(int) - made(views, plan)).mean() <= bound  # of noise
