"""The model card of an export: README.md as the Hugging Face hub reads it, written from what the checkpoint knows.

Nothing is in it that the checkpoint does not say: accuracies are those of the run's validation images, by head.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastdeit.config import height_width
from fastdeit.models import published
from fastdeit.models.deit import DeiT
from fastdeit.models.heads import HEADS
from fastdeit.models.loading import LoadedModel

NAMED_CLASSES = 100  # more are in the files beside the card
LIBRARIES = {"timm": "timm", "transformers": "transformers"}
USE = {
    "timm": """model = timm.create_model("hf-hub:ORG/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image)[None])""",
    "transformers": """processor = AutoImageProcessor.from_pretrained("ORG/NAME")  # or FOLDER
model = AutoModelForImageClassification.from_pretrained("ORG/NAME")
logits = model(**processor(image, return_tensors="pt")).logits""",
    "onnx": """session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {"images": images})  # preprocessing.json says how to make them""",
    "torch-export": """model = torch.export.load("model.pt2").module()
logits = model(images)  # preprocessing.json says how to make them""",
    "aotinductor": """model = torch._inductor.aoti_load_package("model.pt2")
logits = model(images)  # preprocessing.json says how to make them""",
}


def model_card(trained: LoadedModel, kind: str, name: str, quantised: dict | None = None) -> str:
    """The text of README.md. kind: one of formats.FORMATS. name: of the model, for people. quantised: what
    quantise.export_int8 measured."""
    from huggingface_hub import EvalResult, ModelCardData

    described = trained.config if trained.kind == "ours" else {}
    settings, accuracies = described.get("settings", {}), accuracies_of(trained)
    dataset = Path(settings.get("data", {}).get("data_path") or "images").name
    results = [
        EvalResult(
            task_type="image-classification", dataset_type="imagefolder", dataset_name=dataset,
            dataset_split="validation", metric_type="accuracy",
            metric_value=round(value["top1"], 5), metric_name=f"top-1, {HEADS[head]}",
        )
        for head, value in accuracies.items()
    ]  # fmt: skip
    tags = ["image-classification", "fastdeit", *(["deit"] if isinstance(trained.model, DeiT) else [])]
    data = ModelCardData(
        model_name=name, library_name=LIBRARIES.get(kind), pipeline_tag="image-classification",
        tags=tags if kind in LIBRARIES else [*tags, kind.partition("-")[0]], base_model=_base_model(settings),
        metrics=["accuracy"] if results else None, eval_results=results or None,
    )  # fmt: skip
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        _summary(trained),
        _accuracy(accuracies, dataset) if accuracies else None,
        _quantised(quantised) if quantised else None,
        _training(settings) if settings else None,
        f"## Use\n\n```python\n{USE['onnx' if kind == 'onnx-int8' else kind]}\n```",
        _input(trained),
        _classes(trained),
        f"Written by fastdeit {version('fastdeit')}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def accuracies_of(trained: LoadedModel) -> dict[str, Any]:
    """By head, on the run's validation images after its last epoch; nothing where the weights are used at another size
    than they were evaluated at, or come from elsewhere."""
    if trained.kind != "ours" or [*height_width(trained.input_size)] != [*height_width(trained.config["input_size"])]:
        return {}
    return trained.config.get("accuracy", {}).get("ema" if trained.average else "model", {})


def _base_model(settings: dict) -> str | None:
    """The hub's name of what the training started from, where it has one."""
    model = settings.get("model", {})
    start = model.get("finetune")
    if start:
        return start.removeprefix(published.HUB).partition("@")[0] if start.startswith(published.HUB) else None
    config = published.config_of_model(model["model"]) if model.get("pretrained") else None
    return None if config is None else config["pretrained_cfg"].get("hf_hub_id")


def _summary(trained: LoadedModel) -> str:
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    what = trained.architecture or type(trained.model).__name__
    return (
        f"An image classifier: {what}, {parameters / 1e6:.2f} M parameters, {trained.num_classes:,} classes, images of "
        f"{_by(*height_width(trained.input_size))} pixels"
        + (", the moving average of the weights" if trained.average else "")
        + (". It returns the average of its two heads' logits." if _distilled(trained) else ".")
    )


def _distilled(trained: LoadedModel) -> bool:
    return isinstance(trained.model, DeiT) and trained.model.arch.distilled


def _accuracy(accuracies: dict, dataset: str) -> str:
    rows = [
        f"| {HEADS[head]} | {100 * value['top1']:.2f} | {100 * value['top5']:.2f} |"
        for head, value in accuracies.items()
    ]
    return "\n".join([
        f"## Accuracy\n\nOn the validation images of {dataset}, after the last epoch, in %:\n",
        "| | top-1 | top-5 |\n| --- | --- | --- |", *rows,
    ])  # fmt: skip


def _quantised(figures: dict) -> str:
    return (
        "## Quantisation\n\n"
        "Weights (by channel) and inputs of the linear layers in int8, symmetric, calibrated on "
        f"{figures['calibration_images']} training images; attention, normalisation and GELU in float32. On "
        f"{figures['images']:,} validation images:\n\n"
        "| | top-1 % | MB |\n| --- | --- | --- |\n"
        f"| float32 | {100 * figures['top1_fp32']:.2f} | {figures['bytes_fp32'] / 1e6:.1f} |\n"
        f"| int8 | {100 * figures['top1_int8']:.2f} | {figures['bytes_int8'] / 1e6:.1f} |\n\n"
        f"Both predict the same class for {100 * figures['agreement']:.2f} % of them."
    )


def _training(settings: dict) -> str:
    run, model, data = settings["run"], settings["model"], settings["data"]
    distillation, optimization = settings["distillation"], settings["optimization"]
    start = model.get("finetune") or ("what timm publishes for it" if model.get("pretrained") else "random weights")
    rows = {
        "recipe": run.get("recipe"), "model": model["model"], "started from": _short(start),
        "distillation": None, "teacher": None, "epochs": optimization["epochs"], "optimizer": optimization["opt"],
        "curriculum": optimization.get("curriculum"),
        "learning rate": optimization["lr"], "batch per process": data["batch_size"], "image size": data["input_size"],
        "augmentation": data["aa"], "mixup, cutmix": f"{data['mixup']:g}, {data['cutmix']:g}", "seed": run["seed"],
    }  # fmt: skip
    if distillation["distillation_type"] != "none":
        rows["distillation"] = distillation["distillation_type"]
        teacher = distillation["teacher_store"] or distillation["teacher_path"] or distillation["teacher_model"]
        rows["teacher"] = " and ".join(map(_short, teacher if isinstance(teacher, list) else [teacher]))
    if rows["curriculum"] == "none":
        del rows["curriculum"]
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["## Training\n", "| | |\n| --- | --- |", *lines])


def _short(source: str) -> str:
    """An address as it is; of a path the last two parts, which are for nobody but who trained it."""
    return source if published.is_remote(source) else "/".join(Path(source).parts[-2:])


def _input(trained: LoadedModel) -> str:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (trained.mean, trained.std))
    height, width = height_width(trained.input_size)
    target = [int(side / trained.crop_pct) for side in (height, width)]
    resized = f"The shorter side is resized (bicubic, antialiased) to {target[0]} pixels"
    if height != width:
        resized = f"The image is resized (bicubic, antialiased, proportions kept) to cover {_by(*target)} pixels"
    return (
        f"## Input\n\n{'RGB' if trained.in_chans == 3 else 'Grey'}. {resized}, the centre of {_by(height, width)} is "
        f"cropped, and pixels in [0, 1] are normalised by mean {mean} and standard deviation {std}."
    )


def _by(height: int, width: int) -> str:
    return f"{height} x {width}"


def _classes(trained: LoadedModel) -> str:
    names = trained.class_names
    shown = ", ".join(f"`{name}`" for name in names[:NAMED_CLASSES])
    more = f" and {len(names) - NAMED_CLASSES:,} more" if len(names) > NAMED_CLASSES else ""
    return f"## Classes\n\nIn the order of the logits: {shown}{more}."
