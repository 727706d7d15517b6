"""The formats of an export, each written into a folder and read back from it by the library it is meant for."""

import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdeit.checkpoint import files
from fastdeit.config import height_width
from fastdeit.errors import UserError
from fastdeit.models.architectures import own_name
from fastdeit.models.deit import DeiT
from fastdeit.models.implementation import Implementation
from fastdeit.models.loading import LoadedModel

from .transformers import transformers_config, transformers_weights

FORMATS = ("timm", "transformers", "onnx", "torch-export", "aotinductor")


def image_size(trained: LoadedModel) -> tuple[int, int]:
    """Height and width of what it takes."""
    return trained.model.img_size if isinstance(trained.model, DeiT) else height_width(trained.input_size)


def example_images(trained: LoadedModel, batch: int = 2) -> Tensor:
    """Noise that the model takes, on its device."""
    images = torch.randn(batch, trained.in_chans, *image_size(trained), generator=torch.Generator().manual_seed(batch))
    return images.to(next(trained.model.parameters()).device)


def preprocessing(trained: LoadedModel) -> dict:
    """How images become the input of an exported graph, and what its output means."""
    colours = "RGB" if trained.in_chans == 3 else "grey (0.299 R + 0.587 G + 0.114 B)"
    return {
        "input": f"images: (batch, {trained.in_chans}, height, width), {colours}, values in [0, 1] normalised by "
        "(value - mean) / std",
        "output": "logits: (batch, classes)",
        "input_size": list(image_size(trained)),
        "resize": "proportions kept, to the least that covers input_size / crop_pct, then a crop from the centre",
        "crop_pct": trained.crop_pct,
        "interpolation": "bicubic",
        "mean": list(trained.mean),
        "std": list(trained.std),
        "classes": list(trained.class_names),
    }


def export(trained: LoadedModel, kind: str, output: str | Path, *, opset: int = 23) -> float:
    """Write `trained` to the folder `output` as `kind`, one of FORMATS, with a model card; returns the largest
    difference of a logit.

    Raises UserError if `output` exists, if a library is missing, or if the format cannot hold the model; then no folder
    is left behind.
    """
    from .card import model_card

    write = {
        "timm": write_timm,
        "transformers": write_transformers,
        "onnx": lambda trained, folder: write_onnx(trained, folder, opset),
        "torch-export": write_torch_export,
        "aotinductor": write_aotinductor,
    }[kind]
    with in_new_folder(trained, output) as folder:
        read_back = write(trained, folder)
        difference = _compare(trained, read_back, kind)
        (folder / "README.md").write_text(model_card(trained, kind, Path(output).name))
    return difference


@contextmanager
def in_new_folder(trained: LoadedModel, output: str | Path) -> Iterator[Path]:
    """A folder to write into, which is `output` when all has gone well, and is gone otherwise."""
    output = Path(output)
    if output.exists():
        raise UserError(f"{output} exists already: give another --output, or remove it first")
    output.parent.mkdir(parents=True, exist_ok=True)
    trained.model.eval()
    restore_attention = _plain_attention(trained.model)
    unfinished = output.with_name(f".{output.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        for file in unfinished.iterdir():  # safetensors makes private files; let them be as readable as the folder
            file.chmod(unfinished.stat().st_mode & 0o666)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        restore_attention()


def _plain_attention(model: nn.Module) -> Callable[[], None]:
    """Exported graphs hold PyTorch's own attention; returns what puts the model's back."""
    if not isinstance(model, DeiT):
        return lambda: None
    chosen = model.implementation
    model.implement(Implementation())
    return lambda: model.implement(chosen)


@torch.no_grad()
def _compare(trained: LoadedModel, read_back: Callable[[Tensor], Tensor], kind: str) -> float:
    """Largest difference of a logit over batches of other sizes than the exporters saw."""
    largest = 0.0
    for batch in (1, 3):
        images = example_images(trained, batch)
        expected = trained.model(images)
        difference = (read_back(images).to(expected) - expected).abs().max().item()
        # Another order of float32 sums moves a logit by some 1e-6 of its size; a wrong weight by far more.
        if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
            raise RuntimeError(f"the {kind} export gives other logits: one is off by {difference:.3g}")
        largest = max(largest, difference)
    return largest


# The formats: each writes into the folder and returns a function from images to the logits of what was written


def write_timm(trained: LoadedModel, folder: Path) -> Callable[[Tensor], Tensor]:
    timm = import_extra("timm")
    if tuple(map(int, re.findall(r"\d+", timm.__version__)[:3])) < (1, 0, 31):
        raise UserError(f"timm {timm.__version__} cannot read what is written for it: pip install 'timm>=1.0.31'")
    from safetensors.torch import save_file

    model = trained.model
    architecture, arguments = own_name(trained.architecture), {}
    if isinstance(model, DeiT):
        if not timm.is_model(architecture):  # a size of ours: timm builds it from the nearest name and the numbers
            architecture = "deit_tiny_distilled_patch16_224" if model.arch.distilled else "deit_tiny_patch16_224"
        arguments = {
            "img_size": list(model.img_size),
            "patch_size": model.arch.patch_size,
            "embed_dim": model.arch.width,
            "depth": model.arch.depth,
            "num_heads": model.arch.heads,
            **({} if model.in_chans == 3 else {"in_chans": model.in_chans}),
        }
    else:  # what timm made it with, beside the name
        made_with = getattr(model, "_model_args", {})
        arguments = {key: value for key, value in made_with.items() if key not in ("num_classes", "drop_path_rate")}
    config = {
        "architecture": architecture,
        "num_classes": len(trained.class_names),
        "num_features": model.num_features,
        "label_names": list(trained.class_names),
        "model_args": arguments,
        "pretrained_cfg": {
            **{key: model.pretrained_cfg[key] for key in ("first_conv", "classifier") if key in model.pretrained_cfg},
            "input_size": [trained.in_chans, *image_size(trained)],
            "fixed_input_size": isinstance(model, DeiT),
            "interpolation": "bicubic",
            "crop_pct": trained.crop_pct,
            "mean": list(trained.mean),
            "std": list(trained.std),
        },
    }
    save_file(files.separate(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    read = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return read.to(example_images(trained).device)


def write_transformers(trained: LoadedModel, folder: Path) -> Callable[[Tensor], Tensor]:
    transformers = import_extra("transformers")
    from safetensors.torch import save_file

    if not isinstance(trained.model, DeiT) or trained.model.arch.deit3:
        name = trained.architecture or trained.name
        raise UserError(f"transformers has no counterpart of {name}; export it with --format timm or onnx")
    if trained.in_chans != 3:
        raise UserError(
            "transformers' image processors for it make three channels; export it with --format timm or onnx"
        )
    height, width = trained.model.img_size
    if height != width:
        raise UserError(
            f"transformers resizes the shorter side, which does not prepare images of {height} x {width} pixels as "
            "this model wants them; export it with --format timm or onnx"
        )
    config, processor = transformers_config(trained)
    save_file(transformers_weights(trained.model), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", processor)
    kind = getattr(transformers, config["architectures"][0])
    transformers.utils.logging.disable_progress_bar()  # it would draw one for the milliseconds it reads
    read, report = kind.from_pretrained(folder, output_loading_info=True)
    wrong = {key: sorted(map(str, names)) for key, names in report.items() if names}
    assert not wrong, f"transformers {transformers.__version__} reads the weights otherwise: {wrong}"
    read = read.eval().to(example_images(trained).device)
    return lambda images: read(images).logits


def write_onnx(trained: LoadedModel, folder: Path, opset: int) -> Callable[[Tensor], Tensor]:
    for module in ("onnx", "onnxscript"):
        import_extra(module)
    runtime = import_extra("onnxruntime")
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        trained.model, (example_images(trained),), dynamo=True, dynamic_shapes=({0: batch},), opset_version=opset,
        input_names=["images"], output_names=["logits"], verbose=False,
    )  # fmt: skip
    program.model.metadata_props.update({key: json.dumps(value) for key, value in preprocessing(trained).items()})
    size = sum(tensor.nbytes for tensor in trained.model.state_dict().values())
    program.save(folder / "model.onnx", external_data=size > 1.9e9)  # a protobuf ends at 2 GB
    write_json(folder / "preprocessing.json", preprocessing(trained))
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.cpu().numpy()})[0])


def write_torch_export(trained: LoadedModel, folder: Path) -> Callable[[Tensor], Tensor]:
    described = json.dumps(preprocessing(trained))
    torch.export.save(_program(trained), folder / "model.pt2", extra_files={"preprocessing.json": described})
    write_json(folder / "preprocessing.json", preprocessing(trained))
    return torch.export.load(folder / "model.pt2").module()


def write_aotinductor(trained: LoadedModel, folder: Path) -> Callable[[Tensor], Tensor]:
    from torch import _inductor

    package = str(folder / "model.pt2")
    _inductor.aoti_compile_and_package(_program(trained), package_path=package)
    write_json(folder / "preprocessing.json", preprocessing(trained))
    return _inductor.aoti_load_package(package)


@torch.no_grad()
def _program(trained: LoadedModel) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(trained.model, (example_images(trained),), dynamic_shapes=({0: batch},))


def import_extra(module: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'fastdeit[export]' brings it") from error


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
