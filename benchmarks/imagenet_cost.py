"""What DeiT-S at 79.9 and at 81 % would cost on ImageNet-1k with each lever: an estimate, by arithmetic from published
figures and counted FLOP. Nothing in it is measured, and no GPU has run it.

    hours = images of the run x FLOP an image / (RATE x FLOP an image of the plain step)

so the one speed in it is RATE, and every lever is assumed to be as efficient as the plain step, which smaller images,
fewer patches and a teacher need not be. An H200 multiplies as fast as an H100 (989 TFLOP/s of dense bf16) and moves
4.8 TB/s instead of 3.35: its hours lie between those of an H100 and those over 1.43.
"""

from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastdeit.curriculum import Curriculum
from fastdeit.models.deit import create_model
from fastdeit.models.patch_drop import number_kept
from fastdeit.training import muon

IMAGES = 1_281_167  # ImageNet-1k's
RATE = 5_560  # images/s: a compiled ViT-5-S (22 M parameters, 224 pixels), batch 256, one H100 (nvSubquadratic 5129112)
BATCH = 1_024
H200 = 4.8 / 3.35  # times as fast as an H100, at most
STUDENT, DISTILLED, TEACHER = "deit_small_patch16_224", "deit_small_distilled_patch16_224", "regnety_160"
DEIT, ET = "facebookresearch/deit README", "arXiv 2405.08768; their time:"
VIEWS = 10  # epochs in a logit cache


@cache
def step_flop(model: str = STUDENT, pixels: int = 224, patch_drop: float = 0.0) -> int:
    """FLOP an image of a forward and a backward pass, counted on tensors without memory."""
    with torch.device("meta"):
        student = create_model(model, img_size=pixels).train()
        images = torch.empty(1, 3, pixels, pixels)
        kept = number_kept((pixels // 16) ** 2, patch_drop)
        patches = torch.zeros(1, kept, dtype=torch.int64) if patch_drop else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        outputs = student(images, patches=patches)
        sum(logits.sum() for logits in (outputs if isinstance(outputs, tuple) else [outputs])).backward()
    return counter.get_total_flops()


@cache
def teacher_flop() -> int:
    """FLOP an image of the teacher's forward pass."""
    import timm

    with torch.device("meta"), torch.no_grad():
        teacher, images = timm.create_model(TEACHER).eval(), torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter:
            teacher(images)
    return counter.get_total_flops()


@cache
def muon_flop() -> int:
    """FLOP a step of the Newton-Schulz iterations."""
    width, depth, total = 384, 12, 0
    for m, n, count in ((width, width, 4), (width, 4 * width, 2)):
        total += count * depth * muon.ITERATIONS * (2 * (2 * m * m * n) + 2 * m**3)
    return total


def curriculum_flop(budget: int) -> float:
    """FLOP of a run with the published curriculum and so many epochs of work, over those of a plain epoch's image."""
    parts = Curriculum.read("efficienttrain", budget, 224).parts
    return IMAGES * sum((part.end - part.first) * step_flop(pixels=part.size) for part in parts)


def estimate() -> str:
    """Markdown."""
    plain, distilled, teacher = step_flop(), step_flop(DISTILLED), teacher_flop()
    epochs = 300 * IMAGES
    dropped = 0.9 * step_flop(patch_drop=0.5) + 0.1 * plain
    rows = [
        ("plain, 300 epochs", "79.9", epochs * plain, DEIT),
        ("curriculum, the work of 100", "79.9", curriculum_flop(100), f"{ET} a third of the first line"),
        ("muon, 300 epochs", "?", epochs * (plain + muon_flop() / BATCH), "not published for DeiT-S at 300 epochs"),
        ("patch-drop 0.5, 300 epochs", "?", epochs * dropped, "not published for this recipe"),
        ("curriculum, the work of 200", "81.0", curriculum_flop(200), f"{ET} two thirds of the first line"),
        ("hard, live RegNetY-160, 300 epochs", "81.2", epochs * (distilled + teacher), "arXiv 2012.12877, table 3"),
        (
            f"hard, its logits in a cache of {VIEWS} epochs", "? (81.2 live)",
            epochs * distilled + VIEWS * IMAGES * teacher, "not published with so few views",
        ),
        (
            "soft and features (VkD), 300 epochs", "82.3", epochs * (distilled + teacher),
            "roymiles/VkD, with convolutions in place of the patch embedding",
        ),
        (
            "hard, cached logits, curriculum of 100, muon, patch-drop 0.5", "?",
            curriculum_flop(100) * (distilled + muon_flop() / BATCH) / plain * dropped / plain
            + VIEWS * IMAGES * teacher,
            "not published; the factors of the lines above",
        ),
    ]  # fmt: skip
    lines = [
        "ESTIMATE: arithmetic from published figures and counted FLOP. Nothing of it was measured.", "",
        "| DeiT-S on ImageNet-1k, 224 | top-1 %, published | EFLOP | H100 hours | H200 hours | source of the top-1 |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for what, top1, flop, source in rows:
        hours = flop / (RATE * plain) / 3600
        lines.append(
            f"| {what} | {top1} | {flop / 1e18:.1f} | {hours:.1f} | {hours / H200:.1f} to {hours:.1f} | {source} |"
        )
    lines += [
        "",
        f"- Plain: 300 epochs x {IMAGES:,} images / {RATE:,} images/s = {epochs / RATE / 3600:.1f} h; an image takes "
        f"{plain / 1e9:.1f} GFLOP forward and backward, so that is {RATE * plain / 1e12:.0f} of an H100's 989 TFLOP/s. "
        "A run of 300 epochs that was published took 34 H100 hours, at 3,548 images/s (nvSubquadratic).",
        f"- Curriculum: {Curriculum.read('efficienttrain', 100, 224).epochs} epochs of smaller images for the work of "
        f"100; an image of 96 pixels takes {step_flop(pixels=96) / plain:.3f} of one of 224, of 160 "
        f"{step_flop(pixels=160) / plain:.3f}, of 192 {step_flop(pixels=192) / plain:.3f}.",
        f"- Muon: {muon_flop() / 1e9:.0f} GFLOP a step of {BATCH:,} images, {100 * muon_flop() / BATCH / plain:.1f} % "
        "more. On ImageNet-100 it is ahead of AdamW, more so with strong augmentation (arXiv 2605.24770). Each tenth "
        "of the epochs that it saved would save a tenth of the hours.",
        f"- Patch-drop 0.5: {step_flop(patch_drop=0.5) / plain:.2f} of the FLOP in nine tenths of the steps, so "
        f"{dropped / plain:.2f} in all.",
        f"- A live RegNetY-160 adds {teacher / 1e9:.1f} GFLOP an image to the {distilled / 1e9:.1f} of the distilled "
        f"student; a cache of {VIEWS} epochs costs {VIEWS} of its passes, {VIEWS * IMAGES * teacher / 1e18:.1f} EFLOP.",
    ]  # fmt: skip
    return "\n".join(lines)
