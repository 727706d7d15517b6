"""timm's Attention on the fused kernels. Imports timm: `apply_to_timm` imports this file when it is called."""

from timm.layers import Attention
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..attention.api import attention, attention_qkvpacked
from .report import fits


@register_notrace_module  # a leaf for timm's feature extraction by torch.fx
class FusedAttention(Attention):
    """The parameters and the results of timm.layers.Attention, with q, k and v read in place from the projection.

    Only forward differs, so that a layer becomes one by its __class__. A mask, causality, dropout that somebody turned
    on later, and more tokens than the kernels take go to timm's own forward.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        dropped = self.training and self.attn_drop.p > 0
        if attn_mask is not None or is_causal or dropped or not fits(x, tokens):
            return super().forward(x, attn_mask, is_causal)
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            out = attention_qkvpacked(qkv)
        else:
            q, k, v = qkv.unbind(2)
            out = attention(self.q_norm(q), self.k_norm(k), v)
        out = self.norm(out.flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))
