"""What every launch of the attention kernels asks of its tensors and of the device."""

from torch import Tensor

from fastdeit.kernels.backend import compute_capability


def architecture(x: Tensor) -> int:
    """80, 90, 100 and so on. The interpreter runs what a Hopper GPU would."""
    return compute_capability(x.device) if x.is_cuda else 90


def padded_columns(head_dim: int) -> int:
    """Columns of a tile: the next power of two."""
    return 1 << (head_dim - 1).bit_length()


def readable(x_BNHD: Tensor) -> Tensor:
    """x if the kernels can read it in place (contiguous head_dim, a batch entry within 2**31 elements), else a copy."""
    _, tokens, heads, head_dim = x_BNHD.shape
    _, stride_n, stride_h, stride_d = x_BNHD.stride()
    reach = (tokens + 256) * stride_n + heads * stride_h + head_dim
    return x_BNHD if stride_d == 1 and reach < 2**31 else x_BNHD.contiguous()
