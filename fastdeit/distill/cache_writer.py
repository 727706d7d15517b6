"""A teacher's answers to the views of a training run to come, written once, for runs with no teacher in memory.

    python -m fastdeit.teach store --views 30 --output STORE --data-path DIR --teacher-path RUN --distillation-type hard
    torchrun --nproc-per-node 8 -m fastdeit.teach store ...
    python -m fastdeit.train --teacher-store STORE --data-path DIR --distillation-type hard
    python -m fastdeit.teach verify STORE

`store` takes the flags of fastdeit.train: give those of the run to come, for they decide what the images look like. The
same command once more goes on where it was stopped. teacher_store.py says what is in the folder.
"""

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from fastdeit import cli
from fastdeit.checkpoint import atomic
from fastdeit.cli import parse_config
from fastdeit.config import Config
from fastdeit.data import first_views, precision_of, prepare
from fastdeit.distributed.world import World, join
from fastdeit.errors import UserError

from . import logit_cache
from .cached_teacher import describe, positions_of, probe_of
from .logit_cache import Piece, Store, Writer, differences

SAY_EVERY = 10.0  # seconds


@dataclass(kw_only=True)
class Options:
    """What is stored, and where."""

    views: int | None = None
    """Required: how many epochs of augmented views to answer; later epochs use them again."""
    output: Path | None = None
    """Required: folder of the store."""
    top: int = 10
    """Soft answers: how many classes keep their probability."""


@dataclass(kw_only=True)
class _CommandLine(Config):
    """The settings of the run to come, and the store's own."""

    store: Options = field(default_factory=Options)


def store(arguments: list[str]) -> None:
    given = parse_config(arguments, prog="python -m fastdeit.teach store", kind=_CommandLine, description=__doc__)
    options, config = given.store, Config(**{group.name: getattr(given, group.name) for group in fields(Config)})
    _check(options, config)
    with join(config.run.device) as world:
        _store(options, config, world)


def _check(options: Options, config: Config) -> None:
    if options.views is None or options.output is None:
        raise UserError("teach store needs --views N, how many epochs of views to answer, and --output STORE")
    for flag, value in (("--views", options.views), ("--top", options.top)):
        if value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    if config.distillation.distillation_type == "none":
        raise UserError("teach store needs --distillation-type hard or soft, as the training run will have it")
    if config.distillation.teacher_store is not None:
        raise UserError("teach store asks a live teacher: leave --teacher-store away")


def _store(options: Options, config: Config, world: World) -> None:
    from fastdeit.data import loaders, open_images
    from fastdeit.digits import with_digits

    config = with_digits(config, world)
    indices = open_images(config, world)
    live = LiveAnswers(config, world, indices[0].classes, options.top)
    _claim(options.output, world)
    loader, _ = loaders(config, indices, world, options.output if world.is_main else None)
    # Before there is a store of what may be refused here.
    for sentence in live.teacher.check(first_views(loader, live.prepare)):
        _say(world, sentence)
    header = live.header(loader, options.views)
    if world.is_main and not (options.output / "header.json").is_file():
        logit_cache.create(options.output, header, probe_of(loader, live.prepare))
    world.barrier()
    header = _begun(options.output, header)
    pieces = world.broadcast(logit_cache.missing(options.output, header) if world.is_main else None)
    _write(options.output, header, live.pieces(loader, pieces), len(pieces), world)
    world.barrier()
    size = sum(array.nbytes for array in Store(options.output).arrays.values())
    _say(
        world,
        f"{options.output} is complete: {options.views} views of {header['positions']:,} images, {size / 1e6:,.1f} MB; "
        f"train with the same flags and --teacher-store {options.output}",
    )


def _claim(folder: Path, world: World) -> None:
    """The store's folder: a new one, or one that a store was begun in."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: there is a file of this name; choose another folder")
    if world.is_main and folder.is_dir():
        ours = {f"{name}.npy" for name in ("indices", "labels", "classes", "probabilities", "probe")}
        ours |= {"header.json", "written", "bad_files.txt"}
        if {path.name for path in folder.iterdir() if path.suffix != atomic.UNFINISHED} - ours:
            raise UserError(f"--output {folder} holds other files, which are left untouched: choose another folder")
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()


def _begun(folder: Path, header: dict) -> dict:
    """The header that the store was begun with; refused if that was with another teacher, other data or other flags."""
    begun = logit_cache.read_header(folder)
    if found := differences(logit_cache.asked(begun), logit_cache.asked(header)):
        raise UserError(
            f"the store {folder} was begun otherwise: {'; '.join(found[:3])}; go on with the command that began it, or "
            "give another --output"
        )
    return begun


def _write(folder: Path, header: dict, pieces: Iterable[tuple[Piece, dict]], count: int, world: World) -> None:
    writer = Writer(folder, header, world.rank, world.world_size)
    images, begun, said = 0, time.monotonic(), time.monotonic()
    for number, (piece, rows) in enumerate(pieces, 1):
        try:
            writer.write(piece, rows)
        except OSError as error:
            raise UserError(
                f"the store {folder} cannot be written to ({error.strerror}): make room, and give the same command "
                "again; what is written is kept"
            ) from error
        images += rows["indices"].size * world.world_size
        now = time.monotonic()
        if now - said > SAY_EVERY:
            left = int((now - begun) / number * (count - number))
            _say(
                world,
                f"view {piece[0] + 1} of {header['views']}, {images / (now - begun):,.0f} images/s, left "
                f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}",
            )
            said = now
    writer.close()


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


class LiveAnswers:
    """A live teacher's answers to the views of a run, as a store keeps them."""

    def __init__(self, config: Config, world: World, classes: tuple[str, ...], top: int):
        from fastdeit.models.build import build_student
        from fastdeit.models.loading import mean_std

        from .teacher import load_teacher

        self.config, self.classes, self.top = config, classes, min(top, len(classes))
        self.hard = config.distillation.distillation_type == "hard"
        plain = Config.from_dict(config.to_dict())  # of the student only its normalisation is asked for
        plain.model.pretrained = False
        self.mean, self.std = mean_std(build_student(plain, len(classes))[0])
        self.precision = precision_of(config, world.device)
        self.teacher = load_teacher(config, classes, student_mean=self.mean, student_std=self.std, world=world)

    def prepare(self, batch) -> Tensor:
        return prepare(batch, self.mean, self.std, self.precision)

    def header(self, loader, views: int) -> dict:
        global_batch = loader.plans.batch_size * loader.plans.world_size
        return {
            "format": logit_cache.FORMAT,
            "kind": self.config.distillation.distillation_type,
            "classes": len(self.classes),
            "top": None if self.hard else self.top,
            "tau": None if self.hard else self.config.distillation.distillation_tau,
            "views": views,
            "positions": len(loader) * global_batch,
            "global_batch": global_batch,
            "piece_steps": logit_cache.STEPS_AT_ONCE,
            "teacher": self.teacher.identity(),
            "teacher_name": self.teacher.name,
            **describe(self.config, loader, mean=self.mean, std=self.std, precision=self.precision),
            "settings": self.config.to_dict(),
        }

    def pieces(self, loader, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, dict[str, np.ndarray]]]:
        """This process's rows of each piece, for each array of the store."""
        batches, at = None, None
        for piece in pieces:
            view, first, end = piece
            if at != (view, first):  # not the next one of the same view
                loader.set_epoch(view)
                loader.load_state_dict({"position": first})
                batches = iter(loader)
            yield piece, self.rows(islice(batches, end - first))
            at = (view, end)

    def rows(self, batches: Iterable) -> dict[str, np.ndarray]:
        """(steps, batch, ...) for each array. The host waits for the device once, at the end."""
        indices, answers, finite = [], [], []
        for batch in batches:
            logits = self.teacher(self.prepare(batch))
            finite.append(logits.isfinite().all())
            answers.append(self.kept(logits))
            indices.append(batch.indices.numpy())
        if not torch.stack(finite).all():
            raise UserError(f"the teacher {self.teacher.name} gave answers that are not finite; they were not stored")
        names = ("labels",) if self.hard else ("classes", "probabilities")
        columns = (torch.stack(column).cpu().numpy() for column in zip(*answers))
        return {"indices": np.stack(indices), **dict(zip(names, columns))}

    def kept(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Decisions (B,), or the likeliest classes (B, top) and their probabilities."""
        if self.hard:
            return (first_argmax(logits),)
        probabilities = (logits.float() / self.config.distillation.distillation_tau).softmax(1)
        values, classes = probabilities.topk(self.top, dim=1)
        return classes, values.half()


def first_argmax(logits: Tensor) -> Tensor:
    """(B,) int64: the first class among equals, as distillation_loss decides; torch.argmax promises none of them."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(logits == logits.amax(1, keepdim=True), classes, logits.shape[1]).amin(1)


# ---------------------------------------------------------------------------------------------------------------------


def verify(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    import tyro

    @dataclass(kw_only=True)
    class Verify:
        store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
        """The folder that teach store wrote."""
        data_path: Path | None = None
        """Where the images are now, if they have moved."""
        teacher_path: str | None = None
        """Where the teacher is now, if it has moved."""
        batches: int = 8
        """How many are asked again, spread over the store."""
        device: str | None = None
        """cuda, cuda:N or cpu. Default: cuda where present."""

    about = "Compare a store's checksums, and a sample of its answers with those of the live teacher."
    options = cli.parse(Verify, prog="python -m fastdeit.teach verify", args=arguments, description=about)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("teach verify is one process: start it with python, not with torchrun")
    if options.batches < 1:
        raise UserError(f"--batches {options.batches}: must be at least 1")
    kept = Store(options.store)
    if damaged := kept.damaged():
        places = ", ".join(f"view {view} steps {first} to {end - 1}" for view, first, end in damaged[:3])
        raise UserError(
            f"the store {options.store} is damaged, checksums differ at {places}; remove it and store again"
        )
    print(f"{options.store}: checksums agree")
    config = Config.from_dict(kept.header["settings"])
    config.data.data_path = options.data_path or config.data.data_path
    config.distillation.teacher_path = options.teacher_path or config.distillation.teacher_path
    with join(options.device) as world:
        agreement, images, farthest = _agreement(kept, config, world, options.batches)
    text = f"of {images} images asked again the teacher decides as stored on {100 * agreement:.2f} %"
    print(text if farthest is None else f"{text}; its probabilities differ by at most {farthest:.2g}")
    if agreement < 1 and kept.header["kind"] == "hard":
        print("on the machine that wrote the store this must be 100 %: another GPU or PyTorch rounds otherwise")
        return 1
    return 0


def _agreement(kept: Store, config: Config, world: World, batches: int) -> tuple[float, int, float | None]:
    """(share of equal decisions, images, largest difference of a probability)."""
    from fastdeit.data import loaders, open_images

    indices = open_images(config, world)
    live = LiveAnswers(config, world, indices[0].classes, kept.header["top"] or 1)
    same, images, farthest = 0, 0, None
    pieces = logit_cache.pieces_of(kept.header)
    for number in range(batches):
        view, first, end = pieces[number * len(pieces) // batches]
        step = first + number % (end - first)
        # The rank whose images are asked again changes too: each was perhaps answered by another GPU.
        per_process = config.data.batch_size * config.optimization.accumulate
        world_size = kept.header["global_batch"] // per_process
        loader, _ = loaders(config, indices, World(world.device, number % world_size, world_size), None)
        if number == 0:
            _same_views(kept, live, loader)
        loader.set_epoch(view)
        loader.load_state_dict({"position": step})
        rows = live.rows(islice(loader, 1))
        stored = kept.rows(view, positions_of(loader, step))
        name = "labels" if live.hard else "classes"
        decisions = [np.asarray(answers[name]).reshape(loader.plans.batch_size, -1)[:, 0] for answers in (rows, stored)]
        same, images = same + int((decisions[0] == decisions[1]).sum()), images + len(decisions[0])
        if not live.hard:
            difference = np.abs(rows["probabilities"][0].astype(np.float32) - stored["probabilities"]).max()
            farthest = max(farthest or 0.0, float(difference))
    return same / images, images, farthest


def _same_views(kept: Store, live: LiveAnswers, loader) -> None:
    own = {**describe(live.config, loader, mean=live.mean, std=live.std, precision=live.precision)}
    own["teacher"] = live.teacher.identity()
    if found := differences({key: kept.header.get(key) for key in own}, own):
        raise UserError(f"the store {kept.folder} cannot be verified here: {'; '.join(found[:3])}")
