"""Numbers from the device that the host reads some steps later, when they have long been computed."""

from collections import deque

import torch


class Later:
    """`put` a small tensor at each step, `read` those at least `lag` steps old: the host then waits for a step that the
    device has left behind, not for the one it is at. Every process reads the same step's numbers at the same step."""

    def __init__(self, lag: int):
        self.lag, self.waiting = lag, deque()

    def put(self, tensor: torch.Tensor) -> None:
        event = None
        if tensor.is_cuda:
            tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((tensor, event))

    def read(self, *, everything: bool = False) -> list[list[float]]:
        """The numbers that are due, oldest first; with `everything` all of them, which waits for the device."""
        numbers = []
        while len(self.waiting) > (0 if everything else self.lag):
            tensor, event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            numbers.append(tensor.tolist())
        return numbers
