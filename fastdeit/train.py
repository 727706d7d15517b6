"""Train a Data-efficient Image Transformer.

python -m fastdeit.train                      handwritten digits: teacher, distilled student, comparison
python -m fastdeit.train --data-path DIR      your own folder, DIR/train/CLASS/* and DIR/val/CLASS/*
torchrun --nproc-per-node 8 -m fastdeit.train --data-path DIR
"""

import json
from pathlib import Path

from fastdeit.errors import UserError, run


def main() -> None:
    from fastdeit.cli import parse_config
    from fastdeit.distributed.world import join

    config = parse_config()
    if config.run.print_config:
        print(json.dumps(config.to_dict(), indent=2))
        return
    with join(config.run.device) as world:
        train(config, world)


def train(config, world, on_micro_batch=None) -> dict:
    """One run, from settings to the closing table. Returns the table: top-1 as fractions, see tables.NAMES.
    on_micro_batch: see Trainer."""
    from fastdeit.checkpoint import run_dir
    from fastdeit.data import open_images
    from fastdeit.digits import with_digits
    from fastdeit.evaluation import tables
    from fastdeit.training.dry_run import dry_run
    from fastdeit.training.trainer import deterministic

    if config.speed.attention == "xformers" and world.device.type != "cuda":
        raise UserError("--attention xformers runs on CUDA devices only: leave --attention away on this one")
    if config.speed.deterministic:
        deterministic()
    if config.run.eval:
        return evaluate_only(config, world)
    config = with_digits(config, world)
    if (summary := run_dir.summary_of_finished(config)) is not None:
        if world.is_main:
            print(f"{tables.summary_table(summary)}\n{run_dir.to_resume(config)} is finished")
        return summary
    indices = open_images(config, world)
    trainer, folder, saved = build(config, world, indices, on_micro_batch)
    if config.run.dry_run:
        return dry_run(trainer)
    _begin(trainer, indices, folder)
    trainer.load(saved)
    del saved
    accuracy = trainer.fit()
    summary = {head: value["top1"] for head, value in accuracy["model"].items()}
    if trainer.teacher is not None and config.distillation.teacher_store is None:
        summary["teacher"] = trainer.accuracy_of(lambda images: {"cls": trainer.teacher(images)})["cls"]["top1"]
    if config.distillation.compare_undistilled and config.distillation.distillation_type != "none":
        summary["undistilled"] = train_undistilled(config, world, indices, folder, on_micro_batch)
    _end(trainer, summary, folder)
    return summary


def build(config, world, indices, on_micro_batch=None):
    """(trainer, the run's folder, what of the run is saved): the latter two None for a dry run.

    All that can be refused without the folder is refused before it is claimed.
    """
    from fastdeit.checkpoint import resume, run_dir
    from fastdeit.data import first_views, loaders
    from fastdeit.distill import cached_teacher
    from fastdeit.distill.logit_cache import LogitCache
    from fastdeit.distill.teacher import load_teacher
    from fastdeit.models.build import build_student, normalise
    from fastdeit.models.loading import mean_std
    from fastdeit.training.trainer import Trainer

    classes = indices[0].classes
    model, notes = build_student(resume.without_start(config), len(classes), classes)
    if (saved_in := resume.checkpoint_to_come(config)) is not None:
        normalise(model, saved_in["mean"], saved_in["std"])
    mean, std = mean_std(model)
    teacher = cache = None
    if config.distillation.teacher_store is not None:
        cache = LogitCache(config.distillation.teacher_store)
    elif config.distillation.distillation_type != "none":
        teacher = load_teacher(config, classes, student_mean=mean, student_std=std, world=world)

    folder = saved = None
    if not config.run.dry_run:
        folder = world.broadcast(run_dir.open_folder(config, world) if world.is_main else None)
        saved = resume.start(folder, world)
    own_folder = folder if world.is_main else None
    both_loaders = loaders(config, indices, world, own_folder)
    if cache is not None:
        teacher, both_loaders = cached_teacher.from_cache(cache, config, world, both_loaders, mean, std)
    trainer = Trainer(
        config, world, model, teacher, both_loaders, classes, own_folder, title="student", on_micro_batch=on_micro_batch
    )
    for sentence in notes:
        trainer.log.say(sentence)
    if teacher is not None:
        views = first_views(trainer.train_loader, trainer.prepare, parts=config.optimization.accumulate)
        for sentence in teacher.check(views):
            trainer.log.say(sentence)
    return trainer, folder, saved


def _begin(trainer, indices, folder: Path) -> None:
    """What is drawn and said before the first step."""
    from fastdeit.evaluation import plots

    if not trainer.world.is_main:
        return
    if not (folder / "first_batch.png").exists():
        plots.first_batch(trainer, folder / "first_batch.png")
    said = [_sizes(trainer, indices), *_about_the_data(trainer.config, indices), *_pace(trainer)]
    trainer.log.say("\n".join([*said, f"writing to {folder}"]))


def _end(trainer, summary: dict, folder: Path) -> None:
    """What is written, drawn and said after the last one."""
    from fastdeit.checkpoint import atomic
    from fastdeit.evaluation import plots, tables

    if not trainer.world.is_main:
        return
    atomic.replace_json(folder / "summary.json", summary)
    plots.curves(folder)
    similarity = plots.token_similarity(trainer, folder)
    print(tables.summary_table(summary))
    if similarity:
        values = " ".join(map(str, similarity))
        trainer.log.say(f"cosine similarity of class and distillation token, input and after each block: {values}")
    trainer.log.say(f"curves.png, summary.json and the checkpoints last and best are in {folder}")


def evaluate_only(config, world) -> dict:
    """--eval: the accuracies of --resume or --finetune on the validation images, as a table. See fastdeit.evaluate."""
    from fastdeit.digits import with_digits
    from fastdeit.evaluate import about, evaluate
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
        data.data_path, data.batch_size, world, max_bad=data.max_bad, order=data.classes, label_column=data.label_column
    )
    result = evaluate(classifiers, loader, world)
    if world.is_main:
        print(accuracy_table({weights: result[weights] for weights in sources}))
        print(about(classifiers["model"], result["data"]))
    return result


def train_undistilled(config, world, indices, folder: Path, on_micro_batch=None) -> float:
    """The same student without teacher and distillation token, for the same number of steps. Returns its top-1."""
    from fastdeit.checkpoint import resume
    from fastdeit.data import loaders
    from fastdeit.models.build import build_student
    from fastdeit.training.trainer import Trainer

    settings = type(config).from_dict(config.to_dict())
    settings.distillation.distillation_type = "none"
    settings.model.model = config.model.model.replace("_distilled", "")
    classes = indices[0].classes
    folder = folder / "undistilled"
    own_folder = folder if world.is_main else None
    if own_folder is not None:
        own_folder.mkdir(exist_ok=True)
    saved = resume.start(folder, world)
    model, _ = build_student(settings, len(classes), classes)
    trainer = Trainer(
        settings, world, model, None, loaders(settings, indices, world, own_folder), classes, own_folder,
        title="undistilled", on_micro_batch=on_micro_batch,
    )  # fmt: skip
    trainer.load(saved)
    return max(head["top1"] for head in trainer.fit()["model"].values())


def _sizes(trainer, indices) -> str:
    training, validation = indices
    config = trainer.config
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    steps = f"{trainer.total_steps:,} step{'s' * (trainer.total_steps != 1)}"
    return (
        f"{config.model.model}: {parameters / 1e6:.2f} M parameters, {len(training):,} training and "
        f"{len(validation):,} validation images of {len(training.classes)} classes, {steps} of "
        f"{trainer.global_batch} images, {trainer.world.device}"
    )


def _about_the_data(config, indices) -> list[str]:
    from fastdeit.data import order_of_numbers

    training, validation = indices
    said = []
    if getattr(validation, "split", "val") == "test":
        said.append(
            f"{config.data.data_path} has no val: the test images are the validation images, and the checkpoint best "
            "is chosen on them, so its top-1 is no longer that of images it never saw; keep a val of its own for that"
        )
    without_names = config.model.pretrained or (config.model.finetune and Path(config.model.finetune).is_file())
    if without_names and config.data.classes is None and (order := order_of_numbers(training.classes)):
        said.append(order)
    return said


def _pace(trainer) -> list[str]:
    from fastdeit.training.optimizer import average_in_words, rates_in_words

    config, steps = trainer.config, trainer.total_steps
    sentences = rates_in_words(
        trainer.rates, lr=config.optimization.lr, global_batch=trainer.global_batch, total_steps=steps,
        warmup_steps=trainer.warmup_steps,
    )  # fmt: skip
    return (
        [sentences, average_in_words(config.model.model_ema_decay, steps)] if trainer.ema is not None else [sentences]
    )


if __name__ == "__main__":
    run(main)
