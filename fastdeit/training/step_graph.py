"""The whole step as one CUDA graph: preparation, teacher, forward, loss, backward, optimizer, moving average and guard,
started by one call of the host.

A replay repeats kernels as they were recorded: with the addresses they had then, and with every number that the host
put into their arguments. So a step computes from its inputs alone, which are copied into memory that stays, and writes
what it changes in place (`changed`). Whether that is so is not taken for granted:

    steps 1 to WARM_UP   are made as they are, on the stream that will be captured
    then                 the step is captured; the last warm-up step is made again, by a replay from the state before it
                         and with its inputs, and must end where it ended (the capture saw other inputs and another
                         number of the step, so that nothing that was baked in goes unnoticed)
    from there on        a step is a replay

Whatever fails, the state is that of the steps as they are, one sentence says why, and training continues without a
graph. torch.cuda.make_graphed_callables and torch.compile's reduce-overhead graph parts of a step; the launches of the
optimizer and around it stay the host's, and accumulated gradients are overwritten (pytorch#169545).
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3
# Of how far a step moved each kind of state, the difference that a replay may have made: sums in another order move a
# weight whose gradient is nothing but rounding, a stale input moves all of them. And of the state itself, its rounding.
OF_MOVE, OF_SIZE = 0.05, 1e-7

State = dict[str, list[Tensor]]  # all that a step changes, by kind


class Capture(Protocol):
    """How a step is recorded. CudaCapture, or a stand-in of it on the CPU."""

    def aside(self, call: Callable[[], Tensor]) -> Tensor:
        """The call's result, made where `record` will be."""
        ...

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(what repeats all that the call does on the device, its result, which each repetition fills again). Whether
        the call's work is done meanwhile is left open."""
        ...


class CudaCapture:
    """See docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA graphs"."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def aside(self, call: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = call()
        current.wait_stream(self.stream)
        return result

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's threads and the checkpoint writer's may allocate meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = call()
        return graph.replay, result


class Proof(NamedTuple):
    """A step that was made as it is."""

    inputs: NamedTuple
    before: State
    after: State


class StepGraph:
    """compute: inputs -> (terms,) losses, as Trainer.compute; inputs: a NamedTuple of tensors, trees of them and `seed`
    changed: lists what compute changes, under "sums" what changes in every step that is not left out
    say: takes a sentence
    forget: takes back what an interrupted compute has left behind on the host
    """

    def __init__(
        self, compute: Callable, changed: Callable[[], State], capture: Capture, say: Callable[[str], None],
        forget: Callable[[], None],
    ):  # fmt: skip
        self.compute, self.changed, self.capture, self.say, self.forget = compute, changed, capture, say, forget
        self.warm = 0
        self.given: NamedTuple | None = None  # the inputs' fixed memory
        self.proof: Proof | None = None
        self.replay: Callable[[], None] | None = None
        self.losses: Tensor | None = None
        self.failed = False

    def __call__(self, inputs) -> Tensor:
        if self.failed or not self._fit(inputs):
            return self.compute(inputs)
        if self.replay is None and self.proof is not None:
            self._record(inputs)
            if self.failed:
                _seed(inputs)  # of what was drawn meanwhile, the step must not notice
                return self.compute(inputs)
        self._fill(inputs)
        if self.replay is None:
            return self._warm_up(inputs)
        self.replay()
        return self.losses.clone()

    def _warm_up(self, inputs) -> Tensor:
        self.warm += 1
        before = _copied(self.changed()) if self.warm >= WARM_UP else None
        losses = self.capture.aside(lambda: self.compute(self.given))
        if before is not None:
            after = _copied(self.changed())
            if not all(map(torch.equal, before["sums"], after["sums"])):  # a step that was left out proves nothing
                self.proof = Proof(inputs, before, after)
        return losses

    def _record(self, inputs) -> None:
        """Capture, with these inputs in the fixed memory, and see whether a replay makes the proof's step."""
        proof, self.proof = self.proof, None
        self._fill(inputs)
        try:
            self.replay, self.losses = self.capture.record(lambda: self.compute(self.given))
            _restore(self.changed(), proof.before)
            self._fill(proof.inputs)
            self.replay()
            differs = _differences(self.changed(), proof)
            reason = f"its first replay differs from the step in {' and '.join(differs)}" if differs else ""
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        _restore(self.changed(), proof.after)
        if reason:
            self.failed, self.replay, self.losses, self.given = True, None, None, None
            self.forget()
            self.say(f"warning: the step cannot be a CUDA graph ({reason}); training continues without one")
        else:
            self.say("the step is one CUDA graph from here on; its first replay agreed with the step as it is")

    def _fit(self, inputs) -> bool:
        """Whether these inputs have the shapes of the first ones, whose copies become the fixed memory."""
        if self.given is None:
            self.given = pytree.tree_map_only(Tensor, torch.clone, inputs)
        return _shapes(inputs) == _shapes(self.given)

    def _fill(self, inputs) -> None:
        for given, new in zip(pytree.tree_leaves(self.given), pytree.tree_leaves(inputs)):
            if isinstance(new, Tensor):
                given.copy_(new, non_blocking=True)
        _seed(inputs)


def _seed(inputs) -> None:
    if inputs.seed is not None:
        torch.manual_seed(inputs.seed)


def _shapes(inputs) -> list:
    leaves = pytree.tree_leaves(inputs)
    return [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else type(x) for x in leaves]


def _copied(state: State) -> State:
    """In the host's memory: the device's may be full."""
    return {kind: [tensor.detach().to("cpu", copy=True) for tensor in tensors] for kind, tensors in state.items()}


@torch.no_grad()
def _restore(state: State, to: State) -> None:
    for kind, tensors in state.items():
        for tensor, saved in zip(tensors, to[kind], strict=True):
            tensor.copy_(saved)


@torch.no_grad()
def _differences(state: State, proof: Proof) -> list[str]:
    """The kinds of state in which a replay has not ended where the step did. Waits for the device."""
    found = []
    for kind, got in state.items():
        if not got:
            continue
        error, move, size = torch.zeros(3, dtype=torch.float64, device=got[0].device).unbind()
        for one, before, after in zip(got, proof.before[kind], proof.after[kind], strict=True):
            one, before, after = (tensor.to(one.device).double() for tensor in (one, before, after))
            same = (one == after) | (one.isnan() & after.isnan())
            error += torch.where(same, 0, one - after).square().sum()
            move += (after - before).nan_to_num().square().sum()
            size += after.nan_to_num().square().sum()
        if not error.sqrt() <= OF_MOVE * move.sqrt() + OF_SIZE * size.sqrt():
            found.append(kind)
    return found
