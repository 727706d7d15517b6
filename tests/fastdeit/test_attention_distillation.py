"""The attention term: of the right tensors of the right blocks, compiled or not, and refused where it cannot be."""

import copy
import json

import pytest
import timm
import torch

from fastdeit import train
from fastdeit.config import Config
from fastdeit.distill.attention import AttentionDistillation, Tap, add_hooks, layer_pairs
from fastdeit.errors import UserError
from fastdeit.models.deit import create_model

from .conftest import SMALL


def config(layers="last", variant="maps", heads="equal", weight=1.0):
    made = Config()
    made.data.input_size = 16
    settings = made.distillation
    settings.attention_distillation_weight, settings.attention_distillation_layers = weight, layers
    settings.attention_distillation_variant, settings.attention_distillation_heads = variant, heads
    return made


@pytest.fixture
def student():
    torch.manual_seed(0)
    return create_model("deit_nano_distilled_patch4_16", num_classes=5)


@pytest.fixture
def teacher():
    """Another depth, width and number of heads than the student's (6, 128, 4)."""
    torch.manual_seed(1)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=96, depth=9, num_heads=3, num_classes=5
    )
    return model.eval().requires_grad_(False)


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def run(distillation, student, teacher, images):
    with torch.no_grad():
        teacher(images)
    student(images)
    return distillation()


# ---------------------------------------------------------------------------------------------------------------------
# Against maps written out in float64


def explicit(model, block, images):
    """q, k, v of a block, each (batch, heads, tokens, head_dim) float64, from the block's input."""
    model, seen = copy.deepcopy(model).double(), []
    model.blocks[block].attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(images.double())
    attention = model.blocks[block].attn
    heads = attention.heads if hasattr(attention, "heads") else attention.num_heads
    B, N, _ = seen[0].shape
    qkv = torch.nn.functional.linear(seen[0], attention.qkv.weight, attention.qkv.bias)
    q, k, v = qkv.reshape(B, N, 3, heads, -1).permute(2, 0, 3, 1, 4)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q.detach(), k.detach(), v.detach()


def scores(q, k):
    return q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5


def kl(teacher_scores, student_scores):
    p = teacher_scores.softmax(-1)
    return (p * (teacher_scores.log_softmax(-1) - student_scores.log_softmax(-1))).sum(-1).mean()


def regrouped(x, heads):
    """Channels of all heads together, cut into relation heads."""
    B, H, N, D = x.shape
    return x.transpose(1, 2).reshape(B, N, heads, H * D // heads).transpose(1, 2)


def test_maps_of_the_patches_with_relation_heads(student, teacher, images):
    loss = run(AttentionDistillation(config("5:8,1:2", heads="4"), student, teacher, "it"), student, teacher, images)
    expected = []
    for s, t in ((5, 8), (1, 2)):
        q_s, k_s = (regrouped(x, 4)[:, :, 2:] for x in explicit(student, s, images)[:2])
        q_t, k_t = (regrouped(x, 4)[:, :, 1:] for x in explicit(teacher, t, images)[:2])
        expected.append(kl(scores(q_t, k_t), scores(q_s, k_s)))
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_relations_compare_queries_keys_and_values(student, teacher, images):
    distillation = AttentionDistillation(config(variant="relations", heads="2"), student, teacher, "it")
    loss = run(distillation, student, teacher, images)
    mine, theirs = explicit(student, 5, images), explicit(teacher, 8, images)
    expected = []
    for x_s, x_t in zip(mine, theirs):
        x_s, x_t = regrouped(x_s, 2)[:, :, 2:], regrouped(x_t, 2)[:, :, 1:]
        expected.append(kl(scores(x_t, x_t), scores(x_s, x_s)))
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_scores_and_rows(student, teacher, images):
    loss = run(
        AttentionDistillation(config(variant="scores", heads="1"), student, teacher, "it"), student, teacher, images
    )
    q_s, k_s = (regrouped(x, 1) for x in explicit(student, 5, images)[:2])
    q_t, k_t = (regrouped(x, 1) for x in explicit(teacher, 8, images)[:2])
    expected = (scores(q_s[:, :, 2:], k_s[:, :, 2:]) - scores(q_t[:, :, 1:], k_t[:, :, 1:])).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss = run(
        AttentionDistillation(config(variant="rows", heads="1"), student, teacher, "it"), student, teacher, images
    )
    rows = scores(q_s[:, :, :2], k_s[:, :, 2:])  # class and distillation token, both with the teacher's class token
    expected = kl(scores(q_t[:, :, :1], k_t[:, :, 1:]).expand_as(rows), rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_normalised_queries_and_keys_of_timm(images):
    torch.manual_seed(3)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=96, depth=2, num_heads=3, qk_norm=True
    ).eval()
    torch.nn.init.normal_(model.blocks[1].attn.q_norm.weight)
    add_hooks([block.attn for block in model.blocks])
    tap = Tap(model.blocks[1].attn, "relations")
    model(images)
    for mine, expected in zip(tap.take(), explicit(model, 1, images)):
        torch.testing.assert_close(mine.double(), expected.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_a_teacher_attended_alike_costs_nothing(student, images):
    twin = copy.deepcopy(student).eval().requires_grad_(False)
    distillation = AttentionDistillation(config("every-2"), student, twin, "it")
    assert len(distillation.taps) == 3
    assert run(distillation, student, twin, images).item() == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# In training


def gradients(student, teacher, images, mode):
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    distillation = AttentionDistillation(config("every-3", heads="mean"), student, teacher, "it")
    if mode == "checkpointed":
        student.set_grad_checkpointing()
    for part in {"compiled": [student, teacher], "blocks compiled": [*student.blocks, teacher]}.get(mode, []):
        part.compile(backend="aot_eager")
    for scale in (1, 2):  # the second pass must not see what the first has left
        loss = run(distillation, student, teacher, images * scale)
    loss.backward()
    # A compiled graph gives zeros where eager mode gives nothing.
    named = student.named_parameters()
    return loss.item(), {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}


@pytest.mark.parametrize("mode", ["compiled", "blocks compiled", "checkpointed"])
def test_compiled_or_checkpointed_it_is_the_same(student, teacher, images, mode):
    expected, expected_gradients = gradients(student, teacher, images, "plain")
    loss, found = gradients(student, teacher, images, mode)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert expected_gradients["blocks.0.attn.qkv.weight"].abs().max() > 0
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_run_reports_each_term(colors, tmp_path, cli):
    fitted, folder = tmp_path / "teacher", tmp_path / "student"
    plain = [*SMALL, "--data-path", colors, "--epochs", 1]
    code, _, err = cli(train.main, *plain, "--model", "deit_nano_patch4_16", "--output-dir", fitted)
    assert code == 0, err
    code, out, err = cli(
        train.main, *plain, "--distillation-type", "soft", "--distillation-alpha", "0.3", "--teacher-path", fitted,
        "--attention-distillation-weight", "2.5", "--attention-distillation-layers", "every-2", "--smoothing", "0.1",
        "--accumulate", "2", "--output-dir", folder,
    )  # fmt: skip
    assert code == 0, err
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    terms = 0.7 * record["class_loss"] + 0.3 * record["teacher_loss"] + 2.5 * record["attention_loss"]
    assert record["loss"] == pytest.approx(terms, rel=1e-5) and record["attention_loss"] > 0
    assert "attention 0." in out


# ---------------------------------------------------------------------------------------------------------------------
# Which blocks, and what is refused


def test_pairs_of_blocks():
    assert layer_pairs("last", 12, 24) == [(11, 23)]
    assert layer_pairs("every-4", 12, 24) == [(3, 7), (7, 15), (11, 23)]
    assert layer_pairs("every-2", 6, 9) == [(1, 2), (3, 5), (5, 8)]
    assert layer_pairs("5:5, 11:23", 12, 24) == [(5, 5), (11, 23)]


@pytest.mark.parametrize("text", ["first", "every-0", "every-13", "12:0", "0:24", "3", "1:2:3", "-1:0"])
def test_pairs_that_cannot_be_meant(text):
    with pytest.raises(UserError, match=r"--attention-distillation-layers.*0 to 11.*0 to 23"):
        layer_pairs(text, 12, 24)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("test_resnet", "no attention layers"),
        ("swin_tiny_patch4_window7_224", "windows"),
        ("beit_base_patch16_224", "relative"),
    ],
)
def test_teachers_whose_attention_cannot_be_compared(student, name, words):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UserError, match=words):
        AttentionDistillation(config(), student, model, name)


def test_another_number_of_patches(student):
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=128, num_heads=4)
        finer = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=128, num_heads=4)
    AttentionDistillation(config(), student, model, "it")
    with pytest.raises(UserError, match=r"4 x 4 patches.*8 x 8.*--teacher-input-size 16"):
        AttentionDistillation(config(), student, finer, "it")


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ("equal", "4 attention heads.*3.*such as 32"),
        ("5", "divide the widths 128 and 96"),
        ("0", "divide"),
        ("all", "equal, mean"),
    ],
)
def test_heads_that_do_not_fit(student, teacher, heads, words):
    with pytest.raises(UserError, match=words):
        AttentionDistillation(config(heads=heads), student, teacher, "it")


def test_it_needs_a_live_teacher(student):
    with pytest.raises(UserError, match="live teacher"):
        AttentionDistillation.of(config(), student, None)
    assert AttentionDistillation.of(config(weight=0.0), student, None) is None
