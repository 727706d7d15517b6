"""The feature term: an orthogonal projection, of the right features, learned along and left behind."""

import copy
import json
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from fastdeit import train
from fastdeit.config import Config
from fastdeit.distill.features import FeatureDistillation, Projection
from fastdeit.distributed import parallel
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.models.deit import create_model
from fastdeit.models.loading import load_model
from fastdeit.training.run import undistilled
from fastdeit.training.trainer import Trainer

from . import runs
from .conftest import SMALL, refused
from .processes import start_ranks
from .recorded import DeviceOnly
from .runs import RANDOM, assert_same, run, run_until
from .test_step_on_fake_gpu import GPU, on_gpu

CLASSES, CPU = 5, torch.device("cpu")


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def student():
    torch.manual_seed(0)
    return create_model("deit_nano_distilled_patch4_16", num_classes=CLASSES)


def teacher(name="test_resnet", **options):
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=CLASSES, **options).eval().requires_grad_(False)


def of(student, teacher):
    config = Config()
    config.distillation.feature_distillation_weight = 1.0
    return FeatureDistillation(config, student, teacher, "it")


# ---------------------------------------------------------------------------------------------------------------------
# The projection


@pytest.mark.parametrize("widths", [(5, 9), (9, 5), (6, 6), (1, 3)])
def test_the_projection_is_the_product_of_reflections(widths):
    """torch.linalg.householder_product's, of vectors whose first entry is 1; their lengths change nothing."""
    narrow, wide = sorted(widths)
    projection = Projection(*widths).double()
    vectors = torch.randn(wide, narrow, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tril(-1)
    lengths = torch.linspace(0.5, 3.0, narrow)
    projection.reflectors.data = (vectors + torch.eye(wide, narrow)) * lengths
    expected = torch.linalg.householder_product(vectors, 2 / (1 + vectors.square().sum(0)))
    matrix = projection(torch.eye(widths[0], dtype=torch.float64))  # (student, teacher)
    torch.testing.assert_close(matrix, expected.T if widths[0] == narrow else expected)


@pytest.mark.parametrize("widths", [(192, 3024), (768, 512)])
def test_it_is_orthogonal_to_rounding_at_the_start(widths):
    P = Projection(*widths)(torch.eye(widths[0])).detach()
    gram = P @ P.T if widths[0] < widths[1] else P.T @ P
    assert (gram - torch.eye(min(widths))).abs().max() < 1e-5
    # In all directions alike: the entries' fourth moment is 3 / (N (N + 2)) for N wide, that of the sphere.
    assert P.pow(4).mean() == pytest.approx(3 / max(widths) / (max(widths) + 2), rel=0.03)


def test_its_gradient():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for widths in ((4, 6), (4, 3)):
        projection = Projection(*widths).double()
        torch.autograd.gradcheck(
            lambda x, V, p=projection: torch.func.functional_call(p, {"reflectors": V}, x),
            (x, projection.reflectors.detach().clone().requires_grad_()),
        )


@pytest.mark.parametrize(
    "wrap", [DistributedDataParallel, lambda module: parallel._shard(module, World(CPU)) or module]
)
def test_it_may_be_distributed(wrap):
    x, projection = torch.randn(3, 4), Projection(4, 6)
    (projection(x).square() * torch.arange(6)).sum().backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        twin = Projection(4, 6)
        (wrap(twin)(x).square() * torch.arange(6)).sum().backward()
        for part in ("data", "grad"):
            torch.testing.assert_close(
                parallel.full(getattr(twin.reflectors, part)), getattr(projection.reflectors, part)
            )
    finally:
        dist.destroy_process_group()


def test_it_asks_nothing_of_the_host():
    with FakeTensorMode(), torch.no_grad():
        for widths in ((192, 3024), (768, 512)):
            projection, x = on_gpu(Projection(*widths)), torch.empty(4, widths[0], device=GPU)
            with DeviceOnly():
                y = projection(x)
            assert y.device == GPU and y.shape == (4, widths[1])


# ---------------------------------------------------------------------------------------------------------------------
# The distance, and of what


def smooth_l1(a, b):
    d = (a - b).abs()
    return torch.where(d < 1, d.square() / 2, d - 0.5).mean()


def normed(t):
    return (t - t.mean(1, keepdim=True)) / (t.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def check(mine, theirs, student_features, teacher_features, images):
    """The term, of features in float64 that were written out."""
    distillation = of(mine, theirs)
    with torch.no_grad():
        theirs(images)
    mine(images)
    term = distillation()
    P = copy.deepcopy(distillation.projection).double()
    expected = smooth_l1(P(student_features.double()), normed(teacher_features.double()))
    assert term.item() == pytest.approx(expected.item(), rel=1e-4) and 0.05 < term < 1
    return term


def test_patches_of_our_student_and_pooled_channels_of_a_cnn(images):
    mine, theirs = student().train(), teacher()
    patches = mine.forward_features(images)[:, 2:].mean(1)
    pooled = theirs.forward_features(images).mean((2, 3))
    check(mine, theirs, patches, pooled, images).backward()
    assert all(p.grad is not None for name, p in mine.named_parameters() if not name.startswith("head"))
    assert all(p.grad is None for p in theirs.parameters())


def test_a_vision_transformer_as_teacher_and_timms_as_student(images):
    options = {"img_size": 16, "patch_size": 4, "depth": 2, "num_classes": CLASSES}
    mine = timm.create_model("vit_tiny_patch16_224", embed_dim=24, num_heads=2, **options).train()
    for theirs in (
        teacher("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=96, depth=3),
        teacher("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=12, depth=3, global_pool="avg"),
    ):
        pooled = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        check(copy.deepcopy(mine), theirs, mine.forward_features(images)[:, 1:].mean(1), pooled, images)


def test_a_cnn_as_student(images):
    mine, theirs = teacher("test_efficientnet").requires_grad_(True), student().eval()
    pooled = mine.forward_head(mine.forward_features(images), pre_logits=True)
    check(mine, theirs, pooled, theirs.forward_features(images)[:, 0], images)


def test_a_student_outside_training_leaves_out_what_is_not_needed(images):
    mine = student().eval()
    of(mine, teacher())
    mine(images)
    assert mine.all_tokens and "features" not in vars(mine.norm)


def gradients(images, compiled):
    mine, theirs = student().train(), teacher("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=1)
    del mine.blocks[1:]
    distillation = of(mine, theirs)
    for model in (mine, theirs) if compiled else ():
        model.compile(backend="aot_eager")
    for scale in (1, 2):  # the second pass must not see what the first has left
        with torch.no_grad():
            theirs(images * scale)
        mine(images * scale)
        term = distillation()
    term.backward()
    return term.item(), [p.grad for p in (*mine.blocks.parameters(), *distillation.projection.parameters())]


def test_compiled_it_is_the_same(images):
    (expected, grads), (found, others) = gradients(images, False), gradients(images, True)
    assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(grads, others):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# In runs


def trainer_of(**optimization):
    config = Config()
    config.data.batch_size, config.data.input_size = 4, 16
    config.distillation.distillation_type, config.distillation.feature_distillation_weight = "soft", 0.5
    vars(config.optimization).update(optimization)
    model = teacher()
    live = SimpleNamespace(hookable=lambda: model, name="it", fingerprint="it")
    return Trainer(config, World(torch.device("cpu")), student(), live, steps_per_epoch=4)


@pytest.mark.parametrize("opt", ["adamw", "lamb", "sgd", "muon"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_it_learns_without_decay_and_is_no_part_of_the_student(opt, layer_decay):
    trainer = trainer_of(opt=opt, layer_decay=layer_decay)
    (reflectors,) = trainer.features.projection.parameters()
    (group,) = [g for g in trainer.optimizer.param_groups if any(p is reflectors for p in g["params"])]
    assert len(group["params"]) == 1 and group["weight_decay"] == 0 and group.get("lr_scale", 1.0) == 1.0
    learning = [id(p) for g in trainer.optimizer.param_groups for p in g["params"]]
    assert sorted(learning) == sorted(map(id, [*trainer.model.parameters(), reflectors]))
    assert any(p is reflectors for p in trainer.update.parameters)  # of the gradient's norm
    assert trainer.model.state_dict().keys() == trainer.ema.state_dict().keys() == student().state_dict().keys()


TAUGHT = [*RANDOM, "--epochs", "1", "--distillation-type", "soft", "--feature-distillation-weight", "0.7"]


@pytest.fixture(scope="module")
def fitted(colors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "cnn"
    flags = [*RANDOM, "--data-path", colors, "--output-dir", folder, "--epochs", 1]
    run(*flags, "--model", "test_resnet", "--input-size", 32, "--drop-path", 0, "--no-model-ema")
    return folder


@pytest.fixture(scope="module")
def straight(colors, fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(*TAUGHT, "--data-path", colors, "--teacher-path", fitted, "--output-dir", folder)
    return folder


def test_a_run_reports_the_term_and_saves_the_projection_beside_the_student(straight, colors):
    (record,) = [line for line in runs.lines(straight) if line["kind"] == "train"]
    terms = 0.5 * record["class_loss"] + 0.5 * record["teacher_loss"] + 0.7 * record["feature_loss"]
    assert record["loss"] == pytest.approx(terms, rel=1e-5) and record["feature_loss"] > 0
    saved = torch.load(straight / "last" / "training.pt", weights_only=True)
    loaded = load_model(straight)  # as the student that it is
    assert saved["projection"]["reflectors"].shape == (128, 96) and not loaded.notes
    for name in ("model", "ema"):
        assert load_file(straight / "last" / f"{name}.safetensors").keys() == loaded.model.state_dict().keys()
    start = Projection(128, 96).reflectors
    assert not torch.allclose(saved["projection"]["reflectors"], start, atol=1e-4)  # it has learned


def test_a_resumed_run_is_the_same(straight, colors, fitted, tmp_path, monkeypatch):
    flags = [*TAUGHT, "--data-path", colors, "--teacher-path", fitted, "--output-dir", tmp_path / "run"]
    run_until(monkeypatch, 1, *flags)
    run("--resume", tmp_path / "run")
    assert_same(straight, tmp_path / "run")
    states = [torch.load(f / "last" / "training.pt", weights_only=True) for f in (straight, tmp_path / "run")]
    assert torch.equal(*(state["projection"]["reflectors"] for state in states))


@pytest.mark.soak
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_on_two_processes(colors, fitted, tmp_path, sharding):
    flags = [*TAUGHT, "--opt", "sgd", "--lr", "0.1", "--data-path", colors, "--teacher-path", fitted]
    run(*flags, "--output-dir", tmp_path / "alone")
    folder, more = tmp_path / "run", ["--batch-size", 2, "--accumulate", 3, "--sharding", sharding]
    ranks = start_ranks(2, *flags, *more, "--output-dir", folder, logs=tmp_path)
    assert [rank.wait(120) for rank in ranks] == [0, 0], ranks[0].text
    assert_same(tmp_path / "alone", folder, exact=False)
    states = [torch.load(f / "last" / "training.pt", weights_only=True) for f in (tmp_path / "alone", folder)]
    torch.testing.assert_close(*(state["projection"]["reflectors"] for state in states), rtol=1e-3, atol=1e-5)


def test_the_comparison_without_a_teacher_has_no_such_term():
    config = Config()
    config.distillation.feature_distillation_weight = config.distillation.attention_distillation_weight = 1.0
    settings = undistilled(config).distillation
    assert settings.feature_distillation_weight == settings.attention_distillation_weight == 0


def test_what_is_refused(colors, fitted, cli):
    class Headless(nn.Module):
        num_classes = 3

    for model in (Headless(), timm.create_model("test_resnet", num_classes=0)):
        with pytest.raises(UserError, match="the teacher it has no linear classifier"):
            of(student(), model)
    weight = ["--data-path", colors, "--feature-distillation-weight", "0.5"]
    soft = [*SMALL, "--distillation-type", "soft", *weight]
    refused(cli, train.main, *soft, "--teacher-store", "caches/x", words=["live teacher", "no features"])
    refused(cli, train.main, *soft, "--teacher-path", fitted, fitted, words=["one teacher"])
    refused(cli, train.main, *SMALL, *weight, words=["live teacher", "--distillation-type"])


def test_a_checkpoint_of_before_it_resumes(straight, tmp_path, colors, monkeypatch):
    """The sums of an earlier version's log have fewer terms."""
    folder = tmp_path / "run"
    run_until(monkeypatch, 1, *RANDOM, "--data-path", colors, "--output-dir", folder)
    config = folder / "last" / "config.json"
    saved = json.loads(config.read_text())
    *terms, steps = saved["progress"]["sums"]
    assert len(terms) == 5
    config.write_text(json.dumps({**saved, "progress": {**saved["progress"], "sums": [*terms[:4], steps]}}))
    run("--resume", folder)
    run(*RANDOM, "--data-path", colors, "--output-dir", tmp_path / "straight")
    assert_same(tmp_path / "straight", folder)
