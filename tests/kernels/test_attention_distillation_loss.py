"""attention_distillation_loss against explicit attention maps in float64, differentiated by autograd.

Budget: our error may be twice that of the same formulas in the inputs' dtype (products in it, softmax in float32, as
under autocast), plus a floor.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from fastdeit.kernels import attention_distillation_loss
from fastdeit.kernels.attention_distillation_loss import api, reference
from fastdeit.kernels.attention_distillation_loss.api import _backward_op, _op

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # lanes that are masked away
FLOOR = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    tokens: int
    teacher_tokens: int | None = None
    batch: int = 1
    heads: int = 1
    head_dim: int = 32
    teacher_heads: int | None = None
    teacher_dim: int = 16
    size: float = 1.0  # of queries
    relation: bool = False  # q with q
    options: dict = field(default_factory=dict)

    def __str__(self):
        extra = "-".join(f"{key}={value}" for key, value in self.options.items())
        return f"N{self.tokens}-{self.teacher_tokens}-B{self.batch}-H{self.heads}-D{self.head_dim}-{extra}"


MSE, MEAN, PREFIX = {"objective": "mse"}, {"heads": "mean"}, {"rows": "prefix"}
SMALL = [
    *(Case(1, options=options) for options in ({}, MSE, MEAN)),
    *(Case(5, batch=3, heads=3, options=options) for options in ({}, MSE)),
    Case(17, batch=3, heads=3, head_dim=64, teacher_dim=80),
    Case(17, heads=2, teacher_heads=3, head_dim=20, options=MEAN),
    Case(5, heads=2, teacher_heads=3, options=MEAN | MSE),
    # A distilled student of nine patches beside a plain teacher, which has one token less.
    *(Case(11, 10, batch=2, options=options) for options in ({}, MSE, PREFIX, PREFIX | MSE)),
    *(Case(11, 10, heads=3, teacher_heads=2, options=MEAN | options) for options in ({}, PREFIX)),
    Case(14, 11, options=PREFIX | {"student_prefix": 5, "teacher_prefix": 2}),
    Case(11, batch=2, heads=2, options=PREFIX | {"teacher_prefix": 2}),
    Case(11, heads=2, options=PREFIX),
    # Widths 3 * 24 and 2 * 48 regrouped; and a relation of a tensor with itself.
    *(Case(9, heads=3, head_dim=24, teacher_heads=2, teacher_dim=48, options={"heads": R}) for R in (1, 12)),
    Case(9, 8, heads=3, head_dim=24, teacher_heads=2, teacher_dim=48, relation=True, options=MSE | {"heads": 2}),
    Case(9, options={"student_scale": 0.3, "teacher_scale": 0.7}),
    *(Case(9, size=1e4, options=options) for options in ({}, MEAN)),
    Case(9, size=100.0, options=MSE),
    Case(9, size=0.0, options=MEAN),
]
LARGE = [  # several blocks of rows and keys
    Case(65),
    Case(65, options=MSE),
    Case(70, heads=2, options=MEAN),
    Case(66, 65, head_dim=64, teacher_dim=64),
    Case(70, options=PREFIX),
    Case(10, head_dim=160, teacher_dim=300),
]
HALF_ONLY = [Case(197, head_dim=64, teacher_dim=64), Case(198, 197, options=MEAN), Case(198, options=MSE)]
ALL = [
    *((case, torch.float32) for case in SMALL + LARGE),
    *((case, torch.float16) for case in SMALL + LARGE + HALF_ONLY),
]


def ids(value):
    return str(value).removeprefix("torch.")


def packed(generator, batch, tokens, heads, head_dim, dtype, device, regrouped):
    """q, k as views of a packed qkv with NaN around it, and between heads where these are not regrouped."""
    gap = 0 if regrouped else 8
    buffer = torch.full((batch, tokens + 2, 3, heads, head_dim + gap), float("nan"), dtype=dtype, device=device)
    view = buffer[:, 1:-1, :2, :, gap // 2 : gap // 2 + head_dim]
    view.copy_(torch.randn(view.shape, generator=generator))
    return buffer, view


def make(case, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    regrouped = isinstance(case.options.get("heads"), int)
    _, student = packed(generator, case.batch, case.tokens, case.heads, case.head_dim, dtype, device, regrouped)
    _, teacher = packed(
        generator, case.batch, case.teacher_tokens or case.tokens, case.teacher_heads or case.heads, case.teacher_dim,
        dtype, device, regrouped,
    )  # fmt: skip
    student[:, :, 0] *= case.size
    teacher[:, :, 0] *= case.size
    return student, teacher


def pairs(case, student, teacher):
    """(student_q, student_k, teacher_q, teacher_k)"""
    second = 0 if case.relation else 1
    return student[:, :, 0], student[:, :, second], teacher[:, :, 0], teacher[:, :, second]


def compared(case):
    """Rows and columns of the student's map, and of the teacher's, that are held against each other."""
    options = {"rows": "all", "student_prefix": 2, "teacher_prefix": 1} | case.options
    first, first_teacher = options["student_prefix"], options["teacher_prefix"]
    N, N_teacher = case.tokens, case.teacher_tokens or case.tokens
    if N == N_teacher:
        rows = list(range(min(first, first_teacher) if options["rows"] == "prefix" else N))
        return rows, list(range(N)), rows, list(range(N))
    columns, teacher_columns = list(range(first, N)), list(range(first_teacher, N_teacher))
    if options["rows"] == "prefix":
        return list(range(first)), columns, [0] * first, teacher_columns
    return columns, columns, teacher_columns, teacher_columns


def score_maps(q, k, rows, columns, heads, scale, dtype):
    """(batch, heads, rows, columns)"""
    if isinstance(heads, int):
        q, k = (t.reshape(*t.shape[:2], heads, -1) for t in (q, k))
    q, k = q.to(dtype), k.to(dtype)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    maps = [q[:, rows, h] @ k[:, columns, h].transpose(1, 2) for h in range(q.shape[2])]
    maps = torch.stack(maps, 1)
    return scale * (maps if dtype == torch.float64 else maps.float())


def oracle(case, student, teacher, dtype):
    student_q, student_k, teacher_q, teacher_k = pairs(case, student, teacher)
    rows, columns, teacher_rows, teacher_columns = compared(case)
    options = case.options
    heads = options.get("heads", "equal")
    S = score_maps(student_q, student_k, rows, columns, heads, options.get("student_scale"), dtype)
    T = score_maps(teacher_q, teacher_k, teacher_rows, teacher_columns, heads, options.get("teacher_scale"), dtype)
    if options.get("objective") == "mse":
        return F.mse_loss(S.mean(1), T.mean(1)) if heads == "mean" else F.mse_loss(S, T)
    if heads == "mean":
        S, T = S.softmax(-1).mean(1), T.softmax(-1).mean(1)
        terms = torch.xlogy(T, T) - T * S.clamp(min=2.0**-100).log()
        return terms.sum(-1).mean()
    return F.kl_div(S.log_softmax(-1), T.softmax(-1), reduction="none").sum(-1).mean()


def value_and_gradient(function, student, teacher, weight=3.0):
    student = student.detach().requires_grad_()
    loss = function(student, teacher)
    (grad,) = torch.autograd.grad(weight * loss, student)
    return loss.detach().double(), grad.double()


def check(case, dtype, device="cpu"):
    student, teacher = make(case, dtype, device)
    truth = value_and_gradient(lambda s, t: oracle(case, s.double(), t.double(), torch.float64), student, teacher)
    pytorch = value_and_gradient(lambda s, t: oracle(case, s, t, dtype), student, teacher)
    ours = value_and_gradient(
        lambda s, t: attention_distillation_loss(*pairs(case, s, t), **case.options), student, teacher
    )
    # A probability is known to the rounding of its score, which matters where scores are huge. There float16 products
    # overflow in PyTorch, which then sets no budget.
    largest = student.double()[:, :, :2].nan_to_num().abs().amax((0, 1, 3, 4))
    rounding = 2**-22 * largest.prod() * case.head_dim**0.5 if case.size > 1 else 0.0
    for what, mine, theirs, exact in zip(("loss", "gradient"), ours, pytorch, truth):
        error, scale = (mine - exact).abs().max(), exact.abs().max()
        budget = 2 * (theirs - exact).nan_to_num().abs().max() + 1e-7
        if what == "loss":
            budget += FLOOR[torch.float32] * scale + rounding
        else:
            budget += FLOOR[dtype] * scale + rounding * largest.max() / case.head_dim**0.5
        assert error <= budget, (what, error.item(), budget.item(), scale.item())


@pytest.mark.parametrize("case", SMALL + LARGE, ids=ids)
def test_reference(case):
    check(case, torch.float32)


@pytest.mark.interpreter
@pytest.mark.parametrize("case, dtype", ALL, ids=ids)
def test_kernels_interpreted(case, dtype):
    check(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=ids)
@pytest.mark.parametrize("case", SMALL + LARGE + HALF_ONLY, ids=ids)
def test_kernels_on_gpu(case, dtype):
    check(case, dtype, "cuda")


EVERYWHERE = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", id="reference"),
        pytest.param("cpu", id="interpreted", marks=pytest.mark.interpreter),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ],
)


def from_scores(S, T, device, **options):
    """Loss and dS of one head with scores S and T: q holds the scores and k is the identity, so that dq is dS."""

    def function(q, teacher_q):
        k = torch.eye(S.shape[1], device=device)[None, :, None]
        scales = {"student_scale": 1.0, "teacher_scale": 1.0}
        return attention_distillation_loss(q[None, :, None], k, teacher_q[None, :, None], k, **scales, **options)

    loss, grad = value_and_gradient(function, S.to(device), T.to(device), weight=S.shape[0])
    return loss.cpu(), grad.cpu()


@EVERYWHERE
@pytest.mark.parametrize("options", [{}, MEAN], ids=str)
def test_scores_far_below_zero(device, options):
    """exp(-lse) overflows here: what the kernels compute for absent keys must not reach the sums."""
    S, T = torch.randn(5, 5) - 3000.0, torch.randn(5, 5) - 2000.0
    loss, grad = from_scores(S, T, device, **options)
    torch.testing.assert_close(grad, S.double().softmax(1) - T.double().softmax(1), rtol=0, atol=1e-3)
    assert loss.isfinite()


@EVERYWHERE
def test_averaged_map_has_a_floor(device):
    """Below 2^-100, that is 69.3 under the largest score, an averaged probability has no gradient of its own."""
    gaps = torch.tensor([68.0, 70.0])
    S, T = torch.diag(-gaps), torch.zeros(2, 2)
    loss, grad = from_scores(S, T, device, **MEAN)
    cost = gaps.clamp(max=100 * math.log(2)).double()  # -log of the improbable key's probability
    torch.testing.assert_close(loss, (math.log(0.5) + 0.5 * cost).mean(), rtol=1e-6, atol=0)
    truth = torch.tensor([[-0.5, 0.5], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(grad, truth, rtol=0, atol=1e-5)


def test_gradcheck():
    for options in ({}, MSE, MEAN, PREFIX, MEAN | PREFIX, {"heads": 2}):
        case = Case(5, 4, batch=2, heads=2, head_dim=6, teacher_dim=4, options=options)
        student, teacher = (t.clone() for t in make(case, torch.float64))

        def loss(student, case=case, teacher=teacher):
            return attention_distillation_loss(*pairs(case, student, teacher), **case.options)

        assert torch.autograd.gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize("options", [{}, MSE, MEAN], ids=str)
def test_plain_formulas_take_a_few_images_at_a_time(options, monkeypatch):
    """Maps of three images are in memory at a time: the last slice of seven is short."""
    case = Case(9, batch=7, heads=2, teacher_heads=2, options=options)
    monkeypatch.setattr(reference, "MAP_BYTES", 3 * 4 * 2 * 9 * 9)
    scores, images = reference._scores, []
    monkeypatch.setattr(reference, "_scores", lambda q, k, scale: images.append(len(q)) or scores(q, k, scale))
    monkeypatch.setattr(api, "use_triton", lambda x: False)
    check(case, torch.float32)
    assert images == [3, 3, 3, 3, 1, 1] * 2  # student and teacher, forward and backward


def test_equal_models_are_at_distance_zero():
    case = Case(9, heads=3, teacher_dim=32)
    student, _ = make(case, torch.float32)
    for options in ({}, MSE, MEAN, {"heads": 6}):
        loss, grad = value_and_gradient(
            lambda s, t, o=options: attention_distillation_loss(*pairs(case, s, t), **o), student, student
        )
        assert loss.abs() < 1e-6 and grad.abs().max() < 1e-6


def test_no_gradient_reaches_the_teacher():
    case = Case(5)
    student, teacher = (t.clone().requires_grad_() for t in make(case, torch.float32))
    attention_distillation_loss(*pairs(case, student, teacher)).backward()
    assert student.grad[:, :, :2].any() and teacher.grad is None


def test_second_derivative_is_refused():
    case = Case(5)
    student, teacher = make(case, torch.float32)
    student.requires_grad_()
    loss = attention_distillation_loss(*pairs(case, student, teacher))
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_distillation_loss cannot be differentiated twice"):
        grad.nansum().backward()


@pytest.mark.parametrize("objective", ["kl", "mse", "mean_kl"])
def test_opcheck(objective):
    student, teacher = (t.clone() for t in make(Case(5, batch=2, heads=2), torch.float32))
    inputs = (student[:, :, 0], student[:, :, 1], teacher[:, :, 0], teacher[:, :, 1])
    torch.library.opcheck(_op, (*inputs, 0.2, 0.3, objective))
    with torch.no_grad():
        loss, *saved = _op(*inputs, 0.2, 0.3, objective)
        detached = [t.detach() for t in inputs]
        torch.library.opcheck(_backward_op, (torch.ones_like(loss), *detached, *saved, 0.2, 0.3, objective))


def test_compiles_without_a_graph_break():
    def step(student, teacher):
        student = 2 * student
        loss = attention_distillation_loss(*pairs(case, student, teacher))
        return loss + attention_distillation_loss(*pairs(case, student, teacher), rows="prefix", heads="mean")

    case = Case(11, 10, batch=2, heads=2)
    student, teacher = (t.clone() for t in make(case, torch.float32))
    torch._dynamo.reset()
    compiled = value_and_gradient(torch.compile(step, fullgraph=True), student, teacher)
    for ours, truth in zip(compiled, value_and_gradient(step, student, teacher)):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("options", [{}, MSE, MEAN], ids=str)
def test_autocast_leaves_the_arithmetic_alone(options):
    """Scores and products of the plain formulas are in float32 inside autocast too, forward and backward."""
    case, results = Case(9, batch=2, heads=2, head_dim=32, teacher_dim=32, options=options), []
    for enabled in (False, True):
        student, teacher = make(case, torch.bfloat16)
        student.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = attention_distillation_loss(*pairs(case, student, teacher), **options)
            results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    for ours, inside in zip(*results):
        assert torch.equal(ours, inside) and ours.dtype == inside.dtype


x = torch.zeros(2, 5, 3, 8)
BAD_INPUT = [
    ("rows must be", (x, x, x, x), {"rows": "cls"}),
    ("objective must be", (x, x, x, x), {"objective": "l1"}),
    ("heads must be", (x, x, x, x), {"heads": "sum"}),
    ("heads must be", (x, x, x, x), {"heads": 0}),
    ("student_q must be .batch, tokens, heads, head_dim.", (x[0], x, x, x), {}),
    ("teacher_k must be .batch, tokens, heads, head_dim.", (x, x, x, x[:, :0]), {}),
    ("teacher_q must be float32, float16 or bfloat16", (x, x, x.int(), x.int()), {}),
    ("last dimension of student_k", (x, x.transpose(2, 3).contiguous().transpose(2, 3), x, x), {}),
    ("student_q and student_k differ in shape", (x, x[:, :4], x, x), {}),
    ("teacher_q and teacher_k differ in dtype", (x, x, x, x.half()), {}),
    ("student_q and student_k differ in device", (x, x.to("meta"), x, x), {}),
    ("the student is on cpu, the teacher on meta", (x, x, x.to("meta"), x.to("meta")), {}),
    ("must see one batch", (x, x, x[:1], x[:1]), {}),
    ("the student has 3 heads, the teacher 2", (x, x, x[:, :, :2], x[:, :, :2]), {}),
    ("student's width 24 cannot be regrouped into 5", (x, x, x, x), {"heads": 5}),
    ("have 3 and 2 patches", (x, x, x[:, :3], x[:, :3]), {}),
    ("have 0 and 0 patches", (x[:, :2], x[:, :2], x[:, :1], x[:, :1]), {}),
    ("needs prefix tokens", (x, x, x, x), {"rows": "prefix", "student_prefix": 0}),
]


@pytest.mark.parametrize("message, arguments, options", BAD_INPUT, ids=[case[0] for case in BAD_INPUT])
def test_bad_input_is_named(message, arguments, options):
    with pytest.raises(ValueError, match=message):
        attention_distillation_loss(*arguments, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, MSE, MEAN], ids=str)
def test_every_run_gives_the_same_bits(options):
    case = Case(198, batch=8, heads=3, head_dim=64, teacher_dim=64, options=options)
    student, teacher = make(case, torch.bfloat16, "cuda")

    def run():
        return value_and_gradient(
            lambda s, t: attention_distillation_loss(*pairs(case, s, t), **options), student, teacher
        )

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, MSE, MEAN], ids=str)
def test_cuda_graph_replays(options):
    case = Case(198, 197, batch=2, heads=3, head_dim=64, teacher_dim=64, options=options)
    student, teacher = make(case, torch.bfloat16, "cuda")

    def run():
        return value_and_gradient(
            lambda s, t: attention_distillation_loss(*pairs(case, s, t), **options), student, teacher
        )

    with torch.cuda.stream(torch.cuda.Stream()):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for old, new in zip((student, teacher), make(case, torch.bfloat16, "cuda", seed=1)):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run()))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, MSE], ids=str)
def test_no_map_is_in_memory(options):
    case = Case(1024, batch=4, heads=8, head_dim=32, teacher_dim=32, options=options)
    student, teacher = make(case, torch.bfloat16, "cuda")
    student.requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention_distillation_loss(*pairs(case, student, teacher), **options).backward()
    one_map = case.batch * case.heads * case.tokens**2 * 2
    assert torch.cuda.max_memory_allocated() - before < one_map / 2
