"""How the operations meet autograd, torch.func and torch.compile: one derivative, backwards, and words for others.

An autograd.Function around each operator, rather than `register_autograd`: that one's operators return zeros for a
forward derivative, cannot be differentiated by torch.func.grad, and cost three times as much on the host.
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

    functions = {
        "generate_vmap_rule": True,
        "forward": staticmethod(lambda *inputs: operator(*inputs)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    compiled = type(name, (torch.autograd.Function,), functions)
    eager = type(name, (torch.autograd.Function,), functions | {"jvp": staticmethod(jvp)})  # Dynamo takes no jvp

    def apply(*inputs):
        return (compiled if torch.compiler.is_compiling() else eager).apply(*inputs)

    return apply


def only_once(name: str, operator: Callable) -> Callable:
    """`operator`, which computes a gradient, refusing to be differentiated itself."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"fastdeit.kernels.{name} cannot be differentiated twice (a backward pass with create_graph=True, a "
            "gradient penalty, a Hessian). Use PyTorch's own operators there; for attention those are "
            "torch.nn.functional.scaled_dot_product_attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
        )

    return differentiable(name, operator, lambda ctx, inputs, output: None, backward)
