"""What distillation_loss refuses, in words; on a GPU, which nothing may stop, a label out of range gives NaN."""

import pytest
import torch

from fastdeit.kernels import distillation_loss


def test_second_derivative_is_refused():
    z = torch.randn(2, 3, requires_grad=True)
    loss = distillation_loss(z, None, torch.tensor([0, 1]), None, kind="none")
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="distillation_loss cannot be differentiated twice"):
        grad.sum().backward()


z, y, t = torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(2, 3)
BAD_INPUT = [
    ("kind must be one of", (z, z, y, t), {"kind": "hardest"}),
    ("alpha", (z, z, y, t), {"alpha": 1.5}),
    ("tau", (z, z, y, t), {"tau": 0.0}),
    ("smoothing", (z, z, y, t), {"smoothing": 1.0}),
    ("soft_reduction", (z, z, y, t), {"soft_reduction": "mean"}),
    ("reduction must be", (z, z, y, t), {"reduction": "sum"}),
    ("cls_logits must be float32", (z.long(), z, y, t), {}),
    (r"cls_logits must be \(batch, classes\)", (z[0], None, y, t), {}),
    ("up to 32768 classes", (torch.zeros(1, 32769), None, y[:1], None), {"kind": "none"}),
    ("differ in dtype", (z, z.half(), y, t), {}),
    (r"dist_logits must have shape \(2, 3\)", (z, z[:, :2], y, t), {}),
    ("dist_logits is on meta", (z, z.to("meta"), y, t), {}),
    ("last dimension of cls_logits", (torch.zeros(3, 2).T, z, y, t), {}),
    ("last dimension of the teacher's logits", (z, z, y, torch.zeros(3, 2).T), {}),
    (r"target must have shape \(2,\)", (z, z, y[:1], t), {}),
    ("target must be int64, not torch.int32", (z, z, y.int(), t), {}),
    ("target is on meta", (z, z, y.to("meta"), t), {}),
    ("target must be floating", (z, z, torch.zeros(2, 3).long(), t), {}),
    ("mixed already", (z, z, t, t), {"mix": (y, 0.5)}),
    ("mix needs the labels", (z, z, None, t), {"mix": (y, 0.5)}),
    ("the lam of mix must be in", (z, z, y, t), {"mix": (y, 1.5)}),
    ("the lam of mix must have shape", (z, z, y, t), {"mix": (y, torch.ones(3))}),
    ("needs a teacher", (z, z, y, None), {}),
    ("has no teacher term", (z, z, y, t), {"kind": "none"}),
    ("not its labels", (z, z, y, y), {"kind": "soft"}),
    ("teacher's logits must have shape", (z, z, y, torch.zeros(2, 4)), {}),
    ("teacher's indices must be", (z, z, y, (torch.zeros(2, 4).long(), torch.zeros(2, 4))), {"kind": "soft"}),
    ("teacher's probabilities must have shape", (z, z, y, (y[:, None], torch.zeros(2, 2))), {"kind": "soft"}),
    ("target 3 is out of range", (z, z, torch.tensor([0, 3]), t), {}),
    ("target -1 is out of range", (z, z, torch.tensor([-1, 2]), t), {}),
    ("second label 9 is out of range", (z, z, y, t), {"mix": (torch.tensor([9, 0]), 1.0)}),
    ("teacher's label -100 is out of range", (z, z, y, torch.tensor([0, -100])), {}),
    ("teacher's label 5 is out", (z, z, y, (torch.tensor([[5], [0]]), torch.ones(2, 1))), {"kind": "soft"}),
]


@pytest.mark.parametrize("message, arguments, options", BAD_INPUT, ids=[case[0] for case in BAD_INPUT])
def test_bad_input_is_named(message, arguments, options):
    with pytest.raises(ValueError, match=message):
        distillation_loss(*arguments, **{"kind": "hard"} | options)


@pytest.mark.gpu
def test_label_out_of_range_is_nan_on_gpu():
    z = torch.randn(3, 10, device="cuda").requires_grad_()
    labels = torch.tensor([2, 10, -1], device="cuda")
    loss = distillation_loss(z, None, labels, None, kind="none", reduction="none")
    assert loss.isnan().tolist() == [False, True, True]
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert grad.isnan().all(1).tolist() == [False, True, True]
