"""MaskedKD: the teacher, a vision transformer, sees only the patches that the student attends to most. The fewer they
are, the less it costs.

    score of a patch = the attention of the student's class token to it, in the last block, mean over the heads

The student runs first, then the teacher, on the same images. Source: arXiv 2302.10494; effl-lab/MaskedKD losses.py and
vision_transformer_teacher.py.
"""

import timm.models
import torch
from torch import Tensor, nn

from fastdeit.config import Config
from fastdeit.errors import UserError
from fastdeit.models.deit import DeiT

from .attention import Tap, add_hooks, check_grids, plain_attentions

FLAG = "--teacher-patches"


class TeacherPatches:
    """Call it after the student's forward pass: (batch, kept) int64, the patches for the teacher, counted from 0.

    Construct it before either model is compiled, and after the student was copied for its moving average: hooks belong
    to the student, and a timm teacher gets a `KeptPatches`.
    """

    def __init__(self, config: Config, student: nn.Module, teacher: nn.Module, teacher_name: str):
        attentions = plain_attentions(student, f"the student {config.model.model}", FLAG)
        plain_attentions(teacher, f"the teacher {teacher_name}", FLAG)
        rows, columns = check_grids(student, teacher, teacher_name, FLAG)
        if not isinstance(teacher, (DeiT, timm.models.VisionTransformer)):
            raise UserError(f"{FLAG}: the teacher {teacher_name} is no VisionTransformer of timm's: omit the flag")
        self.prefix = student.num_prefix_tokens
        if self.prefix == 0:
            raise UserError(f"{FLAG}: the student {config.model.model} has no class token: omit the flag")
        self.kept = max(1, int(rows * columns * config.distillation.teacher_patches))
        add_hooks(attentions)
        self.tap = Tap(attentions[-1], "maps")
        if not isinstance(teacher, DeiT):
            teacher.patch_drop = KeptPatches(teacher.num_prefix_tokens)

    @classmethod
    def of(cls, config: Config, student: nn.Module, teacher) -> "TeacherPatches | None":
        """That of the settings; None where the teacher sees all. `teacher`: a live one, a cached one or None."""
        if config.distillation.teacher_patches == 1 or teacher is None:
            return None
        if not hasattr(teacher, "hookable"):
            raise UserError(f"{FLAG} needs one live teacher: omit the flag, or --teacher-store")
        return cls(config, student, teacher.hookable(), teacher.name)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        q_BNHK, k_BNHK = self.tap.take()
        q_BHK, scale = q_BNHK[:, 0].float(), q_BNHK.shape[-1] ** -0.5
        with torch.autocast(q_BHK.device.type, enabled=False):
            scores_BHN = torch.einsum("bhk,bnhk->bhn", q_BHK, k_BNHK.float()) * scale
        attention_BN = scores_BHN.softmax(-1).mean(1)
        return attention_BN[:, self.prefix :].topk(self.kept).indices


class KeptPatches(nn.Module):
    """In the place of timm's PatchDropout: leaves the prefix tokens and `patches` of (batch, tokens, width)."""

    def __init__(self, prefix: int):
        super().__init__()
        self.prefix = prefix
        self.patches: Tensor | None = None

    def forward(self, x_BND: Tensor) -> Tensor:
        if self.patches is None:
            return x_BND
        places = (self.patches + self.prefix)[..., None].expand(-1, -1, x_BND.shape[-1])
        return torch.cat([x_BND[:, : self.prefix], x_BND.gather(1, places)], dim=1)


def logits_of(model: nn.Module, images: Tensor, patches: Tensor) -> Tensor:
    """The logits of a teacher that sees these patches of each image only."""
    if isinstance(model, DeiT):
        return model(images, patches=patches)
    model.patch_drop.patches = patches
    logits = model(images)
    model.patch_drop.patches = None
    return logits
