"""Feature distillation, VkD: an orthogonal projection of the student's features is brought near the teacher's.

    distance = smooth L1(P s, layer norm(t)), mean over images and the teacher's channels;  P^T P = 1 (or P P^T = 1,
    where the student has more channels), so that no similarity of the student's features is lost or invented by P

s: the mean of a vision transformer's patches after its last norm, which is what VkD takes; of another student, the
input of its classifier. t: the input of the teacher's classifier, pooled as the teacher pools; the layer norm has no
weights. P is learned along with the student and is no part of it: only training.pt has it. Source: arXiv 2403.06213;
roymiles/VkD engine.py and train.py.
"""

import timm.models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.config import Config
from fastdeit.distributed import parallel
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.models.deit import DeiT


class FeatureDistillation:
    """Call it after a forward pass of both models on the same images: () float32, the distance.

    Construct it before either model is compiled, and after the student was copied for its moving average: hooks belong
    to these two modules.
    """

    def __init__(self, config: Config, student: nn.Module, teacher: nn.Module, teacher_name: str):
        classifier, width = _classifier(teacher, f"the teacher {teacher_name}")
        classifier.register_forward_pre_hook(_keep_input)
        self.teacher, self.student, self.prefix = classifier, *_student_source(student, config.model.model)
        own_width = student.num_features if self.prefix is not None else _classifier(student, "the student")[1]
        self.projection = self.forward = Projection(own_width, width, seed=config.run.seed)

    @classmethod
    def of(cls, config: Config, student: nn.Module, teacher) -> "FeatureDistillation | None":
        """That of the settings; None where its weight is 0. `teacher`: a live one, a cached one or None."""
        if config.distillation.feature_distillation_weight == 0:
            return None
        if not hasattr(teacher, "hookable"):
            raise UserError(
                "--feature-distillation-weight needs one live teacher: give --distillation-type soft or hard, and omit "
                "--teacher-store, since a logit cache holds no features"
            )
        return cls(config, student, teacher.hookable(), teacher.name)

    def distribute(self, world: World, sharding: str) -> None:
        """Put the projection on this process's device, and on all processes."""
        self.projection.to(world.device)
        self.forward = parallel.distribute(self.projection, None, sharding, world)

    def __call__(self) -> Tensor:
        features = _taken(self.student)
        student = features.flatten(1) if self.prefix is None else features[:, self.prefix :].float().mean(1)
        teacher = _taken(self.teacher).flatten(1).float()
        with torch.autocast(student.device.type, enabled=False):
            return F.smooth_l1_loss(self.forward(student.float()), F.layer_norm(teacher, teacher.shape[1:]))


class Projection(nn.Module):
    """(batch, student's channels) -> (batch, teacher's channels), by the first columns (or rows) of a product of
    Householder reflections, one for each channel of the narrower of the two.

        1 - 2 v v^T / |v|^2, one after the other, are 1 - V T V^T with T^-1 = the upper triangle of V^T V, of whose
        diagonal the half

    so that it takes matrix products and one triangular solve, nothing that waits for the host, and is orthogonal to
    rounding. torch.nn.utils.parametrizations.orthogonal multiplies the reflections one by one, and a square matrix of
    the teacher's channels after them. T: Puglisi, SIAM J. Sci. Stat. Comput. 13 (1992). The lengths of the v do not
    matter; these are of numbers as large as the student's weights (deviation 0.02), so that they turn as fast, and make
    every orthogonal matrix equally likely at the start (Stewart, SIAM J. Numer. Anal. 17, 1980).
    """

    def __init__(self, student: int, teacher: int, seed: int = 0):
        super().__init__()
        self.student, self.teacher = student, teacher
        shape, generator = (max(student, teacher), min(student, teacher)), torch.Generator().manual_seed(seed)
        x = torch.empty(shape).normal_(std=0.02, generator=generator).tril()
        diagonal = x.diagonal()
        diagonal += diagonal.sign() * x.norm(dim=0)
        self.reflectors = nn.Parameter(x)

    def forward(self, x: Tensor) -> Tensor:
        V = self.reflectors.tril()
        columns, gram = V.shape[1], V.T @ V
        inverse = gram.triu(1) + torch.diag(gram.diagonal() / 2)
        W = torch.linalg.solve_triangular(inverse, V[:columns].T, upper=True)  # T V^T, of the first columns
        if self.teacher >= self.student:
            return F.pad(x, (0, self.teacher - self.student)) - x @ W.T @ V.T
        return x[:, :columns] - x @ V @ W


def _student_source(student: nn.Module, name: str) -> tuple[nn.Module, int | None]:
    """(the module that keeps the student's features, how many tokens stand before its patches; None where there are
    no tokens)"""
    transformer = isinstance(student, (DeiT, timm.models.VisionTransformer))
    if transformer and not isinstance(student.norm, nn.Identity):
        student.norm.register_forward_hook(_keep_output)
        if isinstance(student, DeiT):
            student.all_tokens = True
        return student.norm, student.num_prefix_tokens
    classifier, _ = _classifier(student, f"the student {name}")
    classifier.register_forward_pre_hook(_keep_input)
    return classifier, None


def _classifier(model: nn.Module, who: str) -> tuple[nn.Module, int]:
    """(the linear layer that makes logits of features, how many they are); of a distilled DeiT the class token's."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    found = found[0] if isinstance(found, (tuple, list)) else found
    if isinstance(found, nn.Linear):
        return found, found.in_features
    if isinstance(found, nn.Conv2d):
        return found, found.in_channels
    raise UserError(
        f"--feature-distillation-weight: {who} has no linear classifier whose input could be compared: take a model of "
        "timm or of ours, or omit the flag"
    )


def _keep_input(module: nn.Module, inputs) -> None:
    module.features = inputs[0]


def _keep_output(module: nn.Module, inputs, output: Tensor) -> None:
    if module.training:
        module.features = output


def _taken(module: nn.Module) -> Tensor:
    """The features of the last forward pass, which are then released."""
    return module.__dict__.pop("features")
