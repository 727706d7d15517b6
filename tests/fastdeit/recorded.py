"""What a step does on its device, seen from below autograd: recorded and repeated in place of a CUDA graph, or refused
where a CUDA graph could not have it."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Tape(TorchDispatchMode):
    """The calls of operators with the very tensors they touched. A replay makes them again, on these tensors and with
    the numbers of then, as a CUDA graph does with kernels."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.inference_mode()  # nothing is differentiated, and tensors of an inference mode may be written
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = pytree.tree_leaves(func(*args, **kwargs))
            for then, now in zip(pytree.tree_leaves(result), again, strict=True):
                if isinstance(then, Tensor) and storage(then) != storage(now):  # neither a view nor written in place
                    then.copy_(now)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recorded:
    """The stand-in of step_graph.CudaCapture on the CPU."""

    def __init__(self):
        self.replays = 0

    def aside(self, call: Callable[[], Tensor]) -> Tensor:
        return call()

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.tape = Tape()
        with self.tape:
            result = call()

        def replay():
            self.replays += 1
            self.tape.replay()

        return replay, result


class Forbidden(AssertionError):
    """Something that makes the host wait for the device, or that a replay could not repeat."""


# Tags say the rest: results that the host must read (item), shapes that depend on values (nonzero).
HOST = ("lift_fresh", "lift_fresh_copy", "set_", "resize_", "pin_memory", "is_pinned", "equal")
DRAWS = ("rand", "randn", "randint", "randperm", "bernoulli", "bernoulli_", "normal_", "uniform_", "native_dropout")


class DeviceOnly(TorchDispatchMode):
    """Raises Forbidden at a call that no CUDA graph can hold. At its end `outlive` counts the tensors' memories that
    were made within it and are still held by someone. draws: whether PyTorch's generators may be used."""

    def __init__(self, *, draws: bool = False):
        super().__init__()
        self.draws = draws
        self.made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        tags = set(func.tags) & {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        name = func._schema.name.removeprefix("aten::")
        masks = name.startswith("index") and any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:])
        if (tags and name != "index") or masks or name in HOST or (name in DRAWS and not self.draws):
            raise Forbidden(f"{func} in a step")
        result = func(*args, **(kwargs or {}))
        known = {storage(x) for x in tensors}
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                if {x.device.type} | {t.device.type for t in tensors if t.ndim} != {x.device.type}:
                    raise Forbidden(f"{func} copies between devices")
                if storage(x) not in known:
                    self.made.append(StorageWeakRef(x.untyped_storage()))
        return result

    def outlive(self) -> int:
        gc.collect()
        return sum(not made.expired() for made in self.made)
