"""The training loss: the labels on the class head, the teacher's targets on the distillation head."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit.config import Config
from fastdeit.errors import UserError
from fastdeit.kernels import distillation_loss

from . import logit_losses


@dataclass(frozen=True)
class Objective:
    """L = (1 - alpha) * class term + alpha * teacher term + attention_weight * attention term
    + feature_weight * feature term, means over the batch.

    - class term: cross entropy with the (mixed, smoothed) label, on the class head;
    - teacher term, kind "hard": cross entropy with the teacher's argmax, on the distillation head (a student with one
      head takes both terms there); kind "soft": tau^2 * KL(teacher || student), both at temperature tau; kinds "dkd",
      "dist", "nkd": see logit_losses.py;
    - attention term: the distance between the models' attention (attention.py), if its weight is not 0;
    - feature term: that between their features (features.py), likewise.

    Training data-efficient image transformers & distillation through attention (arXiv 2012.12877), equations 2 and 3;
    facebookresearch/deit losses.py. Label smoothing applies to the class term only. alpha weights the teacher's term;
    some texts write alpha * cross entropy + (1 - alpha) * teacher instead.
    """

    kind: str = "none"
    alpha: float = 0.5
    tau: float = 1.0
    smoothing: float = 0.0
    soft_reduction: str = "batchmean"
    binary: bool = False
    attention_weight: float = 0.0
    feature_weight: float = 0.0
    nontarget: float = 0.0  # of dkd and nkd: the weight of the classes other than the target's
    standardize: bool = False  # soft, dkd: compare standardised logits

    @classmethod
    def from_config(cls, config: Config) -> "Objective":
        distillation = config.distillation
        binary = config.optimization.bce_loss
        if binary and distillation.distillation_type != "none":
            raise UserError("--bce-loss needs --distillation-type none, as in the DeiT III recipes")
        if binary and config.optimization.smoothing > 0:
            # facebookresearch/deit then makes every class a positive, since all smoothed targets are above 0.
            raise UserError("--bce-loss needs --smoothing 0, as in the DeiT III recipes")
        kind, nontarget = distillation.distillation_type, distillation.distillation_nontarget
        return cls(
            kind,
            distillation.distillation_alpha,
            distillation.distillation_tau,
            config.optimization.smoothing,
            distillation.distillation_reduction,
            binary,
            distillation.attention_distillation_weight,
            distillation.feature_distillation_weight,
            logit_losses.NONTARGET.get(kind, 0.0) if nontarget is None else nontarget,
            distillation.logit_standardization and kind in ("soft", "dkd"),
        )

    def __call__(
        self, outputs, labels: Tensor, mix, teacher, attention: Tensor | None = None, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss to differentiate and, to be logged, a detached (4,) tensor: class, teacher, attention and feature
        term.

        outputs: the student's (cls, dist) logits or its only logits, each (batch, classes)
        labels: (batch,) int64, -100 where there is none
        mix: the batch's `Mix` or None
        teacher: its (batch, classes) logits; or from a logit cache its (batch,) labels, or the (classes,
            probabilities) of the likeliest, (batch, top) each; or None
        attention, features: () the attention term, the feature term, or None
        """
        loss, terms = self._of_logits(outputs, labels, mix, teacher)
        for weight, term in ((self.attention_weight, attention), (self.feature_weight, features)):
            if term is None:
                terms = torch.cat([terms, terms.new_zeros(1)])
            else:
                loss, terms = loss + weight * term, torch.cat([terms, term.detach().to(terms).view(1)])
        return loss, terms

    def _of_logits(self, outputs, labels: Tensor, mix, teacher) -> tuple[Tensor, Tensor]:
        cls_logits, dist_logits = outputs if isinstance(outputs, tuple) else (outputs, None)
        mixed = None if mix is None else (labels[mix.partner], mix.lam)
        if self.binary:
            loss = binary_cross_entropy(cls_logits, labels, mixed)
            return loss, torch.stack([loss.detach(), torch.zeros_like(loss)])
        if self.standardize or self.kind in logit_losses.KINDS:
            cls_logits = cls_logits.float()
            dist_logits = cls_logits if dist_logits is None else dist_logits.float()
            teacher = logit_losses.teacher_logits(teacher, dist_logits, self.tau)
        if self.standardize:
            dist_logits, teacher = map(logit_losses.standardized, (dist_logits, teacher))
        if self.kind not in logit_losses.KINDS:
            return self._fused(cls_logits, dist_logits, labels, mixed, teacher, self.kind)
        class_term, terms = self._fused(cls_logits, None, labels, mixed, None, "none")
        target = logit_losses.target_class(labels, mix, teacher)
        teacher_term = logit_losses.logit_loss(
            self.kind, dist_logits, teacher, target, tau=self.tau, nontarget=self.nontarget
        )
        loss = (1 - self.alpha) * class_term + self.alpha * teacher_term
        return loss, torch.stack([terms[0], teacher_term.detach()])

    def _fused(self, cls_logits: Tensor, dist_logits: Tensor | None, labels, mixed, teacher, kind: str):
        """(loss, (2,) its terms), of the kinds that one kernel computes with their gradients."""
        return distillation_loss(
            cls_logits,
            None if kind == "none" else dist_logits,
            labels,
            teacher,
            kind=kind,
            alpha=self.alpha,
            tau=self.tau,
            smoothing=self.smoothing,
            mix=mixed,
            soft_reduction=self.soft_reduction,
            return_terms=True,
        )


def binary_cross_entropy(logits: Tensor, labels: Tensor, mixed) -> Tensor:
    """DeiT III's class term (arXiv 2204.07118): every class present in the mixed image is a full positive."""
    classes = torch.arange(logits.shape[1], device=logits.device)  # F.one_hot looks at the labels from the host
    target = labels[:, None] == classes
    if mixed is not None:
        second, lam = mixed
        # With lam 1 (0) nothing of the second (first) image is left.
        target = target & (lam > 0)[:, None] | (second[:, None] == classes) & (lam < 1)[:, None]
    return F.binary_cross_entropy_with_logits(logits.float(), target.float())
