"""Writing a logit cache: a live teacher's targets for the epochs of a training run to come."""

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastdeit.batch import settle
from fastdeit.checkpoint import atomic
from fastdeit.config import Config
from fastdeit.data import first_views, loaders, open_images, precision_of, prepare
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.models.build import build_student, mean_std
from fastdeit.tuning import of_run

from . import logit_cache
from .cached_teacher import describe, kind_of_targets, probe_of
from .logit_cache import LogitCache, Piece, Writer, differences
from .teacher import speed_up
from .teachers import load_teachers

REPORT_EVERY = 10.0  # seconds


def write_cache(config: Config, world: World, folder: Path, *, epochs: int, top: int = 10) -> None:
    """Write the teacher's targets for `epochs` epochs of the run that `config` describes; an interrupted cache resumes.

    folder: a new one, or that of the interrupted cache. top: of soft targets, how many classes keep their probability.
    Raises UserError for a folder with other files, a cache started with other settings, a full disk.
    """
    indices = open_images(config, world)
    config, told = settle(config, world, _student(config, indices[0].classes), len(indices[0]))
    targets = TeacherTargets(config, world, indices[0].classes, top)
    for sentence in told:
        _say(world, sentence)
    _claim(folder, world)
    loader, _ = loaders(config, indices, world, folder if world.is_main else None)
    # A teacher that is refused here must not leave a cache behind.
    for sentence in targets.teacher.check(first_views(loader, targets.prepare)):
        _say(world, sentence)
    header = targets.header(loader, epochs)
    if world.is_main and not (folder / "header.json").is_file():
        logit_cache.create(folder, header, probe_of(loader, targets.prepare))
    world.barrier()
    header = _started(folder, header)
    pieces = world.broadcast(logit_cache.missing(folder, header) if world.is_main else None)
    _write(folder, header, targets.pieces(loader, pieces), len(pieces), world)
    world.barrier()
    size = sum(array.nbytes for array in LogitCache(folder).arrays.values())
    _say(
        world,
        f"the logit cache {folder} is complete: {epochs} epoch{'s' * (epochs != 1)} of {header['positions']:,} images, "
        f"{size / 1e6:,.2f} MB; train with the same flags and --teacher-store {folder}",
    )


def _student(config: Config, classes: tuple[str, ...]) -> nn.Module:
    """Only its normalisation and its size are needed."""
    plain = Config.from_dict(config.to_dict())
    plain.model.pretrained = False
    return build_student(plain, len(classes))[0]


def _claim(folder: Path, world: World) -> None:
    """Create the folder; UserError if it has other files than an interrupted cache's."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: there is a file of this name; choose another folder")
    if world.is_main and folder.is_dir():
        ours = {f"{name}.npy" for name in ("indices", "labels", "classes", "probabilities", "probe")}
        ours |= {"header.json", "written", "bad_files.txt"}
        if {path.name for path in folder.iterdir() if path.suffix != atomic.UNFINISHED} - ours:
            raise UserError(f"--output {folder} contains other files, which are left untouched: choose another folder")
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()


def _started(folder: Path, header: dict) -> dict:
    """The header that the cache was started with; refused if that was another teacher, other data or other flags."""
    started = logit_cache.read_header(folder)
    if found := differences(logit_cache.identity(started), logit_cache.identity(header)):
        raise UserError(
            f"the logit cache {folder} was started with other settings: {'; '.join(found[:3])}; resume it with the "
            "command that started it, or give another --output"
        )
    return started


def _write(folder: Path, header: dict, pieces: Iterable[tuple[Piece, dict]], count: int, world: World) -> None:
    writer = Writer(folder, header, world.rank, world.world_size)
    images, begun, said = 0, time.monotonic(), time.monotonic()
    for number, (piece, rows) in enumerate(pieces, 1):
        try:
            writer.write(piece, rows)
        except OSError as error:
            raise UserError(
                f"the logit cache {folder} cannot be written ({error.strerror}): make room and repeat the command; "
                "what is written is kept"
            ) from error
        images += rows["indices"].size * world.world_size
        now = time.monotonic()
        if now - said > REPORT_EVERY:
            left = int((now - begun) / number * (count - number))
            _say(
                world,
                f"epoch {piece[0] + 1} of {header['views']}, {images / (now - begun):,.0f} images/s, "
                f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left",
            )
            said = now
    writer.close()


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


class TeacherTargets:
    """A live teacher's targets for the batches of a run, as a logit cache holds them."""

    def __init__(self, config: Config, world: World, classes: tuple[str, ...], top: int):
        self.config, self.classes, self.top = config, classes, min(top, len(classes))
        self.kind = kind_of_targets(config.distillation)
        self.hard = self.kind == "hard"
        self.mean, self.std = mean_std(_student(config, classes))
        self.precision = precision_of(config, world.device)
        self.teacher = load_teachers(config, classes, student_mean=self.mean, student_std=self.std, world=world)
        speed_up(self.teacher, config, of_run(config, world, None))

    def prepare(self, batch) -> Tensor:
        return prepare(batch, self.mean, self.std, self.precision)

    def header(self, loader, epochs: int) -> dict:
        global_batch = loader.plans.batch_size * loader.plans.world_size
        return {
            "format": logit_cache.FORMAT,
            "kind": self.kind,
            "classes": len(self.classes),
            "top": None if self.hard else self.top,
            "tau": None if self.hard else self.config.distillation.distillation_tau,
            "views": epochs,
            "positions": len(loader) * global_batch,
            "global_batch": global_batch,
            "piece_steps": logit_cache.PIECE_STEPS,
            "teacher": self.teacher.identity(),
            "teacher_name": self.teacher.name,
            **describe(self.config, loader, mean=self.mean, std=self.std, precision=self.precision),
            "settings": self.config.to_dict(),
        }

    def pieces(self, loader, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, dict[str, np.ndarray]]]:
        """This process's rows of each piece, for each array of the cache."""
        batches, at = None, None
        for piece in pieces:
            epoch, first, end = piece
            if at != (epoch, first):  # does not continue the piece before
                loader.set_epoch(epoch)
                loader.load_state_dict({"position": first})
                batches = iter(loader)
            yield piece, self.rows(islice(batches, end - first))
            at = (epoch, end)

    def rows(self, batches: Iterable) -> dict[str, np.ndarray]:
        """(steps, batch, ...) for each array. The host synchronises with the device once, at the end."""
        indices, targets, finite = [], [], []
        for batch in batches:
            logits = self.teacher(self.prepare(batch))
            finite.append(logits.isfinite().all())
            targets.append(self._targets(logits))
            indices.append(batch.indices.numpy())
        if not torch.stack(finite).all():
            raise UserError(f"the teacher {self.teacher.name} gave logits that are not finite; they were not written")
        names = ("labels",) if self.hard else ("classes", "probabilities")
        columns = (torch.stack(column).cpu().numpy() for column in zip(*targets))
        return {"indices": np.stack(indices), **dict(zip(names, columns))}

    def _targets(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Labels (B,), or the likeliest classes (B, top) and their probabilities."""
        if self.hard:
            return (first_argmax(logits),)
        probabilities = (logits.float() / self.config.distillation.distillation_tau).softmax(1)
        values, classes = probabilities.topk(self.top, dim=1)
        return classes, values.half()


def first_argmax(logits: Tensor) -> Tensor:
    """(B,) int64: the first of equal maxima, as in distillation_loss; torch.argmax may return any of them."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(logits == logits.amax(1, keepdim=True), classes, logits.shape[1]).amin(1)
