"""--patch-drop: which patches a step sees, what draws them, and when it ends."""

import numpy as np
import pytest
import timm
import torch

from fastdeit.distributed.world import World
from fastdeit.models import patch_drop
from fastdeit.models.build import create_model as any_model
from fastdeit.models.deit import create_model
from fastdeit.train import main
from fastdeit.training import student_tuning
from fastdeit.training.loop import Loop
from fastdeit.training.step_graph import WARM_UP
from fastdeit.training.trainer import Trainer

from .recorded import DeviceOnly, Recorded
from .reference_loop import Recipe
from .runs import RANDOM, assert_same, run, run_until
from .test_step_graph import NAN
from .test_training_arithmetic import BATCH, CLASSES, SIZE, Teacher, batches, deit, settings_of

NANO = "deit_nano_distilled_patch4_16"
PATCHES, RATE = 4, 0.5  # of deit(): 2 of 4 are seen


def trainer_of(rate=RATE, *, seed=0, epochs=2, teacher=None, model=None, opt="adamw", **how):
    """Steps of 8 images, 4 an epoch."""
    kind = "none" if teacher is None else "hard"
    config = settings_of(Recipe(total_steps=8, peak=0.02, kind=kind, ema_decay=0.7, opt=opt), **how)
    config.model.patch_drop, config.run.seed, config.optimization.epochs = rate, seed, epochs
    model = model or deit()
    if hasattr(model, "drop_path"):
        model.drop_path = 0.3
    trainer = Trainer(config, World(torch.device("cpu")), model, teacher, steps_per_epoch=4)
    trainer.model.train()
    return trainer


def inputs_of(trainer, step, batch=None):
    trainer.state.step = step
    trainer._drop_patches()
    return trainer.inputs(batch)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.25, 0.3, 0.5, 0.75, 0.9, 0.999])
@pytest.mark.parametrize("patches", [4, 16, 49, 196, 576])
def test_as_many_are_kept_as_timm_keeps(patches, rate):
    layer = timm.layers.PatchDropout(rate, num_prefix_tokens=1).train()
    assert layer(torch.zeros(1, 1 + patches, 1)).shape[1] == 1 + patch_drop.number_kept(patches, rate)


@pytest.mark.parametrize("name", [NANO, "deit_nano_patch4_16", "deit3_small_patch16_224"])
def test_the_model_sees_the_patches_it_is_given(name):
    """The tokens of a whole image, those of the others taken out before the first block."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, img_size=16 if "nano" in name else 64).train()
    images = torch.randn(3, 3, *model.img_size)
    patches = torch.tensor([[3, 0, 9], [15, 1, 2], [7, 8, 4]])
    prefix = model.num_prefix_tokens
    entering = model.embed(images).detach()
    expected = []
    for image, places in zip(entering, patches.tolist()):
        tokens = torch.stack([*image[:prefix], *(image[prefix + place] for place in places)])[None]
        for block in model.blocks:
            tokens = block(tokens)
        expected.append(model.norm(tokens)[0])
    got = model._tokens(images, None, patches)
    assert got.shape == (3, prefix + 3, model.embed_dim)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-5)
    heads = model.forward_heads(images, None, patches)
    torch.testing.assert_close(heads[0], model.head(torch.stack(expected)[:, 0]), rtol=1e-4, atol=1e-5)
    logits = model(images, patches=patches)
    torch.testing.assert_close(logits[1] if prefix == 2 else logits, heads[1] if prefix == 2 else heads[0])
    everything = torch.arange(16).expand(3, -1)
    assert torch.equal(model.forward_heads(images, None, everything)[0], model.forward_heads(images)[0])


def test_only_what_is_seen_has_a_gradient():
    torch.manual_seed(0)
    model = create_model(NANO, num_classes=5).train()
    images, patches = torch.randn(2, 3, 16, 16, requires_grad=True), torch.tensor([[0, 5], [5, 15]])
    sum(logits.square().sum() for logits in model(images, patches=patches)).backward()
    by_patch = images.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)).flatten(1)  # row by row
    assert [row.nonzero().flatten().tolist() for row in by_patch] == [[0, 5], [5, 15]]
    rows = model.pos_embed.grad[0].abs().sum(1)
    assert rows.nonzero().flatten().tolist() == [0, 1, 2 + 0, 2 + 5, 2 + 15]
    assert model.dist_token.grad.any() and model.cls_token.grad.any()


def test_compiled_it_is_one_graph_for_each_number_of_patches():
    torch.manual_seed(0)
    model, images = create_model(NANO, num_classes=5).train(), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for patches in (torch.tensor([[0, 5], [5, 15]]), torch.tensor([[1, 5], [6, 14]]), None):
        torch.testing.assert_close(compiled(images, patches=patches)[1], model(images, patches=patches)[1])


def test_what_a_step_draws():
    """The patches with the least of uniform numbers, which are a function of seed and step, and none of drop path's."""
    trainer, words = trainer_of(seed=7), np.random.SeedSequence([7, 3]).generate_state(2, np.uint64) >> np.uint64(1)
    inputs = inputs_of(trainer, 3)
    noise = torch.rand(BATCH, PATCHES, generator=torch.Generator().manual_seed(int(words[1]))).numpy()
    for row, kept in zip(noise, inputs.patches.tolist()):
        assert set(kept) == set(np.argsort(row)[:2]) and len(kept) == 2
    assert not torch.equal(inputs.patches, inputs_of(trainer, 4).patches)
    assert torch.equal(inputs.patches, inputs_of(trainer_of(seed=7), 3).patches)
    assert not torch.equal(inputs.patches, inputs_of(trainer_of(seed=8), 3).patches)
    assert torch.equal(inputs.noise, inputs_of(trainer_of(0.0, seed=7), 3).noise)
    trainer.world = World(torch.device("cpu"), rank=1, world_size=2)  # the second half of the same images
    assert torch.equal(inputs_of(trainer, 3).patches, inputs.patches[BATCH // 2 :])
    counts = np.bincount(
        torch.cat([inputs_of(trainer_of(seed=seed, epochs=99), 0).patches for seed in range(40)]).flatten(), minlength=4
    )
    assert counts.min() > 120 and counts.sum() == 40 * BATCH * 2  # 160 each, give or take 9


@pytest.mark.parametrize("epochs, first", [(1, 3), (5, 18), (10, 36)])
def test_the_last_tenth_of_the_steps_sees_all(epochs, first):
    trainer = trainer_of(epochs=epochs)
    seen = [inputs_of(trainer, step).patches is None for step in range(4 * epochs)]
    assert seen == [step >= first for step in range(4 * epochs)]
    assert trainer.news == [f"from step {first + 1} on, the student sees all patches"]
    assert inputs_of(trainer_of(0.0), 0).patches is None


def test_of_smaller_images_there_are_fewer_patches():
    """With a curriculum of 8, then 16 pixels: four epochs of a quarter of the work each, then one; the last tenth
    of the work are two steps."""
    model = create_model("deit_nano_patch4_16", num_classes=CLASSES)
    config = settings_of(Recipe(total_steps=8, peak=0.02))
    config.data.input_size, config.model.patch_drop, config.optimization.curriculum = 16, 0.25, "8,16"
    trainer = Trainer(config, World(torch.device("cpu")), model, None, steps_per_epoch=10)
    kept = []
    for step in range(50):
        trainer.begin_epoch(step // 10)
        patches = inputs_of(trainer, step).patches
        kept.append(None if patches is None else patches.shape[1])
        if step % 10 == 0 and kept[-1]:
            model.train()(torch.zeros(BATCH, 3, trainer.size, trainer.size), patches=patches)
    assert kept == [3] * 40 + [12] * 8 + [None] * 2


def test_the_teacher_sees_the_whole_image_and_micro_batches_their_own_patches():
    shapes = []

    class Watching(Teacher):
        def __call__(self, images, batch=None):
            shapes.append(tuple(images.shape))
            return super().__call__(images, batch)

    whole, parts = (trainer_of(teacher=Watching(), accumulate=n, opt="sgd") for n in (1, 4))
    for batch in batches(mixed=False):
        losses = [trainer.step(batch) for trainer in (whole, parts)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for one, other in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert set(shapes) == {(BATCH, 3, SIZE, SIZE), (BATCH // 4, 3, SIZE, SIZE)}


def test_a_graph_is_captured_for_each_number_of_patches():
    plain, graphed = trainer_of(epochs=5), trainer_of(epochs=5)
    for trainer in (plain, graphed):
        trainer.state.step = 8
    graphed.capture_steps(capture := Recorded())
    begun = []
    for step, batch in enumerate((batches() * 5)[:16], 8):
        if step == 18:
            begun = [capture.replays]
            for trainer in (plain, graphed):
                trainer.total_steps = 100  # as if the end were further away
                trainer.config.model.patch_drop = 0.0
        assert torch.equal(plain.step(batch), graphed.step(batch)), step
    assert begun == [10 - WARM_UP + 1] and capture.replays == begun[0] + 6 - WARM_UP + 1
    told = [sentence for sentence in graphed.news if "one CUDA graph" in sentence]
    assert len(told) == 2 and "from step 19 on, the student sees all patches" in graphed.news


def test_a_step_asks_nothing_of_the_host():
    trainer = trainer_of()
    for batch in batches()[:2]:
        trainer.step(batch)
    inputs = trainer.inputs(batches()[2])
    with DeviceOnly() as mode:
        losses = trainer.compute(inputs, trainer.world.mean)
    assert mode.outlive() == 1 and losses.shape == (5,) and inputs.patches.shape == (BATCH, 2)


def test_a_step_that_is_not_finite_changes_nothing():
    trainer = trainer_of()
    trainer.guard.tolerated = 5
    batch = batches()[0]
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.step(batch._replace(mix=batch.mix._replace(lam=torch.full_like(batch.mix.lam, NAN))))
    assert all(map(torch.equal, before, trainer.model.parameters())) and trainer.guard.count == 1


def test_the_shape_that_is_tuned():
    trainer = trainer_of()
    assert student_tuning._tokens(trainer.model, trainer.config) == (BATCH, 2 + 2, 16)
    trainer.config.model.patch_drop = 0.0
    assert student_tuning._tokens(trainer.model, trainer.config) == (BATCH, 2 + 4, 16)


# timm's models


def test_a_model_of_timms_draws_for_itself():
    torch.manual_seed(0)
    model = any_model("test_vit", num_classes=CLASSES, input_size=32, drops_patches=True)
    (layer,) = [module for module in model.modules() if isinstance(module, timm.layers.PatchDropout)]
    assert layer.prob == 0.0  # until a step sets it: memory and time are measured with the whole image
    trainer, tokens = trainer_of(epochs=1, model=model), []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0].shape[1]))
    for step in range(4):
        inputs = inputs_of(trainer, step)
        assert inputs.patches is None and inputs.seed is not None
        model(torch.zeros(2, 3, 32, 32))
    whole = tokens[-1]
    assert tokens == [1 + (whole - 1) // 2] * 3 + [whole]
    model.eval()
    layer.prob = RATE
    model(torch.zeros(2, 3, 32, 32))
    assert tokens[-1] == whole


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224"])
def test_a_model_without_it(cli, name, colors):
    arguments = ["--data-path", colors, "--model", name, "--patch-drop", 0.5, "--drop-path", 0, "--dry-run"]
    arguments += ["--distillation-type", "none", "--device", "cpu", "--input-size", 224]
    code, _, err = cli(main, *arguments)
    assert code == 2 and err == f"error: --model {name}: timm's has no patch_drop_rate; give --patch-drop 0\n"


# Runs


def test_a_resumed_run_is_the_same_to_the_bit(colors, tmp_path, monkeypatch):
    """Stopped before the steps that see all, in the second of nine."""
    command = [*RANDOM, "--data-path", colors, "--patch-drop", 0.4]
    run(*command, "--output-dir", tmp_path / "straight")
    run_until(monkeypatch, 1, *command, "--output-dir", tmp_path / "stopped")
    run("--resume", tmp_path / "stopped")
    assert_same(tmp_path / "straight", tmp_path / "stopped")


def test_attention_maps_need_all_patches(cli):
    arguments = ["--patch-drop", 0.5, "--distillation-type", "soft", "--attention-distillation-weight", 1]
    code, _, err = cli(main, *arguments)
    assert code == 2 and err.startswith("error: --patch-drop 0.5: ") and err.count("\n") == 1


def test_a_dry_run_tries_a_step_with_all_patches(cli, colors, monkeypatch):
    seen = []
    inputs = Trainer.inputs
    monkeypatch.setattr(Trainer, "inputs", lambda self, batch: seen.append(inputs(self, batch)) or seen[-1])
    code, *_ = cli(main, *RANDOM, "--data-path", colors, "--patch-drop", 0.5, "--dry-run")
    assert code == 0 and [one.patches is None for one in seen] == [False, True]


def test_the_time_left_knows_that_the_last_tenth_sees_all():
    """Of 40 steps 36 are of half the patches, and cost half."""
    trainer = trainer_of(epochs=10)
    assert [trainer.cost(step) for step in (0, 2, 36, 38, 40)] == [0, 1, 18, 20, 22]
    seen = batches()
    remaining = Loop(trainer, (seen, seen), list("abcde"), None).log.remaining
    assert remaining.work(40) == 22
    assert trainer_of(0.0, epochs=10).cost(40) == 40
