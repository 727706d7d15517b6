"""One run, from its settings to the closing table."""

import os
import resource
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastdeit.batch import settle
from fastdeit.checkpoint import atomic, resume, run_dir
from fastdeit.config import Config
from fastdeit.curriculum import Curriculum
from fastdeit.data import first_views, has_compiler, labelled_alone, lines_of_names, loaders, open_images, remarks
from fastdeit.distill import cached_teacher
from fastdeit.distill.logit_cache import LogitCache
from fastdeit.distill.teacher import speed_up
from fastdeit.distill.teachers import load_teachers
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.evaluation import plots, tables
from fastdeit.models.build import build_student, mean_std, normalise
from fastdeit.tuning import Tuner, of_run

from . import student_tuning, trackers
from .host_memory import keep_freed_memory
from .loop import Loop
from .optimizer import average_in_words, rates_in_words
from .trainer import Trainer

MicroBatchHook = Callable[[Trainer], None]  # see Trainer


def run(config: Config, world: World, on_micro_batch: MicroBatchHook | None = None) -> dict[str, float]:
    """Train as the settings say; --data-path must be given. Returns the closing table: top-1 as fractions, by the names
    of evaluation.tables.NAMES."""
    if (summary := run_dir.summary_of_finished(config)) is not None:
        if world.is_main:
            print(f"{tables.summary_table(summary)}\n{run_dir.to_resume(config)} is finished; to train on: --extend")
        return summary
    indices = open_images(config, world)
    built = build(config, world, indices, on_micro_batch)
    if config.run.dry_run:
        return dry_run(built.loop, indices)
    loop, trainer = built.loop, built.loop.trainer
    if built.extended is not None:
        loop.extend(built.extended)
    _begin(loop, indices, built.folder)
    loop.load(built.saved)
    built.saved = None  # its memory is the training's from here on
    accuracy = loop.fit()
    summary = {head: value["top1"] for head, value in accuracy["model"].items()}
    if trainer.teacher is not None and config.distillation.teacher_store is None:
        summary["teacher"] = loop.accuracy_of(lambda images: {"cls": trainer.teacher(images)})["cls"]["top1"]
    if config.distillation.compare_undistilled and config.distillation.distillation_type != "none":
        summary["undistilled"] = run_undistilled(loop.config, world, indices, built.folder, on_micro_batch)
    _end(loop, summary, built.folder)
    return summary


@dataclass
class Built:
    """loop: ready to `fit`. folder: the run's. saved: the checkpoint that it resumes from, for `loop.load`. extended:
    the run whose end is its beginning, for `loop.extend`. The latter three are None for a dry run."""

    loop: Loop
    folder: Path | None
    saved: dict | None
    extended: Path | None


def build(config: Config, world: World, indices, on_micro_batch: MicroBatchHook | None = None) -> Built:
    """All that can be refused without the run's folder is refused before it is claimed."""
    classes = indices[0].classes
    extended = resume.extended_run(config)
    model, notes = build_student(resume.without_start(config), len(classes), classes)
    if (saved_in := resume.checkpoint_to_come(config)) is not None:
        normalise(model, saved_in["mean"], saved_in["std"])
    config, told = settle(config, world, model, len(indices[0]))
    notes = [*notes, *told]
    mean, std = mean_std(model)
    teacher = cache = None
    if config.distillation.teacher_store is not None:
        cache = LogitCache(config.distillation.teacher_store)
    elif config.distillation.distillation_type != "none":
        teacher = load_teachers(config, classes, student_mean=mean, student_std=std, world=world)

    folder = saved = None
    if not config.run.dry_run:
        folder = world.broadcast(run_dir.open_folder(config, world) if world.is_main else None)
        saved = resume.start(folder, world)
    own_folder = folder if world.is_main else None
    both_loaders = loaders(config, indices, world, own_folder)
    if cache is not None:
        teacher, both_loaders = cached_teacher.from_cache(cache, config, world, both_loaders, mean, std)
    steps = len(both_loaders[0]) * Curriculum.of(config).epochs
    tuner = of_run(config, world, saved_in, steps=steps)
    if teacher is not None and cache is None:
        speed_up(teacher, config, tuner)
    trainer = Trainer(
        config, world, model, teacher, steps_per_epoch=len(both_loaders[0]), on_micro_batch=on_micro_batch,
        arrangement=student_tuning.ask(tuner, model, config),
    )  # fmt: skip
    loop = Loop(trainer, both_loaders, classes, own_folder, title="student", choices=tuner.to_json())
    _show(tuner, loop, own_folder)
    if teacher is not None:
        views = first_views(loop.train_loader, trainer.prepare, parts=config.optimization.accumulate)
        notes = [*notes, *teacher.check(views)]
    for sentence in [*notes, *_not_compiled(config, world)]:
        loop.log.say(sentence)
    return Built(loop, folder, saved, None if config.run.dry_run else extended)


def _not_compiled(config: Config, world: World) -> list[str]:
    if config.speed.compile is not None or world.device.type != "cuda" or has_compiler():
        return []
    return ["there is no C compiler here (gcc or clang), so nothing is compiled; with one, training is faster"]


def tune(config: Config, world: World) -> list[dict]:
    """Ask what `run` would ask, on a CPU too, and print the table; what is asked again when the run begins is then
    remembered. Returns the choices in JSON types."""
    images = open_images(config, world)[0]
    classes = images.classes
    model, _ = build_student(config, len(classes), classes)
    config, _ = settle(config, world, model, len(images))
    tuner = replace(of_run(config, world, None), measures=True)
    distillation = config.distillation
    if distillation.distillation_type != "none" and distillation.teacher_store is None:
        mean, std = mean_std(model)
        teacher = load_teachers(config, classes, student_mean=mean, student_std=std, world=world)
        teacher.forget_plain()
        speed_up(teacher, config, tuner)
        del teacher
    student_tuning.ask(tuner, model, config)
    if distillation.compare_undistilled and distillation.distillation_type != "none":
        config = undistilled(config)
        student_tuning.ask(tuner, build_student(config, len(classes), classes)[0], config)
    if world.is_main:
        print(tuner.table() or "for this student there is nothing to choose on this machine")
    return tuner.to_json()


def _show(tuner: Tuner, loop: Loop, folder: Path | None) -> None:
    """The table of what was measured and chosen: said, and kept beside the settings."""
    if shown := tuner.table():
        loop.log.say(shown)
    if folder is not None and tuner.choices:
        atomic.replace_json(folder / "tuning.json", tuner.to_json())


def undistilled(config: Config) -> Config:
    """The settings of the same student without teacher. It has no distillation token either, unless it starts from the
    weights of a model that has one: then both heads learn the labels."""
    settings = type(config).from_dict(config.to_dict())
    settings.typed = config.typed
    teaching = settings.distillation
    teaching.distillation_type, teaching.unlabelled_path = "none", None
    teaching.attention_distillation_weight = teaching.feature_distillation_weight = 0.0
    if not config.model.finetune and not config.model.pretrained:
        settings.model.model = config.model.model.replace("_distilled", "")
    return settings


def run_undistilled(
    config: Config, world: World, indices, folder: Path, on_micro_batch: MicroBatchHook | None = None
) -> float:
    """The same student without teacher, from the images with labels alone, for the same number of steps. Returns its
    top-1."""
    settings, indices = undistilled(config), labelled_alone(indices)
    classes = indices[0].classes
    folder = folder / "undistilled"
    own_folder = folder if world.is_main else None
    if own_folder is not None:
        own_folder.mkdir(exist_ok=True)
    saved = resume.start(folder, world)
    if saved is not None:  # its weights are in the checkpoint, and those it began with may be gone
        settings.model.finetune, settings.model.pretrained = None, False
    model, _ = build_student(settings, len(classes), classes)
    if saved is not None:
        normalise(model, saved["description"]["mean"], saved["description"]["std"])
    both_loaders = loaders(settings, indices, world, own_folder)
    steps = len(both_loaders[0]) * Curriculum.of(settings).epochs
    tuner = of_run(settings, world, saved and saved["description"], steps=steps)
    trainer = Trainer(
        settings, world, model, None, steps_per_epoch=len(both_loaders[0]), on_micro_batch=on_micro_batch,
        arrangement=student_tuning.ask(tuner, model, settings),
    )  # fmt: skip
    loop = Loop(trainer, both_loaders, classes, own_folder, title="undistilled", choices=tuner.to_json())
    _show(tuner, loop, own_folder)
    loop.load(saved)
    return max(head["top1"] for head in loop.fit()["model"].values())


def _begin(loop: Loop, indices, folder: Path) -> None:
    """What is drawn and said before the first step."""
    if not loop.world.is_main:
        return
    trainer = loop.trainer
    (folder / "summary.json").unlink(missing_ok=True)  # of a run that had lost patience
    if trainer.config.data.val_share is not None and not (folder / "validation.txt").exists():
        atomic.replace(folder / "validation.txt", lines_of_names(indices[1]).encode())
    if not (folder / "first_batch.png").exists():
        plots.first_batch(
            loop.train_loader, trainer.prepare, trainer.mean, trainer.std, loop.classes, folder / "first_batch.png"
        )
    said = [_sizes(trainer, indices), *remarks(trainer.config, indices), *_pace(trainer), f"writing to {folder}"]
    loop.log.say("\n".join(said))


def _sizes(trainer: Trainer, indices) -> str:
    training, validation = indices
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    steps = f"{trainer.total_steps:,} step{'s' * (trainer.total_steps != 1)}"
    return (
        f"{trainer.config.model.model}: {parameters / 1e6:.2f} M parameters, {len(training):,} training and "
        f"{len(validation):,} validation images of {len(training.classes)} classes, {steps} of "
        f"{trainer.global_batch} images, {trainer.world.device}"
    )


def _pace(trainer: Trainer) -> list[str]:
    settings, curriculum, warmup_steps = trainer.config, trainer.curriculum, trainer.warmup_steps
    said = []
    if settings.optimization.curriculum != "none":
        warmup_steps = bisect_left(range(trainer.total_steps), warmup_steps, key=trainer.work)
        said.append(f"--curriculum {settings.optimization.curriculum}: {curriculum.in_words()}")
    rates = rates_in_words(
        trainer.rates, lr=settings.optimization.lr, global_batch=trainer.global_batch,
        total_steps=trainer.total_steps - trainer.state.schedule_start, warmup_steps=warmup_steps,
    )  # fmt: skip
    said.append(rates)
    if trainer.ema is not None:
        said.append(average_in_words(settings.model.model_ema_decay, trainer.total_steps))
    return said


def _end(loop: Loop, summary: dict, folder: Path) -> None:
    """What is written, drawn and said after the last step."""
    if not loop.world.is_main:
        return
    atomic.replace_json(folder / "summary.json", summary)
    plots.curves(folder)
    trainer = loop.trainer
    similarity = plots.token_similarity(trainer.model, loop.val_loader, trainer.prepare, folder)
    print(tables.summary_table(summary))
    if similarity:
        values = " ".join(map(str, similarity))
        loop.log.say(f"cosine similarity of class and distillation token, input and after each block: {values}")
    loop.log.say(f"curves.png, summary.json and the checkpoints last and best are in {folder}")


def set_up(config: Config, world: World) -> None:
    """What holds for the whole process. --deterministic: an operation without a deterministic algorithm raises."""
    trackers.check(config.run.tracker)
    if config.speed.attention == "xformers" and world.device.type != "cuda":
        raise UserError("--attention xformers runs on CUDA devices only: omit --attention on this one")
    if config.speed.cuda_graph == "on" and (world.device.type != "cuda" or world.world_size > 1):
        raise UserError(
            "--cuda-graph on: a step is captured in a CUDA graph for one process on a GPU only: omit the flag"
        )
    if world.device.type == "cpu":
        keep_freed_memory()
    if config.speed.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def dry_run(loop: Loop, indices) -> dict:
    """--dry-run: two steps on the first batch, then memory and shapes on the terminal. Returns an empty summary."""
    trainer = loop.trainer
    trainer.model.train()
    loop.train_loader.set_epoch(0)
    batch = next(iter(loop.train_loader))
    losses, seconds = [], []
    for number in range(2):
        if number and trainer.config.model.patch_drop > 0:
            trainer.state.step = trainer.total_steps - 1  # which sees all patches, and needs the more memory
        start = time.perf_counter()
        losses.append(trainer.step(batch).tolist()[0])
        seconds.append(time.perf_counter() - start)
    on_cuda = trainer.world.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say = loop.log.say
    for sentence in remarks(trainer.config, indices):
        say(sentence)
    say(f"device            {trainer.world.device}, {trainer.world.world_size} process(es), {trainer.precision}")
    say(f"student           {sum(p.numel() for p in trainer.model.parameters()):,} parameters")
    say(
        f"first batch       images {tuple(batch.images.shape)} {batch.images.dtype}, labels {tuple(batch.labels.shape)}"
    )
    say(f"student's input   {tuple(trainer.prepare(batch).shape)} {trainer.precision}")
    say(f"two steps         loss {losses[0]:.4f}, {losses[1]:.4f}; {seconds[0]:.2f} s, {seconds[1]:.2f} s")
    say(f"peak memory       {peak / 2**20:,.0f} MiB {'on the device' if on_cuda else 'of the process'}")
    loop.log.close()
    return {}
