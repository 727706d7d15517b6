"""The distillation losses, forward and backward, beside PyTorch: as people write them, and compiled.

python benchmarks/losses.py [--device cpu] [--only distillation_loss attention_distillation_loss]

distillation_loss claims one launch over the logits where PyTorch needs many: two heads, mixed and smoothed labels, a
live teacher's logits, hard and soft, at 1,000 classes and at ImageNet-21k's 21,841. The peers upcast to float32, as
autocast does, and mix two cross entropies, which is the leanest way in PyTorch (no dense target).

attention_distillation_loss claims that no map is in memory, and so less traffic and a peak that does not grow with
tokens^2: ViT-S beside a plain ViT-S teacher, whole maps head by head, averaged over heads, and class rows only.

Peak memory is what one call allocates beyond its inputs, results included (GPU only). The floors are bytes: logits in
and gradients out once; for attention q and k of both models read in the forward and in the backward, gradients out.
"""

import argparse
import csv
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Table, compare

from fastdeit.kernels import attention_distillation_loss, distillation_loss

Loss = Callable[..., torch.Tensor]


def pytorch_distillation_loss(z, x, labels, teacher, second, lam, kind):
    z, x, teacher = z.float(), x.float(), teacher.float()
    own, other = (F.cross_entropy(z, y, reduction="none", label_smoothing=0.1) for y in (labels, second))
    class_term = (lam * own + (1 - lam) * other).mean()
    if kind == "hard":
        teacher_term = F.cross_entropy(x, teacher.argmax(1))
    else:
        student, target = (x / 2).log_softmax(1), (teacher / 2).log_softmax(1)
        teacher_term = 4 * F.kl_div(student, target, reduction="batchmean", log_target=True)
    return 0.5 * class_term + 0.5 * teacher_term


def our_distillation_loss(z, x, labels, teacher, second, lam, kind):
    return distillation_loss(z, x, labels, teacher, kind=kind, tau=2.0, smoothing=0.1, mix=(second, lam))


def pytorch_attention_loss(student, teacher, kind):
    """student (B, N, 2, H, D) and teacher (B, N - 1, 2, H, D) packed q and k; patches only, or class rows over them."""

    def attention_map(packed, prefix, rows):
        q, k = packed.permute(2, 0, 3, 1, 4)
        return (q[:, :, rows] @ k[:, :, prefix:].transpose(-2, -1)).float() * q.shape[-1] ** -0.5

    prefix_rows = kind == "prefix rows"
    S = attention_map(student, 2, slice(2) if prefix_rows else slice(2, None))
    T = attention_map(teacher, 1, slice(1) if prefix_rows else slice(1, None))
    if kind == "mean of heads":
        S, T = S.softmax(-1).mean(1), T.softmax(-1).mean(1)
        return (T * (T.clamp(min=2.0**-100).log() - S.clamp(min=2.0**-100).log())).sum(-1).mean()
    log_s, log_t = S.log_softmax(-1), T.log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean()


def our_attention_loss(student, teacher, kind):
    options = {"prefix rows": {"rows": "prefix"}, "mean of heads": {"heads": "mean"}}.get(kind, {})
    return attention_distillation_loss(*student.unbind(2), *teacher.unbind(2), **options)


def contenders(ours: Loss, theirs: Loss, leaves: tuple, others: tuple, kind: str) -> dict[str, Callable]:
    def call(loss):
        return lambda: torch.autograd.grad(loss(*leaves, *others, kind), leaves)

    # A compiled function for each case: shapes and kinds are as static as in training.
    torch._dynamo.reset()
    return {"fastdeit": call(ours), "torch.compile": call(torch.compile(theirs, fullgraph=True)), "eager": call(theirs)}


def peak_bytes(call: Callable) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Losses:
    def __init__(self, device: str, seconds: float, record: bool):
        self.device, self.seconds, self.table, self.memory = device, seconds, Table("losses", device, record), []

    def measure(self, operation: str, case: str, calls: dict[str, Callable], floor_bytes: int) -> None:
        timings = compare(calls, device=self.device, seconds=self.seconds)
        self.table.add(operation, case, timings, floor_bytes=floor_bytes)
        if self.device != "cpu":
            peaks = {name: peak_bytes(call) for name, call in calls.items()}
            print("    peak MB: " + ", ".join(f"{name} {peak / 1e6:.1f}" for name, peak in peaks.items()))
            self.memory += [[operation, case, name, f"{peak / 1e6:.2f}"] for name, peak in peaks.items()]
        self.table.write()
        if self.table.folder and self.memory:
            with (self.table.folder / "losses_memory.csv").open("w", newline="") as file:
                columns = ["operation", "case", "contender", "peak_mb"]
                csv.writer(file, lineterminator="\n").writerows([columns, *self.memory])

    def distillation(self, batch: int, classes: int, kind: str, dtype: torch.dtype) -> None:
        z, x, teacher = (3 * torch.randn(batch, classes, device=self.device, dtype=dtype) for _ in range(3))
        labels, second = (torch.randint(classes, (batch,), device=self.device) for _ in range(2))
        lam = torch.rand(batch, device=self.device)
        leaves, others = (z.requires_grad_(), x.requires_grad_()), (labels, teacher, second, lam)
        calls = contenders(our_distillation_loss, pytorch_distillation_loss, leaves, others, kind)
        case = f"{kind}, {batch} x {classes} {str(dtype).removeprefix('torch.')}"
        self.measure("distillation_loss", case, calls, 5 * batch * classes * dtype.itemsize)

    def attention(self, batch: int, tokens: int, heads: int, head_dim: int, kind: str, dtype: torch.dtype) -> None:
        shape = (2, heads, head_dim)
        student, teacher = (
            torch.randn(batch, n, *shape, device=self.device, dtype=dtype) for n in (tokens, tokens - 1)
        )
        calls = contenders(our_attention_loss, pytorch_attention_loss, (student.requires_grad_(),), (teacher,), kind)
        one = student.numel() * dtype.itemsize
        case = f"{kind}, {batch} x {tokens} x {heads} x {head_dim} {str(dtype).removeprefix('torch.')}"
        # Class rows need all keys but hardly any queries.
        self.measure("attention_distillation_loss", case, calls, 5 * one // (2 if kind == "prefix rows" else 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    operations = ("distillation_loss", "attention_distillation_loss")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=operations, default=operations)
    parser.add_argument("--seconds", type=float, default=0.3, help="of measuring for each contender")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    losses = Losses(arguments.device, arguments.seconds, not arguments.no_record)
    if arguments.device == "cpu":  # a small version: the records that decide are a GPU's
        dtype, logits, tokens, batch, heads = torch.float32, [(64, 1000)], (198,), 4, 3
    else:
        dtype, logits = torch.bfloat16, [(batch, classes) for batch in (256, 1024) for classes in (1000, 21841)]
        tokens, batch, heads = (198, 578), 256, 6
    if "distillation_loss" in arguments.only:
        for batch_size, classes in logits:
            for kind in ("hard", "soft"):
                losses.distillation(batch_size, classes, kind, dtype)
    if "attention_distillation_loss" in arguments.only:
        for count in tokens:
            for kind in ("whole maps", "mean of heads", "prefix rows"):
                losses.attention(batch, count, heads, 64, kind, dtype)


if __name__ == "__main__":
    main()
