"""The public API as other projects use it, for mypy (`make lint`): nothing here is run."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastdeit
from fastdeit.config import Config, Data, Optimization
from fastdeit.kernels import (
    add_layer_norm,
    apply_to,
    attention,
    attention_calls,
    attention_distillation_loss,
    attention_qkvpacked,
    attention_varlen,
    bias_gelu,
    distillation_loss,
    mix_normalize,
    mlp,
)
from fastdeit.models.loading import load_model
from fastdeit.pipelines import Augmentation, Index, Loader, Mix, eval_loader, open_index, train_loader


def operations(q: Tensor, qkv: Tensor, logits: Tensor, labels: Tensor, images: Tensor) -> None:
    assert_type(attention(q, q, q, scale=0.125), Tensor)
    assert_type(attention(q, q, q, return_lse=True), tuple[Tensor, Tensor])
    assert_type(attention_qkvpacked(qkv), Tensor)
    assert_type(attention_varlen(q, q, q, labels, 197), Tensor)
    assert_type(attention_qkvpacked(qkv, return_lse=True), tuple[Tensor, Tensor])
    assert_type(distillation_loss(logits, logits, labels, logits, kind="soft", tau=3.0), Tensor)
    assert_type(distillation_loss(logits, None, labels, None, kind="none", return_terms=True), tuple[Tensor, Tensor])
    distillation_loss(logits, logits, None, (labels, logits), kind="hard", mix=(labels, 0.5)).backward()
    assert_type(attention_distillation_loss(q, q, q, q, heads="mean"), Tensor)
    assert_type(mix_normalize(images, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), dtype=torch.bfloat16), Tensor)
    assert_type(add_layer_norm(q, q, q, q, eps=1e-5), tuple[Tensor, Tensor])
    assert_type(bias_gelu(q, q), Tensor)
    assert_type(mlp(q, q, q, q, q), Tensor)


def layers(model: nn.Module, images: Tensor) -> int:
    names: list[str] = apply_to(model).replaced
    with attention_calls() as calls:
        model(images)
    return calls["fused"] - len(names)


def batches(folder: Path) -> None:
    index = open_index(folder, "train", cache_dir=folder)
    assert_type(index, Index)
    train = train_loader(index, batch_size=256, augmentation=Augmentation(aa="3aug"), device="cuda")
    assert_type(train, Loader)
    for images, labels, indices, mix in train:
        assert_type(mix, Mix | None)
        assert_type((images, labels, indices), tuple[Tensor, Tensor, Tensor])
    validation = open_index(folder, "val", classes=index.classes)
    for batch in eval_loader(validation, batch_size=64):
        assert_type(batch.images, Tensor)


def models(checkpoint: Path) -> nn.Module:
    loaded = load_model(checkpoint)
    assert_type(loaded.num_classes, int)
    return loaded.model


def from_python(folder: Path, photo: np.ndarray) -> float:
    run = fastdeit.train(folder, recipe="finetune", epochs=3, scale=(0.5, 1.0))
    assert_type(run, fastdeit.Run)
    classifier = fastdeit.load("hf-hub:me/model", weights="ema") if run.folder is None else run.model
    assert_type(classifier, fastdeit.Classifier)
    for prediction in classifier.predict([photo, photo], top=2):
        assert_type(prediction.label, str | None)
        assert_type(prediction.classes, list[tuple[str, float]])
    assert_type(classifier.logits("photos/"), Tensor)
    assert_type(classifier.attention(photo), Tensor)
    return classifier.evaluate(folder)["both"]["top1"] + run.metrics["both"]


def settings() -> Config:
    return Config(data=Data(batch_size=64), optimization=Optimization(epochs=300))
