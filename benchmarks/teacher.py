"""Claim: stored answers make the teacher free; a live one is cheaper folded, on a GPU also in fp16 and compiled.

python benchmarks/teacher.py [--student deit_tiny_distilled_patch16_224] [--teacher regnety_016] [--batch-size 8]

The trainer's own step (prepare, teacher, student forward and backward, optimizer) on one resident batch of noise, hard
distillation, with the teacher in different states, a step each in turn; medians. The floor is a step whose answers lie
ready on the device. Weights are random: they do not change the time. On a GPU the default is DeiT-S and RegNetY-16GF at
batch 256, all compiled (`--no-compile` leaves that out). On the CPU it is CPU time that counts, all threads', which
other work on the machine disturbs less. Writes records/DEVICE/teacher.csv, .png (a waterfall) and .json.
"""

import argparse
import copy
import csv
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from harness import RECORDS, device_name, surroundings

from fastdeit import stored_teacher, teacher_store
from fastdeit.config import Config
from fastdeit.data import loaders, open_images
from fastdeit.distributed import Place, pick_device
from fastdeit.student import build_student, mean_std
from fastdeit.teacher import Teacher
from fastdeit.teacher_loading import Loaded
from fastdeit.trainer import Trainer

FLOOR = "no teacher"


def settings(arguments) -> Config:
    config = Config()
    config.data.data_path, config.data.batch_size, config.data.num_workers = Path("synthetic"), arguments.batch_size, 1
    config.model.model, config.model.model_ema = arguments.student, False
    config.distillation.distillation_type, config.speed.compile = "hard", arguments.compile
    return config


def teachers(arguments, config: Config, trainer: Trainer, place: Place, store: Path) -> dict:
    """Each state of the teacher, by name, in the order of the waterfall."""
    model = timm.create_model(arguments.teacher, num_classes=1000)
    mean, std = mean_std(model)
    loaded = Loaded(arguments.teacher, model.eval(), config.data.input_size, mean, std, None)

    def made(dtype: torch.dtype, *, folded: bool = True, laid_out: bool = False, compiled: bool = False) -> Teacher:
        teacher = Teacher(
            loaded, student_mean=trainer.mean, student_std=trainer.std, device=place.device, dtype=dtype
        )  # fmt: skip
        teacher.plain = None
        if not folded:
            teacher.network.model = copy.deepcopy(model).to(place.device, dtype).requires_grad_(False)
        if laid_out:
            teacher.choose_memory_format(config.data.batch_size, place)
        if compiled:
            teacher.compile()
        return teacher

    single, half = torch.float32, torch.float16 if place.device.type == "cuda" else torch.bfloat16
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[half]
    states = {"fp32, as published": made(single, folded=False), "fp32, folded": made(single)}
    if place.device.type == "cuda":
        states[f"{name}, folded"] = made(half)
        states[f"{name}, folded, laid out"] = made(half, laid_out=True)
        if arguments.compile:
            states[f"{name}, folded, laid out, compiled"] = made(half, laid_out=True, compiled=True)
    else:
        if arguments.compile:
            states["fp32, folded, compiled"] = made(single, compiled=True)
        states[f"{name}, folded"] = made(half)
    states["stored answers"] = from_store(store, config, place)
    ready = torch.zeros(config.data.batch_size, dtype=torch.int64, device=place.device)
    states[FLOOR] = lambda images, batch: ready
    return states


def from_store(folder: Path, config: Config, place: Place, steps: int = 1000):
    """Answers as the loader of a stored run reads them: rows of a memory-mapped store, to the device."""
    size = config.data.batch_size
    header = {
        "format": teacher_store.FORMAT, "kind": "hard", "classes": 1000, "views": 1, "positions": steps * size,
        "global_batch": size, "piece_steps": steps,
    }  # fmt: skip
    teacher_store.create(folder, header, np.zeros(1))
    writer = teacher_store.Writer(folder, header, 0, 1)
    rows = np.zeros((steps, size), np.int64)
    writer.write((0, 0, steps), {"indices": rows, "labels": rows})
    writer.close()
    store, step = teacher_store.Store(folder), iter(range(steps))

    def answers(images, batch):
        start = next(step) * size
        return stored_teacher.answers_of(store.rows(0, slice(start, start + size)), place.device)

    return answers


def measure(trainer: Trainer, batch, states: dict, rounds: int) -> dict[str, float]:
    """Median seconds of a step with each teacher, a step each in turn."""
    seconds = {name: [] for name in states}
    for number in range(rounds + 2):  # two to warm up and compile
        for name, teacher in states.items():
            trainer.teacher = teacher
            start = _clock(trainer)
            trainer.step(batch)
            if number >= 2:
                seconds[name].append(_clock(trainer) - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _clock(trainer: Trainer) -> float:
    if trainer.place.device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def report(arguments, seconds: dict[str, float], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    floor, first = seconds[FLOOR], next(iter(seconds.values()))
    with (folder / "teacher.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["teacher", "ms_per_step", "images_per_s", "teacher_share", "step_ratio_to_first"])
        for name, value in seconds.items():
            share, ratio = max(0.0, 1 - floor / value), value / first
            print(f"{name:36}{1e3 * value:9.1f} ms{100 * share:6.1f} % of it the teacher{ratio:7.2f} x the first")
            images = arguments.batch_size / value
            writer.writerow([name, f"{1e3 * value:.2f}", f"{images:.1f}", f"{share:.3f}", f"{ratio:.3f}"])
    draw(arguments, seconds, folder / "teacher.png")
    names = ("student", "teacher", "batch_size", "rounds", "compile")
    conditions = {name: getattr(arguments, name) for name in names} | surroundings(arguments.device)
    (folder / "teacher.json").write_text(json.dumps(conditions, indent=1) + "\n")


def draw(arguments, seconds: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names, floor = list(seconds)[::-1], 1e3 * seconds[FLOOR]
    totals = [1e3 * seconds[name] for name in names]
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(names) + 1.2), layout="constrained")
    axis.barh(names, [min(floor, total) for total in totals], color="0.75", label="everything else")
    bars = axis.barh(names, [max(0.0, total - floor) for total in totals], left=floor, color="C1", label="teacher")
    axis.bar_label(bars, labels=[f"{total:.0f} ms" for total in totals], padding=3, fontsize=8)
    axis.set(
        title=f"a step of {arguments.student}, teacher {arguments.teacher}, batch {arguments.batch_size}", xlabel="ms"
    )
    axis.margins(x=0.12)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu", help="cuda or cpu")
    parser.add_argument("--student", default=f"deit_{'small' if on_cuda else 'tiny'}_distilled_patch16_224")
    parser.add_argument("--teacher", default="regnety_160" if on_cuda else "regnety_016")
    parser.add_argument("--batch-size", type=int, default=256 if on_cuda else 8)
    parser.add_argument("--rounds", type=int, default=30 if on_cuda else 7)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_cuda)
    arguments = parser.parse_args()
    place = Place(pick_device(arguments.device))
    config = settings(arguments)
    indices = open_images(config, place)
    both = loaders(config, indices, place, None)
    trainer = Trainer(config, place, build_student(config, 1000), None, both, indices[0].classes, None)
    trainer.model.train()
    batch = next(iter(both[0]))
    with tempfile.TemporaryDirectory() as folder:
        states = teachers(arguments, config, trainer, place, Path(folder) / "store")
        seconds = measure(trainer, batch, states, arguments.rounds)
    report(arguments, seconds, RECORDS / device_name(arguments.device))


if __name__ == "__main__":
    main()
