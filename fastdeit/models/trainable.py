"""Which parameters of a student learn, how deep each lies, and which are matrices for Muon: --freeze, --attn-only,
--layer-decay, --opt muon."""

from types import MethodType

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fastdeit.config import Model
from fastdeit.errors import UserError

from .weights import head_names


def depths(model: nn.Module, name: str = "") -> dict[str, int]:
    """The depth of every parameter, by its name: 0 the stem (patch embedding, tokens, positions), i the i-th block, the
    final norm with the last of them, then the heads. As timm's `group_matcher` has it, of which DeiT has its own.

    name: of the model, for the error. Raises UserError where timm does not say it of a model.
    """
    from timm.models import group_parameters

    if not hasattr(model, "group_matcher"):
        raise UserError(f"--model {name}: timm does not say which block comes first: omit --freeze N and --layer-decay")
    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)


def hidden_matrices(model: nn.Module, name: str = "") -> dict[str, int]:
    """The weights of the linear layers within the network, by name, and how many matrices each holds: 3 where one layer
    computes queries, keys and values. The patch embedding and the heads are none of them: what they map from or to is
    no hidden space.

    name: of the model, for the error. Raises UserError where there are none.
    """
    outside = (*head_names(model), "patch_embed")
    found = {
        f"{path}.weight": 3 if path.endswith("qkv") and module.out_features % 3 == 0 else 1
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not f"{path}.".startswith(tuple(f"{one}." for one in outside))
    }
    if not found:
        raise UserError(f"--opt muon: {name or 'the model'} has no linear layer but its head: choose adamw or lamb")
    return found


def freeze(model: nn.Module, settings: Model) -> list[str]:
    """Make the parameters that --freeze and --attn-only leave out constants: they get no gradient, no weight decay, no
    optimizer state. Frozen batch norms keep their running statistics, and normalise by them in train() too.

    Returns sentences. Raises UserError where nothing would be left to learn, or to freeze.
    """
    if settings.freeze is None and not settings.attn_only:
        return []
    heads = tuple(f"{head}." for head in head_names(model))
    names = [name for name, _ in model.named_parameters()]
    if settings.attn_only:
        flag, learn = "--attn-only", {name for name in names if ".attn." in name}
        if not learn:
            raise UserError(f"--attn-only: {settings.model} has no attention (parameters named .attn.): omit the flag")
        learn |= {name for name in names if name == "pos_embed" or name.startswith(heads)}
    elif settings.freeze == "backbone":
        flag, learn = "--freeze backbone", {name for name in names if name.startswith(heads)}
    else:
        flag, depth = f"--freeze {settings.freeze}", depths(model, settings.model)
        blocks = max(depth.values()) - 1
        if settings.freeze > blocks:
            raise UserError(f"{flag}: {settings.model} has {blocks} blocks; for all but the heads: --freeze backbone")
        learn = {name for name in names if depth[name] > settings.freeze}
    if not learn:
        raise UserError(f"{flag}: nothing of {settings.model} would be left to learn: freeze less")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learn)
    if any(map(_is_frozen_norm, model.modules())):
        model.train = MethodType(_train, model)  # a deep copy of the model gets its own
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)]
    return [f"{flag}: {counts[0] / 1e6:.2f} of {counts[1] / 1e6:.2f} M parameters learn"]


def _is_frozen_norm(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and not any(p.requires_grad for p in module.parameters())


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of a model with frozen batch norms."""
    type(model).train(model, mode)
    for module in filter(_is_frozen_norm, model.modules()):
        module.eval()
    return model
