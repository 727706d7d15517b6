"""What is compiled on several processes, and how DDP's gradients still overlap with the backward pass."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastdeit.distributed import parallel
from fastdeit.distributed.world import World
from fastdeit.models.deit import create_model

CPU = torch.device("cpu")


def student():
    torch.manual_seed(0)
    return create_model("deit_nano_distilled_patch4_16", num_classes=10, drop_path=0.1).train()


@pytest.mark.parametrize(
    "processes, sharding, whole", [(1, "ddp", True), (2, "ddp", True), (2, "fsdp", False), (1, "fsdp", True)]
)
def test_what_is_compiled(monkeypatch, processes, sharding, whole):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled.append(module))
    model = student()
    parallel.compile_model(model, World(CPU, world_size=processes), sharding)
    assert compiled == ([model] if whole else list(model.blocks))


def test_ddp_divides_the_graph_at_its_buckets(monkeypatch):
    """A model of 4.8 MB: DDP's first bucket takes 1 MB, the next one the rest. The gradients are the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        graphs, compile = [], nn.Module.compile
        keep = lambda graph, _: (graphs.append(graph), graph.forward)[1]  # noqa: E731
        monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compile(module, backend=keep))
        model = student()
        plain = copy.deepcopy(model)
        parallel.compile_model(model, World(CPU, world_size=2), "ddp")
        forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
        images, noise = torch.randn(4, 3, 16, 16), torch.rand(4, len(model.blocks), 2)
        for call in (forward, plain):
            sum(logits.square().mean() for logits in call(images, drop_path_noise=noise)).backward()
        assert len(graphs) == 2
        for one, other in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
