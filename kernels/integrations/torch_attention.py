"""nn.MultiheadAttention (torchvision, open_clip, CLIP) on the fused kernels."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.kernels.attention.api import attention, attention_qkvpacked

from .report import note_call, why_not_call, why_not_tensors


class FusedMultiheadAttention(nn.MultiheadAttention):
    """The parameters and the results of nn.MultiheadAttention, with self-attention read in place from the projection.

    Only forward differs, so that a layer becomes one by its __class__. Masks, causality, dropout in training, wanted
    attention weights, unbatched or nested input, added key and value biases, and keys or values of another width go to
    PyTorch's own forward.
    """

    runs_fastdeit_attention = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        heads = self.num_heads, self.head_dim
        masked = attn_mask is not None or key_padding_mask is not None
        reason = (
            self._why_not(query, key, value, need_weights)
            or why_not_call(masked, self.dropout if self.training else 0.0, is_causal)
            or why_not_tensors(*(self._batch_first(x).unflatten(-1, heads) for x in (query, key, value)))
        )
        if note_call(reason):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value:
            qkv = F.linear(query, weight, bias).unflatten(-1, (3, *heads))
            out = attention_qkvpacked(self._batch_first(qkv))
        else:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            parts = zip((query, key, value), weight.chunk(3), biases)
            out = attention(*(self._batch_first(F.linear(x, w, b).unflatten(-1, heads)) for x, w, b in parts))
        return self._batch_first(self.out_proj(out.flatten(2))), None

    def _batch_first(self, x: Tensor) -> Tensor:
        """(batch, tokens, ...) from the layer's order, or the other way."""
        return x if self.batch_first else x.transpose(0, 1)

    def _why_not(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> str:
        if need_weights:
            return "the attention weights are wanted (need_weights=True)"
        if query.is_nested or query.ndim != 3 or key.ndim != 3 or value.ndim != 3:
            return "unbatched or nested input"
        if not self._qkv_same_embed_dim or self.bias_k is not None or self.add_zero_attn:
            return "keys or values of another width, or added keys"
        return ""
