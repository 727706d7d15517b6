"""Where a run stands: with weights, moving average, optimizer and scaler, all that a checkpoint holds."""

from dataclasses import dataclass, field

import torch

from .nonfinite import TERMS


@dataclass
class State:
    """Shared by the step, which counts it on, and by the loop and the checkpointing around it.

    step: optimizer steps taken, of the whole run
    epochs_evaluated: epochs whose accuracies are known
    best: the highest top-1 so far (fraction), of any head of the weights; -1 before the first evaluation
    accuracies: of the last evaluation, {"model": {"cls": {"top1": ...}, ...}, "ema": {...}}
    sums: (len(TERMS) + 1,) float32 on the device: losses, and steps that were applied, since the log's last line
    """

    sums: torch.Tensor
    step: int = 0
    epochs_evaluated: int = 0
    best: float = -1.0
    accuracies: dict = field(default_factory=dict)

    @classmethod
    def begin(cls, device: torch.device) -> "State":
        return cls(torch.zeros(len(TERMS) + 1, device=device))

    def count_step(self, losses: torch.Tensor, hold: torch.Tensor) -> None:
        """losses: (len(TERMS),); hold: (), 1 where the step changed nothing and its losses are left out."""
        self.sums += torch.where(hold > 0, 0, torch.cat([losses, torch.ones_like(losses[:1])]))
        self.step += 1

    def take_means(self) -> tuple[list[float], int]:
        """The mean of each loss since the last call, and the steps it is over. Waits for the device."""
        *sums, steps = self.sums.tolist()
        self.sums.zero_()
        return [value / max(steps, 1) for value in sums], int(steps)
