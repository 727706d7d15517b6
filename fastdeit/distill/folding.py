"""BatchNorm folded into the convolution before it: a frozen network need not compute it.

    gamma * (conv(x, W) + b - mean) / sqrt(var + eps) + beta  ==  conv(x, s * W) + (b - mean) * s + beta
    where s = gamma / sqrt(var + eps)

Which BatchNorm follows which convolution is observed in one forward pass instead of being guessed from names, so any
timm network will do. The folded network must reproduce the logits of the given one, or it is not used.
"""

import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# Of the norm of the logits. float32 rounding through timm's deepest networks stays below a hundredth of it.
TOLERANCE = 1e-4


@torch.no_grad()
def fold_batchnorm(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """A copy of `model` (in eval mode) with its BatchNorms folded, and how many of them are.

    `images` (batch, 3, height, width): any it accepts. (model itself, 0) where there is nothing to fold, or where the
    folded logits differ: a convolution whose output is also used without the BatchNorm only looks foldable.
    """
    folded = copy.deepcopy(model)
    pairs = chained(folded, images, _is_plain_conv, _is_batchnorm)
    if not pairs:
        return model, 0
    for conv, norm in pairs:
        _fold(folded, conv, norm)
    expected, logits = model(images), folded(images)
    if not (logits - expected).norm() <= TOLERANCE * expected.norm():
        return model, 0
    return folded, len(pairs)


def chained(
    model: nn.Module, images: Tensor, is_first: Callable[[nn.Module], bool], is_second: Callable[[nn.Module], bool]
) -> list[tuple[str, str]]:
    """Names of (first, second) where the output of one was the input of the other as `model` ran, each called once.

    Not under inference mode, where tensors have no version counter to show that they were changed in between.
    """
    outputs: dict[int, tuple[str, Tensor, int]] = {}  # by id; holding the tensors keeps the ids apart
    pairs, calls, hooks = [], Counter(), []

    def after_first(name):
        def hook(module, inputs, output):
            calls[name] += 1
            outputs[id(output)] = (name, output, output._version)

        return hook

    def before_second(name):
        def hook(module, inputs):
            calls[name] += 1
            first, _, version = outputs.get(id(inputs[0]), (None, None, None))
            if version == inputs[0]._version:
                pairs.append((first, name))

        return hook

    for name, module in model.named_modules():
        if is_first(module):
            hooks.append(module.register_forward_hook(after_first(name)))
        elif is_second(module):
            hooks.append(module.register_forward_pre_hook(before_second(name)))
    model(images)
    for hook in hooks:
        hook.remove()
    return [(first, second) for first, second in pairs if calls[first] == calls[second] == 1]


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and module.running_mean is not None


def _is_plain_conv(module: nn.Module) -> bool:
    # Subclasses may change the weight in forward (weight standardisation); timm's Conv2dSame only pads.
    return type(module) is nn.Conv2d or type(module).__name__ == "Conv2dSame"


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    # timm's BatchNormAct2d contains the activation too.
    activation = getattr(norm, "act", None)
    model.set_submodule(norm_name, activation if isinstance(activation, nn.Module) else nn.Identity())
