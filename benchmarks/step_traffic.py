"""What a compiled student moves through memory in a training step, counted without a GPU.

    python -m benchmarks.step_traffic [--student MODEL] [--teacher MODEL] [--batch-size 256] [--fused-mlp]

Student and teacher are traced as training traces them (bf16 autocast, drop path, fused attention; fp16, BatchNorms
folded, 1x1 convolutions joined with their ReLU or not) and handed to torch.compile's Inductor, which plans its kernels
for an H200 that it is told of; the plan is read instead of run. Bytes are those that each planned kernel reads and
writes once: what caches save and what cuBLAS reads twice is not in them. The loss and the optimizer are not part of
these graphs. Updates records/compile/step_traffic.csv.

Imitating a device takes some of PyTorch's internals, as they are in 2.15.
"""

import argparse
import csv
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import timm
import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._inductor import config, ir
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastdeit.cli import FoldedHelp
from fastdeit.distill.folding import fold_batchnorm
from fastdeit.distill.layouts import laid_out
from fastdeit.models.deit import create_model
from fastdeit.models.implementation import Implementation

RECORD = Path(__file__).parent / "records" / "compile" / "step_traffic.csv"
KINDS = (
    "products, convolutions", "attention", "residual and LayerNorm", "GELU", "gradients of biases and norms", "casts",
    "fused MLP", "other",
)  # fmt: skip
COLUMNS = ("pass", "kind", "kernels", "gigabytes")
CUDA = torch.device("cuda", 0)
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32, L2_cache_size=60 << 20,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_multiprocessor=228 << 10,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10, total_memory=141 << 30,
)  # fmt: skip


@dataclass
class Kernel:
    kind: str | None  # one of KINDS; None where nothing runs
    bytes: int


def planned(student: str, batch_size: int, *, fused_mlp: bool = False) -> dict[str, list[Kernel]]:
    """The kernels of the "forward" and the "backward" pass."""
    model = create_model(student, drop_path=0.1).train().to(memory_format=torch.channels_last)
    model.implement(Implementation("fused", fused_mlp=fused_mlp))
    with FakeTensorMode() as fake:
        noise = torch.empty(batch_size, len(model.blocks), 2)
        with torch.autocast("cpu", torch.bfloat16):
            graphs = traced(model, fake, images_of(batch_size, model.img_size[0], torch.bfloat16), noise)
    return {name: plan(*graph, backward=name == "backward") for name, graph in graphs.items()}


def planned_teacher(name: str, batch_size: int, *, joined: bool) -> list[Kernel]:
    """The kernels of a forward pass of a timm model as fastdeit.distill.teacher lays it out in channels_last memory."""
    model, pixels = timm.create_model(name, num_classes=1000).eval().requires_grad_(False), 224
    example = torch.randn(2, 3, pixels, pixels)
    model, _ = fold_batchnorm(model, example)
    model = laid_out(model, "joined" if joined else "channels_last", example).half()
    with FakeTensorMode() as fake, torch.no_grad():
        (graph,) = traced(model, fake, images_of(batch_size, pixels, torch.float16)).values()
    return plan(*graph, backward=False)


def images_of(batch_size: int, pixels: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(batch_size, 3, pixels, pixels, dtype=dtype, memory_format=torch.channels_last)


def traced(model: nn.Module, fake: FakeTensorMode, *inputs: torch.Tensor) -> dict[str, tuple[GraphModule, list]]:
    """The graphs of "forward" and, with gradients, "backward", and their inputs. Of tensors without contents on the
    CPU, because autograd asks CUDA's for their stream; `plan` moves them."""
    graphs = {}

    def keep(name):
        def compiler(graph, inputs):
            graphs[name] = (graph, inputs)
            return make_boxed_func(graph)

        return compiler

    def partition(joint, inputs, **options):
        joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **options)

    def run(state, *inputs):
        return torch.func.functional_call(model, state, inputs)

    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    compiled = aot_function(
        run, fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=partition,
        decompositions=select_decomp_table(),
    )  # fmt: skip
    outputs = compiled({name: fake.from_tensor(tensor) for name, tensor in state.items()}, *inputs)
    if torch.is_grad_enabled():
        sum(logits.sum() for logits in outputs).backward()
    return graphs


class Planned(BaseException):
    """Inductor has planned its kernels; nothing is to be compiled. No Exception, of which Inductor makes others."""


def plan(graph: GraphModule, inputs: list, *, backward: bool) -> list[Kernel]:
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": CUDA}
    graph.recompile()
    kernels = []

    def read(lowering):
        lowering._update_scheduler()
        with V.set_graph_handler(lowering):
            for node in lowering.scheduler.nodes:
                kernels.append(Kernel(kind_of(node), node.get_read_write_buffers_sizes()))
        raise Planned

    instead_of_compiling = mock.patch.object(GraphLowering, "compile_to_module", read)
    with imitated_h200(), FakeTensorMode() as fake, torch.no_grad(), instead_of_compiling:
        inputs = [moved(value) for value in inputs]
        FakeTensorProp(graph, fake).propagate_dont_convert_inputs(*inputs)
        try:
            compile_fx_inner(graph, inputs, is_backward=backward, graph_id=0)
        except Planned:
            pass
    return kernels


def moved(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)


@contextmanager
def imitated_h200():
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    results = {
        "torch.cuda.is_available": True, "torch.cuda.device_count": 1, "torch.cuda.current_device": 0,
        "torch.cuda.get_rng_state": torch.zeros(16, dtype=torch.uint8), "torch.cuda.set_rng_state": None,
        "torch.cuda.get_device_properties": H200, "torch.cuda.get_device_capability": (9, 0),
        "torch._dynamo.device_interface.CudaInterface.Worker.get_device_properties": H200,
        "torch._dynamo.device_interface.CudaInterface.get_device_properties": H200,
        "torch.cuda._exchange_device": 0, "torch.cuda._maybe_exchange_device": 0, "torch.cuda.synchronize": None,
        "torch._inductor.scheduler.has_triton": True,
    }  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", target))
        for name, result in results.items():
            stack.enter_context(mock.patch(name, lambda *_, result=result, **__: result))
        yield


def kind_of(node) -> str | None:
    names = {str(origin.target) for part in node.get_nodes() for origin in part.node.get_origins()}

    def has(*parts):
        return any(part in name for part in parts for name in names)

    if isinstance(node.node, ir.MultiOutput):
        return None  # one of several results, counted with them
    if has("attention"):
        return "attention"
    if has("fastdeit.mlp"):
        return "fused MLP"
    if isinstance(node.node, ir.ExternKernel):
        return "products, convolutions"
    if has("rsqrt", "var_mean") or type(node).__name__ == "FusedMixOrderReductions":
        return "residual and LayerNorm"
    if has("sum"):
        return "gradients of biases and norms"
    if has("erf"):
        return "GELU"
    if names == {"prims.convert_element_type.default"}:
        return "casts"
    return "other"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FoldedHelp)
    parser.add_argument("--student", default="deit_small_distilled_patch16_224")
    parser.add_argument("--teacher", default="regnety_160")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--fused-mlp", action="store_true", help="fastdeit.kernels.mlp in the student's blocks")
    parser.add_argument("--combo-kernels", action="store_true", help="Inductor joins independent kernels, an option")
    parser.add_argument("--no-record", action="store_true", help="leave records/compile/step_traffic.csv as it is")
    args = parser.parse_args()
    with config.patch(combo_kernels=args.combo_kernels):
        passes = planned(args.student, args.batch_size, fused_mlp=args.fused_mlp)
        passes["teacher"] = planned_teacher(args.teacher, args.batch_size, joined=False)
        passes["teacher, joined"] = planned_teacher(args.teacher, args.batch_size, joined=True)
    print(f"torch {torch.__version__}, {args.student}, {args.teacher}, batch {args.batch_size}\n")
    rows = table(passes)
    for row in [dict(zip(COLUMNS, COLUMNS)), *rows]:
        print(f"{row['pass']:17}{row['kind']:32}{row['kernels']:>8}{row['gigabytes']:>11}")
    if not args.no_record:
        with RECORD.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def table(passes: dict[str, list[Kernel]]) -> list[dict]:
    """A row for each kind that a pass has, then the sum of the pass."""
    rows = []
    for name, kernels in passes.items():
        own = {kind: [kernel.bytes for kernel in kernels if kernel.kind == kind] for kind in KINDS}
        own["all"] = [size for sizes in own.values() for size in sizes]
        rows += [
            {"pass": name, "kind": kind, "kernels": len(sizes), "gigabytes": f"{sum(sizes) / 1e9:.2f}"}
            for kind, sizes in own.items()
            if sizes
        ]
    return rows


if __name__ == "__main__":
    main()
