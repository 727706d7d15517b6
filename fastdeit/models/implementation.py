"""How a DeiT computes what can be computed in more than one way. The weights, their names and what they mean stay.

ATTENTION holds, by name, attention over the packed projection: (qkv, first) -> (B, first or N, H, K) for qkv of
(B, N, 3, H, K), where the first `first` tokens look at all; None for all tokens.

    sdpa                      PyTorch's scaled_dot_product_attention, which chooses among its backends
    flash cudnn efficient math    that backend of it and no other; RuntimeError where it cannot take the input
    fa3 fa4                   flash, served by FlashAttention-3 or -4 where their packages are installed
    fused                     fastdeit.kernels.attention_qkvpacked
    xformers                  its memory_efficient_attention
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[..., Tensor]


class Implementation(NamedTuple):
    """What DeiT.implement takes. attention, last_attention: keys of ATTENTION, the latter for the last block, where a
    few queries meet all keys. fused_norm: the attention's residual and the LayerNorm behind it in one kernel,
    fastdeit.kernels.add_layer_norm. fused_gelu: the MLP's first bias and the GELU in one, bias_gelu. fused_mlp: all of
    the MLP in one, mlp, whatever fused_gelu is."""

    attention: str = "sdpa"
    last_attention: str = "sdpa"
    fused_norm: bool = False
    fused_gelu: bool = False
    fused_mlp: bool = False


def _sdpa(qkv: Tensor, first: int | None = None) -> Tensor:
    q_BHNK, k_BHNK, v_BHNK = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # views: PyTorch's kernels take any stride
    return F.scaled_dot_product_attention(q_BHNK[:, :, :first], k_BHNK, v_BHNK).transpose(1, 2)


def _backend(backend: SDPBackend) -> Attend:
    def attend(qkv: Tensor, first: int | None = None) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(qkv, first)

    return attend


def _fused(qkv: Tensor, first: int | None = None) -> Tensor:
    from fastdeit.kernels import attention, attention_qkvpacked

    if first is None:
        return attention_qkvpacked(qkv)
    q, k, v = qkv.unbind(2)
    return attention(q[:, :first], k, v)


def _xformers(qkv: Tensor, first: int | None = None) -> Tensor:
    if not qkv.is_cuda:
        raise ValueError("attention='xformers' runs on CUDA devices only; use attention='sdpa' on this one")
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv.unbind(2)
    return memory_efficient_attention(q[:, :first], k, v)


ATTENTION: dict[str, Attend] = {
    "sdpa": _sdpa,
    "fused": _fused,
    "xformers": _xformers,
    "flash": _backend(SDPBackend.FLASH_ATTENTION),
    "cudnn": _backend(SDPBackend.CUDNN_ATTENTION),
    "efficient": _backend(SDPBackend.EFFICIENT_ATTENTION),
    "math": _backend(SDPBackend.MATH),
    "fa3": _backend(SDPBackend.FLASH_ATTENTION),
    "fa4": _backend(SDPBackend.FLASH_ATTENTION),
}
NEEDS = {"xformers": "xformers", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}


def attention_named(name: str) -> Attend:
    """Raises ValueError for an unknown name, and for one whose package is not installed."""
    if name not in ATTENTION:
        raise ValueError(f"attention={name!r} is unknown; choose one of {', '.join(ATTENTION)}")
    if not installed(name):
        how = "pip install 'fastdeit[xformers]'" if name == "xformers" else "see Dao-AILab/flash-attention"
        raise ValueError(f"attention={name!r} needs {NEEDS[name]}: {how}, or use attention='sdpa'")
    activate(name)
    return ATTENTION[name]


def installed(name: str) -> bool:
    """Whether the package that ATTENTION[name] needs can be found here, and PyTorch can make use of it."""
    if name not in NEEDS:
        return True
    if name != "xformers" and name.upper() not in getattr(torch_attention, "list_flash_attention_impls", list)():
        return False
    try:
        return importlib.util.find_spec(NEEDS[name]) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False


def activate(name: str) -> None:
    """Have PyTorch's flash operator, in the whole process, be the one that `name` means: FlashAttention-3 for "fa3", -4
    for "fa4", PyTorch's own for "flash". The other names leave it as it is."""
    if name not in ("flash", "fa3", "fa4") or not hasattr(torch_attention, "activate_flash_attention_impl"):
        return
    wanted = None if name == "flash" else name.upper()
    if torch_attention.current_flash_attention_impl() == wanted:
        return
    if wanted is None:
        torch_attention.restore_flash_attention_impl()
    else:
        torch_attention.activate_flash_attention_impl(wanted)


def candidates(device: torch.device) -> list[str]:
    """The attentions worth timing on this device, PyTorch's own choice first. Which of them can take the run's tensors
    shows when they are called."""
    if device.type == "cpu":
        return ["sdpa", "math"]  # "fused" calls on a CPU what "sdpa" does
    optional = [name for name in NEEDS if installed(name)]
    return ["sdpa", "fused", "flash", "cudnn", "efficient", *optional]
