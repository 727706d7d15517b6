"""The objective against its formulas, written out in float64."""

import pytest
import torch
from torch import nn

from fastdeit.config import Config
from fastdeit.distill.loss import Objective
from fastdeit.errors import UserError
from fastdeit.pipelines import Mix

BATCH, CLASSES = 6, 11


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, CLASSES, generator=generator, dtype=torch.float64) * 3 for _ in range(3)]


LABELS = torch.tensor([0, 3, 10, 7, 7, 1])


def cross_entropy(z, q):
    return -(q * z.log_softmax(1)).sum(1).mean()


def one_hot(labels):
    return torch.eye(CLASSES, dtype=torch.float64)[labels]


def smoothed(q, epsilon):
    return (1 - epsilon) * q + epsilon / CLASSES


def kl(student, teacher, tau):
    p, log_p = (teacher / tau).softmax(1), (teacher / tau).log_softmax(1)
    return tau**2 * (p * (log_p - (student / tau).log_softmax(1))).sum() / BATCH


def mix_of(lam):
    lam = torch.full((BATCH,), lam)
    empty = torch.zeros(BATCH, 4, dtype=torch.int32)
    return Mix(torch.arange(BATCH).flip(0), lam, empty, empty, torch.zeros(BATCH, dtype=torch.int64))


def run(objective, z, mix=None):
    cls, dist, teacher = (value.float() for value in z)
    return objective((cls, dist), LABELS, mix, None if objective.kind == "none" else teacher)


def test_labels_only_with_smoothing(logits):
    loss, terms = run(Objective(smoothing=0.1), logits)
    expected = cross_entropy(logits[0], smoothed(one_hot(LABELS), 0.1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms.tolist() == pytest.approx([expected.item(), 0.0, 0.0, 0.0], rel=1e-6)


def test_hard_distillation(logits):
    loss, terms = run(Objective("hard", alpha=0.3, smoothing=0.1), logits)
    class_term = cross_entropy(logits[0], smoothed(one_hot(LABELS), 0.1))
    teacher_term = cross_entropy(logits[1], one_hot(logits[2].argmax(1)))  # no smoothing here
    assert loss.item() == pytest.approx((0.7 * class_term + 0.3 * teacher_term).item(), rel=1e-6)
    assert terms.tolist() == pytest.approx([class_term.item(), teacher_term.item(), 0.0, 0.0], rel=1e-6)


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "numel"])
def test_soft_distillation(logits, tau, reduction):
    loss, _ = run(Objective("soft", alpha=0.1, tau=tau, soft_reduction=reduction), logits)
    teacher_term = kl(logits[1], logits[2], tau) / (CLASSES if reduction == "numel" else 1)
    expected = 0.9 * cross_entropy(logits[0], one_hot(LABELS)) + 0.1 * teacher_term
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_mixed_labels_are_the_weighted_sum(logits):
    loss, _ = run(Objective("hard", smoothing=0.1), logits, mix_of(0.3))
    q = 0.3 * one_hot(LABELS) + 0.7 * one_hot(LABELS.flip(0))
    expected = 0.5 * cross_entropy(logits[0], smoothed(q, 0.1)) + 0.5 * cross_entropy(
        logits[1], one_hot(logits[2].argmax(1))
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_student_with_one_head_takes_both_terms_there(logits):
    cls, _, teacher = (value.float() for value in logits)
    loss, _ = Objective("soft", alpha=0.4, tau=2.0)(cls, LABELS, None, teacher)
    expected = 0.6 * cross_entropy(logits[0], one_hot(LABELS)) + 0.4 * kl(logits[0], logits[2], 2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_attention_term_is_added_with_its_weight(logits):
    cls, dist, teacher = (value.float() for value in logits)
    plain, _ = Objective("hard", alpha=0.3)((cls, dist), LABELS, None, teacher)
    term = torch.tensor(0.25, requires_grad=True)
    loss, terms = Objective("hard", alpha=0.3, attention_weight=4.0)((cls, dist), LABELS, None, teacher, term)
    assert loss.item() == pytest.approx(plain.item() + 4 * 0.25, rel=1e-6)
    assert terms[2] == 0.25 and not terms.requires_grad
    loss.backward()
    assert term.grad == 4


def test_the_feature_term_is_added_with_its_weight(logits):
    cls, dist, teacher = (value.float() for value in logits)
    plain, _ = Objective("soft")((cls, dist), LABELS, None, teacher)
    objective = Objective("soft", attention_weight=4.0, feature_weight=3.0)
    loss, terms = objective((cls, dist), LABELS, None, teacher, torch.tensor(0.25), torch.tensor(0.5))
    assert loss.item() == pytest.approx(plain.item() + 4 * 0.25 + 3 * 0.5, rel=1e-6)
    assert terms[2:].tolist() == [0.25, 0.5]


def test_unlabelled_samples_carry_the_teachers_term_alone(logits):
    cls, dist, teacher = (value.float() for value in logits)
    labels = torch.where(torch.arange(BATCH) % 2 == 0, LABELS, -100)
    _, terms = Objective("hard", smoothing=0.1)((cls, dist), labels, None, teacher)
    q = smoothed(one_hot(labels.clamp(min=0)), 0.1) * (labels >= 0)[:, None]
    assert terms[0].item() == pytest.approx(cross_entropy(logits[0], q).item(), rel=1e-6)
    assert terms[1].item() == pytest.approx(cross_entropy(logits[1], one_hot(logits[2].argmax(1))).item(), rel=1e-6)


def test_labels_and_cached_probabilities_replace_logits(logits):
    cls, dist, teacher = (value.float() for value in logits)
    live, _ = Objective("hard")((cls, dist), LABELS, None, teacher)
    cached, _ = Objective("hard")((cls, dist), LABELS, None, teacher.argmax(1))
    assert torch.equal(live, cached)
    probabilities, classes = (teacher / 2).softmax(1).topk(4, dim=1)
    cached, _ = Objective("soft", tau=2.0, alpha=1.0)((cls, dist), LABELS, None, (classes, probabilities))
    p = torch.full((BATCH, CLASSES), 0.0, dtype=torch.float64).scatter(1, classes, probabilities.double())
    p = torch.where(p == 0, (1 - p.sum(1, keepdim=True)) / (CLASSES - 4), p)
    expected = 4 * (p * (p.log() - (logits[1] / 2).log_softmax(1))).sum() / BATCH
    assert cached.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_binary_cross_entropy_counts_every_present_class_once(logits, lam):
    loss, _ = Objective(binary=True)(logits[0].float(), LABELS, mix_of(lam), None)
    target = torch.zeros(BATCH, CLASSES, dtype=torch.float64)
    for i, (first, second) in enumerate(zip(LABELS.tolist(), LABELS.flip(0).tolist())):
        if lam > 0:
            target[i, first] = 1
        if lam < 1:
            target[i, second] = 1
    expected = nn.functional.binary_cross_entropy_with_logits(logits[0], target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_binary_cross_entropy_refuses_smoothing_and_a_teacher():
    config = Config()
    config.optimization.bce_loss = True
    with pytest.raises(UserError, match="--smoothing 0"):
        Objective.from_config(config)
    config.distillation.distillation_type = "hard"
    with pytest.raises(UserError, match="--distillation-type none"):
        Objective.from_config(config)
