"""One model on several processes: a full replica in each (DDP), or a shard of every parameter in each (FSDP2).

The model is compiled as a whole. Under DDP, Dynamo divides its graph where DDP's buckets of gradients end, so that the
all-reduce of one overlaps with the backward pass before it (torch._dynamo.config.optimize_ddp): a few calls a pass
instead of one for each block. For FSDP, blocks are compiled one by one, as they are sharded.
"""

from contextlib import ExitStack

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastdeit.errors import UserError

from .world import World


def compile_model(
    model: nn.Module, world: World, sharding: str, options: dict | None = None, *, sizes: int = 1
) -> None:
    """options: of Inductor. sizes: how many sizes of images there will be; each is compiled for itself."""
    by_block = world.world_size > 1 and sharding == "fsdp"
    if sizes > 1:  # a block alone has four graphs a size: all tokens or the first, training or not
        torch._dynamo.config.recompile_limit = max(4 * sizes, torch._dynamo.config.recompile_limit)
    for part in (by_block and _blocks(model)) or [model]:
        part.compile(dynamic=False, options=options or None)


def distribute(model: nn.Module, ema: nn.Module | None, sharding: str, world: World) -> nn.Module:
    """Put a model and its moving average on all processes; returns the module that training steps call."""
    if world.world_size == 1:
        return model
    if sharding == "fsdp":
        for module in (model, ema):
            if module is not None:
                _shard(module, world)
        return model
    devices = [world.device.index] if world.device.index is not None else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _shard(model: nn.Module, world: World) -> None:
    """FSDP2, in place: each process keeps a shard of every parameter, and gathers a block's when its turn comes.

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


def gradient_sync(*modules: nn.Module | None, when: bool):
    """The context of a micro-batch: DDP all-reduces gradients only where `when`, in the last of a step. FSDP
    accumulates its shards' gradients, so that no process ever holds all of them."""
    context = ExitStack()
    for module in modules:
        if isinstance(module, DistributedDataParallel) and not when:
            context.enter_context(module.no_sync())
    return context


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.blocks) if hasattr(model, "blocks") else []


# ---------------------------------------------------------------------------------------------------------------------
# Full tensors and the shards of a process. Sharded ones are DTensors, which are recognised by their methods: importing
# their class takes a second, and few runs need it.


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Gathered from all processes, which must all call."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def own_part(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a tensor that every process has in full, what `local_shard(like)` is of `like`."""
    return _sharded(full, like).to_local() if is_sharded(like) else full


def _sharded(full: torch.Tensor, like) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def load_weights(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Every parameter and buffer from its full tensor in `saved`."""
    own = model.state_dict()
    if own.keys() != saved.keys() or any(own[name].shape != saved[name].shape for name in own):
        raise UserError("the checkpoint is of another model than the settings beside it name")
    for name, tensor in own.items():
        tensor.copy_(_local(saved[name], tensor))


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """The state of an optimizer from its state_dict of full tensors; how it computes is this run's choice."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        i: {
            key: _local(value, parameters[i]) if getattr(value, "shape", None) == parameters[i].shape else value
            for key, value in values.items()
        }
        for i, values in saved["state"].items()
    }
    implementations = [
        {key: group[key] for key in ("fused", "foreach", "capturable") if key in group}
        for group in optimizer.param_groups
    ]
    groups = [{**group, **own} for group, own in zip(saved["param_groups"], implementations)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _local(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if is_sharded(like):
        return _sharded(full.to(like.device), like)
    return torch.empty_like(like, dtype=full.dtype).copy_(full)  # with the strides of `like`: channels_last stays
