"""The most probable classes of images.

python -m fastdeit.predict CHECKPOINT IMAGE...
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .command import UserError, run


def main() -> None:
    import tyro

    from .distributed import join
    from .inference import load

    @dataclass(kw_only=True)
    class Predict:
        checkpoint: Annotated[Path, tyro.conf.Positional]
        """A run's folder, or last or best in it."""
        images: Annotated[tuple[Path, ...], tyro.conf.Positional]
        """Image files."""
        top: int = 5
        """Classes to show."""
        head: Literal["cls", "dist", "both"] = "both"
        """Class head, distillation head, or the average of their logits."""
        ema: bool = False
        """Use the moving average of the weights."""
        batch_size: int = 64
        """Images per step."""
        device: str | None = None
        """cuda, cuda:N or cpu. Default: cuda where present."""
        json: bool = False
        """One JSON object per line: {"image": ..., "classes": [{"class": ..., "probability": ...}, ...]}."""

    arguments = tyro.cli(Predict, prog="python -m fastdeit.predict", description=__doc__)
    if not arguments.images:
        raise UserError("give at least one image file")
    with join(arguments.device) as place:
        classifier = load(arguments.checkpoint, device=place.device, weights="ema" if arguments.ema else "model")
        loader = classifier.files_loader(list(arguments.images), arguments.batch_size, place)
        top = min(arguments.top, len(classifier.classes))
        for batch in loader:
            values, classes = classifier.probabilities(classifier.prepare(batch), arguments.head).topk(top, dim=1)
            for position, row, best in zip(batch.indices.tolist(), values.tolist(), classes.tolist()):
                if position >= 0:
                    answers = [(classifier.classes[i], value) for i, value in zip(best, row)]
                    print(_line(loader.index.name(position), answers, arguments.json))


def _line(image: str, answers: list[tuple[str, float]], as_json: bool) -> str:
    if as_json:
        return json.dumps({"image": image, "classes": [{"class": name, "probability": p} for name, p in answers]})
    return f"{image}  " + "  ".join(f"{name} {100 * p:.1f} %" for name, p in answers)


if __name__ == "__main__":
    run(main)
