"""Accuracy and calibration of each head and of their average, for the weights and for their moving average.

    python -m fastdeit.evaluate RUN --data-path DIR
    python -m fastdeit.evaluate FILE.pth --model MODEL --data-path DIR
    python -m fastdeit.evaluate deit_small_patch16_224 --data-path DIR

With --output FOLDER also: accuracy.json; classes.csv, the top-1 of each head in each class; confusion.png, the
confusion matrix of the model's predictions (confusion_ema.png for the moving average); calibration.png, accuracy over
confidence.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastdeit.cli import parse
from fastdeit.config import Size, setting
from fastdeit.errors import UserError, run


def main() -> None:
    import tyro

    @dataclass(kw_only=True)
    class Evaluate:
        checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
        """A run's folder, or last or best in it; a folder of timm or transformers; a file or URL of weights (with
        --model); hf-hub:ORG/NAME; timm's name of a model, for its published weights."""
        data_path: Path
        """DIR/val/CLASS/*, or shards."""
        classes: Path | None = None
        """Text file, a class a line: the order of the model's outputs, for weights without class names. None:
        class folders sorted as strings (10 before 2)."""
        label_column: str | None = None
        """Column of Parquet files that holds the labels. None: label, labels, ..., or the one with class names."""
        model: str | None = None
        """The model a file of weights is of: deit_*, deit3_*, or any other timm model name."""
        pretrained: bool = False
        """CHECKPOINT is timm's name of a model, even if there is a file of that name."""
        output: Path | None = None
        """Folder for results by class, confusion matrix and calibration."""
        batch_size: int = setting(64, at_least=1)
        """Images per process and step."""
        input_size: Size | None = setting(None, at_least=1)
        """Height and width of the images in pixels, one number for squares; position embeddings are interpolated. None:
        the checkpoint's."""
        eval_crop_ratio: float | None = setting(None, above=0, at_most=1)
        """Side of the centre crop over that of the resized image (crop_pct in timm). None: the checkpoint's."""
        precision: Literal["fp32", "bf16", "fp16"] | None = None
        """Type of the weights and activations. None: fp16 on CUDA, fp32 on the CPU."""
        max_bad: float = setting(0.01, at_least=0, at_most=1)
        """Stop when more than this fraction of the images cannot be read."""
        device: str | None = None
        """cuda, cuda:N or cpu. None: cuda where present."""
        json: bool = False
        """Print JSON in place of a table."""

    arguments = parse(Evaluate, prog="python -m fastdeit.evaluate", description=__doc__)

    from fastdeit.distributed.world import join
    from fastdeit.evaluation.evaluator import about, evaluate
    from fastdeit.evaluation.tables import accuracy_table
    from fastdeit.models.inference import load
    from fastdeit.models.loading import has_moving_average

    if arguments.output is not None and arguments.output.exists() and not arguments.output.is_dir():
        raise UserError(f"--output {arguments.output}: there is a file of this name; choose another folder")
    sources = ["model"]
    if has_moving_average(arguments.checkpoint, pretrained=arguments.pretrained):
        sources.append("ema")
    with join(arguments.device) as world:
        classifiers = {
            source: load(
                arguments.checkpoint, device=world.device, weights=source, input_size=arguments.input_size,
                name=arguments.model, pretrained=arguments.pretrained, precision=arguments.precision,
                crop_pct=arguments.eval_crop_ratio,
            )
            for source in sources
        }  # fmt: skip
        loader = classifiers["model"].evaluation_loader(
            arguments.data_path, arguments.batch_size, world, max_bad=arguments.max_bad,
            order=arguments.classes, label_column=arguments.label_column,
        )  # fmt: skip
        result = evaluate(classifiers, loader, world, arguments.output)
    if not world.is_main:
        return
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(accuracy_table({source: result[source] for source in sources}))
        print(about(classifiers["model"], result["data"]))


if __name__ == "__main__":
    run(main)
