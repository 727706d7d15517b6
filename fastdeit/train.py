"""Train a Data-efficient Image Transformer.

python -m fastdeit.train                      handwritten digits: teacher, distilled student, comparison
python -m fastdeit.train --data-path DIR      your own folder, DIR/train/CLASS/* and DIR/val/CLASS/*
torchrun --nproc-per-node 8 -m fastdeit.train --data-path DIR

From Python: fastdeit.train(data_path=DIR), see fastdeit.api.train.
"""

import json
import sys
from types import ModuleType

from fastdeit.errors import UserError, run


def main() -> None:
    from fastdeit.cli import parse_config

    config = parse_config()
    if config.run.print_config:
        print(json.dumps(config.to_dict(), indent=2))
        return

    from fastdeit.distributed.world import join

    with join(config.run.device) as world:
        train(config, world)


def train(config, world, on_micro_batch=None) -> dict:
    """One run, or what --eval asks for. Returns the closing table. on_micro_batch: see training.trainer.Trainer."""
    from fastdeit.demo import with_digits
    from fastdeit.training import run

    run.set_up(config, world)
    if config.run.eval:
        return evaluate_only(config, world)
    return run.run(with_digits(config, world), world, on_micro_batch)


def evaluate_only(config, world) -> dict:
    """--eval: the accuracies of --resume or --finetune on the validation images, as a table. See fastdeit.evaluate."""
    from fastdeit.batch import FEW
    from fastdeit.demo import with_digits
    from fastdeit.evaluation.evaluator import about, evaluate
    from fastdeit.evaluation.tables import accuracy_table
    from fastdeit.models.inference import load
    from fastdeit.models.loading import has_moving_average

    source = config.model.finetune if config.run.resume is None else config.run.resume
    if source == "auto":
        source = config.run.output_dir
    if source is None:
        raise UserError("--eval does not know what to evaluate: give --resume RUN or --finetune CHECKPOINT")
    sources = ["model", "ema"] if has_moving_average(source) else ["model"]
    typed = config.typed
    classifiers = {
        weights: load(
            source, device=world.device, weights=weights, precision=config.speed.precision,
            input_size=config.data.input_size if "--input-size" in typed else None,
            crop_pct=config.data.eval_crop_ratio if "--eval-crop-ratio" in typed else None,
            name=config.model.model if "--model" in typed else None, default_name=config.model.model,
        )
        for weights in sources
    }  # fmt: skip
    config.distillation.distillation_type = "none"  # no teacher is needed
    data = with_digits(config, world).data
    loader = classifiers["model"].evaluation_loader(
        data.data_path, data.batch_size or FEW, world, max_bad=data.max_bad, order=data.classes,
        label_column=data.label_column,
    )  # fmt: skip
    result = evaluate(classifiers, loader, world)
    if world.is_main:
        print(accuracy_table({weights: result[weights] for weights in sources}))
        print(about(classifiers["model"], result["data"]))
    return result


class _Callable(ModuleType):
    """`import fastdeit.train` puts this module where `fastdeit.train` is looked up, so it answers as the function."""

    def __call__(self, data_path=None, *, recipe=None, **settings):
        """See fastdeit.api.train."""
        from fastdeit import api

        return api.train(data_path, recipe=recipe, **settings)


if __name__ == "__main__":
    run(main)
else:
    sys.modules[__name__].__class__ = _Callable
