"""Claim: the loss of two heads and its gradients cost what moving the logits costs, and two launches.

    python -m benchmarks loss [--kinds hard soft]

distillation_loss, forward and backward, with a live teacher's logits, label smoothing and mixup labels (one lambda for
the batch, as timm's batch mode), at 1,000 classes and at ImageNet-21k's 21,841. Peers:

    deit            as facebookresearch/deit computes it (SoftTargetCrossEntropy on dense targets, which lie ready, and
                    its DistillationLoss), float32 as autocast makes it; eager and compiled
    lean            two cross entropies on integer labels in place of dense targets: the leanest in PyTorch; compiled
    liger           Liger-Kernel's cross entropies and KL divergence; they read the host's memory on the way, so no CUDA
                    graph, and work in place, so each on a copy of the logits

Only who gives the gradients that deit's loss gives is timed. The floor is bytes: the logits of both heads and of the
teacher in, two gradients out.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from fastdeit.kernels import distillation_loss

from .kernel_table import KernelTable
from .record import parser
from .timing import compiled

TAU, SMOOTHING, LAM = 2.0, 0.1, 0.7
TOLERANCE = 2e-2  # of bfloat16 gradients, relative to the largest


def deit_loss(z, x, labels, second, dense, teacher, kind):
    z, x, teacher = z.float(), x.float(), teacher.float()
    class_term = -(dense * z.log_softmax(1)).sum(1).mean()
    if kind == "hard":
        teacher_term = F.cross_entropy(x, teacher.argmax(1))
    else:
        student, target = (x / TAU).log_softmax(1), (teacher / TAU).log_softmax(1)
        teacher_term = TAU**2 * F.kl_div(student, target, reduction="sum", log_target=True) / x.numel()
    return 0.5 * class_term + 0.5 * teacher_term


def lean_loss(z, x, labels, second, dense, teacher, kind):
    z, x, teacher = z.float(), x.float(), teacher.float()
    own, other = (F.cross_entropy(z, y, label_smoothing=SMOOTHING) for y in (labels, second))
    if kind == "hard":
        teacher_term = F.cross_entropy(x, teacher.argmax(1))
    else:
        student, target = (x / TAU).log_softmax(1), (teacher / TAU).log_softmax(1)
        teacher_term = TAU**2 / x.shape[1] * F.kl_div(student, target, reduction="batchmean", log_target=True)
    return 0.5 * (LAM * own + (1 - LAM) * other) + 0.5 * teacher_term


def liger_loss(z, x, labels, second, dense, teacher, kind):
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_kl_div

    own, other = (liger_cross_entropy(z.clone(), y, label_smoothing=SMOOTHING) for y in (labels, second))
    if kind == "hard":
        teacher_term = liger_cross_entropy(x.clone(), teacher.argmax(1))
    else:
        student, target = (x.float() / TAU).log_softmax(1), (teacher.float() / TAU).log_softmax(1)
        teacher_term = TAU**2 / x.shape[1] * liger_kl_div(student, target, reduction="batchmean", log_target=True)
    return 0.5 * (LAM * own + (1 - LAM) * other) + 0.5 * teacher_term


def our_loss(z, x, labels, second, dense, teacher, kind):
    return distillation_loss(
        z, x, labels, teacher, kind=kind, tau=TAU, smoothing=SMOOTHING, mix=(second, LAM), soft_reduction="numel"
    )


FUNCTIONS = {"fastdeit": our_loss, "deit eager": deit_loss, "liger": liger_loss}
COMPILED = {"deit compiled": deit_loss, "lean compiled": lean_loss}


class Case:
    def __init__(self, batch: int, classes: int, kind: str, dtype: torch.dtype, device: str):
        *heads, teacher = (3 * torch.randn(batch, classes, device=device, dtype=dtype) for _ in range(3))
        self.leaves, self.kind = [logits.requires_grad_() for logits in heads], kind
        labels, second = (torch.randint(classes, (batch,), device=device) for _ in range(2))
        dense = torch.full((batch, classes), SMOOTHING / classes, device=device)
        for rows, share in ((labels, LAM), (second, 1 - LAM)):
            dense.scatter_add_(1, rows[:, None], torch.full((batch, 1), (1 - SMOOTHING) * share, device=device))
        self.others = labels, second, dense, teacher

    def call(self, loss: Callable) -> Callable[[], tuple[torch.Tensor, ...]]:
        return lambda: torch.autograd.grad(loss(*self.leaves, *self.others, self.kind), self.leaves)

    def contenders(self, quick: bool) -> tuple[dict[str, Callable], dict[str, str]]:
        """Those that give the gradients that deit's loss gives, and the others with the reason. Ours must."""
        torch._dynamo.reset()  # recompiled for each case: shapes and kinds are as static as in training
        functions = FUNCTIONS | {name: compiled(function, quick=quick) for name, function in COMPILED.items()}
        usable, missing, expected = {}, {}, self.call(deit_loss)()
        for name, function in functions.items():
            if name == "liger" and (find_spec("liger_kernel") is None or not self.leaves[0].is_cuda):
                missing[name] = "needs liger-kernel and a GPU"
                continue
            usable[name] = self.call(function)
            errors = [((g - e).abs().max() / e.abs().max()).item() for g, e in zip(usable[name](), expected)]
            if not max(errors) <= TOLERANCE:
                assert name != "fastdeit", f"wrong gradients, off by {errors}"
                del usable[name]
                missing[name] = f"wrong gradients, off by {max(errors):.1e} of the largest"
        return usable, missing


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--kinds", nargs="+", choices=("hard", "soft"), default=("hard", "soft"))
    own.add_argument("--seconds", type=float, default=0.3, help="of measuring for each contender")
    arguments = own.parse_args()
    dtype, shapes = torch.bfloat16, [(256, 1000), (1024, 1000), (16384, 1000), (1024, 21841)]
    if arguments.device == "cpu":  # the interpreter's bfloat16 is wrong
        dtype, shapes = torch.float32, [(4, 10)]
    table = KernelTable("loss", arguments, dtype, arguments.seconds)
    for batch, classes in shapes:
        for kind in arguments.kinds:
            calls, missing = Case(batch, classes, kind, dtype, arguments.device).contenders(arguments.quick)
            case = f"{kind}, {batch} x {classes} {str(dtype).removeprefix('torch.')}"
            table.measure(
                "distillation_loss", case, calls, missing=missing, uncaptured=("liger",),
                floor_bytes=5 * batch * classes * dtype.itemsize, headline=batch in (1024, 16384) and classes == 1000,
            )  # fmt: skip
            table.write()


if __name__ == "__main__":
    main()
