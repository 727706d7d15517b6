"""The accuracies of a run's weights and of their moving average, on images that are decoded once for both.

Training and evaluation do not share modules. `frozen` makes a second one over the same memory, without gradients, hooks
and dropped paths, which never leaves eval(): what torch.compile has made of the training step stays valid, and one
compiled graph serves the weights and their average.
"""

import copy

import torch
from torch import Tensor, nn

from fastdeit.config import Config
from fastdeit.data import compiles
from fastdeit.distributed.world import World
from fastdeit.evaluation.metrics import accuracies
from fastdeit.models.heads import by_head, logits_by_head


class Evaluation:
    """Made before the model is hooked, compiled or distributed. A sharded model is evaluated itself: its weights are
    nowhere whole.

    inductor: options of torch.compile
    """

    def __init__(
        self, model: nn.Module, ema: nn.Module | None, config: Config, world: World, inductor: dict | None = None
    ):
        is_sharded = config.speed.sharding == "fsdp" and world.world_size > 1
        self.model, self.world = model, world
        self.modules = {"model": model if is_sharded else frozen(model)}
        if ema is not None:
            self.modules["ema"] = ema
        self.is_compiled = compiles(config, world.device) and not is_sharded
        self.logits = logits_by_head
        if self.is_compiled:  # every batch has the same shape: the last one is padded
            self.logits = torch.compile(by_head, dynamic=False, options=inductor or None)

    def __call__(self, loader, prepare, autocast) -> dict[str, dict]:
        """{"model": {head: {"top1", "top5", "loss", "ece"}}, "ema": ...} over all processes. prepare: from a batch to
        the model's input. autocast: makes the context of a forward pass."""
        own, modules = self.modules["model"], self.modules.values()
        if own is not self.model:
            share(own, self.model)
        were_training = [module.training for module in modules]
        for module in modules:
            module.eval()
        try:
            with autocast():
                return accuracies(
                    {name: self._of(module) for name, module in self.modules.items()}, loader, prepare, self.world
                )
        finally:
            for module, was_training in zip(modules, were_training):
                module.train(was_training)

    def _of(self, module: nn.Module):
        def logits(images: Tensor) -> dict[str, Tensor]:
            return self.logits(module, images)

        return logits


def frozen(model: nn.Module) -> nn.Module:
    """A copy of the module in eval() that shares the memory of its parameters and buffers, and takes no gradients."""
    shared: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(model, shared).eval()


def share(own: nn.Module, model: nn.Module) -> None:
    """Let a `frozen` module follow the model's parameters where they have moved to other memory."""
    for mine, theirs in zip(own.parameters(), model.parameters(), strict=True):
        mine.data = theirs.detach()
