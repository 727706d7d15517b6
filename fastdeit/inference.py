"""A trained model, ready to answer: from a checkpoint, a file of timm or facebookresearch/deit, or timm by name.

load("runs/cats")                                                     a run's last checkpoint
load("deit_small.pth", name="deit_small_patch16_224")                 a file, and the model that it is of
load("deit_tiny_patch16_224.fb_in1k", pretrained=True)                timm's published weights
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fastdeit.kernels import mix_normalize
from fastdeit.pipelines import BadFiles, eval_loader, open_files, open_index

from . import checkpoint
from . import model as ours
from .accuracy import by_head
from .architectures import ARCHITECTURES, Architecture
from .command import UserError
from .distributed import Place
from .preparation import PRECISIONS
from .student import create_timm, heads, is_ours, mean_std, rebuild
from .weights import checkpoint_file, head_names, load_weights, read_state_dict


@dataclass(frozen=True)
class Classifier:
    """classes: their names, None where the weights come without. notes: what was not simply copied into the model."""

    model: nn.Module
    classes: tuple[str, ...] | None
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float
    device: torch.device
    precision: torch.dtype = torch.float32
    notes: tuple[str, ...] = ()

    def prepare(self, batch) -> torch.Tensor:
        """The batch's images, normalised: (batch, 3, input_size, input_size) float32."""
        return mix_normalize(batch.images, self.mean, self.std)

    @torch.inference_mode()
    def answers(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(batch, classes) float32 logits by head, see accuracy.by_head. images: as `prepare` gives them."""
        half = self.precision != torch.float32
        with torch.autocast(self.device.type, self.precision) if half else nullcontext():
            return by_head(*heads(self.model, images))

    def probabilities(self, images: torch.Tensor, head: str = "both") -> torch.Tensor:
        """(batch, classes) float32: softmax of the class head ("cls"), the distillation head ("dist") or of their
        averaged logits ("both"). A model with one head answers with that, whether "cls" or "both" is asked for."""
        answers = self.answers(images)
        if len(answers) == 1 and head == "dist":
            raise UserError("this model has no distillation head: leave --head away")
        return answers["cls" if len(answers) == 1 else head].softmax(1)

    def evaluation_loader(self, data_path: Path, batch_size: int, place: Place, *, max_bad: float = 0.01):
        """Batches of data_path/val, labelled by this model's classes; refused when the folder has others. A model
        without names takes the folder's classes in sorted order, if it answers for as many."""
        index = open_index(data_path, "val", classes=self.classes)
        if len(index.classes) != self.model.num_classes:
            raise UserError(
                f"{data_path} has {len(index.classes)} classes in val, the model answers for {self.model.num_classes}: "
                "evaluate it on the data it was trained for, or fine-tune it on this one (fastdeit.train --finetune)"
            )
        return self._loader(index, batch_size, place, BadFiles.of(index, limit=max_bad))

    def files_loader(self, files: list[str | Path], batch_size: int, place: Place):
        """Batches of image files, without labels. Unreadable ones are noted in its bad_files, however many they are."""
        index = open_files(files)
        return self._loader(index, batch_size, place, BadFiles.of(index, limit=1.0))

    def _loader(self, index, batch_size: int, place: Place, bad_files: BadFiles):
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size}: take at least one image per step")
        return eval_loader(
            index, batch_size=batch_size, input_size=self.input_size, crop_pct=self.crop_ratio,
            device=str(place.device), rank=place.rank, world_size=place.world_size, bad_files=bad_files,
        )  # fmt: skip


def load(
    source: str | Path,
    *,
    device,
    weights: str = "model",
    input_size: int | None = None,
    name: str | None = None,
    pretrained: bool = False,
    precision: str | None = None,
    crop_ratio: float | None = None,
) -> Classifier:
    """The classifier that `source` means.

    source: a run's folder or a checkpoint folder in it; a folder that fastdeit.export --format timm wrote; a file of
        weights, with `name`; or with `pretrained` a name of timm's (NAME, NAME.TAG, hf-hub:NAME)
    weights: "model", or "ema" for the moving average
    input_size: pixels on a side; the position embedding is interpolated. The checkpoint's or model's own if None.
    crop_ratio: share of the resized image's side that the centre crop keeps. The checkpoint's or model's own if None.
    precision: a key of PRECISIONS, for the model's arithmetic; fp16 on CUDA and fp32 elsewhere if None

    Raises UserError, or ValueError for weights that do not fit.
    """
    if input_size is not None and input_size < 1:
        raise UserError(f"--input-size {input_size}: must be at least 1")
    if crop_ratio is not None and not 0 < crop_ratio <= 1:
        raise UserError(f"--eval-crop-ratio {crop_ratio}: must lie above 0 and up to 1")
    device = torch.device(device)
    if pretrained:
        loaded = _published(str(source), input_size)
    elif Path(source).is_file():
        loaded = _file(Path(source), weights, input_size, name)
    elif _written_by_timm(Path(source)):
        loaded = _published(f"local-dir:{source}", input_size)
    else:
        loaded = _checkpoint(source, weights, input_size, device)
    if crop_ratio is not None:
        loaded["crop_ratio"] = crop_ratio
    model = loaded.pop("model").to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    dtype = PRECISIONS[precision or ("fp16" if device.type == "cuda" else "fp32")]
    return Classifier(model, device=device, precision=dtype, **loaded)


def has_moving_average(source: str | Path, *, pretrained: bool = False) -> bool:
    """Whether `source` holds a moving average of the weights beside the weights."""
    path = Path(source)
    if pretrained or path.suffix == ".safetensors":
        return False
    try:
        if path.is_file():
            return bool(read_state_dict(path, ema=True))
        return checkpoint_file(path, ema=True).is_file()
    except ValueError:
        return False


def class_names(classifier: Classifier) -> tuple[str, ...]:
    """Names to show: the classifier's own, ImageNet's where their number is one of ImageNet's, else numbers."""
    if classifier.classes is not None:
        return classifier.classes
    from timm.data import ImageNetInfo, infer_imagenet_subset

    count = classifier.model.num_classes
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return tuple(map(str, range(count)))
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(count))


# The kinds of source: each returns what Classifier needs beside the device


def _checkpoint(source: str | Path, weights: str, input_size: int | None, device: torch.device) -> dict:
    if not Path(source).exists():
        raise UserError(_nothing_at(str(source)))
    model, saved, notes = rebuild(checkpoint.find(source), device, weights=weights, input_size=input_size)
    return {
        "model": model, "classes": tuple(saved["classes"]), "input_size": input_size or saved["input_size"],
        "mean": tuple(saved["mean"]), "std": tuple(saved["std"]), "crop_ratio": saved["eval_crop_ratio"],
        "notes": tuple(notes),
    }  # fmt: skip


def _file(path: Path, weights: str, input_size: int | None, name: str | None) -> dict:
    """A file of weights: the number of classes is read off its head."""
    if name is None:
        raise UserError(f"{path} does not say which model it is of: give --model NAME, such as deit_small_patch16_224")
    ema = weights == "ema" and path.suffix != ".safetensors"
    probe = ours.create_model(name) if is_ours(name) else _create(name, None)
    head = read_state_dict(path, ema=ema).get(f"{head_names(probe)[0]}.weight")
    classes = {} if head is None else {"num_classes": len(head)}
    if is_ours(name):
        model = ours.create_model(name, img_size=input_size, **classes)
    else:
        model = _create(name, input_size, **classes)
    notes = load_weights(model, path, ema=ema)
    return _as_configured(model, input_size, notes)


def _published(name: str, input_size: int | None) -> dict:
    """timm's model with the weights timm publishes, or reads from a folder of its kind; in our code where we have it,
    which answers by head."""
    try:
        model = _create(name, input_size, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes its reader stumble anywhere
        raise UserError(
            f"the published weights of {name} could not be loaded ({error.__class__.__name__}: {error}); download a "
            "file of them and give it with --model NAME"
        ) from error
    settings = model.pretrained_cfg
    if is_ours(settings.get("architecture", "")):
        model = _in_our_code(model, ARCHITECTURES[settings["architecture"]])
    return _as_configured(model, input_size, [], settings)


def _in_our_code(model: nn.Module, arch: Architecture) -> ours.DeiT:
    """timm's model of a name that is ours too; a folder may say other sizes than the name."""
    arch = replace(
        arch, width=model.embed_dim, depth=len(model.blocks), heads=model.blocks[0].attn.num_heads,
        patch_size=model.patch_embed.patch_size[0],
    )  # fmt: skip
    size = model.patch_embed.img_size
    twin = ours.DeiT(arch, num_classes=model.num_classes, img_size=size, drop_path=0.0, attention="sdpa")
    twin.load_state_dict(model.state_dict())
    return twin


def _as_configured(model: nn.Module, input_size: int | None, notes: list[str], settings: dict | None = None) -> dict:
    """How timm's configuration of a model says that images are prepared."""
    settings = settings or model.pretrained_cfg
    names = settings.get("label_names")
    mean, std = mean_std(model)
    return {
        "model": model, "classes": tuple(names) if names else None,
        "input_size": input_size or settings["input_size"][-1], "mean": tuple(settings.get("mean") or mean),
        "std": tuple(settings.get("std") or std), "crop_ratio": settings.get("crop_pct") or 0.875,
        "notes": tuple(notes),
    }  # fmt: skip


def _create(name: str, input_size: int | None, **options) -> nn.Module:
    """student.create_timm for a name that timm knows."""
    import timm
    from timm.models import parse_model_name

    source, _ = parse_model_name(name)
    if source is None and not timm.is_model(name):
        raise UserError(ours.unknown_model_message(name, timm.list_models()))
    return create_timm(name, input_size, **options)


def _written_by_timm(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "architecture" in checkpoint.description(folder)


def _nothing_at(source: str) -> str:
    import timm

    if is_ours(source) or source.startswith("hf-hub:") or timm.is_model(source):
        return (
            f"{source} is the name of a model: add --pretrained for its published weights, or give a file of its "
            f"weights and --model {source}"
        )
    return (
        f"there is no checkpoint {source}: give a run's folder, a file of weights with --model NAME, or a timm name "
        "with --pretrained"
    )
