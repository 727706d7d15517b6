"""Claim: cached logits make the teacher free; a live one is cheaper folded, on a GPU also in fp16 and compiled.

    python -m benchmarks teacher [--student deit_tiny_distilled_patch16_224] [--teacher regnety_016] [--batch-size 8]

Two comparisons, each in turns, medians:

    step       the trainer's own step on noise on the device (steps.py), hard distillation, with the teacher
               in different states; the floor is a step whose labels are on the device
    forward    the teacher alone, to logits: ours in its best state beside timm's distillation teacher, in autocast's
               bf16 and compiled on a GPU, fed contiguous and channels_last

Weights are random: they do not change the time. On a GPU the default is DeiT-S and RegNetY-16GF at batch 256, all
compiled (not with `--no-compile`).
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import timm
import torch
from torch import nn

from fastdeit.distill.teacher import Teacher, speed_up
from fastdeit.models.build import mean_std
from fastdeit.models.loading import LoadedModel
from fastdeit.training.loop import Loop
from fastdeit.training.trainer import Trainer
from fastdeit.tuning import Tuner, of_run

from . import charts, peers, steps
from .record import Headline, Record, parser
from .timing import Timing

COLUMNS = ("measured", "teacher", "ms", "ms_p10", "ms_p90", "images_per_s", "teacher_share", "ratio_to_first")
FLOOR = "no teacher"


def make_teacher(
    network: nn.Module, trainer: Trainer, dtype: torch.dtype, *, folded: bool = True, laid_out: bool = False,
    compiled: bool = False,
) -> Teacher:  # fmt: skip
    """A timm model as the trainer's teacher, in a state between published and best."""
    data, world = trainer.config.data, trainer.world
    mean, std = mean_std(network)
    loaded = LoadedModel(name="teacher", model=network.eval(), input_size=data.input_size, mean=mean, std=std)
    teacher = Teacher(
        loaded, student_mean=trainer.mean, student_std=trainer.std, device=world.device, dtype=dtype
    )  # fmt: skip
    teacher.plain = None
    if not folded:
        teacher.network.model = copy.deepcopy(network).to(world.device, dtype).requires_grad_(False)
    if laid_out:
        shape = (data.batch_size, 3, data.input_size, data.input_size)
        teacher.tune(Tuner(world), shape, trainer.precision, compiled=compiled)
    if compiled:
        teacher.compile()
    return teacher


def default_teacher(network: nn.Module, trainer: Trainer) -> tuple[Teacher, list[dict]]:
    """A timm model as load_teacher and speed_up make it of the run's settings; and what was chosen by measurement."""
    world, config = trainer.world, trainer.config
    tuner = of_run(config, world, None)
    teacher = make_teacher(network, trainer, torch.float16 if world.device.type == "cuda" else torch.float32)
    speed_up(teacher, config, tuner)
    return teacher, tuner.to_json()


def best_teacher(network: nn.Module, trainer: Trainer, *, compiled: bool) -> Teacher:
    """Folded, laid out, compiled."""
    gpu = trainer.world.device.type == "cuda"
    return make_teacher(
        network, trainer, torch.float16 if gpu else torch.float32, laid_out=gpu, compiled=compiled
    )  # fmt: skip


def states(network: nn.Module, trainer: Trainer, *, compiled: bool) -> dict[str, Callable]:
    """Each state of the teacher, by name, the slowest first, as far as expected."""
    made = {
        "fp32, as published": make_teacher(network, trainer, torch.float32, folded=False),
        "fp32, folded": make_teacher(network, trainer, torch.float32),
    }
    if trainer.world.device.type == "cuda":
        made["fp16, folded"] = make_teacher(network, trainer, torch.float16)
        made["fp16, folded, laid out"] = make_teacher(network, trainer, torch.float16, laid_out=True)
        if compiled:
            made["fp16, folded, laid out, compiled"] = best_teacher(network, trainer, compiled=True)
    else:
        if compiled:
            made["fp32, folded, compiled"] = best_teacher(network, trainer, compiled=True)
        made["bf16, folded"] = make_teacher(network, trainer, torch.bfloat16)
    return made


def compare_steps(arguments, network: nn.Module, loop: Loop) -> dict[str, Timing]:
    trainer = loop.trainer
    device, batches = trainer.world.device, list(islice(loop.train_loader, steps.RESIDENT))
    with tempfile.TemporaryDirectory() as folder:
        teachers = states(network, trainer, compiled=arguments.compile)
        ready = torch.zeros(arguments.batch_size, dtype=torch.int64, device=device)
        teachers[FLOOR] = lambda images, batch: ready
        calls = {name: steps.our_step(loop, teacher, batches) for name, teacher in teachers.items()}
        calls["cached logits"] = steps.our_step(
            loop, steps.of_the_batch, steps.with_cached_logits(Path(folder), batches)
        )
        for step in calls.values():
            steps.built(lambda step=step: step, device, 1 if arguments.quick else 2)
        return steps.in_turn(calls, device, arguments.rounds)


@torch.no_grad()
def compare_forwards(arguments, network: nn.Module, loop: Loop) -> dict[str, Timing]:
    trainer = loop.trainer
    device, dtype = trainer.world.device, trainer.precision
    images = trainer.prepare(next(iter(loop.train_loader)))
    ours = best_teacher(network, trainer, compiled=arguments.compile)
    calls = {"fastdeit": lambda: ours(images)}
    if (lacking := peers.timm_lacks()) is not None:
        print(f"forward  {'timm':36} left out: {lacking}")
    else:
        formats = {"timm": torch.contiguous_format}
        if device.type == "cuda":
            formats["timm, channels_last"] = torch.channels_last
        for name, layout in formats.items():
            theirs = peers.teacher_of_timm(copy.deepcopy(network), device, compile=arguments.compile)
            given = images.float().contiguous(memory_format=layout)
            calls[name] = lambda theirs=theirs, given=given: peers.logits(theirs, given, dtype)
    for call in calls.values():
        for _ in range(1 if arguments.quick else 2):
            call()
    return steps.in_turn(calls, device, arguments.rounds)


def report(record: Record, measured: str, timings: dict[str, Timing], images: int) -> None:
    floor, first = timings.get(FLOOR), next(iter(timings.values()))
    for name, t in timings.items():
        share = None if floor is None else max(0.0, 1 - floor.median / t.median)
        figures = [f"{value / 1e3:.2f}" for value in (t.median, t.low, t.high)]
        record.rows.append(
            [measured, name, *figures, f"{1e6 * images / t.median:.1f}", "" if share is None else f"{share:.3f}",
             f"{t.median / first.median:.3f}"]
        )  # fmt: skip
        if record.quick:
            print(f"{measured:9}{name:36} runs")
            continue
        of_it = "" if share is None else f"{100 * share:6.1f} % of it the teacher"
        print(f"{measured:9}{name:36}{t.median / 1e3:9.1f} ms{of_it}{t.median / first.median:7.2f} x the first")


def headline(arguments, forwards: dict[str, Timing], device: torch.device) -> Headline:
    ours, *theirs = (1e6 * arguments.batch_size / t.median for t in forwards.values())
    fastest = max(theirs)
    return Headline(
        f"teacher's forward pass, {arguments.teacher}, batch {arguments.batch_size}", steps.speed(ours, device),
        [*forwards][1 + theirs.index(fastest)], steps.speed(fastest, device), round(ours / fastest, 3),
    )  # fmt: skip


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--student", help="default: DeiT-S, on the CPU DeiT-Ti")
    own.add_argument("--teacher", help="default: regnety_160, on the CPU regnety_016")
    own.add_argument("--batch-size", type=int)
    own.add_argument("--rounds", type=int)
    own.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    tiny = "deit_tiny_distilled_patch16_224"
    arguments = steps.fill_in(
        own.parse_args(), student=("deit_small_distilled_patch16_224", tiny, tiny),
        teacher=("regnety_160", "regnety_016", "test_byobnet"), batch_size=(256, 8, 4), rounds=(8, 15, 1),
        compile=(True, False, False), pixels=(224, 224, 32),
    )  # fmt: skip
    record = Record("teacher", arguments, COLUMNS)
    names = ("student", "teacher", "batch_size", "rounds", "compile")
    record.conditions |= {name: getattr(arguments, name) for name in names}
    world = steps.pick_world(arguments.device)
    torch._dynamo.config.recompile_limit = 64  # of states that in training have a process each
    config = steps.configuration(
        arguments.student, batch_size=arguments.batch_size, pixels=arguments.pixels, compile=arguments.compile,
        **steps.AS_WRITTEN,
    )  # fmt: skip
    loop = steps.loop_on(config, world, steps.noise(config, world))
    network = timm.create_model(arguments.teacher, num_classes=steps.CLASSES)
    by_state = compare_steps(arguments, network, loop)
    report(record, "step", by_state, arguments.batch_size)
    record.write()
    forwards = compare_forwards(arguments, network, loop)
    report(record, "forward", forwards, arguments.batch_size)
    if len(forwards) > 1:
        record.headlines.append(headline(arguments, forwards, world.device))
    record.write()
    if (chart := record.path("teacher.png")) is not None:
        title = f"a step of {arguments.student}, teacher {arguments.teacher}, batch {arguments.batch_size}"
        charts.shares({name: t.median / 1e3 for name, t in by_state.items()}, FLOOR, title, "ms", chart)


if __name__ == "__main__":
    main()
