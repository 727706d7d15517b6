"""What attention must return, in float64 from its definition, and how far from it we may be.

The budget: our error is at most twice that of PyTorch's own scaled_dot_product_attention in the same dtype on the same
device, plus one rounding of the largest value to the dtype. Gradients recompute P = exp(S - lse), and one rounding of
a logit in float32 is a relative error of P; so they get that, too (it matters for logits of 1e4). Those of q and k are
differences dP - delta of numbers up to |dO| |V|, whose rounding remains where they should cancel (one token: all).
"""

import torch
import torch.nn.functional as F


def definition(q, k, v, scale):
    """Output (B, N, H, D) and lse (B, H, N) by softmax over all keys, in the dtype given."""
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v), logits.logsumexp(-1)


def peer(q, k, v, scale):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def gradients(function, inputs, grad_outputs):
    """Outputs of the function on fresh leaves made of the inputs, and the leaves' gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # Fewer gradients than outputs: the last outputs are not used.
    torch.autograd.backward(outputs[: len(grad_outputs)], [g.to(o.dtype) for o, g in zip(outputs, grad_outputs)])
    return [o.detach() for o in outputs], [leaf.grad for leaf in leaves]


def check(ours, q, k, v, scale, through_lse=True, lse_floor=1e-6, seed=0):
    """`ours(q, k, v)` returns (out, lse) and is differentiable, also through lse; q, k, v may be views of anything."""
    generator = torch.Generator(q.device).manual_seed(seed)
    grad_out = torch.randn(q.shape, generator=generator, device=q.device).to(q.dtype)
    grad_lse = torch.randn(q.shape[0], q.shape[2], q.shape[1], generator=generator, device=q.device)
    grad_outputs = [grad_out, grad_lse] if through_lse else [grad_out]
    exact, exact_grads = gradients(lambda *x: definition(*x, scale), [x.double() for x in (q, k, v)], grad_outputs)
    (out, lse), grads = gradients(ours, (q, k, v), grad_outputs)
    _, exact_out_grads = gradients(lambda *x: definition(*x, scale)[0], [x.double() for x in (q, k, v)], [grad_out])
    theirs, their_grads = gradients(lambda *x: peer(*x, scale), (q, k, v), [grad_out])

    assert out.dtype == q.dtype and lse.dtype == torch.float32 and out.is_contiguous()
    logit = exact[1].abs().max().item() * torch.finfo(torch.float32).eps
    within(out, exact[0], error(theirs[0], exact[0]), "out")
    assert error(lse, exact[1]) <= 4 * logit + lse_floor, "lse"
    norms = [x.double().norm(dim=-1).max().item() for x in (q, k, v, grad_out)]
    cancelled = torch.finfo(torch.float32).eps * scale * norms[2] * norms[3]
    floors = {"q": cancelled * norms[1], "k": cancelled * norms[0], "v": 0.0}
    for (name, floor), grad, exact_grad, their_grad, exact_out_grad in zip(
        floors.items(), grads, exact_grads, their_grads, exact_out_grads
    ):
        within(grad, exact_grad, error(their_grad, exact_out_grad), f"grad {name}", 4 * logit, floor)


def within(ours, exact, their_error, name, relative=0.0, floor=0.0):
    largest = exact.abs().max().item()
    budget = 2 * their_error + (torch.finfo(ours.dtype).eps + relative) * largest + floor + 1e-7
    assert ours.shape == exact.shape
    assert error(ours, exact) <= budget, f"{name}: error {error(ours, exact):.3g}, budget {budget:.3g}"


def error(x, exact):
    """Largest absolute difference; NaN anywhere counts as infinite."""
    return (x.double() - exact).abs().nan_to_num(nan=float("inf")).max().item()
