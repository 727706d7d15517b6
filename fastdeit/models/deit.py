"""The student: DeiT (arXiv 2012.12877) and DeiT III (arXiv 2204.07118), in plain PyTorch unless told otherwise.

    patches + class token (+ distillation token) -> depth x [attention, MLP] -> LayerNorm -> one linear head per token

Parameters carry timm's names, so state dicts pass between this file, timm and facebookresearch/deit unchanged.
The only randomness of the model is stochastic depth, drawn from a single tensor that a trainer may supply. Which
patches are left out (patch_drop.py) is the trainer's choice altogether.

Shapes: B batch, N tokens, D width, H heads, K head_dim (D = H K), L depth, C classes.
Tokens are ordered [class, distillation, patches row by row].
"""

import importlib.util
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdeit.kernels import add_layer_norm, bias_gelu, mlp

from .architectures import ARCHITECTURES, Architecture, model_names, unknown_model_message
from .implementation import ATTENTION, Implementation, attention_named
from .positions import regridded

__all__ = ["DeiT", "create_model", "model_names", "unknown_model_message"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# Layers


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attend = self.attend_first = ATTENTION["sdpa"]
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, first: int | None = None) -> Tensor:
        """`first`: for so many tokens only; None for all."""
        qkv = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1))
        out = self.attend(qkv) if first is None else self.attend_first(qkv, first)
        return self.proj(out.flatten(-2))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)
        self.fused_gelu = self.fused = False

    def forward(self, x_BND: Tensor) -> Tensor:
        if self.fused:
            return mlp(x_BND, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        if self.fused_gelu:
            return self.fc2(bias_gelu(F.linear(x_BND, self.fc1.weight), self.fc1.bias))
        return self.fc2(self.act(self.fc1(x_BND)))


class LayerScale(nn.Module):
    """A learned factor per channel, 1e-4 at first as in facebookresearch/deit models_v2.py (timm starts at 1e-6)."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND * self.gamma


class PatchEmbed(nn.Module):
    """(B, 3, height, width) -> (B, patches, D): one linear map of each square patch.

    It has the parameters of a strided convolution and is computed as a matrix product, 1.3 times as fast forward and
    backward on a CPU; libraries tune convolutions neither for three channels nor for windows that do not overlap. Where
    one is faster all the same, tuning sets as_convolution.
    """

    def __init__(self, patch_size: int, width: int, in_chans: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, patch_size, patch_size)
        self.as_convolution = False

    def forward(self, images: Tensor) -> Tensor:
        if self.as_convolution:
            return self.proj(images).flatten(2).transpose(1, 2)
        size = self.proj.stride[0]
        patches = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, 3, rows, size, columns, size)
        patches_BNP = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return F.linear(patches_BNP, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


class Block(nn.Module):
    """Attention, then MLP, each normalised first and added to the residual stream."""

    def __init__(self, width: int, heads: int, layer_scale: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()
        self.implement(Implementation())

    def implement(self, implementation: Implementation) -> None:
        """As DeiT.implement."""
        self.attn.attend, self.attn.attend_first = map(attention_named, implementation[:2])
        self.fused_norm = implementation.fused_norm
        self.mlp.fused_gelu, self.mlp.fused = implementation.fused_gelu, implementation.fused_mlp

    def forward(self, x_BND: Tensor, branch_scale_B2: Tensor | None = None, first: int | None = None) -> Tensor:
        """`branch_scale_B2`: factor of each sample's attention and MLP branch (0 drops it); None means 1.
        `first`: return so many tokens only, which look at all; None for all."""
        # The factors come as a tensor, not as this block's drop rate, so that one compiled graph serves all blocks.
        attn_scale, mlp_scale = (None, None) if branch_scale_B2 is None else branch_scale_B2.unbind(1)
        branch_BND = self.attn(self.norm1(x_BND), first)
        if self.fused_norm:
            normed_BND, x_BND = add_layer_norm(
                branch_BND, x_BND[:, :first], self.norm2.weight, self.norm2.bias, eps=self.norm2.eps,
                layer_scale=getattr(self.ls1, "gamma", None), drop_path_scale=attn_scale,
            )  # fmt: skip
        else:
            x_BND = _add(x_BND[:, :first], self.ls1(branch_BND), attn_scale)
            normed_BND = self.norm2(x_BND)
        return _add(x_BND, self.ls2(self.mlp(normed_BND)), mlp_scale)


def _add(x_BND: Tensor, branch_BND: Tensor, scale_B: Tensor | None) -> Tensor:
    if scale_B is None:
        return x_BND + branch_BND
    # In float32: 1 / keep_prob rounded to bfloat16 would be off by up to 0.4 % for every kept sample alike.
    return (x_BND + branch_BND * scale_B[:, None, None]).to(x_BND.dtype)


# The model


class DeiT(nn.Module):
    """A Data-efficient Image Transformer; `create_model` makes one.

    forward(images, drop_path_noise=None, patches=None), images (B, 3, height, width) of the size the model was made for
    (or, see positions.take_sizes, a smaller one):
      distilled, in train(): (cls_logits, dist_logits), each (B, C), as facebookresearch/deit has it;
      distilled, in eval():  the average of both logits, (B, C) (the paper averages the softmax outputs instead);
      plain:                 logits (B, C).
    `set_distilled_training(False)` makes a distilled model average in train() too, which is timm's default.

    drop_path_noise (B, depth, 2), uniform in [0, 1): decides which samples skip which branch while training ([..., 0]
    attention, [..., 1] MLP; a branch is kept where noise < keep_prob, and then scaled by 1 / keep_prob). Drawn with
    torch.rand when not given. The drop rate rises linearly from 0 to `drop_path` over the depth in DeiT, and is
    `drop_path` in every block of DeiT III.

    patches (B, K) int64: of each image the places, counted from 0 row by row, of the patches that are seen; None: all.
    """

    def __init__(
        self, arch: Architecture, *, num_classes: int, img_size: tuple[int, int], drop_path: float, attention: str,
        in_chans: int = 3,
    ):  # fmt: skip
        super().__init__()
        self.arch = arch
        self.num_classes = num_classes
        self.num_features = self.embed_dim = arch.width
        self.num_prefix_tokens = 2 if arch.distilled else 1
        self.img_size = img_size
        self.in_chans = in_chans
        self.grid_size = (img_size[0] // arch.patch_size, img_size[1] // arch.patch_size)
        self.drop_path = drop_path
        self.distilled_training = arch.distilled
        self.grad_checkpointing = False
        self.regriddings: dict[tuple[int, int], Tensor] = {}  # see positions.take_sizes
        self.all_tokens = False  # training: the last block for all tokens, where their features are wanted

        # A position for every token; in DeiT III for the patches only.
        positions = self.grid_size[0] * self.grid_size[1] + (0 if arch.deit3 else self.num_prefix_tokens)
        self.cls_token = nn.Parameter(torch.empty(1, 1, arch.width))
        if arch.distilled:
            self.dist_token = nn.Parameter(torch.empty(1, 1, arch.width))
        self.pos_embed = nn.Parameter(torch.empty(1, positions, arch.width))
        self.patch_embed = PatchEmbed(arch.patch_size, arch.width, in_chans)
        self.blocks = nn.ModuleList(Block(arch.width, arch.heads, arch.deit3) for _ in range(arch.depth))
        self.set_attention(attention)
        self.norm = nn.LayerNorm(arch.width, eps=1e-6)
        self.reset_classifier(num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """As facebookresearch/deit: tokens, positions and Linear weights normal with a deviation of 0.02, biases 0."""
        for token in self.parameters(recurse=False):  # cls_token, dist_token, pos_embed
            nn.init.normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh heads for `num_classes` classes (0: no heads, the logits are the tokens' features)."""
        self.num_classes = num_classes
        for name in ("head", "head_dist") if self.arch.distilled else ("head",):
            head = nn.Identity() if num_classes == 0 else _init_linear(nn.Linear(self.embed_dim, num_classes))
            setattr(self, name, head.to(self.pos_embed))

    def forward(
        self, images: Tensor, drop_path_noise: Tensor | None = None, patches: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        cls_logits, dist_logits = self.forward_heads(images, drop_path_noise, patches)
        if dist_logits is None:
            return cls_logits
        if self.training and self.distilled_training:
            return cls_logits, dist_logits
        return (cls_logits + dist_logits) / 2

    def forward_heads(
        self, images: Tensor, drop_path_noise: Tensor | None = None, patches: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(cls_logits, dist_logits) in train() and eval() alike; dist_logits is None for a plain model."""
        # The heads read the prefix tokens only, so the last block need not compute the others.
        first = None if self.all_tokens and self.training else self.num_prefix_tokens
        x_BTD = self._tokens(images, drop_path_noise, patches, first=first)
        return self.head(x_BTD[:, 0]), self.head_dist(x_BTD[:, 1]) if self.arch.distilled else None

    def forward_features(self, images: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        """All tokens after the final LayerNorm, (B, N, D)."""
        return self._tokens(images, drop_path_noise)

    def _tokens(
        self, images: Tensor, drop_path_noise: Tensor | None, patches: Tensor | None = None, first: int | None = None
    ) -> Tensor:
        x_BND = self.embed(images, patches)
        branch_scale_BL2 = self._branch_scale(images, drop_path_noise)
        for i, block in enumerate(self.blocks):
            scale_B2 = None if branch_scale_BL2 is None else branch_scale_BL2[:, i]
            inputs = (x_BND, scale_B2, first if i == len(self.blocks) - 1 else None)
            if self.grad_checkpointing and torch.is_grad_enabled():
                # All randomness is in branch_scale, so there is no generator state to save and restore.
                x_BND = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BND = block(*inputs)
        return self.norm(x_BND)

    def embed(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """The tokens that enter the first block, (B, N, D)."""
        size, pos_embed = tuple(images.shape[-2:]), self.pos_embed
        if size in self.regriddings:
            pos_embed = regridded(pos_embed, self.regriddings[size])
        elif size != self.img_size:
            raise ValueError(
                f"this model takes images of {_pixels(self.img_size)} pixels, got {_pixels(size)}: "
                "resize them, or create the model with img_size= and load its weights again"
            )
        x_BND = self.patch_embed(images)
        tokens = [self.cls_token, self.dist_token] if self.arch.distilled else [self.cls_token]
        prefix = [token.expand(x_BND.shape[0], -1, -1) for token in tokens]
        if self.arch.deit3:
            x_BND = torch.cat([*prefix, x_BND + pos_embed], dim=1)
        else:
            x_BND = torch.cat([*prefix, x_BND], dim=1) + pos_embed
        if patches is None:
            return x_BND
        places_BKD = (patches + len(prefix))[..., None].expand(-1, -1, x_BND.shape[-1])
        return torch.cat([x_BND[:, : len(prefix)], x_BND.gather(1, places_BKD)], dim=1)

    def _branch_scale(self, images: Tensor, noise_BL2: Tensor | None) -> Tensor | None:
        if not self.training or self.drop_path == 0:
            return None
        shape = (images.shape[0], self.arch.depth, 2)
        if noise_BL2 is None:
            noise_BL2 = torch.rand(shape, device=images.device)
        elif noise_BL2.shape != shape:
            raise ValueError(f"drop_path_noise must be (batch, depth, 2) = {shape}, got {tuple(noise_BL2.shape)}")
        first = self.drop_path if self.arch.deit3 else 0.0
        keep_prob_L1 = 1 - torch.linspace(first, self.drop_path, self.arch.depth, device=images.device)[:, None]
        return (noise_BL2 < keep_prob_L1) / keep_prob_L1

    # What trainers, timm's included, ask a model for.

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable and self.arch.distilled

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass: activations of one block at a time, a third more work."""
        self.grad_checkpointing = enable

    def set_attention(self, attention: str) -> None:
        """Change the implementation of attention: 'sdpa', 'fused', 'xformers' or another of implementation.ATTENTION.
        The last block, where a few tokens look at all, stays with sdpa."""
        self.implement(Implementation(attention))

    def implement(self, implementation: Implementation) -> None:
        """Change how attention, norms and activations are computed; before the model is compiled. The weights do not
        care. Raises ValueError for what is unknown or not installed."""
        for block in self.blocks:
            block.implement(implementation)
        self.implementation = implementation

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        return (self.head, self.head_dist) if self.arch.distilled else self.head

    def no_weight_decay(self) -> set[str]:
        """Beside biases and norms (facebookresearch/deit decays dist_token; timm does not)."""
        return {"pos_embed", "cls_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """What timm's layer-wise decay reads: the stem, then the blocks, the final norm with the last one."""
        stem = "cls_token|dist_token|pos_embed|patch_embed"
        return {"stem": stem, "blocks": [(r"blocks\.(\d+)", None), ("norm", (99999,))]}

    @property
    def pretrained_cfg(self) -> dict:
        """What timm's resolve_data_config reads: input size, normalisation, crop."""
        return {
            "num_classes": self.num_classes,
            "input_size": (self.in_chans, *self.img_size),
            "mean": IMAGENET_MEAN if self.in_chans == 3 else (sum(IMAGENET_MEAN) / 3,) * self.in_chans,
            "std": IMAGENET_STD if self.in_chans == 3 else (sum(IMAGENET_STD) / 3,) * self.in_chans,
            "interpolation": "bicubic",
            "crop_pct": 1.0 if self.arch.img_size == 384 else 0.9,
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": ("head", "head_dist") if self.arch.distilled else "head",
        }

    default_cfg = pretrained_cfg


def _init_linear(linear: nn.Linear) -> nn.Linear:
    # Not trunc_normal_, whose bounds of 2 are 100 deviations away: in PyTorch 2.11 some weights came out as 2.0 itself.
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


# Making models


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    drop_path: float = 0.0,
    attention: str = "sdpa",
    in_chans: int = 3,
) -> DeiT:
    """A freshly initialised model; `fastdeit.models.weights.load_weights` fills it.

    img_size: pixels, one number or (height, width); img_size and patch_size default to those in the name.
    drop_path: highest stochastic depth rate, in [0, 1). attention: 'sdpa' (PyTorch), 'fused' (fastdeit.kernels),
    'xformers' or another of implementation.ATTENTION. Raises ValueError for an unknown name, a size that is no
    multiple of the patch, or a bad rate.
    """
    if name not in ARCHITECTURES:
        raise ValueError(unknown_model_message(name))
    arch = ARCHITECTURES[name]
    if patch_size is not None:
        arch = replace(arch, patch_size=patch_size)
    if img_size is None:
        img_size = arch.img_size
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if arch.patch_size < 1 or min(height, width) < 1 or height % arch.patch_size or width % arch.patch_size:
        raise ValueError(
            f"images of {_pixels((height, width))} pixels do not divide into patches of {arch.patch_size}; "
            f"choose sizes that are multiples of {arch.patch_size}, or another patch_size"
        )
    if num_classes < 0:
        raise ValueError(f"num_classes must be at least 1 (or 0 for a model without heads), got {num_classes}")
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")
    return DeiT(
        arch, num_classes=num_classes, img_size=(height, width), drop_path=drop_path, attention=attention,
        in_chans=in_chans,
    )  # fmt: skip


if importlib.util.find_spec("timm"):
    from . import timm_registry

    timm_registry.register(create_model)
