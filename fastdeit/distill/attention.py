"""Attention distillation: the attention maps of student and teacher are compared block by block.

The teacher must be a plain vision transformer. Off by default: over 20 teachers of 11 families attention transfer
helped with 7 and hurt with 4, where teacher and student differ in architecture (arXiv 2605.07191).

Queries and keys are captured by hooks on the qkv projections; the maps themselves are never in memory
(fastdeit.kernels.attention_distillation_loss).
"""

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from fastdeit.config import Config
from fastdeit.errors import UserError
from fastdeit.kernels import attention_distillation_loss
from fastdeit.models import deit as ours

VARIANTS = {
    "maps": {"objective": "kl", "rows": "all"},
    "rows": {"objective": "kl", "rows": "prefix"},
    "scores": {"objective": "mse", "rows": "all"},
    "relations": {"objective": "kl", "rows": "all"},
}


class AttentionDistillation:
    """Call it after a forward pass of both models on the same images: () float32, the mean over the pairs of blocks.

    Construct it before either model is compiled, and after the student was copied for its moving average: the hooks
    belong to these two modules.
    """

    def __init__(self, config: Config, student: nn.Module, teacher: nn.Module, teacher_name: str):
        settings = config.distillation
        student_blocks = plain_attentions(student, f"the student {config.model.model}")
        teacher_blocks = plain_attentions(teacher, f"the teacher {teacher_name}")
        check_grids(student, teacher, teacher_name)
        pairs = layer_pairs(settings.attention_distillation_layers, len(student_blocks), len(teacher_blocks))
        self.variant, heads = settings.attention_distillation_variant, settings.attention_distillation_heads
        self.options = {
            **VARIANTS[self.variant],
            "heads": int(heads) if heads.isdecimal() else heads,
            "student_prefix": student.num_prefix_tokens,
            "teacher_prefix": teacher.num_prefix_tokens,
        }
        _check_heads(student_blocks[0], teacher_blocks[0], self.options["heads"])
        add_hooks([*student_blocks, *teacher_blocks])
        self.taps = [(Tap(student_blocks[s], self.variant), Tap(teacher_blocks[t], self.variant)) for s, t in pairs]

    @classmethod
    def of(cls, config: Config, student: nn.Module, teacher) -> "AttentionDistillation | None":
        """That of the settings; None where its weight is 0. `teacher`: a live one, a cached one or None."""
        if config.distillation.attention_distillation_weight == 0:
            return None
        if not hasattr(teacher, "hookable"):
            raise UserError(
                "--attention-distillation-weight needs a live teacher: give --distillation-type soft or hard, and omit "
                "--teacher-store, since a logit cache holds no attention maps"
            )
        return cls(config, student, teacher.hookable(), teacher.name)

    def __call__(self) -> Tensor:
        losses = [self._pair(student.take(), teacher.take()) for student, teacher in self.taps]
        return torch.stack(losses).mean()

    def _pair(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        if self.variant != "relations":
            return attention_distillation_loss(*student, *teacher, **self.options)
        # MiniLMv2 (arXiv 2012.15828): queries with queries, keys with keys, values with values.
        relations = [
            attention_distillation_loss(mine, mine, theirs, theirs, **self.options)
            for mine, theirs in zip(student, teacher)
        ]
        return torch.stack(relations).mean()


class Tap:
    """[q, k] of an attention module, for relations [q, k, v], each (batch, tokens, heads, head_dim)."""

    def __init__(self, attention: nn.Module, variant: str):
        self.heads, self.count = _heads(attention), 3 if variant == "relations" else 2
        self.qkv, *self.norms = _sources(attention)
        for module in (self.qkv, *self.norms):
            module.tapped = True

    def take(self) -> list[Tensor]:
        """The tensors of the last forward pass, which are then released."""
        kept = [module.__dict__.pop("kept", None) for module in (self.qkv, *self.norms)]
        assert kept[0] is not None, "the model has not run, or does not call its qkv projection"
        q, k, v = kept[0].unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.norms:  # timm normalises (batch, heads, tokens, head_dim)
            q, k = (normed.transpose(1, 2) for normed in kept[1:])
        return [q, k, v][: self.count]


def add_hooks(attentions: list[nn.Module]) -> None:
    """Hook every block, not only those that are compared: torch.compile does not guard on hooks, and blocks that share
    a compiled graph must not differ in them. It does guard on `tapped`."""
    for attention in attentions:
        for module in _sources(attention):
            module.tapped = False
            module.register_forward_hook(_keep)


def _keep(module: nn.Module, inputs, output: Tensor) -> None:
    if module.tapped:
        module.kept = output


def _sources(attention: nn.Module) -> list[nn.Module]:
    """The modules that compute queries and keys: the projection, and where they are normalised, the two norms."""
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return [attention.qkv, *(norm for norm in norms if not isinstance(norm, (nn.Identity, type(None))))]


def layer_pairs(text: str, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """[(student's block, teacher's block)], counted from 0, of "last", "every-N" or pairs such as "5:5,11:23"."""
    if text == "last":
        return [(student_depth - 1, teacher_depth - 1)]
    try:
        if text.startswith("every-"):
            n = int(text.removeprefix("every-"))
            if not 1 <= n <= student_depth:
                raise ValueError
            # At the same relative depth.
            return [(s, round((s + 1) * teacher_depth / student_depth) - 1) for s in range(n - 1, student_depth, n)]
        pairs = [tuple(map(int, pair.split(":"))) for pair in text.split(",")]
        if any(len(pair) != 2 or not (0 <= pair[0] < student_depth and 0 <= pair[1] < teacher_depth) for pair in pairs):
            raise ValueError
        return pairs
    except ValueError:
        raise UserError(
            f"--attention-distillation-layers {text}: give last, every-N, or pairs STUDENT:TEACHER of blocks such as "
            f"0:1,5:11; the student has blocks 0 to {student_depth - 1}, the teacher 0 to {teacher_depth - 1}"
        ) from None


FLAG = "--attention-distillation-weight"


def plain_attentions(model: nn.Module, who: str, flag: str = FLAG) -> list[nn.Module]:
    """The attention modules of a plain vision transformer, block by block. Raises UserError for another model, which
    `flag` cannot do with."""
    blocks = getattr(model, "blocks", ())
    found = [block.attn for block in blocks if type(getattr(block, "attn", None)) in (Attention, ours.Attention)]
    if found and len(found) == len(blocks) and hasattr(model, "num_prefix_tokens"):
        return found
    has_any = any("attention" in type(module).__name__.lower() for module in model.modules())
    reason = (
        "its attention is not that of a plain vision transformer (windows, relative or rotary positions)"
        if has_any
        else "it has no attention layers"
    )
    raise UserError(
        f"{flag}: the attention of {who} cannot be used; {reason}. Use a plain "
        "vision transformer of timm (vit_*, deit_*), or omit the flag"
    )


def _heads(attention: nn.Module) -> int:
    return attention.heads if isinstance(attention, ours.Attention) else attention.num_heads


def check_grids(student: nn.Module, teacher: nn.Module, teacher_name: str, flag: str = FLAG) -> tuple[int, int]:
    """(rows, columns) of patches, which both models have. Raises UserError otherwise."""
    own, other = _grid(student), _grid(teacher)
    if own == other:
        return own
    patch = teacher.patch_embed.proj.weight.shape[-2:]
    sides = list(dict.fromkeys(rows * side for rows, side in zip(own, patch)))  # one of a square
    size = " ".join(map(str, sides))
    raise UserError(
        f"{flag}: the student has {own[0]} x {own[1]} patches, the teacher {teacher_name} "
        f"{other[0]} x {other[1]}: give --teacher-input-size {size}, or a teacher with the same grid"
    )


def _grid(model: nn.Module) -> tuple[int, int]:
    return tuple(getattr(model, "grid_size", None) or model.patch_embed.grid_size)


def _check_heads(student: nn.Module, teacher: nn.Module, heads: str | int) -> None:
    counts, widths = (_heads(student), _heads(teacher)), (student.qkv.in_features, teacher.qkv.in_features)
    if heads == "equal" and counts[0] != counts[1]:
        raise UserError(
            f"the student has {counts[0]} attention heads, the teacher {counts[1]}: give "
            "--attention-distillation-heads mean, or a number of relation heads that divides both widths, such as "
            f"{max(n for n in range(1, 65) if widths[0] % n == widths[1] % n == 0)}"
        )
    if isinstance(heads, int) and (heads < 1 or any(width % heads for width in widths)):
        raise UserError(
            f"--attention-distillation-heads {heads}: must divide the widths {widths[0]} and {widths[1]} of student "
            "and teacher"
        )
    if heads not in ("equal", "mean") and not isinstance(heads, int):
        raise UserError(f"--attention-distillation-heads {heads}: give equal, mean, or a number of relation heads")
