"""Pictures for the page: what the tokens look at, drawn from the checkpoint; PNGs of the run; all as data URIs."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastdeit.data import open_validation
from fastdeit.models import attention_maps, inference
from fastdeit.models.deit import DeiT
from fastdeit.models.token_similarity import token_cosine_similarity
from fastdeit.pipelines import BadFiles, Index, eval_loader

SHOWN = 8  # validation images, evenly spaced over the split
SIDE = 160  # pixels of the longer side of a drawn image
LARGE = 300_000  # bytes of a PNG above which it is stored as JPEG


@dataclass(frozen=True)
class Look:
    """A validation image, where the tokens look in it, and the predicted class. Pictures are data URIs.

    maps: a picture for each name of `Looks.maps`
    """

    name: str
    image: str
    maps: list[str]
    true: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Looks:
    """similarity: of class and distillation token at the input and after each block; [] for one token."""

    maps: list[str]
    looks: list[Look]
    similarity: list[float]
    images: int  # in the validation split


class NotDrawn(Exception):
    """There is nothing to draw for this run; says why."""


def look(run: Path, settings: dict) -> Looks:
    """Draw what the tokens of the run's last checkpoint look at.

    Raises NotDrawn for a student without such tokens, and what `load` and `open_index` raise.
    """
    data_path, batch_size = settings["data"]["data_path"], settings["data"]["batch_size"]
    if data_path in (None, "synthetic"):
        raise NotDrawn("the run was trained on synthetic images")
    classifier = inference.load(run, device="cpu")
    if not isinstance(classifier.model, DeiT):
        raise NotDrawn(f"{settings['model']['model']} has no class token that fastdeit could follow")
    cache = run.parent / "index-cache"
    index = open_validation(
        Path(data_path), classes=classifier.classes, settings=settings,
        label_column=settings["data"].get("label_column"), cache_dir=cache if cache.is_dir() else None,
    )  # fmt: skip
    spread = np.unique(np.linspace(0, len(index) - 1, min(SHOWN, len(index))).round().astype(int))
    return Looks(
        maps=attention_maps.titles(classifier.model),
        looks=_looks(classifier, index.take(spread)),
        similarity=_similarity(classifier, index.take(np.arange(min(batch_size, len(index))))),
        images=len(index),
    )


def _batch(classifier: inference.Classifier, index: Index):
    """(model's input, labels, positions) of the images of a small index, without those that cannot be read."""
    loader = eval_loader(
        index, batch_size=len(index), input_size=classifier.input_size, crop_pct=classifier.crop_pct,
        bad_files=BadFiles.of(index, limit=1.0),
    )  # fmt: skip
    batch = next(iter(loader))
    read = batch.indices >= 0
    return classifier.prepare(batch)[read], batch.labels[read], batch.indices[read]


def _similarity(classifier: inference.Classifier, index: Index) -> list[float]:
    """As pictures.token_similarity of the training: over the first validation batch."""
    if not classifier.model.arch.distilled:
        return []
    with torch.inference_mode():
        return token_cosine_similarity(classifier.model, _batch(classifier, index)[0]).tolist()


def _looks(classifier: inference.Classifier, index: Index) -> list[Look]:
    model, (images, labels, positions) = classifier.model, _batch(classifier, index)
    probabilities, classes = classifier.probabilities(images).max(1)
    names = classifier.class_names
    maps_BTRC = attention_maps.looks(model, images)
    shift, scale = (torch.tensor(value).view(-1, 1, 1) for value in (classifier.mean, classifier.std))
    pixels = (images * scale + shift).clamp(0, 1).expand(-1, 3, -1, -1)
    # Pixels that can be counted stay square; photographs are only made smaller.
    longer = max(images.shape[-2:])
    mode = {"mode": "nearest"} if longer < SIDE else {"mode": "area"}
    size = [round(SIDE * side / longer) for side in images.shape[-2:]]
    pixels = F.interpolate(pixels, size, **mode).permute(0, 2, 3, 1).numpy()
    return [
        Look(
            name=Path(index.name(position)).name,
            image=_jpeg(pixels[i]),
            maps=[_jpeg(attention_maps.overlay(pixels[i], map_RC)) for map_RC in maps_BTRC[i]],
            true=names[labels[i]],
            predicted=names[classes[i]],
            probability=float(probabilities[i]),
        )
        for i, position in enumerate(positions.tolist())
    ]


def _jpeg(pixels: np.ndarray) -> str:
    """pixels: (height, width, 3) in [0, 1]"""
    return _encoded(Image.fromarray((pixels * 255).round().astype("uint8")))


def embedded(path: Path) -> str | None:
    """A PNG as a data URI; a large one, which is full of photographs, as JPEG. None if there is no such file."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if len(content) > LARGE:
        with Image.open(io.BytesIO(content)) as image:
            return _encoded(image.convert("RGB"))
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
