"""What a model's attention does after it was replaced: layer by layer, and call by call."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdeit.kernels.attention.api import DTYPES, HEAD_DIMS, offsets_fit


@dataclass(frozen=True)
class SwapReport:
    """Which attention layers of a model can now run fastdeit.kernels.attention, and which cannot and why. Prints well.

    A layer decides again at each call, by what it is given: `attention_calls` tells what became of the calls.
    """

    replaced: list[str] = field(default_factory=list)  # names of modules
    kept: dict[str, str] = field(default_factory=dict)  # name of a module: the reason it was left as it was

    def __str__(self) -> str:
        layers = len(self.replaced) + len(self.kept)
        if not layers:
            return "fastdeit attention: found no attention layers"
        lines = [f"fastdeit attention: {len(self.replaced)} of {layers} attention layers replaced"]
        for reason in dict.fromkeys(self.kept.values()):
            names = [name or "the model itself" for name, why in self.kept.items() if why == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"    left alone: {', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines)


FUSED = "fused"
_listeners: list[Counter[str]] = []


@contextmanager
def attention_calls() -> Iterator[Counter[str]]:
    """Counts the calls of replaced attention layers: `calls["fused"]` ran our kernels; each other key is a reason for
    which so many calls ran PyTorch's attention.

    with attention_calls() as calls:
        model(images)
    print(calls)    # Counter({'fused': 12})

    Calls inside a torch.compile'd region are not seen.
    """
    calls: Counter[str] = Counter()
    _listeners.append(calls)
    try:
        yield calls
    finally:
        _listeners.remove(calls)


def note_call(reason: str) -> str:
    for calls in _listeners:
        calls[reason or FUSED] += 1
    return reason


def why_not_layer(head_dim: int | None, dropout: float = 0.0) -> str:
    """The reason a layer with these properties has to stay as it is; empty when the kernels can take it."""
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} is not a multiple of 8 from 16 to 128"
    if dropout > 0:
        return f"attention dropout {dropout:g}, and the kernels do none"
    return ""


def why_not_call(masked: bool, dropout: float, causal: bool) -> str:
    """The reason a call has to go to PyTorch's attention; empty when the kernels can take it. `masked`: by a mask that
    is no bias of attention's."""
    if masked:
        return "a mask, or a bias added to the logits"
    if causal:
        return "causal"
    return "attention dropout" if dropout > 0 else ""


def why_not_tensors(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Likewise for q, k and v, (batch, tokens, heads, head_dim)."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        return "shapes: grouped heads, or v of another width than k"
    if q.dtype != k.dtype or q.dtype != v.dtype:
        return "q, k and v differ in dtype"
    if q.dtype not in DTYPES and not (q.dtype == torch.float64 and q.device.type == "cpu"):
        return f"{q.dtype} on {q.device.type}"
    if reason := why_not_layer(q.shape[3]):
        return reason
    return "" if all(x.shape[1] and offsets_fit(*x.shape[1:]) for x in (q, k)) else "no tokens, or too many"
