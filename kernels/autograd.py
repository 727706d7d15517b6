"""How the operations meet autograd, torch.func and torch.compile: one derivative, backwards, and words for others.

An autograd.Function around each operator, rather than `register_autograd`, whose operators return zeros for a forward
derivative and cannot be differentiated by torch.func.grad.
"""

from collections.abc import Callable

import torch


def differentiable(name: str, operator: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """`operator` with the gradient `backward(ctx, *grads)`. What backward calls must not be differentiable again, which
    `only_once` sees to. `name` is what users call the operation."""

    def jvp(ctx, *tangents):
        raise NotImplementedError(
            f"fastdeit.kernels.{name} has no forward derivative (torch.func.jvp, jacfwd, hessian). Use reverse mode "
            "(torch.func.vjp, jacrev), or PyTorch's own operators."
        )

    def forward_and_setup(ctx, *inputs):
        output = operator(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def make(**functions):
        functions = {key: f if isinstance(f, bool) else staticmethod(f) for key, f in functions.items()}
        return type(name, (torch.autograd.Function,), functions | {"backward": staticmethod(backward)})

    # torch.func wants setup_context apart, which costs 50 us a call; Dynamo takes no jvp.
    apart = {"forward": lambda *inputs: operator(*inputs), "setup_context": setup_context, "generate_vmap_rule": True}
    eager, transformed, compiled = make(forward=forward_and_setup, jvp=jvp), make(**apart, jvp=jvp), make(**apart)

    def apply(*inputs):
        if torch.compiler.is_compiling():  # PyTorch 2.11's Dynamo stumbles over a Function that needs no gradient
            return compiled.apply(*inputs) if _needs_gradient(inputs) else operator(*inputs)
        return (transformed if _transforms_active() else eager).apply(*inputs)

    return apply


def _needs_gradient(inputs) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


# Of torch.func. Without this function of torch's, every call is made as if one were.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def only_once(name: str, operator: Callable) -> Callable:
    """`operator`, which computes a gradient, refusing to be differentiated itself."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"fastdeit.kernels.{name} cannot be differentiated twice (a backward pass with create_graph=True, a "
            "gradient penalty, a Hessian). Use PyTorch's own operators there; for attention those are "
            "torch.nn.functional.scaled_dot_product_attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
        )

    refusing = differentiable(name, operator, lambda ctx, inputs, output: None, backward)

    def apply(*inputs):
        # Compiled code has no second derivatives to refuse, and PyTorch 2.11's Dynamo takes no Function in a backward.
        return operator(*inputs) if torch.compiler.is_compiling() else refusing(*inputs)

    return apply
