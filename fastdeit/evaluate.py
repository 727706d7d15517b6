"""Top-1 and top-5 of class head, distillation head and their average, of the weights and of their moving average.

python -m fastdeit.evaluate CHECKPOINT --data-path DIR
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .command import run


def main() -> None:
    import tyro

    from . import checkpoint
    from .accuracy import accuracy
    from .distributed import join
    from .inference import load
    from .student import heads
    from .tables import accuracy_table

    @dataclass(kw_only=True)
    class Evaluate:
        checkpoint: Annotated[Path, tyro.conf.Positional]
        """A run's folder, or last or best in it."""
        data_path: Path
        """DIR/val/CLASS/*."""
        batch_size: int = 64
        """Images per process and step."""
        input_size: int | None = None
        """Pixels on a side; position embeddings are interpolated. Default: the checkpoint's."""
        device: str | None = None
        """cuda, cuda:N or cpu. Default: cuda where present."""
        json: bool = False
        """Print JSON in place of a table."""

    arguments = tyro.cli(Evaluate, prog="python -m fastdeit.evaluate", description=__doc__)
    folder = checkpoint.find(arguments.checkpoint)
    with join(arguments.device) as place:
        result = {}
        for source in ("model", "ema"):
            if source == "ema" and not (folder / "ema.safetensors").is_file():
                continue
            classifier = load(folder, device=place.device, weights=source, input_size=arguments.input_size)
            loader = classifier.evaluation_loader(arguments.data_path, arguments.batch_size, place)
            result[source] = accuracy(
                lambda images, model=classifier.model: heads(model, images), loader, classifier.prepare, place
            )
    if place.is_main:
        print(json.dumps(result, indent=2) if arguments.json else accuracy_table(result))


if __name__ == "__main__":
    run(main)
