"""A step on tensors of a CUDA device that is not there: PyTorch's fake tensors have a device, a shape and strides, and
raise where devices mix or the host reads a value. All of a step but the derivative, which fake tensors of a GPU cannot
have: autograd's engine asks the driver. Gradients are given instead."""

from unittest import mock

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastdeit.distill.teacher import Teacher
from fastdeit.distributed.world import World
from fastdeit.evaluation.metrics import Tally
from fastdeit.models.heads import logits_by_head
from fastdeit.models.loading import LoadedModel
from fastdeit.training.log import PhaseTimer
from fastdeit.training.trainer import Inputs, Trainer

from .recorded import DeviceOnly, Forbidden
from .test_step_graph import CASES, Cached, settings, stream
from .test_training_arithmetic import BATCH, CLASSES, SIZE

GPU = torch.device("cuda", 0)


class Fused(TorchDispatchMode):
    """What PyTorch's fused optimizers ask of their arguments on a GPU: with a rate on the device they have no function
    for fake tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not (name.startswith("_fused_") and func._overloadname == "tensor_lr"):
            return func(*args, **(kwargs or {}))
        lists, numbers = args[:5] if "adam" in name else args[:3], [kwargs["lr"], kwargs["found_inf"]]
        numbers += [*args[5]] if "adam" in name else []
        assert all(x.device == GPU and x.dtype == torch.float32 and x.shape == () for x in numbers), name
        for tensors in filter(None, lists):
            assert len(tensors) == len(args[0]), name
            for own, parameter in zip(tensors, args[0]):
                same = (own.device, own.dtype, own.shape, own.stride())
                assert same == (GPU, parameter.dtype, parameter.shape, parameter.stride()), name
        self.seen.append(name)


def moved(tree):
    return pytree.tree_map_only(
        Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU), tree
    )


def on_gpu(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(moved(parameter), requires_grad=parameter.requires_grad)
        module._buffers.update(moved(module._buffers))
    return model


def live_teacher():
    """With its own normalisation and size."""
    shape = {"input_size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    loaded = LoadedModel(name="it", model=timm.create_model("test_resnet", num_classes=CLASSES), classes=None, **shape)
    made = Teacher(loaded, student_mean=(0.4, 0.4, 0.4), student_std=(0.2, 0.2, 0.2), device="cpu")
    made.device = GPU
    return made


def given_gradients(model):
    """In place of Tensor.backward."""

    def backward(loss, *_):
        assert loss.device == GPU and loss.shape == ()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)

    return backward


# Each optimizer, loss and kind of teacher. Not those with buffers, of which a copy is of another fake mode, with hooks,
# which see no fake teacher, or with fp16, whose scaler wants a real GPU.
FAKE = (
    "adamw, hard, accumulated, clipped", "lamb, soft", "sgd, labels", "lamb, binary, layer scale", "cached, soft",
    "muon",
    "dkd, standardised", "cached, dist", "cached, nkd, accumulated",
)  # fmt: skip


def step_of(case, change=lambda trainer: None):
    """One step, as far as it goes without autograd. Returns the names of the fused operators it called."""
    make, teacher, *_ = CASES[case]
    student, batch = make(), stream(case)[0]
    teacher = None if teacher is None else Cached() if teacher is Cached else live_teacher()
    config = settings(case)
    config.speed.precision, config.speed.cuda_graph, config.speed.compile = "fp32", "off", False
    stay = mock.patch.object(nn.Module, "to", lambda module, *_, **__: module)  # it is there, and cannot be swapped
    with FakeTensorMode(), Fused() as fused, torch.no_grad(), stay:
        model = on_gpu(student)
        if isinstance(teacher, Teacher):
            on_gpu(teacher.network)
        trainer = Trainer(config, World(GPU), model, teacher, steps_per_epoch=4)
        trainer.timer = PhaseTimer(torch.device("cpu"))
        trainer.model.train()
        noise = torch.empty(BATCH, 2, 2, device=GPU) if hasattr(model, "drop_path") else None
        numbers = torch.empty(3, dtype=torch.float64, device=GPU)
        batch = moved(batch)
        change(trainer)
        with mock.patch.object(Tensor, "backward", given_gradients(model)):
            for _ in range(2):  # the second one with the optimizer's state as it stays
                with DeviceOnly(draws=not hasattr(model, "drop_path")):
                    losses = trainer.compute(Inputs(batch, noise, numbers, 0), trainer.world.mean)
        assert losses.device == GPU and losses.shape == (5,)
        for tensors in trainer.changed().values():
            assert all(tensor.device == GPU for tensor in tensors)
        tally, images = Tally(), torch.empty(BATCH, 3, SIZE, SIZE, device=GPU)
        model.eval()
        tally.add(logits_by_head(model, images), batch.labels)
        assert tally.sums.device == GPU
    return fused.seen


@pytest.mark.parametrize("case", FAKE)
def test_a_step_stays_on_its_device(case):
    seen = step_of(case)
    optimizer = {"lamb": "_fused_adam_", "sgd": "_fused_sgd_"}.get(settings(case).optimization.opt, "_fused_adamw_")
    assert {optimizer, "_fused_sgd_"} <= set(seen) and len(seen) >= 4


def offend(trainer, how):
    objective = trainer.objective
    trainer.objective = lambda outputs, *others: (how(trainer, outputs), objective(outputs, *others))[1]


@pytest.mark.parametrize(
    "how, words",
    [
        (lambda trainer, outputs: outputs[0].sum().item(), "_local_scalar_dense"),
        (lambda trainer, outputs: outputs[0].cpu(), "copies between devices"),
        (lambda trainer, outputs: outputs[0] + torch.empty(BATCH // 2, CLASSES), "device"),
        (lambda trainer, outputs: outputs[0][outputs[0] > 0], "index"),
        (lambda trainer, outputs: torch.tensor([1.0], device=GPU), "in a step|between devices"),
    ],
)
def test_what_leaves_the_device_is_noticed(how, words):
    with pytest.raises((Forbidden, DataDependentOutputException, RuntimeError), match=words):
        step_of("adamw, hard, accumulated, clipped", lambda trainer: offend(trainer, how))
