"""A logit cache for a run with a curriculum: logits of whole views, whose RandAugment gets stronger."""

import numpy as np
import pytest

from fastdeit import teach
from fastdeit.cli import parse_config
from fastdeit.curriculum import Curriculum
from fastdeit.distill.logit_cache import LogitCache
from fastdeit.errors import UserError

from . import logit_caches
from .logit_caches import cached, loader_with_targets
from .test_logit_cache import losses

pytest.importorskip("tyro")
pytest.importorskip("nvidia.dali")

data_fixture, teacher_fixture = logit_caches.data_fixture, logit_caches.teacher_fixture
flags_fixture = logit_caches.flags_fixture

STAGED = ["--curriculum", "12:0,16:9", "--epochs", "3"]  # 1.5 epochs of work each: 2.67 epochs and 4.17, rounded


@pytest.fixture(scope="module")
def cache(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "staged"
    teach.store([*flags, *STAGED, "--views", "4", "--output", str(folder)])
    return folder


def test_training_from_it_has_the_losses_of_the_live_teacher(flags, cache, tmp_path, monkeypatch):
    assert Curriculum.of(parse_config([*flags, *STAGED])).magnitudes == ((0, 0), (3, 9))
    live = losses([*flags, *STAGED], tmp_path / "live", monkeypatch, epochs=3)
    from_cache = losses([*cached(flags, cache), *STAGED], tmp_path / "cached", monkeypatch, epochs=3)
    assert len(live) == 4 * 6 and (live == from_cache).all()


@pytest.mark.parametrize(
    "change, words",
    [
        (["--curriculum", "none"], "recipe magnitudes is .*0, 0.* in the logit cache and null here"),
        (["--curriculum", "12:0,16:8"], "recipe magnitudes is .*3, 9.* in the logit cache and .*3, 8.* here"),
        (["--epochs", "6"], "recipe magnitudes is .*3, 9.* in the logit cache and .*5, 9.* here"),
    ],
)
def test_another_curriculum_is_refused(flags, cache, change, words):
    with pytest.raises(UserError, match=words):
        loader_with_targets(parse_config([*cached(flags, cache), *STAGED, *change]), cache)


def test_too_few_epochs_for_its_magnitudes(flags, tmp_path):
    folder = tmp_path / "cache"
    teach.store([*flags, *STAGED, "--views", "2", "--output", str(folder)])
    with pytest.raises(UserError, match=r"holds 2 of the 4 epochs.*--views 4, or give sizes alone"):
        loader_with_targets(parse_config([*cached(flags, folder), *STAGED]), folder)


def test_sizes_alone_fit_any_cache(flags, tmp_path):
    """Its header says nothing of them, as those of versions without a curriculum."""
    folder = tmp_path / "cache"
    teach.store([*flags, "--views", "1", "--output", str(folder)])
    assert "magnitudes" not in LogitCache(folder).header["recipe"]
    loader = loader_with_targets(parse_config([*cached(flags, folder), "--curriculum", "8,16"]), folder)
    assert len(list(loader)) == 6


def test_operations_get_stronger_where_the_curriculum_says(flags):
    from fastdeit.data import loaders, open_images
    from fastdeit.distributed.world import join

    config = parse_config([*flags, *STAGED])
    with join("cpu") as world:
        plans = loaders(config, open_images(config, world), world, None)[0].plans
    strength = []
    for epoch in range(4):
        plans.set_epoch(epoch)
        views = [plans[step].views for step in range(6)]
        ops, args = (np.concatenate([getattr(view, name) for view in views]) for name in ("ops", "args"))
        strength.append(np.abs(args[ops == 12]).mean())  # degrees of rotations
    assert max(strength[:3]) < 3 and strength[3] > 20  # magnitude 0 +- 0.5 of 10 for 30 degrees, then 9 +- 0.5
