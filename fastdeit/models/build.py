"""Models made by name, ours or timm's, and the student that the settings of a run mean.

An image size whose border a model would ignore is refused here, in words, before anything is trained or downloaded.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdeit.config import Config, Size, height_width, in_pixels, size_of
from fastdeit.curriculum import Curriculum
from fastdeit.errors import UserError

from . import deit as ours
from . import patch_drop, published, sources
from .architectures import ARCHITECTURES, own_name, unknown_model_message
from .trainable import freeze, hidden_matrices
from .weights import first_convolution, load_weights


def build_student(
    config: Config, num_classes: int, classes: Sequence[str] | None = None
) -> tuple[nn.Module, list[str]]:
    """(the model the settings name, on the CPU, with `num_classes` outputs and, if asked for, loaded weights; sentences
    about these weights).

    classes: the outputs' names; a head that comes with the weights is kept only if its classes are the same.
    Raises UserError for an unknown name, for distillation tokens a model does not have, and for weights that do not
    fit.
    """
    settings = config.model
    torch.manual_seed(config.run.seed)
    pretrained = settings.pretrained and not settings.finetune  # which would be written over
    attention = "sdpa" if config.speed.attention == "auto" else config.speed.attention  # until something is measured
    model = create_model(
        settings.model, num_classes=num_classes, input_size=config.data.input_size, patch_size=settings.patch_size,
        drop_path=settings.drop_path, attention=attention, in_chans=config.data.in_chans,
        pretrained=pretrained and not is_ours(settings.model), drops_patches=settings.patch_drop > 0,
    )  # fmt: skip
    check_sizes(model, config)
    if config.optimization.opt == "muon":
        hidden_matrices(model, settings.model)  # refused here if there are none
    if settings.grad_checkpointing:
        model.set_grad_checkpointing(True)
    source, notes = None, []
    if settings.finetune:
        source = sources.find(settings.finetune)
    elif pretrained and is_ours(settings.model):
        source = sources.of_model(settings.model)
    if source is not None:
        notes = [
            f"starts from {source.weights}", *load_weights(model, source, new_head=True, classes=classes),
        ]  # fmt: skip
        if source.mean and source.std:
            normalise(model, source.mean, source.std)
    return model, [*notes, *freeze(model, settings)]


# ---------------------------------------------------------------------------------------------------------------------
# By name


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    input_size: Size | None = None,
    patch_size: int | None = None,
    drop_path: float = 0.0,
    attention: str = "sdpa",
    in_chans: int = 3,
    pretrained: bool = False,
    drops_patches: bool = False,
) -> nn.Module:
    """A model of ours or timm's by name, on the CPU, with fresh weights or those that timm publishes (`pretrained`).

    num_classes, input_size, patch_size: the model's own if None. drops_patches: timm's has its layer for that, at a
    rate of 0 (patch_drop.set_rate). Raises UserError, or ValueError from our own code, where there is no such model, or
    it does not take all of an image of this size.
    """
    options = {"num_classes": num_classes, "patch_size": patch_size}
    options = {key: value for key, value in options.items() if value is not None}
    if is_ours(name):
        model = ours.create_model(
            own_name(name), img_size=input_size, drop_path=drop_path, attention=attention, in_chans=in_chans, **options
        )
        if pretrained:
            load_weights(model, sources.of_model(name), new_head=True)
        return model
    import timm
    from timm.models import parse_model_name

    try:
        source = parse_model_name(name)[0]
    except ValueError as error:
        raise UserError(f"--model {name}: {error}") from error
    if source is None and not timm.is_model(name):
        raise UserError(unknown_model_message(name, timm.list_models()))
    if drop_path:
        options["drop_path_rate"] = drop_path
    if in_chans != 3:
        options["in_chans"] = in_chans
    if drops_patches:
        options["patch_drop_rate"] = 0.5  # any but 0, for which timm has no layer
    if pretrained:
        with torch.device("meta"):  # what can be refused is refused before anything is downloaded
            _made(name, input_size, options)
        model = _published(name, input_size, options)
    else:
        model = _made(name, input_size, options)
    if drops_patches and not patch_drop.has_layer(model):
        raise UserError(_without(name, "patch_drop_rate"))
    patch_drop.set_rate(model, 0.0)
    if input_size is not None:
        probe(model, name, input_size, in_chans)
    return model


REMEDIES = {
    "patch_size": "omit --patch-size", "drop_path_rate": "give --drop-path 0", "patch_drop_rate": "give --patch-drop 0",
}  # fmt: skip


def _without(name: str, option: str) -> str:
    return f"--model {name}: timm's has no {option}; {REMEDIES[option]}"


def _made(name: str, input_size: Size | None, options: dict) -> nn.Module:
    try:
        return _timm_model(name, input_size, **options)
    except Exception as error:  # each of timm's files refuses in its own way
        for option in REMEDIES:
            if option in options and option in str(error) and isinstance(error, TypeError):
                raise UserError(_without(name, option)) from error
        if input_size is None:
            raise UserError(f"--model {name}: timm cannot make it ({one_line(error)})") from error
        raise UserError(_refused(name, input_size, error)) from error


def _published(name: str, input_size: Size | None, options: dict) -> nn.Module:
    """With the weights that timm publishes, which have their names and shapes changed as timm does for this model."""
    weights = published.of_model(name).weights
    if weights.suffix == ".safetensors":
        options = options | {"pretrained_cfg_overlay": {"file": str(weights)}}
    try:
        return _timm_model(name, input_size, pretrained=True, **options)
    except Exception as error:  # a damaged file raises anything
        raise UserError(
            f"the published weights of {name} in {weights} cannot be loaded ({one_line(error)}): remove the file, so "
            "that it is downloaded again"
        ) from error


def is_ours(name: str) -> bool:
    return own_name(name) in ARCHITECTURES


def is_known(name: str) -> bool:
    import timm

    return is_ours(name) or timm.is_model(name)


def _timm_model(name: str, input_size: Size | None, **options) -> nn.Module:
    """A transformer is made for images of `input_size` pixels (None: its own), and timm interpolates its positions; a
    convolutional network takes any."""
    import timm

    if input_size is not None:
        try:
            return timm.create_model(name, img_size=input_size, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    return timm.create_model(name, **options)


@torch.no_grad()
def probe(model: nn.Module, name: str, input_size: Size, in_chans: int = 3) -> None:
    """Refuse, in words, an image size that the model does not take, or whose border it would ignore.

    One forward pass of a copy without data (on the meta device: no arithmetic); of the model itself where it has
    tensors that such a copy cannot hold.
    """
    patch, _ = patch_and_grid(model)
    if patch and not getattr(model.patch_embed, "dynamic_img_pad", False):
        refuse_remainder(f"--model {name}", input_size, *patch)
    was_training, lost = model.training, []
    images = torch.zeros(1, in_chans, *height_width(input_size))
    try:
        try:
            twin = _without_data(model).eval()
            for module in twin.modules():
                if _cuts_patches(module, in_chans):
                    module.register_forward_pre_hook(lambda module, inputs: lost.append((module, inputs[0].shape[-2:])))
            logits = twin(images.to("meta"))
        except Exception:  # a tensor that is no buffer, a shape that depends on values; or truly a refusal
            logits = model.eval()(images)
    except Exception as error:
        raise UserError(_refused(name, input_size, error)) from error
    finally:
        model.train(was_training)
    for module, sides in lost:
        if any(side % stride for side, stride in zip(sides, module.stride)):
            refuse_remainder(f"--model {name}", input_size, *module.stride)
    if not isinstance(logits, Tensor) or logits.ndim != 2:  # some return tokens, or one tensor per stage
        raise UserError(f"--model {name}: its output is not (batch, classes) logits; choose a classifier")


def _cuts_patches(module: nn.Module, in_chans: int) -> bool:
    """Whether it is a convolution of the image itself that drops what is left of a row behind its last window."""
    if not isinstance(module, nn.Conv2d) or module.in_channels != in_chans:
        return False
    return module.kernel_size == module.stride != (1, 1) and module.padding in ((0, 0), "valid")


def _without_data(model: nn.Module) -> nn.Module:
    memo = {id(tensor): nn.Parameter(tensor.to("meta"), requires_grad=False) for tensor in model.parameters()}
    memo |= {id(tensor): tensor.to("meta") for tensor in model.buffers()}
    return copy.deepcopy(model, memo)


def check_sizes(model: nn.Module, config: Config) -> None:
    """Refuse a size of --curriculum that the patch does not divide, or the model does not take."""
    flag = f"--curriculum {config.optimization.curriculum}"
    patch, _ = patch_and_grid(model)
    for size in Curriculum.of(config).sizes:
        if patch and any(side % of_patch for side, of_patch in zip(height_width(size), patch)):
            raise UserError(
                f"{flag}: images of {in_pixels(size)} pixels do not divide into the {in_pixels(size_of(patch))}-pixel "
                f"patches of {config.model.model}: give multiples of that"
            )
        if size == config.data.input_size or isinstance(model, ours.DeiT):
            continue
        try:
            probe(model, config.model.model, size, config.data.in_chans)
        except UserError as error:
            raise UserError(
                f"{flag}: {config.model.model} does not take images of {size} pixels beside those of "
                f"{config.data.input_size}: choose a model that does (deit_*, deit3_*, CNNs of timm), or omit the flag"
            ) from error


def patch_and_grid(model: nn.Module) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Sides of a patch in pixels, and the grid of them; None where the model has none, or they overlap."""
    embed = getattr(model, "patch_embed", None)
    projection = getattr(embed, "proj", None)
    if not isinstance(projection, nn.Conv2d) or projection.kernel_size != projection.stride:
        return None, None
    grid = getattr(model, "grid_size", None) or getattr(embed, "grid_size", None)
    return projection.kernel_size, tuple(grid) if grid else None


def refuse_remainder(who: object, input_size: Size, *patch: int) -> None:
    """patch: its height and width."""
    sides = height_width(input_size)
    if all(side % of_patch == 0 for side, of_patch in zip(sides, patch)):
        return
    less = [max(of_patch, side // of_patch * of_patch) for side, of_patch in zip(sides, patch)]
    more = [near + (of_patch if side % of_patch else 0) for near, side, of_patch in zip(less, sides, patch)]
    remedies = [" ".join(map(str, near[:1] if isinstance(input_size, int) else near)) for near in (less, more)]
    raise UserError(
        f"{who}: images of {in_pixels(input_size)} pixels do not divide into patches of {in_pixels(size_of(patch))}, "
        f"the rest would be lost; choose --input-size {' or '.join(remedies)}"
    )


def _refused(name: str, input_size: Size, error: Exception) -> str:
    return (
        f"--model {name}: timm's cannot take images of {in_pixels(input_size)} pixels ({one_line(error)}); change "
        "--input-size"
    )


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation


def normalise(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Feed the model, from now on, what its weights were trained on: `mean_std` says it."""
    model.normalisation = (tuple(mean), tuple(std))


def mean_std(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The normalisation the model's weights expect, in [0, 1] units, a number for each channel; ImageNet's where the
    model does not say. What is known of three channels is averaged for one."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    known = settings.get("mean") or ours.IMAGENET_MEAN, settings.get("std") or ours.IMAGENET_STD
    mean, std = getattr(model, "normalisation", None) or known
    if len(mean) == 3 and is_grey(model):
        return (sum(mean) / 3,), (sum(std) / 3,)
    return tuple(mean), tuple(std)


def is_grey(model: nn.Module) -> bool:
    """Whether it takes images of one channel."""
    layer = first_convolution(model)
    return layer is not None and layer.weight.ndim == 4 and layer.weight.shape[1] == 1
