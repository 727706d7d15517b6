"""Claim: comparing two models' attention maps costs a fraction of materialising them, and memory grows with tokens.

    python -m benchmarks attention-distillation

attention_distillation_loss, forward and backward, from the packed q and k of one layer: a DeiT-S student (6 heads)
beside a teacher ViT-B (12 heads, averaged on both sides) or ViT-S (head by head, and class rows only). The peers hold
the maps, as one writes it in PyTorch; eager and compiled. One whose gradients differ from the eager one's is not timed.

The floor is the larger of bytes (q and k of both models in for the forward and again for the backward, gradients out)
and products (scores of both models in the forward and again in the backward, two products for the gradients).
"""

from collections.abc import Callable

import torch

from fastdeit.kernels import attention_distillation_loss

from .kernel_table import KernelTable
from .record import parser
from .timing import compiled

HEAD_DIM, STUDENT_HEADS = 64, 6
KINDS = {"mean of heads": 12, "full maps": 6, "class rows": 6}  # with the heads of the teacher
TOLERANCE = 3e-2  # of bfloat16 gradients, relative to the largest


def materialised_loss(student, teacher, kind):
    """student (B, N, 2, H, D) and teacher (B, N - 1, 2, H', D), packed q and k; rows of patches over patches only."""

    def scores(packed, prefix, rows):
        q, k = packed.permute(2, 0, 3, 1, 4)
        return (q[:, :, rows] @ k[:, :, prefix:].transpose(-2, -1)).float() * HEAD_DIM**-0.5

    class_rows = kind == "class rows"
    S = scores(student, 2, slice(2) if class_rows else slice(2, None))
    T = scores(teacher, 1, slice(1) if class_rows else slice(1, None))
    if kind == "mean of heads":
        S, T = S.softmax(-1).mean(1), T.softmax(-1).mean(1)
        return (T * (T.clamp(min=2.0**-100).log() - S.clamp(min=2.0**-100).log())).sum(-1).mean()
    log_s, log_t = S.log_softmax(-1), T.log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean()


def our_loss(student, teacher, kind):
    options = {"class rows": {"rows": "prefix"}, "mean of heads": {"heads": "mean"}, "full maps": {}}[kind]
    return attention_distillation_loss(*student.unbind(2), *teacher.unbind(2), **options)


def contenders(student, teacher, kind: str, quick: bool) -> tuple[dict[str, Callable], dict[str, str]]:
    """Those that agree with the eager version, and the others with the reason. Ours must."""

    def call(loss):
        return lambda: torch.autograd.grad(loss(student, teacher, kind), student)

    torch._dynamo.reset()  # recompiled for each case
    functions = {"fastdeit": our_loss, "compiled": compiled(materialised_loss, quick=quick), "eager": materialised_loss}
    (expected,), usable, missing = call(materialised_loss)(), {}, {}
    for name, function in functions.items():
        usable[name] = call(function)
        error = ((usable[name]()[0] - expected).abs().max() / expected.abs().max()).item()
        if not error <= TOLERANCE:
            assert name != "fastdeit", f"wrong gradients, off by {error}"
            del usable[name]
            missing[name] = f"wrong gradients, off by {error:.1e} of the largest"
    return usable, missing


def work(student, teacher, kind: str) -> tuple[float, float]:
    """Bytes and FLOP at least."""
    batch, tokens, _, heads, width = student.shape
    q_and_k = [x.numel() * x.element_size() for x in (student, teacher)]
    rows = 1 if kind == "class rows" else tokens  # of the class token's row the queries are hardly anything
    moved = (3 * q_and_k[0] + 2 * q_and_k[1]) / (2 if kind == "class rows" else 1)
    product = 2 * batch * rows * tokens * width
    return moved, product * (2 * teacher.shape[3] + 4 * heads)


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--seconds", type=float, default=0.3, help="of measuring for each contender")
    arguments = own.parse_args()
    dtype, batch, sizes = torch.bfloat16, 64, (198, 578)
    if arguments.device == "cpu":  # the interpreter's bfloat16 is wrong
        dtype, batch, sizes = torch.float32, 1, (18,)
    table = KernelTable("attention_distillation", arguments, dtype, arguments.seconds)
    for tokens in sizes:
        for kind, teacher_heads in KINDS.items():
            student, teacher = (
                torch.randn(batch, n, 2, heads, HEAD_DIM, device=arguments.device, dtype=dtype)
                for n, heads in ((tokens, STUDENT_HEADS), (tokens - 1, teacher_heads))
            )
            calls, missing = contenders(student.requires_grad_(), teacher, kind, arguments.quick)
            moved, flops = work(student, teacher, kind)
            case = f"{kind}, {batch} x {tokens}, heads {STUDENT_HEADS} of {teacher_heads}"
            table.measure(
                "attention_distillation_loss", f"{case} {str(dtype).removeprefix('torch.')}", calls, missing=missing,
                floor_bytes=moved, floor_flops=flops, headline=tokens == 198,
            )  # fmt: skip
            table.write()


if __name__ == "__main__":
    main()
