"""What a compiled student moves through memory in a training step, counted without a GPU.

python -m benchmarks.step_traffic [--student deit_small_distilled_patch16_224] [--batch-size 256]

The student is traced as training traces it (bf16 autocast, drop path, fused attention) and handed to torch.compile's
Inductor, which plans its kernels for an H200 that it is told of; the plan is read instead of run. Bytes are those that
each planned kernel reads and writes once: what caches save and what cuBLAS reads twice is not in them. The teacher, the
loss and the optimizer are not part of this graph. Updates records/compile/step_traffic.csv.

Imitating a device takes some of PyTorch's internals, as they are in 2.15.
"""

import argparse
import csv
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
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

from fastdeit.model import create_model

RECORD = Path(__file__).parent / "records" / "compile" / "step_traffic.csv"
KINDS = (
    "matrix products", "attention", "residual and LayerNorm", "GELU", "gradients of biases and norms", "casts", "other",
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


def planned(student: str, batch_size: int) -> dict[str, list[Kernel]]:
    """The kernels of the "forward" and the "backward" pass."""
    return {name: plan(*graph, backward=name == "backward") for name, graph in traced(student, batch_size).items()}


def traced(student: str, batch_size: int) -> dict[str, tuple[GraphModule, list]]:
    """The graphs of both passes and their inputs. Of tensors without contents on the CPU, because autograd asks CUDA's
    for their stream; `plan` moves them."""
    graphs = {}

    def keep(name):
        def compiler(graph, inputs):
            graphs[name] = (graph, inputs)
            return make_boxed_func(graph)

        return compiler

    def partition(joint, inputs, **options):
        joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **options)

    model = create_model(student, drop_path=0.1, attention="fused").train().to(memory_format=torch.channels_last)
    with FakeTensorMode() as fake:
        parameters = {name: fake.from_tensor(parameter) for name, parameter in model.named_parameters()}
        shape = (batch_size, 3, *model.img_size)
        images = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
        noise = torch.empty(batch_size, len(model.blocks), 2)

        def lifted(parameters, images, noise):
            with torch.autocast("cpu", torch.bfloat16):
                return torch.func.functional_call(model, parameters, (images, noise))

        compiled = aot_function(
            lifted, fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=partition,
            decompositions=select_decomp_table(),
        )  # fmt: skip
        sum(logits.sum() for logits in compiled(parameters, images, noise)).backward()
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
    answers = {
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
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, lambda *_, answer=answer, **__: answer))
        yield


def kind_of(node) -> str | None:
    names = {str(origin.target) for part in node.get_nodes() for origin in part.node.get_origins()}

    def has(*parts):
        return any(part in name for part in parts for name in names)

    if isinstance(node.node, ir.MultiOutput):
        return None  # one of several results, counted with them
    if has("attention"):
        return "attention"
    if isinstance(node.node, ir.ExternKernel):
        return "matrix products"
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="deit_small_distilled_patch16_224")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--combo-kernels", action="store_true", help="Inductor joins independent kernels, an option")
    parser.add_argument("--no-record", action="store_true", help="leave records/compile/step_traffic.csv as it is")
    args = parser.parse_args()
    with config.patch(combo_kernels=args.combo_kernels):
        rows = table(planned(args.student, args.batch_size))
    print(f"torch {torch.__version__}, {args.student}, batch {args.batch_size}\n")
    for row in [dict(zip(COLUMNS, COLUMNS)), *rows]:
        print(f"{row['pass']:10}{row['kind']:32}{row['kernels']:>8}{row['gigabytes']:>11}")
    if not args.no_record:
        with RECORD.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def table(kernels: dict[str, list[Kernel]]) -> list[dict]:
    """A row for each pass and kind, then the sum."""
    rows = []
    for name, of_pass in kernels.items():
        for kind in KINDS:
            own = [kernel.bytes for kernel in of_pass if kernel.kind == kind]
            rows.append({"pass": name, "kind": kind, "kernels": len(own), "gigabytes": sum(own) / 1e9})
    total = {key: sum(row[key] for row in rows) for key in ("kernels", "gigabytes")}
    rows.append({"pass": "both", "kind": "all", **total})
    return [{**row, "gigabytes": f"{row['gigabytes']:.2f}"} for row in rows]


if __name__ == "__main__":
    main()
