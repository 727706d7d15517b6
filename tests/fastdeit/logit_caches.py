"""A logit cache on small images, its teacher, and what reads and compares one."""

import json
import shutil

import numpy as np
import pytest
import torch

from fastdeit import teach, train
from fastdeit.cli import parse_config
from fastdeit.distill import cached_teacher, logit_cache
from fastdeit.distill.logit_cache import LogitCache
from fastdeit.distributed.world import join

from .conftest import SMALL, write_folder

# Everything random is on, so that the order, the pixels, the mixing and the erasing must all come out alike. 48 images
# in global batches of 8 are 6 steps an epoch, of which a third of the images is seen.
RECIPE = [
    *SMALL, *"--batch-size 8 --aa rand-m9-mstd0.5-inc1 --reprob 0.5 --mixup 0.8 --cutmix 1.0 --repeated-aug".split(),
    *"--hflip 0.5 --scale 0.3 1.0 --distillation-type hard --drop-path 0.1 --device cpu".split(),
]  # fmt: skip


@pytest.fixture(name="data", scope="module")
def data_fixture(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), train=16, val=4)


@pytest.fixture(name="teacher", scope="module")
def teacher_fixture(data, tmp_path_factory):
    """A CNN fitted to the colours, so that its decisions differ between images."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    arguments = (
        "--input-size 32 --batch-size 12 --epochs 8 --lr 4e-3 --unscale-lr --no-pretrained --num-workers 1".split()
    )
    config = parse_config(
        [*arguments, "--model", "test_resnet", "--data-path", str(data), "--output-dir", str(folder)], recipe="teacher"
    )
    with join("cpu") as world:
        train.train(config, world)
    return folder


@pytest.fixture(name="flags", scope="module")
def flags_fixture(data, teacher):
    return [*RECIPE, "--data-path", str(data), "--teacher-path", str(teacher)]


@pytest.fixture(name="cache", scope="module")
def cache_fixture(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "four epochs"
    teach.store([*flags, "--views", "4", "--output", str(folder)])
    return folder


def cached(flags, folder):
    """The flags with a logit cache in place of the teacher."""
    return [*without(flags, "--teacher-path"), "--teacher-store", str(folder)]


def without(arguments, flag):
    at = arguments.index(flag)
    return arguments[:at] + arguments[at + 2 :]


def loader_with_targets(config, folder, rank=0, world_size=1):
    return parts(config, folder, rank, world_size)[1]


def parts(config, folder, rank=0, world_size=1):
    """(cached teacher, loader with targets) of a run."""
    from fastdeit.data import loaders, open_images
    from fastdeit.distributed.world import World
    from fastdeit.models.deit import IMAGENET_MEAN, IMAGENET_STD

    alone = World(torch.device("cpu"))
    both = loaders(config, open_images(config, alone), World(torch.device("cpu"), rank, world_size), None)
    world = World(torch.device("cpu"), rank, world_size)
    teacher, (loader, _) = cached_teacher.from_cache(
        LogitCache(folder), config, world, both, IMAGENET_MEAN, IMAGENET_STD
    )
    return teacher, loader


def arrays(folder):
    return {name: np.array(array) for name, array in LogitCache(folder).arrays.items()}


def same(folder, other):
    assert arrays(folder).keys() == arrays(other).keys()
    for name, array in arrays(folder).items():
        assert np.array_equal(array, arrays(other)[name]), name


def changed(cache, tmp_path, change):
    """A copy of the cache with another header."""
    folder = tmp_path / "changed"
    shutil.copytree(cache, folder)
    header = logit_cache.read_header(folder)
    change(header)
    (folder / "header.json").write_text(json.dumps(header))
    return folder
