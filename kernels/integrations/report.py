"""What is common to swapping the attention of timm's and of transformers' models: the limits and the report."""

from dataclasses import dataclass, field

import torch

from ..attention.api import DTYPES, HEAD_DIMS, MAX_TOKENS


@dataclass(frozen=True)
class SwapReport:
    """Which attention layers of a model now run fastdeit.kernels.attention, and which do not and why. Prints well."""

    replaced: list[str] = field(default_factory=list)  # names of modules
    kept: dict[str, str] = field(default_factory=dict)  # name of a module: the reason it was left as it was

    def __str__(self) -> str:
        layers = len(self.replaced) + len(self.kept)
        if not layers:
            return "fastdeit attention: the model has no attention layers"
        lines = [f"fastdeit attention: {len(self.replaced)} of {layers} attention layers replaced"]
        for reason in dict.fromkeys(self.kept.values()):
            names = [name or "the model itself" for name, why in self.kept.items() if why == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"    left alone: {', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines)


def why_not(head_dim: int | None, dropout: float) -> str:
    """The reason a layer with these properties has to stay as it is; empty when the kernels can take it."""
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if dropout > 0:
        return f"attention dropout {dropout:g}, and the kernels do none"
    return ""


def fits(x: torch.Tensor, tokens: int) -> bool:
    """Whether the kernels take this many tokens in the dtype of x."""
    return tokens <= MAX_TOKENS and (x.dtype in DTYPES or (x.dtype == torch.float64 and x.device.type == "cpu"))
