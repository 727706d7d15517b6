"""A trained checkpoint in the format of another library.

    python -m fastdeit.export CHECKPOINT --format onnx --output FOLDER

    timm           timm.create_model("local-dir:FOLDER", pretrained=True)
    transformers   AutoModelForImageClassification.from_pretrained("FOLDER"),
                   and its image processor
    onnx           FOLDER/model.onnx
    torch-export   torch.export.load("FOLDER/model.pt2").module()
    aotinductor    torch._inductor.aoti_load_package("FOLDER/model.pt2"),
                   compiled for one kind of device

Every export is read back by the library it is meant for and its logits are compared with the checkpoint's; the folder
appears only after that. The last three take normalised images (batch, 3, height, width) in float32, of any batch size,
and return logits (batch, classes), the average of both heads; preprocessing.json beside them says how to make such
input from images.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastdeit.cli import parse
from fastdeit.config import setting
from fastdeit.errors import run


def main() -> None:
    import tyro

    @dataclass(kw_only=True)
    class Export:
        checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
        """A run's folder, or last or best in it; a folder of timm or transformers; a file or URL of weights (with
        --model); hf-hub:ORG/NAME; timm's name of a model, for its published weights."""
        output: Path
        """Folder to write; must not exist."""
        format: Literal["timm", "transformers", "onnx", "torch-export", "aotinductor"] = "timm"
        """What it is for; see above."""
        ema: bool = False
        """Export the moving average of the weights."""
        model: str | None = None
        """The model a file of weights is of: deit_*, deit3_*, or any other timm model name."""
        input_size: int | None = setting(None, at_least=1)
        """Height and width of the images in pixels; position embeddings are interpolated. None: the checkpoint's."""
        opset: int = setting(23, at_least=1)
        """ONNX operator set: 23 has attention as one operator; older runtimes read 20."""
        device: str | None = None
        """Device that aotinductor compiles for. None: cuda where present."""

    arguments = parse(Export, prog="python -m fastdeit.export", description=__doc__)

    from fastdeit.distributed.world import join
    from fastdeit.models.inference import load

    from .formats import export

    weights = "ema" if arguments.ema else "model"
    with join(arguments.device) as world:
        classifier = load(
            arguments.checkpoint, device=world.device, weights=weights, input_size=arguments.input_size,
            name=arguments.model,
        )  # fmt: skip
        for note in classifier.notes:
            print(note, file=sys.stderr)
        difference = export(classifier, arguments.format, arguments.output, opset=arguments.opset)
        print(f"wrote {arguments.output}; read back, its logits differ by {difference:.1e} at most")


if __name__ == "__main__":
    run(main)
