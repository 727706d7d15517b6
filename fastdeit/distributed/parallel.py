"""One model over several processes: every process a whole one (DDP), or each a share of it (FSDP2).

Blocks are compiled one by one, and shared out one by one: so the exchange of one block's gradients overlaps with the
backward pass of the block before it. A single process gains from compiling the whole model.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastdeit.errors import UserError

from .world import World


def compile_model(model: nn.Module, world: World) -> None:
    for part in [model] if world.world_size == 1 else _blocks(model) or [model]:
        part.compile()


def spread(model: nn.Module, ema: nn.Module | None, sharding: str, world: World) -> nn.Module:
    """Lay a model and its moving average over the processes; returns what training steps call in the model's place."""
    if world.world_size == 1:
        return model
    if sharding == "fsdp":
        for whole in (model, ema):
            if whole is not None:
                _shard(whole, world)
        return model
    devices = [world.device.index] if world.device.index is not None else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _shard(model: nn.Module, world: World) -> None:
    """FSDP2, in place: each process keeps a share of every parameter, and gathers a block when its turn comes.

    Weights are gathered as they are stored, in float32: the numbers are those of DDP up to the order of sums.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.world_size,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    # By default the outermost module stays gathered after a forward pass without a backward pass: an evaluation's.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if hasattr(model, "forward_heads"):
        register_fsdp_forward_method(model, "forward_heads")  # evaluation enters here, not in forward


def without_exchange(forward: nn.Module, last: bool):
    """A context for all but the last of the parts whose gradients add up to one step: DDP exchanges only their sum.
    FSDP adds up the shares, which is what it is for: no process ever holds all gradients."""
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    return nullcontext()


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.blocks) if hasattr(model, "blocks") else []


# ---------------------------------------------------------------------------------------------------------------------
# Whole tensors and what a process holds of them. Sharded ones are DTensors, which are known here by their methods:
# importing their class takes a second, and few runs meet one.


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gathered from all processes, which must all call."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_share(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def load_weights(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Every parameter and buffer from its whole tensor in `saved`."""
    own = model.state_dict()
    if own.keys() != saved.keys() or any(own[name].shape != saved[name].shape for name in own):
        raise UserError("the checkpoint is of another model than the settings beside it name")
    for name, tensor in own.items():
        tensor.copy_(_share(saved[name], tensor))


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """The state of an optimizer from its state_dict of whole tensors; how it computes is this run's choice."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        i: {
            key: _share(value, parameters[i]) if getattr(value, "shape", None) == parameters[i].shape else value
            for key, value in values.items()
        }
        for i, values in saved["state"].items()
    }
    implementations = [
        {key: group[key] for key in ("fused", "foreach") if key in group} for group in optimizer.param_groups
    ]
    groups = [{**group, **own} for group, own in zip(saved["param_groups"], implementations)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _share(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, dtype=whole.dtype).copy_(whole)  # with the strides of `like`: channels_last stays
