"""timm's Attention on the fused kernels. Imports timm: `apply_to` imports this file for a model of timm's."""

from timm.layers import Attention
from timm.models import register_notrace_module
from torch import Tensor, nn

from fastdeit.kernels.attention.api import attention, attention_qkvpacked

from .masks import as_bias, fits
from .report import note_call, why_not_call, why_not_tensors


@register_notrace_module  # a leaf for timm's feature extraction by torch.fx
class FusedAttention(Attention):
    """The parameters and the results of timm.layers.Attention, with q, k and v read in place from the projection.

    Only forward differs, so that a layer becomes one by its __class__. Causality and dropout that somebody turned on
    later go to timm's own forward.
    """

    runs_fastdeit_attention = True

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(2)
        reason = why_not_call(not fits(attn_mask, q, k), self.attn_drop.p if self.training else 0.0, is_causal)
        if note_call(reason or why_not_tensors(q, k, v)):
            return super().forward(x, attn_mask, is_causal)
        bias = as_bias(attn_mask, q, k)
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            out = attention_qkvpacked(qkv, bias=bias)
        else:
            out = attention(self.q_norm(q), self.k_norm(k), v, bias=bias)
        out = self.norm(out.flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))
