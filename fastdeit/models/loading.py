"""The one way from a name, a folder or a file to a trained model, for predict, evaluate, export and teachers.

load_model("runs/cats")                                                a run's last checkpoint
load_model("exported")                                                 a folder of timm or transformers
load_model("deit_small.pth", name="deit_small_patch16_224")            a file, and the model that it is of
load_model("deit_tiny_patch16_224.fb_in1k")                            timm's published weights
load_model("hf-hub:facebook/deit-tiny-patch16-224")                    a repository of the hub
"""

import importlib.util
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fastdeit.checkpoint import state_dict
from fastdeit.checkpoint.state_dict import StateDict
from fastdeit.config import Size, height_width, in_pixels, size_of
from fastdeit.errors import UserError

from . import deit as ours
from . import published, sources, weight_names, weights
from .architectures import ARCHITECTURES, Architecture, own_name, similar
from .build import create_model, is_known, is_ours, mean_std, one_line, patch_and_grid, refuse_remainder
from .implementation import installed
from .sources import Source


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model as it was trained, on the CPU in float32, its input and its classes.

    name: for people. architecture: what it is made by. input_size: pixels, one number for a square. mean, std: in
    [0, 1] units. classes: None where the weights come without names. crop_pct: share of the resized image's side that
    the centre crop keeps. precision: arithmetic it was trained in, if one was chosen. notes: what was not simply
    copied. config: what config.json beside the weights says. average: these are a moving average of the weights.
    """

    name: str
    model: nn.Module
    input_size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None = None
    crop_pct: float = 0.875
    kind: Literal["ours", "timm", "transformers", "file"] = "timm"
    architecture: str = ""
    precision: str | None = None
    notes: tuple[str, ...] = ()
    config: dict = field(default_factory=dict, repr=False)
    average: bool = False

    @property
    def num_classes(self) -> int:
        return cast(int, self.model.num_classes)

    @property
    def in_chans(self) -> int:
        """Channels of its images: 3, or 1 for grey."""
        return len(self.mean)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names to show: `classes`, ImageNet's where their number is one of ImageNet's, else numbers."""
        if self.classes is not None:
            return self.classes
        from timm.data import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset({"num_classes": self.num_classes})
        if subset is None:
            return tuple(map(str, range(self.num_classes)))
        info = ImageNetInfo(subset)
        return tuple(info.index_to_description(i) for i in range(self.num_classes))


def load_model(
    source: str | Path,
    *,
    name: str | None = None,
    default_name: str | None = None,
    pretrained: bool = False,
    weights: Literal["model", "ema"] = "model",
    input_size: Size | None = None,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """The model that `source` means.

    source: a file, a folder or an address as sources.find takes it (local-dir:FOLDER means FOLDER); or timm's name of
        a model (NAME or NAME.TAG), which means the weights that timm publishes for it
    pretrained: the name of a model means these weights even where there is a file of that name
    name: the model that a file of weights is of. default_name: the same, where the file itself does not say
    weights: "ema" for the moving average
    input_size: pixels, if others than in training; the position embedding is interpolated
    device: where it is going to be used; it is returned on the CPU

    Raises UserError, or ValueError for weights that cannot be read or do not fit.
    """
    source = str(source)
    if not sources.exists(source) or (pretrained and not published.is_remote(source) and is_known(source)):
        return _published(source, input_size)
    found = sources.find(source, weights=weights)
    if found.kind == "file" or (name is not None and found.path.is_file()):
        return _file(replace(found, kind="file"), weights == "ema", input_size, name, default_name)
    load = {"ours": _ours, "timm": _timm, "transformers": _transformers}[found.kind]
    return load(found, input_size, torch.device(device))


def has_moving_average(source: str | Path, *, pretrained: bool = False) -> bool:
    """Whether `source` holds a moving average of the weights beside the weights."""
    if pretrained or not sources.exists(source) or str(source).endswith((".safetensors", ".json")):
        return False
    try:
        return bool(state_dict.read(sources.find(source, weights="ema").weights, ema=True).state)
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# The kinds of source


def _ours(found: Source, input_size: Size | None, device: torch.device) -> LoadedModel:
    settings = found.config["settings"].get("speed", {})
    attention = settings.get("attention", "auto")
    if attention == "auto" or device.type != "cuda" or not installed(attention):
        attention = "sdpa"  # the weights do not care, and the others need a GPU to be fast or to run
    assert found.model is not None, "a checkpoint of ours names its model"
    model = create_model(
        found.model, num_classes=found.num_classes, input_size=_size(found, input_size), patch_size=found.patch_size,
        attention=attention, in_chans=found.in_chans,
    )  # fmt: skip
    return _loaded(found, model, input_size, precision=settings.get("precision"))


def _timm(found: Source, input_size: Size | None, device: torch.device) -> LoadedModel:
    folder = found.weights.parent
    model = create_model(f"local-dir:{folder}", input_size=_size(found, input_size), in_chans=found.in_chans)
    architecture = found.config["architecture"]
    if is_ours(architecture):
        model = _in_our_code(model, ARCHITECTURES[architecture])
    return _loaded(found, model, input_size, architecture=architecture)


def _transformers(found: Source, input_size: Size | None, device: torch.device) -> LoadedModel:
    config, size = found.config, _size(found, input_size)
    if not sources.is_plain_transformer(config):
        return _by_transformers(found, size)
    size = 224 if size is None else size  # transformers' own default
    assert found.patch_size is not None and found.num_classes is not None  # by is_plain_transformer, and by default
    arch = Architecture(
        config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"], found.patch_size,
        max(height_width(size)), distilled=config["model_type"] == "deit",
    )  # fmt: skip
    refuse_remainder(found.path, size, arch.patch_size, arch.patch_size)
    model = ours.DeiT(arch, num_classes=found.num_classes, img_size=height_width(size), drop_path=0.0, attention="sdpa")
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config.get("layer_norm_eps", 1e-12)
    return _loaded(found, model, size, architecture=found.model or "")


def _loaded(found: Source, model: nn.Module, input_size: Size | None, **more) -> LoadedModel:
    """`model` filled with the weights, and what the folder says of it."""
    notes = weights.load_weights(model, found, ema=found.weights.name == "ema.safetensors")
    return _as_configured(found, model, input_size, (*found.notes, *notes), **more)


def _as_configured(found: Source, model: nn.Module, input_size: Size | None, notes, **more) -> LoadedModel:
    mean, std = mean_std(model)
    settings = getattr(model, "pretrained_cfg", None) or {}
    return LoadedModel(**{
        "name": found.name or str(found.path), "model": model, "kind": found.kind, "classes": found.classes,
        "architecture": found.model or "",
        "input_size": _size(found, input_size) or size_of(settings["input_size"][1:]),
        "mean": found.mean or mean, "std": found.std or std,
        "crop_pct": found.crop_pct or settings.get("crop_pct") or 0.875, "notes": tuple(notes),
        "config": found.config, "average": found.weights.name == "ema.safetensors", **more,
    })  # fmt: skip


def _file(found: Source, ema: bool, input_size: Size | None, name: str | None, default: str | None) -> LoadedModel:
    """Weights alone. Classes, patch size and, unless asked for, image size are read off the tensors."""
    contents = state_dict.read(found.weights, ema=ema)
    name = name or (contents.model if contents.model and is_known(contents.model) else None) or default
    if name is None:
        raise UserError(
            f"{found.path} does not say which model it is of: give --model NAME, such as deit_small_patch16_224"
        )
    notes: list[str] = []
    probe = create_model(name)
    fresh, heads = probe.state_dict(), weights.head_names(probe)
    state = weight_names.match(found.path, contents.state, fresh, heads, notes)
    head, kernel = state.get(f"{heads[0]}.weight"), state.get("patch_embed.proj.weight")
    patch = None
    own = probe.arch.patch_size if isinstance(probe, ours.DeiT) else None
    if kernel is not None and kernel.ndim == 4 and own not in (None, kernel.shape[-1]):
        patch = kernel.shape[-1]
    side = input_size or contents.input_size or _side_of(probe, state)
    model = create_model(
        name, num_classes=None if head is None else len(head), input_size=side, patch_size=patch,
        in_chans=1 if kernel is not None and kernel.ndim == 4 and kernel.shape[1] == 1 else 3,
    )  # fmt: skip
    state, more = weights.fit(model, state, found)
    model.load_state_dict(state)
    return _as_configured(
        found, model, side, (*contents.notes, *notes, *more), architecture=name,
        name=f"{name} from {found.name or found.path}",
    )  # fmt: skip


def _side_of(model: nn.Module, state: StateDict) -> int | None:
    """Pixels on a side for which a file has positions; None where that is the model's own size, or is not known."""
    ours, theirs = getattr(model, "pos_embed", None), state.get("pos_embed")
    patch, grid = patch_and_grid(model)
    if not patch or not grid or not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return None
    if ours.ndim != 3 or theirs.ndim != 3:
        return None
    patches = theirs.shape[1] - (ours.shape[1] - grid[0] * grid[1])
    rows = math.isqrt(max(patches, 0))
    kernel = state.get("patch_embed.proj.weight")
    return rows * (kernel.shape[-1] if kernel is not None else patch[0]) if rows and rows * rows == patches else None


def _published(name: str, input_size: Size | None) -> LoadedModel:
    """timm's model with the weights timm publishes; in our code where we have it, which gives logits by head."""
    if published.config_of_model(name) is None and not is_known(name):
        raise UserError(_nothing_at(name))
    found = sources.of_model(name)
    notes: tuple[str, ...] = ()
    if is_ours(name):
        model = create_model(name, num_classes=found.num_classes, input_size=_size(found, input_size))
        notes = tuple(weights.load_weights(model, found))
    else:
        model = create_model(name, input_size=input_size, pretrained=True)
        own_size = size_of(cast(dict[str, Any], model.pretrained_cfg)["input_size"][1:])
        if input_size not in (None, own_size) and getattr(model, "pos_embed", None) is not None:
            notes = (f"positions interpolated by timm from {in_pixels(own_size)} to {in_pixels(input_size)} pixels",)
    return _as_configured(found, model, input_size, notes, architecture=own_name(name))


def _in_our_code(model: Any, arch: Architecture) -> ours.DeiT:
    """timm's model of a name that is ours too; a folder may say other sizes than the name."""
    arch = replace(
        arch, width=model.embed_dim, depth=len(model.blocks), heads=model.blocks[0].attn.num_heads,
        patch_size=model.patch_embed.patch_size[0],
    )  # fmt: skip
    size = model.patch_embed.img_size
    twin = ours.DeiT(
        arch, num_classes=model.num_classes, img_size=size, drop_path=0.0, attention="sdpa",
        in_chans=model.patch_embed.proj.in_channels,
    )  # fmt: skip
    twin.load_state_dict(model.state_dict())
    return twin


def _by_transformers(found: Source, size: Size | None) -> LoadedModel:
    """A network that is neither timm's nor ours, in the code of transformers."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            f"{found.path} is a {found.config['model_type']} of transformers: pip install 'fastdeit[export]' brings "
            "the code that runs it"
        )
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if found.input_size and size is not None and size != (own := size_of(found.input_size)):
        raise UserError(
            f"--input-size {in_pixels(size)}: {found.path} takes {in_pixels(own)} pixels, and no others here"
        )
    try:
        network, report = transformers.AutoModelForImageClassification.from_pretrained(
            found.weights.parent, output_loading_info=True
        )
    except Exception as error:  # whatever its reader raises
        raise UserError(f"transformers cannot read {found.path} as an image classifier: {one_line(error)}") from error
    if missing := sorted(map(str, report["missing_keys"])):
        raise UserError(f"{found.path} has no trained head of classes: it lacks {', '.join(missing[:3])}")
    model = InTransformers(network.float())
    return _as_configured(found, model, size, found.notes, architecture="")


class InTransformers(nn.Module):
    """(batch, 3, height, width) -> (batch, classes): a classifier of transformers with the interface of timm's."""

    def __init__(self, network: Any):
        super().__init__()
        self.network, self.num_classes = network, network.config.num_labels
        self.pretrained_cfg = {"input_size": (3, 224, 224)}

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).logits


def _size(found: Source, input_size: Size | None) -> Size | None:
    """At which the model is used."""
    if input_size is not None or found.input_size is None:
        return input_size
    return size_of(found.input_size)


def _nothing_at(source: str) -> str:
    import timm

    near = "" if "/" in source else similar(source, timm.list_models())
    return (
        f"there is no checkpoint {source}: give a run's folder, a folder of timm or transformers, a file of weights "
        f"with --model NAME, hf-hub:ORG/NAME, a URL, or timm's name of a model{near}"
    )
