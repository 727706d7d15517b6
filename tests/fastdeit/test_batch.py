"""The batch of a run without --batch-size: the paper's, as the memory allows; the estimate against a count of all
tensors that live in a step."""

import functools
import json
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastdeit import batch, recipes
from fastdeit.cli import parse_config
from fastdeit.config import Config
from fastdeit.distributed.world import World
from fastdeit.models.deit import create_model

from .runs import RANDOM, run

GIB = 1 << 30
IMAGENET = 1_281_167


class Gpus(World):
    """`world_size` GPUs with so much memory, as far as settle asks."""

    memory = (80 * GIB,)

    def gather(self, value):
        return list(self.memory)


@pytest.fixture
def gpus(monkeypatch):
    class Properties:
        total_memory = 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(batch, "kept_bytes", lambda *_: 30 * (1 << 20))  # about a DeiT-S in bf16

    def made(world_size=1, memory=(80 * GIB,)):
        world = Gpus(torch.device("cuda", 0), 0, world_size)
        object.__setattr__(world, "memory", memory)
        return world

    return made


def settled(world, *, recipe="deit_small", images=IMAGENET, model=None, **settings):
    config = recipes.load(recipe)
    config.run.recipe = recipe
    for name, value in settings.items():
        group = config.data if name == "batch_size" else config.optimization
        setattr(group, name, value)
    found, told = batch.settle(config, world, model or nn.Linear(1000, 22_000), images)
    return found.data.batch_size, found.optimization.accumulate, told


def test_on_a_cpu():
    here = World(torch.device("cpu"))
    assert settled(here) == (64, 1, ["--batch-size 64: 64 images a step; in the recipe's paper 1,024"])
    assert settled(World(torch.device("cpu"), 0, 2), recipe="deit3_base")[:2] == (64, 1)
    assert settled(here, recipe="teacher") == (64, 1, ["--batch-size 64: 64 images a step"])


def test_what_is_given_is_taken(gpus):
    for world in (gpus(), World(torch.device("cpu"))):
        assert settled(world, batch_size=48) == (48, 1, [])
        assert settled(world, batch_size=50, accumulate=3) == (50, 3, [])
        assert settled(world, recipe="finetune") == settled(world, recipe="demo") == (64, 1, [])


@pytest.mark.parametrize(
    "recipe, processes, expected",
    [
        ("deit_small", 1, (1024, 1)),
        ("deit_small", 8, (128, 1)),
        ("deit_tiny_distilled", 6, (170, 1)),  # 1,020
        ("deit3_base", 1, (2048, 1)),
        ("deit3_large", 8, (256, 1)),
        ("deit_base_distilled_384", 4, (128, 1)),
        ("deit3_finetune", 8, (64, 1)),
    ],
)
def test_the_papers_batch_on_gpus(gpus, recipe, processes, expected):
    size, parts, (told,) = settled(gpus(processes), recipe=recipe)
    assert (size, parts) == expected
    assert f"{size * parts * processes:,} images a step" in told and f"--batch-size {size}" in told


def test_the_smallest_memory_counts(gpus):
    assert settled(gpus(memory=(24 * GIB,)))[:2] == (512, 2)
    assert settled(gpus(2, memory=(80 * GIB, 8 * GIB)))[:2] == (128, 4)
    assert settled(gpus(memory=(GIB,)))[:2] == (2, 512)  # hopeless, and the run says so
    told = settled(gpus(memory=(24 * GIB,)))[2]
    assert told == [
        "--batch-size 512 --accumulate 2: 1,024 images a step, as in the recipe's paper; this many at once fit 24 GiB, "
        "by an estimate"
    ]
    assert settled(gpus(), accumulate=4)[:2] == (256, 4)


@pytest.mark.parametrize("images, expected", [(102_400, 1024), (102_399, 512), (50_000, 256), (6_400, 64), (300, 64)])
def test_a_small_data_set_has_a_hundred_steps_an_epoch(gpus, images, expected):
    size, parts, (told,) = settled(gpus(), images=images)
    assert (size, parts) == (expected, 1)
    assert (f"would make {images // 1024} steps an epoch" in told) == (expected < 1024)


def test_micro_batches_are_even_and_make_the_whole():
    for own in range(2, 300, 2):
        for limit in (2, 5, 64, 1000):
            size, parts = batch.micro_batches(own, 1, limit=limit)
            assert size * parts == own and size % 2 == 0 and size <= max(limit, 2)
            assert not any(own % n == 0 and own // n % 2 == 0 and own // n <= limit for n in range(1, parts))


def test_a_model_that_does_not_run_without_memory(monkeypatch):
    class Stubborn(nn.Module):
        def forward(self, images):
            return images * images.sum().item()

    assert batch.fitting(Config(), World(torch.device("cpu")), Stubborn(), 80 * GIB) == batch.FEW


@functools.wraps(recipes.RECIPES["demo"])
def without_a_batch():
    config = recipes.demo()
    config.data.batch_size = None
    return config


def test_the_settings_of_a_run_hold_what_was_settled(colors, tmp_path, capsys):
    """So that it resumes with them, wherever."""
    command = [*RANDOM, "--data-path", colors, "--epochs", 1, "--output-dir", tmp_path / "run"]
    at = command.index("--batch-size")
    config = parse_config([*map(str, command[:at]), *map(str, command[at + 2 :])])
    assert config.data.batch_size == 64  # the demo's own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "FEW", 12)
        patch.setitem(recipes.RECIPES, "demo", without_a_batch)
        run(*command[:at], *command[at + 2 :])
    assert "--batch-size 12: 12 images a step" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["data"]["batch_size"] == 12


# ---------------------------------------------------------------------------------------------------------------------
# The estimate


class Live(TorchDispatchMode):
    """The bytes of all tensors that live at once, at most."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key, count):
        self.known.discard(key)
        self.live -= count


def peak_of_a_step(model, size, count):
    with FakeTensorMode(), Live() as live:
        weights = {name: torch.empty(p.shape, requires_grad=True) for name, p in model.named_parameters()}
        images = torch.empty(count, 3, size, size, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(logits.float().square().mean() for logits in functional_call(model, weights, (images,)))
        loss.backward()
    return live.peak


def test_the_estimate_covers_what_lives_in_a_step_and_little_more():
    size, config, device = 32, Config(), World(torch.device("cpu"))
    model = create_model("deit_nano_distilled_patch4_16", img_size=(size, size), drop_path=0.1).train()
    few, many = (peak_of_a_step(model, size, count) for count in (64, 128))
    each = (many - few) / 64
    kept = batch.kept_bytes(model, size, torch.bfloat16)
    assert each < batch.BACKWARD * kept + 3 * size * size * 6 < 1.1 * each
    config.data.input_size, config.speed.precision = size, "bf16"
    assert batch.fixed_bytes(config, model) == 22 * sum(p.numel() for p in model.parameters())
    memory = batch.RESERVED + (batch.fixed_bytes(config, model) + 128 * each) / batch.USABLE
    assert 0.9 * 128 < batch.fitting(config, device, model, int(memory)) <= 128


def test_what_a_block_keeps_by_hand():
    """A linear layer, GELU, a linear layer: the input and both sides of the GELU; ReLU in place keeps one of them."""
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 100), nn.GELU(), nn.Linear(100, 10))
    assert batch.kept_bytes(mlp, 4, torch.float32) == 4 * (48 + 100 + 100)
    relu = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 100), nn.ReLU(inplace=True), nn.Linear(100, 10))
    assert batch.kept_bytes(relu, 4, torch.float32) == 4 * (48 + 100)
