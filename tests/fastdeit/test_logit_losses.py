"""DKD, NKD, DIST and logit standardisation against their papers' formulas, one image and class at a time in float64."""

import math
from statistics import fmean, stdev

import pytest
import torch

from fastdeit.config import Config
from fastdeit.distill import logit_losses
from fastdeit.distill.logit_losses import dist, dkd, logit_loss, nkd, standardized, target_class, teacher_logits
from fastdeit.distill.loss import Objective
from fastdeit.pipelines import Mix

BATCH, CLASSES = 6, 11
LABELS = torch.tensor([0, 3, 10, 7, 7, 1])


def softmax(z):
    top = max(z)
    powers = [math.exp(x - top) for x in z]
    return [x / sum(powers) for x in powers]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def without(p, y):
    """The distribution over the other classes."""
    others = p[:y] + p[y + 1 :]
    return [x / sum(others) for x in others]


def oracle_dkd(s, t, labels, tau, beta):
    total = 0.0
    for zs, zt, y in zip(s, t, labels):
        p, q = softmax([x / tau for x in zt]), softmax([x / tau for x in zs])
        total += divergence([p[y], 1 - p[y]], [q[y], 1 - q[y]]) + beta * divergence(without(p, y), without(q, y))
    return tau**2 * total / len(s)


def oracle_nkd(s, t, labels, tau, gamma):
    total = 0.0
    for zs, zt, y in zip(s, t, labels):
        p, q = softmax(zt), softmax(zs)
        n, m = (without(softmax([x / tau for x in z]), y) for z in (zt, zs))
        total -= p[y] * math.log(q[y]) + gamma * tau**2 * sum(a * math.log(b) for a, b in zip(n, m))
    return total / len(s)


def correlation(x, y):
    dx, dy = [a - fmean(x) for a in x], [b - fmean(y) for b in y]
    return sum(a * b for a, b in zip(dx, dy)) / math.sqrt(sum(a * a for a in dx) * sum(b * b for b in dy))


def oracle_dist(s, t, labels, tau, _):
    s, t = ([softmax([x / tau for x in z]) for z in rows] for rows in (s, t))
    inter = 1 - fmean(map(correlation, s, t))
    intra = 1 - fmean(map(correlation, zip(*s), zip(*t)))
    return tau**2 * (2 * inter + 2 * intra)


ORACLES = {"dkd": oracle_dkd, "nkd": oracle_nkd, "dist": oracle_dist}


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, CLASSES, generator=generator, dtype=torch.float64) * 3 for _ in range(3)]


# Three classes: the teacher says 0.7, 0.2, 0.1 and the student 0.5, 0.25, 0.25; of a second image 0.1, 0.3, 0.6 and
# 0.2, 0.3, 0.5.
TEACHER = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]], dtype=torch.float64).log()


def test_values_by_hand():
    first = STUDENT[:1], TEACHER[:1], torch.tensor([0])
    # Target 0.7 ln(7/5) + 0.3 ln(3/5); the others 2/3 ln(4/3) + 1/3 ln(2/3).
    assert dkd(*first, nontarget=0.0).item() == pytest.approx(0.0822828, abs=1e-7)
    assert dkd(*first).item() == pytest.approx(0.0822828 + 0.5 * 0.0566330, abs=1e-7)
    # 0.7 ln 2, and of the others ln 2.
    assert nkd(*first).item() == pytest.approx(1.7 * math.log(2), abs=1e-12)
    assert nkd(*first, nontarget=1.5).item() == pytest.approx(2.2 * math.log(2), abs=1e-12)
    # Less 1/3 each, six times the sums of products: 0.55, and of squares 0.25 and 1.24; of the second image 0.46, 0.28,
    # 0.76. Each class rises or falls from one image to the other with both models.
    rows = (0.55 / math.sqrt(0.25 * 1.24) + 0.46 / math.sqrt(0.28 * 0.76)) / 2
    assert dist(STUDENT, TEACHER).item() == pytest.approx(2 * (1 - rows), abs=1e-5)
    assert standardized(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [pytest.approx([-1, 0, 1])]


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("kind", logit_losses.KINDS)
def test_the_formulas(logits, kind, tau):
    s, t, _ = logits
    found = logit_loss(kind, s, t, LABELS, tau=tau, nontarget=0.7)
    assert found.item() == pytest.approx(ORACLES[kind](s.tolist(), t.tolist(), LABELS.tolist(), tau, 0.7), rel=1e-6)


@pytest.mark.parametrize("kind", logit_losses.KINDS)
def test_the_gradients(logits, kind):
    s, t, _ = (x[:4, :5] for x in logits)

    def loss(s):
        return logit_loss(kind, s, t, LABELS[[0, 1, 5, 5]], tau=1.5, nontarget=0.7)

    torch.autograd.gradcheck(loss, s.clone().requires_grad_())
    torch.autograd.gradcheck(lambda s: loss(standardized(s)), s.clone().requires_grad_())


def test_dkd_is_the_divergence_taken_apart(logits):
    s, t, _ = (x[:1] for x in logits)
    rest = 1 - t.softmax(1)[0, 3].item()
    expected = divergence(softmax(t[0].tolist()), softmax(s[0].tolist()))
    assert dkd(s, t, torch.tensor([3]), nontarget=rest).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", logit_losses.KINDS)
def test_logits_of_any_size_give_finite_numbers(logits, kind, dtype):
    for scale in (0.0, 1.0, 1e3):
        s, t = ((x * scale).to(dtype).requires_grad_() for x in logits[:2])
        loss = logit_loss(kind, s, t.detach(), LABELS, tau=1.0, nontarget=1.0)
        loss.backward()
        assert loss.isfinite() and s.grad.isfinite().all()


def test_standardized_logits(logits):
    s = logits[0]
    expected = [[(x - fmean(row)) / (stdev(row) + 1e-7) for x in row] for row in s.tolist()]
    torch.testing.assert_close(standardized(s), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(standardized(5 * s - 3), standardized(s))  # all that it keeps
    equal = torch.zeros(2, 4, requires_grad=True)
    standardized(equal).sum().backward()
    assert equal.grad.isfinite().all()


def test_the_target_class():
    teacher = torch.eye(5)[[4, 4, 4, 4, 4, 4]]
    labels = torch.tensor([0, 1, 2, 3, -100, -100])
    assert target_class(labels, None, teacher).tolist() == [0, 1, 2, 3, 4, 4]
    lam, empty = torch.tensor([0.6, 0.4, 0.5, 0.4, 0.4, 0.6]), torch.zeros(6, 4, dtype=torch.int32)
    mix = Mix(torch.arange(6).flip(0), lam, empty, empty, torch.zeros(6, dtype=torch.int64))
    # Of the larger weight; where that has no label, the teacher's.
    assert target_class(labels, mix, teacher).tolist() == [0, 4, 2, 2, 1, 4]


# ---------------------------------------------------------------------------------------------------------------------
# In the training loss


def objective_of(**settings):
    config = Config()
    config.optimization.smoothing = 0.0
    for name, value in settings.items():
        setattr(config.distillation, name, value)
    return Objective.from_config(config)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", logit_losses.KINDS)
def test_the_training_loss(logits, kind, heads):
    cls, dist_head, t = logits
    objective = objective_of(distillation_type=kind, distillation_alpha=0.3, distillation_tau=2.0)
    outputs = [x.float().requires_grad_() for x in (cls, dist_head)[:heads]]
    loss, terms = objective(tuple(outputs) if heads == 2 else outputs[0], LABELS, None, t.float())
    weight = {"dkd": 0.5, "nkd": 1.0, "dist": None}[kind]  # as published
    class_term = -fmean(math.log(softmax(z)[y]) for z, y in zip(cls.tolist(), LABELS.tolist()))
    taught = (cls, dist_head)[heads - 1]
    teacher_term = ORACLES[kind](taught.tolist(), t.tolist(), LABELS.tolist(), 2.0, weight)
    assert loss.item() == pytest.approx(0.7 * class_term + 0.3 * teacher_term, rel=1e-5)
    assert terms.tolist()[:2] == pytest.approx([class_term, teacher_term], rel=1e-5)
    assert not terms.requires_grad
    loss.backward()
    exact = taught.clone().requires_grad_()
    (0.3 * logit_loss(kind, exact, t, LABELS, tau=2.0, nontarget=weight or 0.0)).backward()
    if heads == 1:
        exact.grad += 0.7 * (cls.softmax(1) - torch.eye(CLASSES)[LABELS]) / BATCH
    torch.testing.assert_close(outputs[-1].grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["soft", "dkd"])
def test_the_training_loss_of_standardized_logits(logits, kind):
    cls, dist_head, t = logits
    objective = objective_of(distillation_type=kind, distillation_tau=2.0, logit_standardization=True)
    _, terms = objective((cls.float(), dist_head.float()), LABELS, None, t.float())
    s, t = standardized(dist_head).tolist(), standardized(t).tolist()
    if kind == "dkd":
        expected = oracle_dkd(s, t, LABELS.tolist(), 2.0, 0.5)
    else:
        expected = 4 * fmean(divergence(*(softmax([x / 2 for x in z]) for z in (b, a))) for a, b in zip(s, t))
    assert terms[1].item() == pytest.approx(expected, rel=1e-5)
    (alone,) = {objective(cls.float(), LABELS, None, cls.float())[1][1].item()}  # one head, and a teacher that agrees
    assert alone == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "kind, standardize", [(kind, False) for kind in logit_losses.KINDS] + [("soft", 1), ("dkd", 1)]
)
def test_all_classes_in_a_cache_are_the_live_teacher(logits, kind, standardize):
    cls, dist_head, t = (x.float() for x in logits)
    objective = objective_of(distillation_type=kind, distillation_tau=2.0, logit_standardization=bool(standardize))
    probabilities, classes = (t / 2).softmax(1).topk(CLASSES)
    live = objective((cls, dist_head), LABELS, None, t)
    cached = objective((cls, dist_head), LABELS, None, (classes, probabilities))
    assert cached[0].item() == pytest.approx(live[0].item(), rel=1e-5)
    torch.testing.assert_close(cached[1], live[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["hard", "dist", "nkd"])
def test_standardisation_belongs_to_soft_and_dkd(logits, kind):
    """As a warning says."""
    inputs = ((logits[0].float(), logits[1].float()), LABELS, None, logits[2].float())
    both = [objective_of(distillation_type=kind, logit_standardization=on)(*inputs)[0] for on in (False, True)]
    assert torch.equal(*both)


def test_what_a_cache_leaves_out_is_spread_evenly(logits):
    t = logits[2]
    probabilities, classes = (t / 2).softmax(1).topk(4)
    p = teacher_logits((classes, probabilities), t, 2.0).div(2).softmax(1)
    torch.testing.assert_close(p.gather(1, classes), probabilities)
    others = torch.ones_like(p).scatter(1, classes, 0.0)
    rest = (1 - probabilities.sum(1, keepdim=True)) / (CLASSES - 4)
    torch.testing.assert_close(p * others, rest * others)
    # Nothing left for any of them, as float16 has it of a teacher that is certain.
    certain = classes[:, :1], torch.ones(BATCH, 1)
    for kind in logit_losses.KINDS:
        loss = logit_loss(kind, t, teacher_logits(certain, t, 1.0), classes[:, 0], tau=1.0, nontarget=1.0)
        assert loss.isfinite()


@pytest.mark.parametrize("kind", logit_losses.KINDS)
def test_they_compile_as_one_graph(logits, kind):
    s, t, _ = (x.float() for x in logits)
    call = lambda s: logit_loss(kind, standardized(s), t, target_class(LABELS, None, t), tau=2.0, nontarget=0.5)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s), call(s))
