"""distillation_loss against float64 formulas written with PyTorch's own losses and autograd.

Budget: our error may be twice that of the same formulas in float32, whose gradients are then rounded to the logits'
dtype, plus a floor of a few float32 roundings.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from fastdeit.kernels import distillation_loss
from fastdeit.kernels.distillation_loss.api import _backward_op, _op

FLOOR = 1e-6
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # masked lanes of the interpreter


@dataclass(frozen=True)
class Case:
    classes: int
    teacher: str = "soft"  # none, hard, labels, soft, stored
    target: str = "labels"  # none, labels, mix, dense
    heads: int = 2
    batch: int = 3
    smoothing: float = 0.1
    tau: float = 2.0
    scale: float = 3.0  # of the logits
    stored: int = 5
    soft_reduction: str = "batchmean"

    @property
    def kind(self):
        return {"labels": "hard", "stored": "soft"}.get(self.teacher, self.teacher)

    def __str__(self):
        return "-".join(str(value) for value in self.__dict__.values())


# Every combination of inputs at 10 classes; then sizes: one class, no full warp, aligned rows, odd rows, several blocks
# of 4,096 with and without a tail, the largest.
CASES = [
    *(
        Case(10, teacher, target, heads)
        for teacher, target, heads in itertools.product(
            ("hard", "labels", "soft", "stored"), ("none", "labels", "mix", "dense"), (1, 2)
        )
    ),
    *(Case(10, "none", target) for target in ("labels", "mix", "dense")),
    *(Case(1, teacher, "mix") for teacher in ("hard", "soft", "stored")),
    Case(2, "hard", "mix", batch=1),
    Case(2, "stored", "labels", heads=1, stored=2),
    Case(1000, "hard", "mix"),
    Case(1000, "soft", "labels", smoothing=0.0, soft_reduction="numel"),
    Case(1000, "stored", "mix", stored=100),
    Case(1001, "soft", "dense", heads=1, tau=4.0),
    Case(1001, "hard", "labels", batch=1),
    Case(9001, "hard", "mix"),
    Case(9001, "stored", "labels", heads=1),
    Case(32768, "soft", "mix", batch=2),
    Case(32768, "hard", "dense", batch=1),
    *(Case(10, teacher, "mix", scale=1e4, smoothing=s) for teacher in ("hard", "soft", "stored") for s in (0.0, 0.1)),
    Case(5000, "soft", "labels", scale=1e4),
    Case(10, "soft", "labels", scale=0.0),
]


def make(case, dtype=torch.float32, device="cpu", seed=0):
    """Arguments of distillation_loss. Every matrix is a view with NaN around it."""
    generator = torch.Generator().manual_seed(seed)
    B, C = case.batch, case.classes

    def logits():
        z = torch.randn(B, C, generator=generator) * case.scale
        return poisoned(z.clamp(-1e4, 1e4).to(dtype), device)

    def labels():
        return torch.randint(0, C, (B,), generator=generator).to(device)

    cls_logits, dist_logits = logits(), logits() if case.heads == 2 else None
    target, mix = labels(), None
    if case.target == "mix":
        lam = torch.rand(B, generator=generator)
        lam[-1] = 1.0
        mix = (labels(), lam.to(device))
    if case.target in ("labels", "mix") and B > 1:
        target[1] = -100
    if case.target == "dense":
        sums = torch.linspace(0.5, 1.5, B)[:, None]  # cross entropy asks for no 1
        target = poisoned(sums * torch.rand(B, C, generator=generator).softmax(1), device)
    if case.target == "none":
        target = None
    if case.teacher == "none":
        teacher = None
    elif case.teacher == "labels":
        teacher = labels()
    elif case.teacher == "stored":
        K = min(case.stored, C)
        probs, indices = torch.randn(B, C, generator=generator).mul(3).softmax(1).topk(K)
        teacher = indices.to(device), poisoned(probs.half(), device)
    else:
        teacher = logits()
    options = {
        "kind": case.kind, "alpha": 0.3, "tau": case.tau, "smoothing": case.smoothing, "mix": mix,
        "soft_reduction": case.soft_reduction,
    }  # fmt: skip
    return [cls_logits, dist_logits, target, teacher], options


def poisoned(x, device):
    B, C = x.shape
    buffer = torch.full((B + 2, C + 5), float("nan"), dtype=x.dtype, device=device)
    view = buffer[1:-1, 2 : 2 + C]
    view.copy_(x)
    return view


def oracle(dtype, cls_logits, dist_logits, target, teacher, *, kind, alpha, tau, smoothing, mix, soft_reduction):
    """Per-sample losses, and the two terms, with PyTorch's own functions in `dtype`."""
    z = cls_logits.to(dtype)
    x = z if dist_logits is None else dist_logits.to(dtype)
    B, C = z.shape
    class_term = teacher_term = z.new_zeros(B)

    def cross_entropy(y):
        return F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing)

    if target is not None and mix is None:
        class_term = cross_entropy(target.to(dtype) if target.ndim == 2 else target)
    elif target is not None:
        second, lam = mix
        class_term = torch.stack(
            [
                z[i, 0] * 0 if (a == -100 and w > 0) or (b == -100 and w < 1) else w * ce_a + (1 - w) * ce_b
                for i, (a, b, w, ce_a, ce_b) in enumerate(
                    zip(target.tolist(), second.tolist(), lam.tolist(), cross_entropy(target), cross_entropy(second))
                )
            ]
        )
    if kind == "hard":
        labels = teacher.float().argmax(1) if teacher.ndim == 2 else teacher
        teacher_term = F.cross_entropy(x, labels, reduction="none")
    elif kind == "soft":
        if isinstance(teacher, tuple):
            indices, probs = teacher
            p = torch.zeros(B, C, dtype=dtype, device=z.device)
            for i in range(B):
                named = set(indices[i].tolist())
                row = probs[i].to(dtype)
                row = row / max(row.sum(), 1.0) if len(named) < C else row / row.sum()
                p[i] = (1 - row.sum()).clamp(min=0) / max(C - len(named), 1)
                p[i, indices[i]] = row
        else:
            p = (teacher.to(dtype) / tau).softmax(1)
        teacher_term = tau**2 * F.kl_div((x / tau).log_softmax(1), p, reduction="none").sum(1)
        if soft_reduction == "numel":
            teacher_term = teacher_term / C
    if kind == "none":
        return class_term, (class_term, teacher_term)
    return (1 - alpha) * class_term + alpha * teacher_term, (class_term, teacher_term)


def with_gradients(loss, inputs, weights):
    heads = [t for t in inputs[:2] if t is not None]
    grads = torch.autograd.grad((loss * weights.to(loss.dtype)).sum(), heads, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(h) if g is None else g for g, h in zip(grads, heads))]


def check(case, dtype, device="cpu"):
    inputs, options = make(case, dtype, device)
    for head in inputs[:2]:
        if head is not None:
            head.requires_grad_()
    weights = torch.linspace(-2.0, 3.0, case.batch, device=device)
    exact = with_gradients(oracle(torch.float64, *inputs, **options)[0], inputs, weights)
    float32 = with_gradients(oracle(torch.float32, *inputs, **options)[0], inputs, weights)
    loss, terms = distillation_loss(*inputs, **options, reduction="none", return_terms=True)
    ours = with_gradients(loss, inputs, weights)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    # `exact` gradients were rounded to the logits' dtype on their way back, as they must be.
    rounding = torch.finfo(dtype).eps
    for what, mine, theirs, truth in zip(("loss", "dcls", "ddist"), ours, float32, exact):
        budget = 2 * (theirs.double() - truth.double()).abs().max() + FLOOR * (1 + truth.double().abs().max())
        if what != "loss":  # both rounded once
            budget = budget + rounding * truth.double().abs()
        error = (mine.double() - truth.double()).abs()
        assert (error <= budget).all(), (what, error.max().item(), budget.max().item())
    true_terms = torch.stack(oracle(torch.float64, *inputs, **options)[1]).mean(1)
    assert not terms.requires_grad and terms.dtype == torch.float32
    torch.testing.assert_close(terms.double(), true_terms.detach(), rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_in_half_precision(dtype):
    for case in (Case(10, "hard", "mix"), Case(1001, "soft", "dense", heads=1)):
        check(case, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_interpreted(case, dtype):
    check(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_on_gpu(case, dtype):
    check(case, dtype, "cuda")


def both_implementations(test):
    """The same property of the reference, of the interpreted kernel, and of the compiled one."""
    cpu = pytest.param("cpu", id="cpu")
    interpreted = pytest.param("cpu", id="interpreted", marks=pytest.mark.interpreter)
    gpu = pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)
    return pytest.mark.parametrize("device", [cpu, interpreted, gpu])(test)


@both_implementations
def test_mean_is_over_all_samples_and_terms_add_up(device):
    inputs, options = make(Case(10, "soft", "labels"), device=device)
    heads = [head.requires_grad_() for head in inputs[:2]]
    losses = distillation_loss(*inputs, **options, reduction="none")
    loss, terms = distillation_loss(*inputs, **options, return_terms=True)
    torch.testing.assert_close(loss, losses.mean())
    of_each = torch.autograd.grad(losses, heads, torch.full_like(losses, 2 / 3), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(2 * loss, heads), of_each)
    # A sum's gradient comes in as one number in memory.
    torch.testing.assert_close(torch.autograd.grad(2 / 3 * losses.sum(), heads), of_each)
    torch.testing.assert_close(loss, 0.7 * terms[0] + 0.3 * terms[1])


@both_implementations
def test_hard_teacher_takes_the_first_of_equals(device):
    x = torch.randn(3, 5000, device=device)
    teacher = torch.zeros(3, 5000, device=device)
    teacher[1, 17] = teacher[1, 4999] = 1.0
    teacher[2, 4500] = teacher[2, 4501] = 2.0
    loss = distillation_loss(x, x, None, teacher, kind="hard", alpha=1.0, reduction="none")
    labels = torch.tensor([0, 17, 4500], device=device)
    torch.testing.assert_close(loss, F.cross_entropy(x, labels, reduction="none"))
    stored = (
        torch.tensor([[7, 0], [3, 17], [4500, 1]], device=device),
        torch.tensor([[0.1, 0.6], [0.2, 0.7], [0.5, 0.4]], device=device),
    )
    assert torch.equal(loss, distillation_loss(x, x, None, stored, kind="hard", alpha=1.0, reduction="none"))


@both_implementations
def test_lambda_of_zero_and_one(device):
    z = torch.randn(4, 10, device=device)
    a, b = torch.tensor([1, 2, 3, -100], device=device), torch.tensor([4, 5, -100, 6], device=device)
    lam = torch.tensor([1.0, 0.0, 1.0, 0.0], device=device)
    loss = distillation_loss(z, None, a, None, kind="none", mix=(b, lam), reduction="none")
    truth = F.cross_entropy(z, torch.tensor([1, 5, 3, 6], device=device), reduction="none")
    torch.testing.assert_close(loss, truth)
    for value, labels in ((1.0, a), (0.0, b)):
        loss = distillation_loss(z, None, a, None, kind="none", mix=(b, value), reduction="none")
        torch.testing.assert_close(loss, F.cross_entropy(z, labels, reduction="none"))


@both_implementations
def test_unlabelled_batch_trains_on_the_teacher_alone(device):
    z, x, teacher = (torch.randn(3, 10, device=device).requires_grad_() for _ in range(3))
    missing = torch.full((3,), -100, device=device)
    losses = [distillation_loss(z, x, y, teacher.detach(), kind="hard", smoothing=0.1) for y in (missing, None)]
    torch.testing.assert_close(losses[0], 0.5 * F.cross_entropy(x, teacher.argmax(1)))
    assert torch.equal(*losses)
    dz, dx = torch.autograd.grad(losses[0], (z, x))
    assert not dz.any() and dx.any()
    lonely = distillation_loss(z, None, missing, None, kind="none", smoothing=0.1)
    assert lonely == 0 and not torch.autograd.grad(lonely, z)[0].any()


@both_implementations
def test_teacher_of_minus_infinity_gives_a_class_nothing(device):
    x, teacher = torch.randn(2, 9000, device=device), torch.randn(2, 9000, device=device)
    teacher[0, :5000] = float("-inf")  # more than the first block
    loss = distillation_loss(x, x, None, teacher, kind="soft", alpha=1.0, reduction="none")
    p = teacher.double().softmax(1)
    truth = F.kl_div(x.double().log_softmax(1), p, reduction="none").sum(1)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)


@both_implementations
def test_small_gradients_survive_float16(device):
    """Loss scaling reaches the gradient before it is rounded: with 1/B inside, those below 6e-8 would be lost."""
    z = torch.zeros(512, 1000, device=device)[:: 512 // 2].half().requires_grad_()
    z.data[:, 0] = 6.0
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    losses = distillation_loss(z, None, labels, None, kind="none", reduction="none")
    (grad,) = torch.autograd.grad((losses / 1024).sum() * 65536, z)
    truth = z.detach().double().softmax(1) - F.one_hot(labels, 1000)
    torch.testing.assert_close(grad.double(), truth * 64, rtol=2e-3, atol=0)


@both_implementations
def test_no_gradient_is_computed_where_none_is_asked_for(device):
    inputs, options = make(Case(10), device=device)
    with_grad = distillation_loss(inputs[0].clone().requires_grad_(), *inputs[1:], **options)
    without = distillation_loss(*inputs, **options)
    assert with_grad.requires_grad and not without.requires_grad and torch.equal(with_grad, without)


def test_gradcheck():
    for case in (Case(5, "soft", "mix"), Case(5, "stored", "dense", heads=1, stored=2), Case(5, "hard", "labels")):
        inputs, options = make(case, torch.float64)
        heads = [head.clone().requires_grad_() for head in inputs[:2] if head is not None]

        def loss(*heads, case=case, inputs=inputs, options=options):
            pair = heads if case.heads == 2 else (heads[0], None)
            return distillation_loss(*pair, *inputs[2:], **options, reduction="none")

        assert torch.autograd.gradcheck(loss, heads)


@pytest.mark.parametrize("case", [Case(10, "soft", "mix"), Case(10, "stored", "dense", heads=1), Case(10, "none")])
def test_opcheck(case):
    (cls_logits, dist_logits, target, teacher), options = make(case)
    teacher, probs = teacher if isinstance(teacher, tuple) else (teacher, None)
    dist_logits = None if case.kind == "none" else dist_logits
    second, lam = options["mix"] or (None, None)
    arguments = (cls_logits, dist_logits, target, second, lam, teacher, probs, case.kind, 0.3, 2.0, 0.1, False)
    torch.library.opcheck(_op, arguments)
    losses, _, statistics = _op(*arguments)
    torch.library.opcheck(_backward_op, (losses, statistics, *arguments))


def test_compiles_without_a_graph_break():
    def step(z, x, target, teacher, second, lam):
        options = {"kind": "soft", "smoothing": 0.1, "mix": (second, lam), "return_terms": True}
        return distillation_loss(2 * z, x.sin(), target, teacher, **options)

    (z, x, target, teacher), options = make(Case(10, "soft", "mix"))
    z, x = z.clone().requires_grad_(), x.clone().requires_grad_()
    arguments = (z, x, target, teacher, *options["mix"])
    torch._dynamo.reset()
    compiled, eager = torch.compile(step, fullgraph=True)(*arguments), step(*arguments)
    torch.testing.assert_close(compiled, eager)
    for ours, truth in zip(torch.autograd.grad(compiled[0], (z, x)), torch.autograd.grad(eager[0], (z, x))):
        torch.testing.assert_close(ours, truth)


@pytest.mark.gpu
def test_every_run_gives_the_same_bits():
    inputs, options = make(Case(1000, "soft", "mix", batch=300), torch.bfloat16, "cuda")
    inputs[0].requires_grad_(), inputs[1].requires_grad_()

    def run():
        loss = distillation_loss(*inputs, **options)
        return loss, *torch.autograd.grad(loss, inputs[:2])

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.gpu
def test_cuda_graph_replays():
    case = Case(1000, "hard", "mix", batch=64)
    inputs, options = make(case, torch.bfloat16, "cuda")
    cls_logits, dist_logits = (head.requires_grad_() for head in inputs[:2])

    def run():
        loss = distillation_loss(*inputs, **options)
        return loss, *torch.autograd.grad(loss, (cls_logits, dist_logits))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    fresh, _ = make(case, torch.bfloat16, "cuda", seed=1)
    with torch.no_grad():
        for old, new in zip(inputs, fresh):
            old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run()))
