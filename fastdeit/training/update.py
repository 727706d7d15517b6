"""From gradients to new weights and a new moving average, or to nothing at all where a step is not finite."""

import torch
from torch import nn

from fastdeit.config import Config
from fastdeit.distributed.parallel import full, local_shard

from .nonfinite import Guard
from .optimizer import average_decay


class Update:
    """One optimizer's step at a time. `ema` is the moving average's model, or None."""

    def __init__(self, model: nn.Module, ema: nn.Module | None, optimizer, scaler, guard: Guard, config: Config):
        self.model, self.ema, self.ema_decay = model, ema, config.model.model_ema_decay
        self.optimizer, self.scaler, self.guard = optimizer, scaler, guard
        self.clip = config.optimization.clip_grad
        # Fused optimizers take `hold` themselves (they call it found_inf); for others the host has to wait and decide.
        self.decides_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.buffers_before: list[torch.Tensor] = []

    def begin(self) -> None:
        """Before the forward pass: remember running statistics, which it changes (a DeiT has none)."""
        self.buffers_before = [buffer.clone() for buffer in self.model.buffers()]

    @torch.no_grad()
    def apply(self, step: int, lr: float, losses: torch.Tensor, own_losses: torch.Tensor) -> torch.Tensor:
        """Use the gradients up. losses: (terms,) of all processes, own_losses: (terms,) of this one, see Guard.hold.
        Returns () float32 on the device: 1 where nothing was changed."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        norm = self._gradient_norm()
        # A norm that is not finite while the loss is: the scaler's next scale is lower, and the next step will do.
        excused = self.scaler.scale(torch.ones_like(norm)) > 1 if self.scaler.is_enabled() else None
        hold = self.guard.hold(step, losses, own_losses, norm, excused)
        if self.decides_on_device:
            self.optimizer.found_inf = hold
            self.optimizer.step()
        elif hold.item() == 0:
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.model.buffers(), self.buffers_before):
            buffer.copy_(torch.where(hold > 0, before, buffer))
        if self.ema is not None:
            self._average((1 - average_decay(step, self.ema_decay)) * (1 - hold))
        return hold

    def _gradient_norm(self) -> torch.Tensor:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return full(norm)

    def _average(self, weight: torch.Tensor) -> None:
        """ema += weight * (model - ema). Not torch._foreach_lerp_, whose weight is a number of the host's."""
        averages = [local_shard(parameter) for parameter in self.ema.parameters()]
        difference = torch._foreach_sub([local_shard(parameter) for parameter in self.model.parameters()], averages)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(averages, difference)
        for average, buffer in zip(self.ema.buffers(), self.model.buffers()):
            average.copy_(buffer)
