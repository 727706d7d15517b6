"""Static int8 quantisation of an ONNX export by onnxruntime, and what it costs in accuracy.

The linear layers, which hold nearly all weights and arithmetic, get int8 weights (by channel) and int8 inputs, whose
ranges are measured on training images. Products of two activations (attention), softmax, LayerNorm and GELU stay in
float32. Both are symmetric about zero, as TensorRT wants them, and written as QuantizeLinear and DequantizeLinear
around the layers (QDQ), which onnxruntime fuses into integer kernels.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.models.inference import Classifier
from fastdeit.pipelines import Augmentation, open_index, train_loader

from .formats import import_extra, in_new_folder, preprocessing, write_json, write_onnx

CALIBRATION = 256  # training images
BATCH = 32
AS_THEY_ARE = Augmentation(
    scale=(0.9, 1.0), ratio=(1.0, 1.0), hflip=0, aa="none", color_jitter=0, reprob=0, mixup=0, cutmix=0, repeats=1
)


def export_int8(
    trained: Classifier, output: Path, data_path: Path, world: World, *, opset: int = 23
) -> dict[str, float]:
    """Write FOLDER/model.onnx in int8. Returns what it measured on data_path/val: "images", "top1_fp32", "top1_int8",
    "agreement" (fractions), "bytes_fp32", "bytes_int8", "calibration_images".

    data_path: DIR/train to calibrate on, DIR/val to measure on, with the model's classes
    """
    from .card import model_card

    quantization, runtime = import_extra("onnxruntime.quantization"), import_extra("onnxruntime")
    images = calibration_images(trained, data_path, world)
    with in_new_folder(trained, output) as folder:
        full, prepared, target = folder / "fp32.onnx", folder / "prepared.onnx", folder / "model.onnx"
        write_onnx(trained, folder, opset)
        target.rename(full)
        quantization.shape_inference.quant_pre_process(full, prepared, skip_symbolic_shape=True)
        nodes = linear_layers(prepared)
        if not nodes:
            raise UserError(
                f"{trained.name} has no linear layers or convolutions to quantise: export it with --format onnx"
            )
        quantization.quantize_static(
            prepared, target, _Reader(images, quantization), nodes_to_quantize=nodes, per_channel=True,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )  # fmt: skip
        sessions = {name: runtime.InferenceSession(path, providers=["CPUExecutionProvider"]) for name, path in
                    {"fp32": full, "int8": target}.items()}  # fmt: skip
        figures = {
            **measure(trained, sessions, data_path, world), "bytes_fp32": full.stat().st_size,
            "bytes_int8": target.stat().st_size, "calibration_images": len(images),
        }  # fmt: skip
        full.unlink()
        prepared.unlink()
        write_json(folder / "preprocessing.json", {**preprocessing(trained), "quantised": figures})
        _describe(target, preprocessing(trained))
        (folder / "README.md").write_text(model_card(trained, "onnx-int8", Path(output).name, figures))
    return figures


def calibration_images(trained: Classifier, data_path: Path, world: World) -> Tensor:
    """(up to CALIBRATION, 3, size, size) float32 on the CPU: training images, nearly whole, normalised."""
    index = open_index(data_path, "train", classes=trained.classes)
    batch = min(BATCH, len(index))
    loader = train_loader(
        index, batch_size=batch, input_size=trained.input_size, augmentation=AS_THEY_ARE, device=world.device
    )
    return torch.cat([trained.prepare(one).cpu() for one in islice(loader, CALIBRATION // batch)])


def linear_layers(path: Path) -> list[str]:
    """The names of the graph's products with weights: MatMul and Gemm with a constant, convolutions."""
    graph = import_extra("onnx").load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm", "Conv") and constants & set(node.input[:2])
    ]


def measure(trained: Classifier, sessions: dict, data_path: Path, world: World) -> dict[str, float]:
    """Top-1 of each session on data_path/val, and how often the first two agree."""
    right, same, count = dict.fromkeys(sessions, 0), 0, 0
    for batch in trained.evaluation_loader(data_path, BATCH, world):
        counted = (batch.labels >= 0).cpu().numpy()
        images, labels = trained.prepare(batch).cpu().numpy()[counted], batch.labels.cpu().numpy()[counted]
        predicted = {
            name: session.run(["logits"], {"images": images})[0].argmax(1) for name, session in sessions.items()
        }
        for name, classes in predicted.items():
            right[name] += int((classes == labels).sum())
        same += int((predicted["fp32"] == predicted["int8"]).sum())
        count += len(labels)
    if not count:
        raise UserError(
            f"{data_path} has no validation image that can be read: int8 could not be compared with float32"
        )
    return {
        "images": count,
        "agreement": same / count,
        **{f"top1_{name}": hits / count for name, hits in right.items()},
    }


def _Reader(images: Tensor, quantization):
    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(images.split(BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    return Reader()


def _describe(path: Path, described: dict) -> None:
    """The metadata that the quantiser left out."""
    onnx = import_extra("onnx")
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in described.items()})
    onnx.save(model, path)
