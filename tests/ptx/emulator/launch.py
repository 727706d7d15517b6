"""Launches of Triton kernels on CPU tensors, compiled for a GPU and executed by the emulator."""

import ctypes
import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastdeit.kernels import backend

from . import floats
from .kernel import Kernel
from .memory import POISON16, Clock, Fault, GlobalMemory

SHARED_KILOBYTES = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # that a CTA may have
LARGEST_GRID = (2**31 - 1, 65535, 65535)
_KERNELS: dict[str, Kernel] = {}  # by the text's hash


class Driver:
    """Of a GPU that is not here, for Triton's JIT to compile for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self):
        return 1000 + self.arch  # Triton caches kernels by device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    ptx: str
    notes: frozenset[str]  # what is no fault, but worth knowing


@contextmanager
def emulated(arch: int, *, edit=None, worst: bool = False):
    """Inside, operators on CPU tensors launch their Triton kernels, compiled for sm_<arch> and emulated. Yields a list
    of the launches. What torch.empty makes is poisoned, so that reading it is a fault.

    edit:  a function from PTX text to the PTX text executed instead, to break a kernel on purpose.
    worst: ex2, rcp, rsqrt and divisions are as wrong as PTX's documentation allows.
    """
    run, launches = JITFunction.run, []

    def emulate(kernel, *arguments, grid, warmup, **options):
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        bound = dict(zip(kernel.arg_names, arguments)) | options
        grid = tuple(grid(bound) if callable(grid) else grid)
        launches.append(_execute(compiled, bound, grid, kernel.fn.__name__, edit or (lambda text: text)))

    with (
        patch.object(triton.runtime.driver, "_active", Driver(arch)),
        patch.object(JITFunction, "run", emulate),
        patch.object(backend, "INTERPRETED", True),
        patch.object(backend, "CPU_ARCHITECTURE", arch),
        patch.object(floats, "WORST", worst),
        patch.object(torch, "empty", _poisoned(torch.empty)),
        patch.object(torch, "empty_like", _poisoned(torch.empty_like)),
        patch.object(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty)),
    ):
        yield launches


def _execute(compiled, bound, grid, name, edit) -> Launch:
    if any(not 1 <= n <= limit for n, limit in zip(grid, LARGEST_GRID)):
        raise Fault(f"{name}: a grid of {grid}")
    if compiled.metadata.shared > SHARED_KILOBYTES[compiled.metadata.target.arch] * 1024:
        raise Fault(f"{name}: {compiled.metadata.shared} bytes of shared memory")
    ptx = edit(compiled.asm["ptx"])
    key = hashlib.sha1(ptx.encode()).hexdigest()
    if key not in _KERNELS:
        _KERNELS[key] = Kernel(ptx, compiled.metadata.num_warps * 32, compiled.metadata.shared)
    kernel = _KERNELS[key]
    clock = Clock()
    tensors, arguments = [], []
    for argument, t in compiled.src.signature.items():
        if t == "constexpr" or isinstance(t, tuple):
            assert t == "constexpr" or all(x == "constexpr" for x in t), (argument, t)
            continue
        value = bound[argument]
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            value = value.data_ptr()
        arguments.append(value)
    arguments += [0] * (len(kernel.program.params) - len(arguments))  # scratch that is not used
    kernel.launch(grid, arguments, _global_memory(tensors, clock))
    return Launch(name, grid, ptx, frozenset(clock.notes))


def _global_memory(tensors, clock) -> GlobalMemory:
    """The tensors' storages; what of a storage belongs to no tensor may not be touched."""
    memory, storages = GlobalMemory(clock), {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        start = (np.zeros((size + 15) // 16 * 16, np.uint8), size, tensor.element_size() > 1)
        valid, _, _ = storages.setdefault(storage.data_ptr(), start)
        _mark_elements(tensor, valid)
    for i, (pointer, (valid, size, marked)) in enumerate(storages.items()):
        whole = valid[:size].all()
        memory.add(f"storage {i}", pointer, size, None if whole else valid, 1 if size % 2 else 2, marked)
    return memory


def _mark_elements(tensor: torch.Tensor, valid: np.ndarray):
    """The bytes of a view's elements among those of its storage."""
    size = tensor.element_size()
    marks = torch.from_numpy(valid[: valid.size // size * size]).view(-1, size)
    strides = [stride * size for stride in tensor.stride()]
    for byte in range(size if tensor.numel() else 0):
        torch.as_strided(marks[:, byte], tensor.shape, strides, tensor.storage_offset() * size + byte).fill_(1)


def _poisoned(make):
    def empty(*arguments, **options):
        x = make(*arguments, **options)
        if type(x) is torch.Tensor and x.device.type == "cpu" and x.layout is torch.strided:
            storage = x.untyped_storage()
            n = storage.nbytes() // 2
            if n and storage.data_ptr():
                np.ctypeslib.as_array((ctypes.c_uint16 * n).from_address(storage.data_ptr()))[:] = POISON16
        return x

    return empty
