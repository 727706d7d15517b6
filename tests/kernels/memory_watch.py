"""A memory checker for the interpreter: what compute-sanitizer would say on a GPU, and some of what it could not.

    with memory_watch():
        ...  # Triton kernels in the interpreter

raises MemoryFault, at the very line, when a program

- reads or writes outside the tensor whose pointer it started from, the gaps of a strided view included;
- writes what another program of the same launch reads or writes;
- reads or writes what it has itself written, or writes what it has itself read, with no tl.debug_barrier() between: on
  a GPU these may be different threads. Updates in place are allowed: a tile stored where it was last loaded comes of
  what was loaded, so that the store has waited for it, whichever threads hold it;
- writes one address twice in one store;
- reads a NaN, or the largest number of an integer type: torch.empty is filled with these here, so it is memory nobody
  wrote (the tests' own data must have none);

and when a launch has an empty grid, one that CUDA does not have, or 2**31 programs, which Triton launches as none.

Pointers carry the number of their argument in the bits above an address' 48, which arithmetic leaves alone. Atomics are
checked for bounds only, and the interpreter's descriptors and block pointers end in the same loads and stores.
"""

import math
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime import interpreter

ADDRESS = np.uint64(2**48 - 1)
GRID_LIMITS = (2**31 - 1, 65535, 65535)


class MemoryFault(AssertionError):
    pass


class _Argument:
    """A tensor handed to a launch."""

    def __init__(self, tensor: torch.Tensor):
        self.base, self.size = tensor.data_ptr(), tensor.element_size()
        layout = [(stride, n) for stride, n in zip(tensor.stride(), tensor.shape) if n != 1 and stride]
        self.dimensions, self.numel = sorted(layout, reverse=True), tensor.numel()
        self.what = f"a {tuple(tensor.shape)} {tensor.dtype} tensor of strides {tensor.stride()}"
        self.start, self.bytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        self.loaded = np.zeros(0)  # the last tile of pointers

    def has(self, addresses: np.ndarray) -> np.ndarray:
        """Which addresses are elements of the view, of dimensions that do not interleave."""
        rest, misaligned = np.divmod(addresses.astype(np.int64) - self.base, self.size)
        inside = (misaligned == 0) & (rest >= 0) & (self.numel > 0)
        for stride, n in self.dimensions:
            inside &= rest // stride < n
            rest = rest % stride
        return inside & (rest == 0)


class _Watch:
    """Stands in for the interpreter's compiled part. One launch after another."""

    SEVERAL = -1  # programs

    def __init__(self, last_program_only: bool):
        self.compiled, self.builder = interpreter._interpreter, interpreter.interpreter_builder
        self.last_program_only = last_program_only

    def __getattr__(self, name):
        return getattr(self.compiled, name)

    def start(self, kernel: str):
        self.kernel, self.arguments, self.histories, self.stretch = kernel, [], {}, 1

    def pointer(self, tensor) -> np.uint64:
        self.arguments.append(_Argument(tensor))
        return np.uint64(len(self.arguments) << 48)

    def barrier(self, *_):
        self.stretch += 1

    def load(self, pointers, mask, other, dtype):
        self._check(pointers, mask, "reads")
        values = self.compiled.load(pointers & ADDRESS, mask, other, dtype)
        if not self.last_program_only:
            self._refuse_unwritten(values[mask])
        return values

    def store(self, pointers, values, mask):
        self._check(pointers, mask, "writes")
        return self.compiled.store(pointers & ADDRESS, values, mask)

    def atomic_rmw(self, operation, pointers, values, mask, semantics):
        list(self._arguments_of(pointers[mask], "updates"))
        return self.compiled.atomic_rmw(operation, pointers & ADDRESS, values, mask, semantics)

    def atomic_cas(self, pointers, compared, values, semantics):
        list(self._arguments_of(pointers.ravel(), "updates"))
        return self.compiled.atomic_cas(pointers & ADDRESS, compared, values, semantics)

    def _history(self, argument) -> np.ndarray:
        """Of each element of its storage: the last program to read it and when, the last to write it and when."""
        storage = argument.start, argument.size
        if storage not in self.histories:
            self.histories[storage] = np.zeros((4, argument.bytes // argument.size), np.int32)
        return self.histories[storage]

    def _fault(self, verb: str, what: str):
        raise MemoryFault(f"{self.kernel}: program {self.builder.grid_idx} {verb} {what}")

    def _refuse_unwritten(self, values):
        if values.dtype.kind == "f":
            unwritten = np.isnan(values)
        else:
            unwritten = (values == np.iinfo(values.dtype).max) & (values.itemsize >= 4)
        if unwritten.any():
            self._fault("reads", "memory that nobody wrote")

    def _arguments_of(self, pointers, verb):
        """(argument, its addresses), each element of which it has."""
        numbers = pointers >> np.uint64(48)
        for number in np.unique(numbers):
            if not 1 <= number <= len(self.arguments):
                self._fault(verb, "what is in no tensor")
            argument, addresses = self.arguments[int(number) - 1], pointers[numbers == number] & ADDRESS
            inside = argument.has(addresses)
            if not inside.all():
                wrong = addresses[~inside].astype(np.int64) - argument.base
                where = f"{len(wrong)} addresses outside, from {wrong.min()} to {wrong.max()} bytes after its first"
                self._fault(verb, f"{argument.what}: {where}")
            yield argument, addresses

    def _check(self, pointers, mask, verb):
        x, y, z = self.builder.grid_idx
        width, height, _ = self.builder.grid_dim
        program = x + width * (y + height * z) + 1
        for argument, addresses in self._arguments_of(pointers[mask], verb):
            if self.last_program_only:
                continue
            reader, read_at, writer, written_at = self._history(argument)
            elements = (addresses.astype(np.int64) - argument.start) // argument.size
            readers, writers = reader[elements], writer[elements]
            if ((writers != 0) & (writers != program)).any():
                self._fault(verb, f"{argument.what}, where another program has written")
            if ((writers == program) & (written_at[elements] == self.stretch)).any():
                self._fault(verb, f"{argument.what}, where it has written, with no barrier between")
            if verb == "reads":
                reader[elements] = np.where((readers == 0) | (readers == program), program, self.SEVERAL)
                read_at[elements], argument.loaded = self.stretch, pointers
                continue
            if ((readers != 0) & (readers != program)).any():
                self._fault(verb, f"{argument.what}, where another program has read")
            read_before = (readers == program) & (read_at[elements] == self.stretch)
            if read_before.any() and not np.array_equal(pointers, argument.loaded):
                self._fault(verb, f"{argument.what}, where it has read, with no barrier between")
            if len(np.unique(elements)) != len(elements):
                self._fault(verb, f"{argument.what}, the same place twice in one store")
            writer[elements], written_at[elements] = program, self.stretch


@contextmanager
def memory_watch(last_program_only: bool = False):
    """last_program_only: of each grid, run that program alone, and check its bounds: for tensors so large that only
    the addresses can be looked at, and no memory may be touched in vain."""
    watch = _Watch(last_program_only)
    launch, convert = interpreter.GridExecutor.__call__, interpreter._implicit_cvt
    set_dim, set_idx = watch.builder.set_grid_dim, watch.builder.set_grid_idx

    def checked_launch(executor, *arguments, **options):
        grid = executor.grid
        if any(not 1 <= n <= limit for n, limit in zip(grid, GRID_LIMITS)) or math.prod(grid) >= 2**31:
            raise MemoryFault(f"{executor.fn.__name__}: a grid of {grid}, of at least 1 and at most {GRID_LIMITS}")
        watch.start(executor.fn.__name__)
        if not last_program_only:
            return launch(executor, *arguments, **options)
        executor.grid, whole = (1,), (*grid, 1, 1)[:3]
        executor._restore_args_dev = lambda *_: None  # would copy every tensor to itself
        watch.builder.set_grid_dim = lambda *_: set_dim(*whole)
        watch.builder.set_grid_idx = lambda *_: set_idx(*(n - 1 for n in whole))
        return launch(executor, *arguments, **options)

    def numbered(argument):
        converted = convert(argument)
        if isinstance(argument, torch.Tensor):
            converted.handle.data += watch.pointer(argument)
        return converted

    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not last_program_only)  # fills torch.empty
    try:
        with (
            patch.object(interpreter, "_interpreter", watch),
            patch.object(interpreter, "_implicit_cvt", numbered),
            patch.object(interpreter.GridExecutor, "__call__", checked_launch),
            patch.object(watch.builder, "create_barrier", watch.barrier, create=True),
            patch.object(watch.builder, "set_grid_dim", set_dim),
            patch.object(watch.builder, "set_grid_idx", set_idx),
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
