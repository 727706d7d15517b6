"""Several teachers as one, whose probabilities are the mean of theirs (Hinton et al., arXiv 1503.02531)."""

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastdeit.config import Config
from fastdeit.distributed.world import World
from fastdeit.tuning import Tuner

from .teacher import Teacher, load_teacher


class Teachers:
    """Called like a `Teacher`. Each of them has its own input size, normalisation and classes; they run one after the
    other, so that only their weights are in memory together.

    tau: the temperature of the probabilities whose mean is taken
    """

    def __init__(self, teachers: Sequence[Teacher], tau: float):
        self.teachers, self.tau = teachers, tau
        self.name = " and ".join(teacher.name for teacher in teachers)
        self.fingerprint = hashlib.sha256(" ".join(one.fingerprint for one in teachers).encode()).hexdigest()

    def __call__(self, images: Tensor, batch=None) -> Tensor:
        """(batch, classes) float32 logits whose softmax at `tau` is the mean of the teachers'."""
        mean = None
        for teacher in self.teachers:
            log_p = (teacher(images).float() / self.tau).log_softmax(1)
            mean = log_p if mean is None else torch.logaddexp(mean, log_p)
        return self.tau * (mean - math.log(len(self.teachers)))

    def identity(self) -> dict:
        """As Teacher.identity."""
        return {"teachers": [teacher.identity() for teacher in self.teachers]}

    def tune(self, tuner: Tuner, shape: Sequence[int], dtype: torch.dtype, *, compiled: bool) -> None:
        for number, teacher in enumerate(self.teachers, 1):  # a resumed run knows its choices by their questions
            teacher.tune(tuner, shape, dtype, compiled=compiled, question=f"teacher {number}")

    def compile(self) -> None:
        for teacher in self.teachers:
            teacher.compile()

    def forget_plain(self) -> None:
        for teacher in self.teachers:
            teacher.forget_plain()

    def check(self, batches: Iterable[Tensor]) -> list[str]:
        """As Teacher.check, the sentences of all."""
        batches = list(batches) if any(teacher.plain is not None for teacher in self.teachers) else []
        sentences = [sentence for teacher in self.teachers for sentence in teacher.check(batches)]
        return [*sentences, f"the mean of the {len(self.teachers)} teachers' probabilities teaches"]


def load_teachers(config: Config, classes: Sequence[str], *, student_mean, student_std, world: World):
    """The Teacher of the settings, or of several the Teachers; see load_teacher."""
    settings = config.distillation
    given = {"student_mean": student_mean, "student_std": student_std, "world": world}
    loaded = [load_teacher(one, classes, **given) for one in settings.teachers()]
    if len(loaded) == 1:
        return loaded[0]
    return Teachers(loaded, 1.0 if settings.distillation_type == "hard" else settings.distillation_tau)
