"""A trained checkpoint in the format of another library.

    python -m fastdeit.export CHECKPOINT --format onnx --output FOLDER

    timm           timm.create_model("local-dir:FOLDER", pretrained=True)
    transformers   AutoModelForImageClassification.from_pretrained("FOLDER"),
                   and its image processor
    onnx           FOLDER/model.onnx
    onnx-int8      the same, quantised: needs --data-path DIR, calibrates on
                   DIR/train and compares with float32 on DIR/val
    torch-export   torch.export.load("FOLDER/model.pt2").module()
    aotinductor    torch._inductor.aoti_load_package("FOLDER/model.pt2"),
                   compiled for one kind of device

Every export is read back by the library it is meant for and its logits are compared with the checkpoint's (of int8: its
predictions); the folder appears only after that. README.md in it is a model card for the Hugging Face hub. The graphs,
which are all but the first two, take normalised images (batch, 3, height, width) in float32, of any batch size, and
return logits (batch, classes), the average of both heads; preprocessing.json beside them says how to make such input
from images.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastdeit.cli import parse
from fastdeit.config import Size, setting
from fastdeit.errors import UserError, run


def main() -> None:
    import tyro

    @dataclass(kw_only=True)
    class Export:
        checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
        """A run's folder, or last or best in it; a folder of timm or transformers; a file or URL of weights (with
        --model); hf-hub:ORG/NAME; timm's name of a model, for its published weights."""
        output: Path
        """Folder to write; must not exist."""
        format: Literal["timm", "transformers", "onnx", "onnx-int8", "torch-export", "aotinductor"] = "timm"
        """What it is for; see above."""
        data_path: Path | None = None
        """For onnx-int8: DIR/train/CLASS/* to calibrate on, DIR/val/CLASS/* to measure on, or shards."""
        ema: bool = False
        """Export the moving average of the weights."""
        model: str | None = None
        """The model a file of weights is of: deit_*, deit3_*, or any other timm model name."""
        input_size: Size | None = setting(None, at_least=1)
        """Height and width of the images in pixels, one number for squares; position embeddings are interpolated. None:
        the checkpoint's."""
        opset: int = setting(23, at_least=1)
        """ONNX operator set: 23 has attention as one operator; older runtimes read 20."""
        device: str | None = None
        """Device that aotinductor compiles for. None: cuda where present."""

    arguments = parse(Export, prog="python -m fastdeit.export", description=__doc__)

    from fastdeit.distributed.world import join
    from fastdeit.models.inference import load

    from .formats import export
    from .quantise import export_int8

    quantises = arguments.format == "onnx-int8"
    if quantises != (arguments.data_path is not None):
        raise UserError("--format onnx-int8 needs --data-path DIR to calibrate on, and the others take none")
    weights = "ema" if arguments.ema else "model"
    with join(arguments.device) as world:
        classifier = load(
            arguments.checkpoint, device=world.device, weights=weights, input_size=arguments.input_size,
            name=arguments.model,
        )  # fmt: skip
        for note in classifier.notes:
            print(note, file=sys.stderr)
        if quantises:
            print(
                in_words(export_int8(classifier, arguments.output, arguments.data_path, world, opset=arguments.opset))
            )
            print(f"wrote {arguments.output}")
            return
        difference = export(classifier, arguments.format, arguments.output, opset=arguments.opset)
        print(f"wrote {arguments.output}; read back, its logits differ by {difference:.1e} at most")


def in_words(figures: dict) -> str:
    return (
        f"on {figures['images']:,} images top-1 {100 * figures['top1_fp32']:.2f} % in float32, "
        f"{100 * figures['top1_int8']:.2f} % in int8, the same class for {100 * figures['agreement']:.2f} %; "
        f"{figures['bytes_fp32'] / 1e6:.1f} MB become {figures['bytes_int8'] / 1e6:.1f}"
    )


if __name__ == "__main__":
    run(main)
