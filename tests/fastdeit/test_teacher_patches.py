"""A teacher that sees some patches: those that the student attends to, and as if there were no others."""

import json

import pytest
import timm
import torch

from fastdeit import teach, train
from fastdeit.config import Config
from fastdeit.distill.patches import TeacherPatches
from fastdeit.distill.teacher import Teacher
from fastdeit.errors import UserError
from fastdeit.models.deit import create_model
from fastdeit.models.loading import LoadedModel

from .conftest import SMALL, refused
from .test_attention_distillation import explicit, scores

CLASSES = 5
NORMALISED = {"student_mean": (0.5,) * 3, "student_std": (0.5,) * 3}


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def ours(name="deit_nano_distilled_patch4_16"):
    torch.manual_seed(0)
    return create_model(name, num_classes=CLASSES)


def vit(seed=1, **options):
    torch.manual_seed(seed)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": CLASSES}
    return timm.create_model("vit_tiny_patch16_224", **{**shape, **options})


def live(model):
    mean = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return Teacher(LoadedModel(name="it", model=model, input_size=16, **mean), **NORMALISED, device="cpu")


def of(student, teacher, share=0.5):
    config = Config()
    config.distillation.teacher_patches = share
    return TeacherPatches.of(config, student, teacher)


@pytest.mark.parametrize("make", [ours, lambda: ours("deit_nano_patch4_16"), vit, lambda: vit(qk_norm=True)])
def test_the_patches_that_the_student_attends_to_most(images, make):
    student = make().train()
    if hasattr(student, "drop_path"):
        student.drop_path = 0.0
    # Attention that is not nearly the same everywhere, as it is at the start.
    torch.nn.init.normal_(student.blocks[-1].attn.qkv.weight, std=0.3)
    q, k, _ = explicit(student, -1 % len(student.blocks), images)
    attention = scores(q, k).softmax(-1).mean(1)[:, 0, student.num_prefix_tokens :]
    chosen = of(student, live(ours("deit_nano_patch4_16")), 0.3)
    student(images)
    found = chosen()
    assert found.shape == (4, 4) and found.dtype == torch.int64  # 0.3 of 16
    expected = attention.argsort(dim=1, descending=True)[:, :4]
    assert torch.equal(found.sort().values, expected.sort().values)
    assert not torch.equal(found[0].sort().values, found[1].sort().values)


TEACHERS = {
    "ours": ours,
    "timm": vit,
    "registers, averaged": lambda: vit(reg_tokens=2, class_token=False, global_pool="avg"),
    "no positions for the class": lambda: vit(no_embed_class=True),
}


@pytest.mark.parametrize("make", TEACHERS.values(), ids=TEACHERS)
def test_a_teacher_sees_these_and_no_others(images, make):
    teacher, student = live(make()), ours()
    full = teacher(images)
    of(student, teacher)
    assert torch.equal(teacher(images), full)  # without patches as before
    shuffled = torch.rand(4, 16, generator=torch.Generator().manual_seed(3)).argsort(1)
    torch.testing.assert_close(teacher(images, patches=shuffled), full, atol=1e-5, rtol=1e-4)  # all, in any order
    some, places = teacher(images, patches=shuffled[:, :5]), shuffled[:, :5]
    assert (some - full).abs().max() > 1e-3
    changed = images.clone()  # the pixels of all other patches
    for i, kept in enumerate(places.tolist()):
        for patch in set(range(16)) - set(kept):
            changed[i, :, patch // 4 * 4 : patch // 4 * 4 + 4, patch % 4 * 4 : patch % 4 * 4 + 4] = 7.0
    torch.testing.assert_close(teacher(changed, patches=places), some)
    assert not torch.allclose(teacher(changed), full, atol=1e-3)
    assert torch.equal(teacher(images), full)  # nor is anything left of it


def test_of_one_image_by_hand(images):
    model = vit().eval()
    teacher = live(model)
    of(ours(), teacher)
    x = model.patch_embed(images)
    x = torch.cat([model.cls_token.expand(4, -1, -1), x], dim=1) + model.pos_embed
    x = model.blocks(x[:, [0, 1 + 3, 1 + 11]])
    expected = model.head(model.norm(x)[:, 0])
    found = teacher(images, patches=torch.tensor([[3, 11]] * 4))
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [ours, vit])
def test_compiled_it_is_the_same(images, make):
    teacher, twin, places = live(make()), live(make()), torch.tensor([[3, 11, 0]] * 4)
    for one in (teacher, twin):
        of(ours(), one)
    twin.network.compile(backend="aot_eager", dynamic=False)
    for _ in range(2):
        torch.testing.assert_close(twin(images, patches=places), teacher(images, patches=places), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(twin(images), teacher(images), atol=1e-5, rtol=1e-4)


def test_a_run(colors, run, tmp_path, cli):
    flags = [*SMALL, "--epochs", 1, "--data-path", colors, "--distillation-type", "soft", "--teacher-path", run]
    losses = {}
    for share in ("1", "0.25"):
        folder = tmp_path / share
        code, _, err = cli(train.main, *flags, "--teacher-patches", share, "--accumulate", 2, "--output-dir", folder)
        assert code == 0, err
        losses[share] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["teacher_loss"]
    assert 0 < losses["0.25"] != losses["1"] > 0


def test_what_is_refused(colors, run, cli):
    with pytest.raises(UserError, match="--teacher-patches: the attention of the teacher it cannot be used; it has no"):
        of(ours(), live(timm.create_model("test_resnet", num_classes=CLASSES)))
    with pytest.raises(UserError, match="--teacher-patches: the student has 4 x 4 patches, the teacher it 2 x 2"):
        of(ours(), live(vit(patch_size=8)))
    with pytest.raises(UserError, match="no class token"):
        of(vit(class_token=False, global_pool="avg"), live(vit()))
    assert of(ours(), live(vit()), share=1.0) is None
    flags = [*SMALL, "--data-path", colors, "--distillation-type", "soft", "--teacher-patches", "0.5"]
    for more, words in (
        (["--teacher-store", "x"], ["does not go with --teacher-store"]),
        (["--teacher-path", run, run], ["several teachers"]),
        (["--teacher-path", run, "--patch-drop", "0.5"], ["--patch-drop"]),
        (["--teacher-path", run, "--attention-distillation-weight", "1"], ["--attention-distillation-weight"]),
    ):
        refused(cli, train.main, *flags, *more, words=["--teacher-patches 0.5", *words])
    refused(cli, teach.main, "store", *flags, "--views", 1, "--output", "x", words=["--teacher-patches", "omit"])
