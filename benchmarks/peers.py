"""The training steps of others, token distillation with a live teacher: hard, weights a half each, AdamW, EMA.

Everything that is theirs and can be imported is. The order of operations is that of

    Timm    huggingface/pytorch-image-models train.py, train_one_epoch, with --kd-distill-type token
    Deit    facebookresearch/deit engine.py and losses.py, with the model from timm, as there

Both wait for the loss at every step, as they do. What costs nothing beside the step is left out: schedule, meters.
Images are mixed on the device, as by timm without its prefetcher (with it, the loader's workers mix) and by deit.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import repeat

import timm
import torch
from timm.data import Mixup
from timm.data.loader import PrefetchLoader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEma
from torch import Tensor, nn

SMOOTHING, DECAY, WEIGHT_DECAY = 0.1, 0.99996, 0.05  # the DeiT recipe's
MIXING = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": SMOOTHING}  # further ones are the defaults
LR = 2.5e-4


def timm_lacks() -> str | None:
    """What this timm lacks to distil as its train.py does, in a sentence; None where it can."""
    try:
        from timm.task import TokenDistillationTask

        complete = hasattr(TokenDistillationTask, "setup_ema")
    except ImportError:
        complete = False
    return None if complete else f"timm {timm.__version__} does not distil as 1.0.31 does: pip install 'timm>=1.0.31'"


def student_of_timm(name: str, *, classes: int, pixels: int, drop_path: float) -> nn.Module:
    return timm.create_model(name, num_classes=classes, img_size=pixels, drop_path_rate=drop_path)


def noise(images: Tensor, labels: Tensor, *, erase: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches as timm's loader hands them over from uint8 pixels (B, 3, H, W): normalised on the device, erased
    with this probability, a batch ahead on a stream of its own."""
    erasing = {"re_prob": erase, "re_mode": "pixel", "re_count": 1}
    return iter(PrefetchLoader(repeat((images, labels)), device=images.device, **erasing))


def mixed(batches: Iterator[tuple[Tensor, Tensor]], classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    mixup = Mixup(**MIXING, num_classes=classes)
    return (mixup(*batch) for batch in batches)


def teacher_of_timm(network: nn.Module, device: torch.device, *, compile: bool) -> nn.Module:
    from timm.task import DistillationTeacher

    teacher = DistillationTeacher(network.to(device), device=device)
    if compile:
        teacher.compile()
    return teacher


@torch.no_grad()
def logits(teacher: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits (B, classes) of a teacher of timm, which runs in the student's autocast."""
    with _cudnn_benchmark(), _autocast(images.device, dtype):
        return teacher(images)


class Timm:
    """Call it with normalised images (B, 3, H, W) and soft targets (B, classes). student and teacher: of timm, on the
    CPU; dtype: autocast's."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, device: torch.device, dtype: torch.dtype, compile: bool,
        channels_last: bool, lr: float = LR,
    ):  # fmt: skip
        from timm.task import TokenDistillationTask

        self.device, self.dtype, self.channels_last, self.steps = device, dtype, channels_last, 0
        student.to(device)
        if channels_last:
            student.to(memory_format=torch.channels_last)
        self.task = TokenDistillationTask(
            student, teacher.to(device), criterion=SoftTargetCrossEntropy(), distill_type="hard", task_loss_weight=0.5,
            device=device, verbose=False,
        )  # fmt: skip
        self.optimizer = create_optimizer_v2(student, opt="adamw", lr=lr, weight_decay=WEIGHT_DECAY)
        self.task.setup_ema(decay=DECAY)
        if compile:
            self.task.compile()
        self.task.get_trainable_module().train()

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        with _cudnn_benchmark():
            if self.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with _autocast(self.device, self.dtype):
                loss = self.task(images, targets)["loss"]
            loss.backward()
            self.optimizer.step()
            loss.item()
            self.optimizer.zero_grad()
            self.steps += 1
            self.task.update_ema(step=self.steps)
        return loss.detach()


class Deit:
    """Call it with normalised images (B, 3, H, W) and soft targets (B, classes). Not its fp16 with loss scaling but
    bfloat16, which costs less."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, device: torch.device, dtype: torch.dtype, lr: float = LR
    ):
        self.device, self.dtype = device, dtype
        student.set_distilled_training(True)
        self.student, self.teacher = student.to(device).train(), teacher.to(device).eval()
        self.ema = ModelEma(self.student, decay=DECAY)
        self.optimizer = create_optimizer_v2(self.student, opt="adamw", lr=lr, weight_decay=WEIGHT_DECAY)
        self.class_term = SoftTargetCrossEntropy()

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        with _cudnn_benchmark():
            with _autocast(self.device, self.dtype):
                cls_logits, dist_logits = self.student(images)
                class_term = self.class_term(cls_logits, targets)
                with torch.no_grad():
                    decisions = self.teacher(images).argmax(dim=1)
                loss = 0.5 * class_term + 0.5 * nn.functional.cross_entropy(dist_logits, decisions)
            loss.item()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.ema.update(self.student)
        return loss.detach()


def _autocast(device: torch.device, dtype: torch.dtype):
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def _cudnn_benchmark():
    """Both set it for their whole process, which here they share with others."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
