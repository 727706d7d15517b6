"""Training and using models from Python: `fastdeit.train` and `fastdeit.load`.

run = fastdeit.train(data_path="photos", recipe="finetune", epochs=10)
run.metrics, run.folder
model = fastdeit.load(run.folder)
model.predict("new/")
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from fastdeit.checkpoint import metrics_log, run_dir
from fastdeit.cli import parse_config
from fastdeit.config import Config, Size, in_pixels
from fastdeit.distributed.world import World, join, pick_device
from fastdeit.errors import UserError
from fastdeit.models import inference
from fastdeit.predict import Prediction, image_files, predict

Image: TypeAlias = Any  # a path, a Pillow image, an array (height, width[, 3]) or a tensor ([3,] height, width)
Head: TypeAlias = Literal["cls", "dist", "both"]
COMMAND_ONLY = ("eval", "print_config")


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Run:
    """A run that has come to its end. folder: None for a dry run. metrics: top-1 as fractions by head ("cls", "dist",
    "both"), of the teacher and the undistilled student too where there were any."""

    folder: Path | None
    metrics: Mapping[str, float]

    @property
    def history(self) -> list[dict]:
        """After each epoch: "epoch", "step", and the top-1 by head of the weights ("model") and of their moving average
        ("ema")."""
        return [] if self.folder is None else metrics_log.read(self.folder / "metrics.jsonl")[1]

    @cached_property
    def model(self) -> "Classifier":
        """The last weights, ready to use; `load(run.folder, weights="ema")` for their moving average."""
        if self.folder is None:
            raise UserError("a dry run leaves no model: train without dry_run")
        return load(self.folder)


def train(data_path: str | os.PathLike[str] | None = None, *, recipe: str | None = None, **settings: Any) -> Run:
    """Train as `python -m fastdeit.train` does, until the last epoch.

    data_path: DIR with DIR/train/CLASS/* and DIR/val/CLASS/*, or shards; None for scikit-learn's digits
    recipe: what --recipe takes
    settings: every other flag of `python -m fastdeit.train --help`, as batch_size=64 for --batch-size 64; config=FILE
        for a file of settings

    Raises UserError for what the command would refuse. Interrupting it (KeyboardInterrupt) keeps the last checkpoint:
    train(resume=FOLDER) resumes it. Under torchrun every process calls it.
    """
    given = {"data_path": data_path, "recipe": recipe, **settings}
    config = parse_config(
        arguments({name: value for name, value in given.items() if value is not None or name in settings})
    )
    from fastdeit.demo import with_digits
    from fastdeit.training import run

    with join(config.run.device, listen=False) as world:
        folder = None if config.run.dry_run else world.broadcast(run_dir.folder_of(config))
        if config.run.resume is None:
            config.run.output_dir = folder
        run.set_up(config, world)
        metrics = run.run(with_digits(config, world), world)
    return Run(folder, metrics)


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """The command line that means these settings. Raises UserError for an unknown one, and for a value of another
    type."""
    kinds: dict[str, Any] = {"config": Path}
    kinds |= {name: kind for group in fields(Config) for name, kind in get_type_hints(group.type).items()}
    line = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if name not in kinds or name in COMMAND_ONLY:
            from difflib import get_close_matches

            near = get_close_matches(name, kinds, n=2)
            meant = f"; did you mean {' or '.join(near)}?" if near and name not in kinds else ""
            raise UserError(f"train() has no setting {name}{meant or ': see python -m fastdeit.train --help'}")
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, kinds[name]):
            wanted = (
                getattr(kinds[name], "__name__", str(kinds[name])) if isinstance(kinds[name], type) else kinds[name]
            )
            raise UserError(f"{name}={value!r}: expected {str(wanted).replace('pathlib.', '').replace('typing.', '')}")
        if kinds[name] is bool:
            line.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            line += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return line


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if kinds[-1] is Ellipsis and isinstance(value, tuple):
            return all(_fits(one, kinds[0]) for one in value)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is NoneType or value is None:
        return value is None and kind is NoneType
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, {float: (float, int), Path: (str, os.PathLike), str: (str, os.PathLike)}.get(kind, kind))


# ---------------------------------------------------------------------------------------------------------------------
# Using


def load(
    source: str | os.PathLike[str],
    *,
    weights: Literal["model", "ema"] = "model",
    model: str | None = None,
    input_size: Size | None = None,
    crop_pct: float | None = None,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    device: str | None = None,
) -> "Classifier":
    """A trained model, ready to use.

    source: a run's folder; a folder of timm or transformers; a file or URL of weights; hf-hub:ORG/NAME; or timm's name
        of a model, for its published weights
    weights: "ema" for the moving average
    model: the model that a file of weights is of, where it does not say
    input_size, crop_pct: of the images, if others than in training
    precision: of the arithmetic. None: fp32 on the CPU, on CUDA that of its training, or fp16
    device: cuda, cuda:N or cpu. None: cuda where present
    """
    world = World(pick_device(device))
    loaded = inference.load(
        os.fspath(source), device=world.device, weights=weights, name=model, input_size=input_size, crop_pct=crop_pct,
        precision=precision,
    )  # fmt: skip
    return Classifier(loaded, world)


class Classifier:
    """A trained model on its device; `load` makes one.

    Images are given as one or several paths (files; folders and patterns, which give the images in them), Pillow
    images, NumPy arrays (height, width[, 3]), PyTorch tensors ([3,] height, width), or a batch as an array (batch,
    height, width, 3) or a tensor (batch, 3, height, width). Integers are pixels from 0 to 255, floats from 0 to 1: not
    yet resized, not yet normalised.
    """

    def __init__(self, loaded: inference.Classifier, world: World):
        self._loaded, self._world = loaded, world

    def __repr__(self) -> str:
        return f"<fastdeit.Classifier {self.name}: {len(self.classes):,} classes, {in_pixels(self.input_size)} pixels>"

    @property
    def name(self) -> str:
        return self._loaded.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the logits; numbers where none are known."""
        return self._loaded.class_names

    @property
    def input_size(self) -> Size:
        """Height and width of what the network sees, in pixels; one number for a square."""
        return self._loaded.input_size

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not simply copied from the weights' file."""
        return self._loaded.notes

    @property
    def network(self) -> nn.Module:
        """The PyTorch module, in eval(): (batch, 3, height, width) normalised images to (batch, classes) logits."""
        return self._loaded.model

    def predict(self, images: Image, *, top: int = 5, head: Head = "both", batch_size: int = 64) -> list[Prediction]:
        """A Prediction for each image, in their order: `.label`, `.classes` as (name, probability) pairs, `.error` for
        a file that cannot be read. top: classes to name. head: class head, distillation head, or both averaged."""
        images = _listed(images)
        if (files := _files(images)) is not None:
            batches = predict(self._loaded, files, self._world, top=top, head=head, batch_size=batch_size)
            return [prediction for batch in batches for prediction in batch]
        probabilities = self._by_batch(images, batch_size, lambda x: self._loaded.probabilities(x, head))
        best = probabilities.topk(min(top, len(self.classes)), dim=1)
        return [
            Prediction(f"[{row}]", [(self.classes[label], value) for label, value in zip(labels, values)])
            for row, (labels, values) in enumerate(zip(best.indices.tolist(), best.values.tolist()))
        ]

    def logits(self, images: Image, *, head: Head = "both", batch_size: int = 64) -> Tensor:
        """(images, classes) float32 on the CPU. Raises UserError for a file that cannot be read."""

        def of(x: Tensor) -> Tensor:
            by_head = self._loaded.logits(x)
            if head not in by_head and head == "dist":
                raise UserError("this model has no distillation head: omit head")
            return by_head["cls" if len(by_head) == 1 else head]

        return self._by_batch(images, batch_size, of)

    def attention(self, images: Image, *, batch_size: int = 16) -> Tensor:
        """How much the class token, and the distillation token if there is one, look at each patch: (images, depth,
        heads, tokens, rows, columns) float32 on the CPU, rows of the softmax. For DeiT and DeiT III only."""
        from fastdeit.models.attention_maps import attention_maps
        from fastdeit.models.deit import DeiT

        network = self.network
        if not isinstance(network, DeiT):
            raise UserError(f"where a {type(network).__name__} looks is not known here, only that of DeiT and DeiT III")
        return self._by_batch(images, batch_size, lambda x: attention_maps(network, x))

    def evaluate(
        self,
        data_path: str | os.PathLike[str],
        *,
        batch_size: int = 64,
        output: str | os.PathLike[str] | None = None,
        label_column: str | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Accuracies on data_path/val: {"cls": {"top1", "top5", "loss", "ece"}, "dist": ..., "both": ..., "data": ...}
        with fractions; a model with one head has "cls" alone. "data" says how many images count, and which could not
        be read.

        output: a folder for the accuracies of each class, the confusion matrix and the calibration
        """
        from fastdeit.evaluation.evaluator import evaluate

        loader = self._loaded.evaluation_loader(Path(data_path), batch_size, self._world, label_column=label_column)
        result = evaluate({"model": self._loaded}, loader, self._world, None if output is None else Path(output))
        return {**result["model"], "data": result["data"]}

    def _by_batch(self, images: Image, batch_size: int, function) -> Tensor:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: take at least one image per step")
        return torch.cat([function(batch).float().cpu() for batch in self._batches(_listed(images), batch_size)])

    def _batches(self, images: list, batch_size: int) -> Iterator[Tensor]:
        """(batch, channels, height, width), normalised, on the device."""
        if (files := _files(images)) is not None:
            yield from self._batches_of_files(files, batch_size)
            return
        from fastdeit.data import as_input
        from fastdeit.pipelines.decode.in_memory import evaluation_view

        size, crop = self._loaded.input_size, self._loaded.crop_pct
        for first in range(0, len(images), batch_size):
            views = [evaluation_view(image, size, crop) for image in images[first : first + batch_size]]
            yield as_input(torch.stack(views).to(self._world.device), self._loaded.mean, self._loaded.std)

    def _batches_of_files(self, files: list[str], batch_size: int) -> Iterator[Tensor]:
        loader = self._loaded.files_loader(list(files), batch_size, self._world)
        for batch in loader:
            if loader.bad_files.causes:
                name, cause = next(iter(loader.bad_files.causes.items()))
                raise UserError(f"{name}: {cause}")
            yield self._loaded.prepare(batch)[(batch.indices >= 0).to(self._world.device)]


def _listed(images: Image) -> list:
    """One image, a batch or a sequence of images as a list; empty ones are refused."""
    dimensions = getattr(images, "ndim", None)
    single = isinstance(images, (str, os.PathLike)) or (not isinstance(images, Sequence) and dimensions in (None, 2, 3))
    listed = [images] if single and not isinstance(images, Iterator) else list(images)
    if not listed:
        raise UserError("give at least one image")
    return listed


def _files(images: list) -> list[str] | None:
    """The files that paths name; None where the images are in memory."""
    paths = [isinstance(image, (str, os.PathLike)) for image in images]
    if not any(paths):
        return None
    if not all(paths):
        raise UserError("paths and images in memory do not go together: give the one or the other")
    return image_files([os.fspath(image) for image in images])
