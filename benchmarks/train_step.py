"""Claim: a step of distilled training takes less time than with timm, with a live teacher and with cached logits.

    python -m benchmarks train-step [--students deit_small_distilled_patch16_224 ...] [--teacher regnety_160]
                                [--batch-size 256]

From uint8 noise on the device to new weights and a new moving average: normalised, a quarter of it erased,
mixed, smoothed labels, hard distillation, drop path 0.1, AdamW. bf16 AMP on a GPU, fp32 on the CPU. Contenders:

    fastdeit              the trainer's own step (steps.py), with a live teacher, and with cached logits: exactly what
                          a run gets that says nothing of speed, tuned, compiled and captured where the program does so
                          (on a GPU; --no-compile for all). The record has what was chosen
    timm                  as its train.py does it with token distillation (peers.py), with --torchcompile on a GPU,
                          there with and without --channels-last
    facebookresearch/deit  as its engine.py does it (peers.py), eager; its images come without being erased, which its
                          loader does elsewhere

and, for the waterfall of the first student, our trainer with what makes it fast switched on one thing after another.
Weights are random: they do not change the time. Times are steps.py's: on the CPU a second is one of CPU time.

    mfu          FLOP of the student's forward and backward pass, as torch.utils.flop_counter counts them at batch 1
                 (matrix products, attention's among them; the teacher's and the optimizer's are not counted), over the
                 time and the peak of dense bf16: the datasheet's, and that of a large product measured here. Counted in
                 our student, whose last block computes the heads' tokens alone, and taken for the peers as well
    peak_mb      most memory that the contender holds in a step: models, optimizer, activations
    kernels      that run in a step; launches: calls that the host makes for them, and a CUDA graph's is one
    idle_share   the part of the step in which no kernel, copy or memset runs: 1 - their time as the profiler has it
                 over the step's time without a profiler
"""

import argparse
import copy
import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastdeit.models.deit import create_model
from fastdeit.training.step_graph import WARM_UP, StepGraph

from . import charts, peers, steps
from .gpu_work import Work, work_of
from .record import Headline, Record, parser
from .steps import CLASSES, Step
from .teacher import best_teacher, default_teacher, make_teacher
from .timing import measure_ceilings

COLUMNS = (
    "student", "contender", "ms", "ms_p10", "ms_p90", "images_per_s", "times_live", "mfu_datasheet", "mfu_measured",
    "peak_mb", "launches", "kernels", "idle_share",
)  # fmt: skip
CACHED, LIVE = "fastdeit, cached logits", "fastdeit, live teacher"
DEIT = "facebookresearch/deit"
DATASHEET = {  # FLOP/s of dense bf16
    "H200": 989e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "B200": 2250e12,
}  # fmt: skip
# The waterfall: a contender, and what it has that the one before has not.
ON_GPU = {
    f"{DEIT}, fp32": f"{DEIT} in fp32",
    DEIT: "bf16 AMP",
    "fastdeit, nothing compiled": "our trainer: lean last block, fused loss, mixing and AdamW, fp16 teacher",
    "fastdeit, student compiled": "student compiled",
    "fastdeit, teacher folded": "teacher's BatchNorms folded, laid out",
    "fastdeit, teacher compiled": "teacher compiled",
    "fastdeit, tuned": "attention and the rest as measured",
    LIVE: "one CUDA graph",
    CACHED: "cached logits",
}
ON_CPU = {
    DEIT: DEIT,
    "fastdeit, teacher not folded": "our trainer: lean last block, loss, mixing, AdamW and EMA",
    LIVE: "teacher's BatchNorms folded",
    CACHED: "cached logits",
}


class Case:
    """A student, and how its contenders are built, each with a model of its own."""

    def __init__(self, arguments: argparse.Namespace, student: str, folder: Path):
        self.arguments, self.student, self.folder = arguments, student, folder
        self.world = steps.pick_world(arguments.device)
        self.device, self.gpu = self.world.device, arguments.device != "cpu"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.network = timm.create_model(arguments.teacher, num_classes=CLASSES)
        self.noise = steps.noise(self._configuration(), self.world)
        self.batches = list(islice(self.noise, steps.RESIDENT))
        self.chosen: dict[str, dict] = {}  # by contender: question: what was chosen
        self.graphs: dict[str, StepGraph | None] = {}

    def contenders(self, waterfall: bool) -> dict[str, Callable[[], Step]]:
        """How to build each."""
        best = partial(best_teacher, compiled=self.arguments.compile)
        found = {
            CACHED: lambda: self.by_default(CACHED),
            LIVE: lambda: self.by_default(LIVE),
            DEIT: lambda: self.deit(self.dtype),
        }
        if peers.timm_lacks() is None:
            found["timm"] = lambda: self.timm(channels_last=False)
            if self.gpu:
                found["timm, channels_last"] = lambda: self.timm(channels_last=True)
        if not waterfall:
            return found
        made = partial(make_teacher, dtype=torch.float16 if self.gpu else torch.float32)
        published = partial(made, folded=False)
        if not self.gpu:
            return found | {"fastdeit, teacher not folded": lambda: self.ours(published)}
        found[f"{DEIT}, fp32"] = lambda: self.deit(torch.float32)
        found["fastdeit, nothing compiled"] = lambda: self.ours(published, compile=False)
        if self.arguments.compile:
            found["fastdeit, student compiled"] = lambda: self.ours(published)
            found["fastdeit, teacher folded"] = lambda: self.ours(partial(made, laid_out=True))
            found["fastdeit, teacher compiled"] = lambda: self.ours(best)
        found["fastdeit, tuned"] = lambda: self.by_default("fastdeit, tuned", cuda_graph="off")
        return found

    def by_default(self, name: str, **speed) -> Step:
        """As the program has it that is told nothing but `speed`."""
        if self.arguments.compile != self.gpu:
            speed["compile"] = self.arguments.compile
        loop = steps.loop_on(self._configuration(**speed), self.world, self.noise)
        choices = list(loop.choices)
        if name == CACHED:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            step = steps.our_step(loop, steps.of_the_batch, steps.with_cached_logits(folder, self.batches))
        else:
            teacher, of_teacher = default_teacher(self.network, loop.trainer)
            choices += of_teacher
            step = steps.our_step(loop, teacher, self.batches)
        self.chosen[name] = {choice["question"]: choice["chosen"] for choice in choices}
        self.graphs[name] = loop.trainer.graph
        return step

    def ours(self, make: Callable, *, compile: bool | None = None) -> Step:
        """One thing after another. make: of the timm model and the trainer its teacher."""
        compile = self.arguments.compile if compile is None else compile
        loop = steps.loop_on(self._configuration(**steps.AS_WRITTEN, compile=compile), self.world, self.noise)
        return steps.our_step(loop, make(self.network, loop.trainer), self.batches)

    def conditions(self) -> dict[str, dict]:
        """By contender: what was chosen, and whether its step is a CUDA graph."""
        captured = {name: graph is not None and graph.replay is not None for name, graph in self.graphs.items()}
        return {name: {**chosen, "CUDA graph": captured[name]} for name, chosen in self.chosen.items()}

    def timm(self, *, channels_last: bool) -> Step:
        step = peers.Timm(
            *self._models_of_timm(), device=self.device, dtype=self.dtype, compile=self.arguments.compile,
            channels_last=channels_last,
        )  # fmt: skip
        batches = self._batches_of_timm(erase=0.25)
        return lambda: step(*next(batches))

    def deit(self, dtype: torch.dtype) -> Step:
        step = peers.Deit(*self._models_of_timm(), device=self.device, dtype=dtype)
        batches = self._batches_of_timm(erase=0.0)
        return lambda: step(*next(batches))

    def _configuration(self, **speed):
        size, pixels = self.arguments.batch_size, self.arguments.pixels
        return steps.configuration(self.student, batch_size=size, pixels=pixels, **speed)

    def _models_of_timm(self):
        student = peers.student_of_timm(self.student, classes=CLASSES, pixels=self.arguments.pixels, drop_path=0.1)
        return student, copy.deepcopy(self.network)

    def _batches_of_timm(self, erase: float):
        batch = self.batches[0]
        images = batch.images.permute(0, 3, 1, 2).contiguous()
        return peers.mixed(peers.noise(images, batch.labels, erase=erase), CLASSES)


def flops_per_image(student: str, pixels: int) -> int:
    """Of a forward and a backward pass."""
    model, images = create_model(student, img_size=pixels).train(), torch.randn(1, 3, pixels, pixels)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(logits.sum() for logits in model(images)).backward()
    return counter.get_total_flops()


def datasheet_peak(device: str) -> float | None:
    name = torch.cuda.get_device_name(device) if device != "cpu" else ""
    return next((peak for key, peak in DATASHEET.items() if key in name), None)


class Result:
    """The contenders of a student that could be built, with what is measured of them."""

    def __init__(self, case: Case, waterfall: bool, warm_up: int):
        self.case, self.steps, self.peaks, self.missing = case, {}, {}, []
        for name, build in case.contenders(waterfall).items():
            gc.collect()
            began = time.monotonic()
            try:
                self.steps[name], self.peaks[name] = steps.built(build, case.device, warm_up)
            except Exception as error:  # the others are still worth measuring
                traceback.print_exc()
                reason = " ".join(str(error).split())[:150]
                self.missing.append(f"{case.student}, {name}: {type(error).__name__}: {reason}")
            became = "runs" if name in self.steps else "FAILED"
            print(f"    {case.student}, {name}: {became} after {time.monotonic() - began:.0f} s", flush=True)
        self.flops = case.arguments.batch_size * flops_per_image(case.student, case.arguments.pixels)
        self.work: dict[str, Work] = {}

    def measure(self, rounds: int) -> None:
        self.timings = steps.in_turn(self.steps, self.case.device, rounds)

    def profile(self) -> None:
        self.work = {name: work_of(step) for name, step in self.steps.items()}

    def images_per_s(self, name: str) -> float:
        return 1e6 * self.case.arguments.batch_size / self.timings[name].median

    def mfu(self, name: str, peak: float | None) -> float | None:
        return None if peak is None else 1e6 * self.flops / self.timings[name].median / peak

    def rows(self, peaks: tuple[float | None, float | None]) -> list[list]:
        """peaks: FLOP/s of the datasheet and as measured, None where not known."""
        rows, live = [], self.timings.get(LIVE)
        for name, t in self.timings.items():
            work, memory = self.work.get(name), self.peaks[name]
            rows.append([
                self.case.student, name, *(f"{value / 1e3:.2f}" for value in (t.median, t.low, t.high)),
                f"{self.images_per_s(name):.1f}", _cell(live and t.median / live.median, ".3f"),
                *(_cell(self.mfu(name, peak), ".3f") for peak in peaks),
                _cell(None if memory is None else memory / 1e6, ".0f"),
                _cell(work and work.launches, ".0f"), _cell(work and work.kernels, ".0f"),
                _cell(work and work.idle_share(t.median), ".3f"),
            ])  # fmt: skip
        return rows

    def headlines(self, measured_peak: float | None) -> list[Headline]:
        """Ours beside the fastest peer; for cached logits also which share of the measured peak is reached."""
        theirs = {name: self.images_per_s(name) for name in self.timings if not name.startswith("fastdeit,")}
        if not theirs:
            return []
        peer = max(theirs, key=theirs.get)
        arguments, found = self.case.arguments, []
        for name, teacher in ((LIVE, f"live {arguments.teacher}"), (CACHED, "cached logits")):
            if name not in self.timings:
                continue
            what = f"training step, {self.case.student}, {teacher}, batch {arguments.batch_size}"
            ours, share = self.images_per_s(name), self.mfu(name, measured_peak) if name == CACHED else None
            speeds = steps.speed(ours, self.case.device), peer, steps.speed(theirs[peer], self.case.device)
            found.append(Headline(what, *speeds, round(ours / theirs[peer], 3), share and round(share, 3)))
        return found

    def waterfall(self, record: Record) -> None:
        labels = ON_GPU if self.case.gpu else ON_CPU
        bars = {label: self.timings[name].median / 1e3 for name, label in labels.items() if name in self.timings}
        title = f"a training step of {self.case.student}, batch {self.case.arguments.batch_size}"
        if (path := record.path("train_step.png")) is not None:
            charts.waterfall(bars, title, "ms", path)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def show(rows: list[list]) -> None:
    for row in rows:
        ms, _, _, images, times, sheet, measured, memory, launches, kernels, idle = row[2:]
        print(f"    {row[1]:30}{ms:>10} ms{images:>10} images/s{times:>7} x live", end="")
        print(f"  mfu {measured} ({sheet or '?'} of the datasheet)  {memory} MB" if measured else "", end="")
        print(f"  {launches} launches, {kernels} kernels, idle {idle}" if kernels else "", flush=True)


def settings() -> argparse.Namespace:
    own = parser(__doc__)
    own.add_argument("--students", nargs="+", help="default: DeiT-S and DeiT-B, on the CPU DeiT-Ti")
    own.add_argument("--teacher", help="default: regnety_160, on the CPU regnety_016")
    own.add_argument("--batch-size", type=int)
    own.add_argument("--rounds", type=int, help="samples of each contender")
    own.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    small, base, tiny = (f"deit_{size}_distilled_patch16_224" for size in ("small", "base", "tiny"))
    return steps.fill_in(
        own.parse_args(), students=([small, base], [tiny], [tiny]), batch_size=(256, 8, 4), rounds=(8, 15, 1),
        teacher=("regnety_160", "regnety_016", "test_byobnet"), compile=(True, False, False), pixels=(224, 224, 32),
    )  # fmt: skip


def main() -> None:
    arguments = settings()
    record, results, gpu = Record("train_step", arguments, COLUMNS), [], arguments.device != "cpu"
    torch._dynamo.config.recompile_limit = 256  # for contenders that in training have a process each
    peaks = (None, None)
    if gpu:
        measured = measure_ceilings(arguments.device, torch.bfloat16, quick=arguments.quick).matmul
        peaks = datasheet_peak(arguments.device), measured
        record.conditions["peak of dense bf16, FLOP/s"] = {"datasheet": peaks[0], "measured": round(measured, -9)}
    record.conditions |= {name: getattr(arguments, name) for name in ("students", "teacher", "batch_size", "rounds")}

    if (lacking := peers.timm_lacks()) is not None:
        record.conditions["left out"] = lacking
        print(f"    timm is left out: {lacking}")

    def write(result: Result) -> None:
        if not arguments.quick:
            show(result.rows(peaks))
        record.rows = [row for each in results for row in each.rows(peaks)]
        record.headlines = [headline for each in results for headline in each.headlines(peaks[1])]
        record.conditions["what a run gets by default"] = {
            each.case.student: each.case.conditions() for each in results
        }
        record.conditions["not measured"] = [reason for each in results for reason in each.missing]
        record.write()

    with tempfile.TemporaryDirectory() as folder:
        for i, student in enumerate(arguments.students):
            result = Result(
                Case(arguments, student, Path(folder)), waterfall=i == 0, warm_up=1 if arguments.quick else WARM_UP + 2
            )
            result.measure(arguments.rounds)
            results.append(result)
            write(result)
            if i == 0:
                result.waterfall(record)
        for result in results if gpu else ():
            result.profile()
            write(result)
    if failed := record.conditions["not measured"]:
        sys.exit("\n".join(["not measured:", *failed]))


if __name__ == "__main__":
    main()
