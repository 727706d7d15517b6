"""Steps whose loss or gradient is not finite: kept from the weights on the device, reported when the host looks.

    bad  = some loss term of some process, or the norm of the gradient, is nan or infinite
    hold = bad, or more bad steps have been met than are tolerated

A step that is held changes nothing: not the weights, the optimizer, the moving average or the running statistics. As
`hold` stays up once it is up for good, the host may notice some steps later and still find everything as it was before
the step, ready to be saved and to be repeated: what a step computes is a function of the weights and of its number.
"""

import json
import math
from pathlib import Path

import torch

from fastdeit.distributed.world import World
from fastdeit.errors import UserError

TERMS = ("loss", "class term", "teacher term", "attention term", "feature term")
ROWS = 1000  # of so many bad steps the numbers are kept


class NonFinite(UserError):
    """A step was not finite, and more of them than --skip-nonfinite allows."""


class Guard:
    """All on the device and written in place, as a CUDA graph needs it; nothing here waits but `incident`."""

    def __init__(self, device: torch.device, tolerated: int):
        self.tolerated = tolerated
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.slots = torch.arange(min(tolerated + 1, ROWS), device=device)
        self.rows = torch.zeros(len(self.slots), 2 + len(TERMS), dtype=torch.float64, device=device)

    def hold(
        self, step: torch.Tensor, losses: torch.Tensor, own_losses: torch.Tensor, norm: torch.Tensor, excused=None
    ):
        """() float32: 1 where this step must change nothing, else 0.

        step: () float64. losses: (len(TERMS),) of all processes together; own_losses: (len(TERMS),) of this one.
        norm: () of the whole gradient.
        excused: () bool, a norm that is not finite because the gradient scaler has reached too high; held, not counted.
        """
        finite_norm = norm.isfinite()
        held = ~finite_norm
        bad = ~losses.isfinite().all() | (held if excused is None else held & ~excused)
        stopped = self.count > self.tolerated
        row = torch.cat([step.view(1), own_losses.double(), norm.double().view(1)])
        at = (self.slots == self.count.clamp(max=len(self.slots) - 1)) & bad & ~stopped
        self.rows.copy_(torch.where(at[:, None], row, self.rows))
        self.count += bad & ~stopped
        return (bad | held | stopped).float()

    def incident(self, number: int) -> tuple[int, list[float], float]:
        """(step, this process's losses, norm of the gradient) of the bad step `number`, counted from 0."""
        step, *losses, norm = self.rows[min(number, len(self.slots) - 1)].tolist()
        return int(step), losses, norm

    def rewind(self, number: int) -> int:
        """Forget the bad step `number` and all after it, which changed nothing. Returns its step, to be repeated."""
        self.count.fill_(number)
        return self.incident(number)[0]


def report(guard: Guard, number: int, names: list[str], world: World, run: Path | None, *, skipped: bool) -> str:
    """Gather what every process knows of the bad step `number`, append it to RUN/nonfinite.jsonl, and say it in a
    sentence. names: of the images that this process saw in it. All processes call."""
    step, losses, norm = guard.incident(number)
    ranks = world.gather({"rank": world.rank, "losses": losses, "files": names})
    guilty = [rank for rank in ranks if not all(map(math.isfinite, rank["losses"]))]
    files = [name for rank in guilty or ranks for name in rank["files"]]
    if run is not None:
        numbers = [{**rank, "losses": [_json(value) for value in rank["losses"]]} for rank in ranks]
        record = {"step": step, "skipped": skipped, "gradient_norm": _json(norm), "terms": TERMS, "ranks": numbers}
        with (run / "nonfinite.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    where = f" on rank {', '.join(str(rank['rank']) for rank in guilty)}" if guilty and world.world_size > 1 else ""
    return f"step {step}: {_what(guilty, norm)}{where}; its batch: {_some(files)}"


def _what(guilty: list[dict], norm: float) -> str:
    if not guilty:
        return f"the gradient's norm is {norm}, the loss is finite"
    bad = [(name, value) for name, value in zip(TERMS, guilty[0]["losses"]) if not math.isfinite(value)]
    terms = [pair for pair in bad if pair[0] != "loss"] or bad
    return " and ".join(f"the {name} is {value}" for name, value in terms)


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no nan


def _some(files: list[str]) -> str:
    return ", ".join(files[:4]) + (f" and {len(files) - 4} more (nonfinite.jsonl)" if len(files) > 4 else "")
