"""What a file or folder of weights is, and what it says of its model: decided here, for every command.

    ours           a run's folder, or a checkpoint in it: config.json as fastdeit.checkpoint writes it
    timm           config.json with "architecture": a folder of timm's hub, or of fastdeit.export --format timm
    transformers   config.json with "model_type": a folder of transformers' save_pretrained, or of its hub
    file           weights without a config.json: .safetensors, or a file of torch.save

Only JSON is read. What weights say of themselves outranks a default; a flag that was typed outranks what they say.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fastdeit.config import size_of

from . import published
from .architectures import ARCHITECTURES

# The files that may hold a folder's weights, the first one found.
WEIGHTS = {"model": published.WEIGHTS, "ema": ("ema.safetensors",)}
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Source:
    """`path` as it was named, or where it was downloaded to, `weights` the file that is read; None, or (), for what is
    not said."""

    path: Path
    kind: Literal["ours", "timm", "transformers", "file"]
    weights: Path
    config: dict
    model: str | None = None  # a name that --model takes
    num_classes: int | None = None
    classes: tuple[str, ...] | None = None
    input_size: Size | None = None
    patch_size: int | None = None
    in_chans: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    notes: tuple[str, ...] = ()
    name: str | None = None  # where the weights are not of a path: an address, or timm's name of them


def exists(source: str | Path) -> bool:
    """Whether `source` is a file, a folder or an address; what is behind an address is not asked."""
    return published.is_remote(source) or _path(source).exists()


def _path(source: str | Path) -> Path:
    return Path(str(source).removeprefix("local-dir:")).expanduser()


def of_model(name: str) -> Source:
    """What timm publishes for a name; see published.of_model."""
    weights, config = published.of_model(name)
    return Source(weights, "timm", weights, config, name=name, **_timm(config))


def find(path: str | Path, *, weights: Literal["model", "ema"] = "model") -> Source:
    """What is at `path`. Raises ValueError where nothing is that can be read as a model's weights.

    path: a file; a folder; a run's folder, which means last/ in it; a folder of the hub's cache (models--ORG--NAME),
        which means its newest snapshot; local-dir:FOLDER, as timm writes it; an address, which is downloaded
        (published.local)
    weights: "ema" for the moving average: ema.safetensors of a folder, a state dict beside the weights in a file
    """
    if published.is_remote(path):
        return replace(find(published.local(str(path)), weights=weights), name=str(path))
    path = _path(path)
    if not path.exists():
        raise ValueError(
            f"no checkpoint at {path}: give a folder with model.safetensors, a .safetensors or .pth file, hf-hub:NAME "
            "or a URL"
        )
    if path.is_file():
        beside, names = path.with_name("config.json"), (*WEIGHTS["model"], *WEIGHTS["ema"])
        if path.name in names and beside.is_file() and _kind(read_config(path.parent)) is not None:
            return _described(path, path.parent, path)
        return Source(path, "file", path, {})
    folders = (path, path / "last", *_snapshots(path))
    for folder in folders:
        for name in WEIGHTS[weights]:
            if (folder / name).is_file():
                described = (folder / "config.json").is_file()
                return _described(path, folder, folder / name) if described else Source(path, "file", folder / name, {})
    raise ValueError(_nothing_in(path, folders, WEIGHTS[weights][0]))


def _snapshots(folder: Path) -> list[Path]:
    """Those of a folder of the hub's cache, the one that refs/main names before others."""
    main = folder / "refs" / "main"
    names = [main.read_text().strip()] if main.is_file() else []
    snapshots = sorted((folder / "snapshots").glob("*"), key=lambda snapshot: snapshot.stat().st_mtime, reverse=True)
    return [*(folder / "snapshots" / name for name in names), *snapshots]


def _nothing_in(path: Path, folders: tuple, name: str) -> str:
    for folder in folders:
        if (folder / "config.json").is_file():
            read_config(folder)  # a damaged one is the cause to name
    if (path / "settings.json").is_file():
        return f"the run {path} has no checkpoint yet: train it further (--resume {path}), or give another"
    if name == "ema.safetensors" and any((folder / "model.safetensors").is_file() for folder in folders):
        return f"{path} holds no moving average of the weights: there is no {name} in it"
    if (path / "preprocessing.json").is_file():
        return f"{path} holds an exported graph, not weights: give the checkpoint it was exported from"
    return f"the folder {path} holds no checkpoint: there is no {name} in it or in last/"


def read_config(folder: Path) -> dict:
    """config.json of a folder. Raises ValueError if it cannot be read."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} cannot be read: it holds a {type(config).__name__}, not a dictionary")
    return config


def _kind(config: dict) -> str | None:
    if "model" in config and "settings" in config:
        return "ours"
    return "timm" if "architecture" in config else "transformers" if "model_type" in config else None


def _described(path: Path, folder: Path, weights: Path) -> Source:
    config = read_config(folder)
    kind = _kind(config)
    says = {"ours": _ours, "timm": _timm, "transformers": lambda config: _transformers(config, folder)}
    try:
        if kind is not None:
            return Source(path, kind, weights, config, **says[kind](config))
    except (KeyError, TypeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is not as it should be ({error})"
        raise ValueError(f"{folder / 'config.json'} {what}; write or download the checkpoint again") from error
    raise ValueError(
        f"{folder / 'config.json'} is not of fastdeit, timm or transformers: give the file of weights beside it with "
        "--model NAME"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What each kind says


def _ours(config: dict) -> dict:
    size = _size(config["input_size"])
    return {
        "model": config["model"], "num_classes": config["num_classes"], "classes": tuple(config["classes"]),
        "input_size": size, "patch_size": config["patch_size"], "mean": tuple(config["mean"]),
        "std": tuple(config["std"]), "crop_pct": config["eval_crop_ratio"], "in_chans": config.get("in_chans", 3),
    }  # fmt: skip


def _timm(config: dict) -> dict:
    said = config.get("pretrained_cfg") or config  # older ones hold all in one dictionary
    arguments = config.get("model_args") or {}
    name, patch = config["architecture"], arguments.get("patch_size")
    if name in ARCHITECTURES:
        arch = ARCHITECTURES[name]
        patch = patch or arch.patch_size
        sizes = {"embed_dim": arch.width, "depth": arch.depth, "num_heads": arch.heads}
        width, depth, heads = (arguments.get(key, default) for key, default in sizes.items())
        name = our_name(width, depth, heads, patch, arch.distilled, arch.deit3)
    classes = config.get("label_names") or said.get("label_names") or said.get("labels")
    count = config.get("num_classes", said.get("num_classes"))
    channels, *size = said.get("input_size") or [3]
    size = arguments.get("img_size") or size
    return {
        "in_chans": arguments.get("in_chans", channels),
        "model": name, "num_classes": count, "patch_size": patch if isinstance(patch, int) else None,
        "classes": tuple(classes) if classes and len(classes) == count else None,
        "input_size": _size(size) if size else None, "crop_pct": said.get("crop_pct"), **_normalisation(said),
    }  # fmt: skip


def _transformers(config: dict, folder: Path) -> dict:
    notes, names = [], config.get("id2label") or {}
    classes = tuple(names[key] for key in sorted(names, key=int))
    known = {"num_classes": len(classes) or config.get("num_labels", 2)}  # transformers' own default
    if classes and any(not re.fullmatch(r"LABEL_\d+", name) for name in classes):
        known["classes"] = classes
    size, patch = config.get("image_size"), config.get("patch_size")
    if isinstance(patch, int):
        known["patch_size"] = patch
    if is_plain_transformer(config):
        width, depth, heads = (config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        known["model"] = our_name(width, depth, heads, config["patch_size"], config["model_type"] == "deit", False)
    processor = {}
    if (folder / "preprocessor_config.json").is_file():
        processor = json.loads((folder / "preprocessor_config.json").read_text())
    else:
        notes.append(
            "no preprocessor_config.json: normalised by a mean and deviation of 0.5, the default of transformers"
        )
    half = (0.5, 0.5, 0.5)
    mean, std = (tuple(processor.get(key) or half) for key in ("image_mean", "image_std"))
    crop, resized = (_edge(processor.get(key)) for key in ("crop_size", "size"))
    if processor.get("do_center_crop", "crop_size" in processor) and crop and resized:
        crop_pct = min(1.0, crop / resized)
    else:
        crop_pct = 1.0
        notes.append("transformers squeezes this model's images into a square; here the centre square is taken")
    size = size or crop or resized
    return {
        **known, "mean": mean, "std": std, "crop_pct": crop_pct, "input_size": _size(size) if size else None,
        "notes": tuple(notes),
    }  # fmt: skip


def is_plain_transformer(config: dict) -> bool:
    """Whether a config.json of transformers is of a network that fastdeit.models.deit is, too."""
    heads = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassificationWithTeacher"}
    return (
        heads.get(config.get("model_type")) in (config.get("architectures") or ())
        and config.get("intermediate_size") == 4 * config.get("hidden_size", 0)
        and config.get("hidden_act", "gelu") == "gelu"
        and config.get("qkv_bias", True)
        and config.get("num_channels", 3) == 3
        and isinstance(config.get("patch_size"), int)
    )


def our_name(width: int, depth: int, heads: int, patch: int, distilled: bool, deit3: bool) -> str | None:
    """Our name of a model with these numbers, one with this patch before others; None if there is none."""
    numbers = (width, depth, heads, distilled, deit3)
    names = [
        name
        for name, arch in ARCHITECTURES.items()
        if (arch.width, arch.depth, arch.heads, arch.distilled, arch.deit3) == numbers
    ]
    return min(names, key=lambda name: ARCHITECTURES[name].patch_size != patch, default=None)


def _normalisation(said: dict) -> dict:
    return {key: tuple(said[key]) for key in ("mean", "std") if said.get(key)}


def _size(size) -> Size:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _edge(size) -> int | None:
    """Pixels of the shorter side, in any of the forms transformers has."""
    if isinstance(size, dict):
        return size.get("shortest_edge") or min((v for v in size.values() if isinstance(v, int)), default=None)
    return size


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def adopt(config, typed: frozenset[str], *, keep_size: bool = False) -> None:
    """Give a config.Config what the weights of --finetune or --pretrained say, except for the flags that were `typed`:
    the model with its patch size, and, unless `keep_size`, the size and crop of images."""
    source = _start(config.model)
    if source is None:
        return
    if source.model is not None and "--model" not in typed and config.model.finetune:
        config.model.model = source.model
        if source.patch_size is not None and "--patch-size" not in typed:
            own = ARCHITECTURES.get(source.model)
            is_own = own is not None and own.patch_size == source.patch_size
            config.model.patch_size = None if is_own else source.patch_size
    if keep_size:
        return
    if source.input_size is not None and "--input-size" not in typed:
        config.data.input_size = size_of(source.input_size)
    if source.in_chans == 1 and "--in-chans" not in typed:
        config.data.in_chans = 1
    if source.crop_pct is not None and "--eval-crop-ratio" not in typed:
        config.data.eval_crop_ratio = source.crop_pct


def _start(model) -> Source | None:
    """What the weights that config.Model names say; those of timm are not downloaded for it."""
    if model.finetune:
        return find(model.finetune) if exists(model.finetune) else None
    config = published.config_of_model(model.model) if model.pretrained else None
    return None if config is None else Source(Path(model.model), "timm", Path(model.model), config, **_timm(config))
