"""The formats of an export, each written into a folder and read back from it by the library it is meant for."""

import importlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdeit.checkpoint import files
from fastdeit.errors import UserError
from fastdeit.models.architectures import without_prefix
from fastdeit.models.deit import DeiT

from .transformers import transformers_config, transformers_weights

FORMATS = ("timm", "transformers", "onnx", "torch-export", "aotinductor")


@dataclass(frozen=True)
class Trained:
    """What is exported: the model in eval mode, the name it was made by, and what it takes and answers."""

    model: nn.Module
    name: str
    classes: tuple[str, ...]
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float

    def example(self, batch: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        images = torch.randn(batch, 3, *self.input_size, generator=generator)
        return images.to(next(self.model.parameters()).device)

    def preprocessing(self) -> dict:
        return {
            "input": "images: (batch, 3, height, width), RGB, values in [0, 1] normalised by (value - mean) / std",
            "output": "logits: (batch, classes)",
            "input_size": list(self.input_size),
            "resize": "shorter side to input_size / crop_pct, then a crop of input_size from the centre",
            "crop_pct": self.crop_pct,
            "interpolation": "bicubic",
            "mean": list(self.mean),
            "std": list(self.std),
            "classes": list(self.classes),
        }


def export(trained: Trained, kind: str, output: str | Path, *, opset: int = 23) -> float:
    """Write `trained` to the folder `output` as `kind`, one of FORMATS; returns the largest difference of a logit.

    Raises UserError if `output` exists, if a library is missing, or if the format cannot hold the model; then no folder
    is left behind.
    """
    output = Path(output)
    if output.exists():
        raise UserError(f"{output} exists already: give another --output, or remove it first")
    output.parent.mkdir(parents=True, exist_ok=True)
    write = {
        "timm": write_timm,
        "transformers": write_transformers,
        "onnx": lambda trained, folder: write_onnx(trained, folder, opset),
        "torch-export": write_torch_export,
        "aotinductor": write_aotinductor,
    }[kind]
    trained.model.eval()
    restore_attention = _plain_attention(trained.model)
    unfinished = output.with_name(f".{output.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        read_back = write(trained, unfinished)
        difference = _compare(trained, read_back, kind)
        for file in unfinished.iterdir():  # safetensors makes private files; let them be as readable as the folder
            file.chmod(unfinished.stat().st_mode & 0o666)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        restore_attention()
    return difference


def _plain_attention(model: nn.Module) -> Callable[[], None]:
    """Exported graphs hold PyTorch's own attention; returns what puts the model's back."""
    if not isinstance(model, DeiT):
        return lambda: None
    chosen = [block.attn.attend for block in model.blocks]
    model.set_attention("sdpa")

    def restore() -> None:
        for block, attend in zip(model.blocks, chosen):
            block.attn.attend = attend

    return restore


@torch.no_grad()
def _compare(trained: Trained, read_back: Callable[[Tensor], Tensor], kind: str) -> float:
    """Largest difference of a logit over batches of other sizes than the exporters saw."""
    largest = 0.0
    for batch in (1, 3):
        images = trained.example(batch)
        expected = trained.model(images)
        difference = (read_back(images).to(expected) - expected).abs().max().item()
        # Another order of float32 sums moves a logit by some 1e-6 of its size; a wrong weight by far more.
        if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
            raise RuntimeError(f"the {kind} export answers differently: a logit is off by {difference:.3g}")
        largest = max(largest, difference)
    return largest


# The formats: each writes into the folder and returns a function that answers from what was written


def write_timm(trained: Trained, folder: Path) -> Callable[[Tensor], Tensor]:
    timm = _import("timm")
    if tuple(map(int, re.findall(r"\d+", timm.__version__)[:3])) < (1, 0, 31):
        raise UserError(f"timm {timm.__version__} cannot read what is written for it: pip install 'timm>=1.0.31'")
    from safetensors.torch import save_file

    model = trained.model
    architecture, arguments = without_prefix(trained.name), {}
    if isinstance(model, DeiT):
        if not timm.is_model(architecture):  # a size of ours: timm builds it from the nearest name and the numbers
            architecture = "deit_tiny_distilled_patch16_224" if model.arch.distilled else "deit_tiny_patch16_224"
        arguments = {
            "img_size": list(model.img_size),
            "patch_size": model.arch.patch_size,
            "embed_dim": model.arch.width,
            "depth": model.arch.depth,
            "num_heads": model.arch.heads,
        }
    else:  # what timm made it with, beside the name
        made_with = getattr(model, "_model_args", {})
        arguments = {key: value for key, value in made_with.items() if key not in ("num_classes", "drop_path_rate")}
    config = {
        "architecture": architecture,
        "num_classes": len(trained.classes),
        "num_features": model.num_features,
        "label_names": list(trained.classes),
        "model_args": arguments,
        "pretrained_cfg": {
            **{key: model.pretrained_cfg[key] for key in ("first_conv", "classifier") if key in model.pretrained_cfg},
            "input_size": [3, *trained.input_size],
            "fixed_input_size": isinstance(model, DeiT),
            "interpolation": "bicubic",
            "crop_pct": trained.crop_pct,
            "mean": list(trained.mean),
            "std": list(trained.std),
        },
    }
    save_file(files.separate(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    read = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return read.to(trained.example().device)


def write_transformers(trained: Trained, folder: Path) -> Callable[[Tensor], Tensor]:
    transformers = _import("transformers")
    from safetensors.torch import save_file

    if not isinstance(trained.model, DeiT) or trained.model.arch.deit3:
        raise UserError(f"transformers has no counterpart of {trained.name}; export it with --format timm or onnx")
    config, processor = transformers_config(trained)
    save_file(transformers_weights(trained.model), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", processor)
    kind = getattr(transformers, config["architectures"][0])
    transformers.utils.logging.disable_progress_bar()  # it would draw one for the milliseconds it reads
    read, report = kind.from_pretrained(folder, output_loading_info=True)
    wrong = {key: sorted(map(str, names)) for key, names in report.items() if names}
    assert not wrong, f"transformers {transformers.__version__} reads the weights otherwise: {wrong}"
    read = read.eval().to(trained.example().device)
    return lambda images: read(images).logits


def write_onnx(trained: Trained, folder: Path, opset: int) -> Callable[[Tensor], Tensor]:
    for module in ("onnx", "onnxscript"):
        _import(module)
    runtime = _import("onnxruntime")
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        trained.model, (trained.example(),), dynamo=True, dynamic_shapes=({0: batch},), opset_version=opset,
        input_names=["images"], output_names=["logits"], verbose=False,
    )  # fmt: skip
    program.model.metadata_props.update({key: json.dumps(value) for key, value in trained.preprocessing().items()})
    size = sum(tensor.nbytes for tensor in trained.model.state_dict().values())
    program.save(folder / "model.onnx", external_data=size > 1.9e9)  # a protobuf ends at 2 GB
    _write_json(folder / "preprocessing.json", trained.preprocessing())
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.cpu().numpy()})[0])


def write_torch_export(trained: Trained, folder: Path) -> Callable[[Tensor], Tensor]:
    preprocessing = json.dumps(trained.preprocessing())
    torch.export.save(_program(trained), folder / "model.pt2", extra_files={"preprocessing.json": preprocessing})
    _write_json(folder / "preprocessing.json", trained.preprocessing())
    return torch.export.load(folder / "model.pt2").module()


def write_aotinductor(trained: Trained, folder: Path) -> Callable[[Tensor], Tensor]:
    from torch import _inductor

    package = str(folder / "model.pt2")
    _inductor.aoti_compile_and_package(_program(trained), package_path=package)
    _write_json(folder / "preprocessing.json", trained.preprocessing())
    return _inductor.aoti_load_package(package)


@torch.no_grad()
def _program(trained: Trained) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(trained.model, (trained.example(),), dynamic_shapes=({0: batch},))


def _import(module: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'fastdeit[export]' brings it") from error


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
