"""A curriculum of size and strength: early epochs see the low frequencies of the images, as smaller images, and weak
augmentation (EfficientTrain++: Wang et al., arXiv 2405.08768; LeapLabTHU/EfficientTrain, _ET_pp_main_deitS.py).

It is a list of parts of equal work. An image of size s costs (s / S)^2 of one at the full size S, the size of the
images, so with n parts a part of size s has E / n x (S / s)^2 epochs, where E (--epochs) is the work of the whole run
in epochs at the full size. A part begins with an epoch: its end is rounded to one.

    published for DeiT at 224 pixels       96  96  160  160  160  160  192  192  224  224
    magnitude of RandAugment                0   1    2    3    4    5    6    7    8    9
    epochs, for the work of 100            54  55   19   20   20   19   14   14   10   10      235 in all
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from fastdeit.config import Config, Size, in_pixels
from fastdeit.errors import UserError

PUBLISHED = {"efficienttrain": "96:0,96:1,160:2,160:3,160:4,160:5,192:6,192:7,224:8,224:9"}


@dataclass(frozen=True)
class Part:
    """The epochs from `first` to `end`, that one excluded. size: of the student's images, in pixels. magnitude: of
    RandAugment; None: as --aa says."""

    size: Size
    magnitude: int | None
    first: int
    end: int


@dataclass(frozen=True)
class Curriculum:
    """budget: the work of the run, in epochs at the full size."""

    parts: tuple[Part, ...]
    budget: int

    @classmethod
    def of(cls, config: Config) -> "Curriculum":
        """Of the settings of a run; without --curriculum one part. Raises UserError for what cannot be read, or does
        not fit the images."""
        return cls.read(config.optimization.curriculum, config.optimization.epochs, config.data.input_size)

    @staticmethod
    @lru_cache
    def read(text: str, budget: int, full: Size) -> "Curriculum":
        """text: what --curriculum takes. full: the images' size."""
        if text == "none":
            return Curriculum((Part(full, None, 0, budget),), budget)
        sizes = _read(text)
        _check(text, sizes, full)
        parts, done, first = [], Fraction(0), 0
        for size, magnitude in sizes:
            done += Fraction(budget * full**2, len(sizes) * size**2)
            parts.append(Part(size, magnitude, first, round(done)))
            first = round(done)
        if parts[-1].first == parts[-1].end:
            raise UserError(
                f"--epochs {budget}: the last of the {len(parts)} parts of --curriculum {text} would have no epoch: "
                f"give --epochs {len(parts)}, or fewer parts"
            )
        return Curriculum(tuple(parts), budget)

    @property
    def epochs(self) -> int:
        """Passes over the training images."""
        return self.parts[-1].end

    @property
    def sizes(self) -> tuple[Size, ...]:
        """In the order they come, each once."""
        return tuple(dict.fromkeys(part.size for part in self.parts))

    @property
    def magnitudes(self) -> tuple[tuple[int, int], ...]:
        """(epoch, magnitude of RandAugment from there on); empty where --aa says it."""
        return tuple(
            (part.first, part.magnitude) for part in self.parts if part.magnitude is not None and part.end > part.first
        )

    def in_words(self) -> str:
        """235 epochs, the work of 100 at 224 pixels: 96 pixels until epoch 109, 160 until 187, ..."""
        ends = {part.size: part.end for part in self.parts if part.end > part.first}
        until = ", ".join(
            f"{in_pixels(size)}{' pixels' * (not i)} until {'epoch ' * (not i)}{end}"
            for i, (size, end) in enumerate(ends.items())
        )
        return (
            f"{self.epochs:,} epochs, the work of {self.budget:,} at {in_pixels(self.parts[-1].size)} pixels: {until}"
        )

    def part(self, epoch: int) -> Part:
        """That an epoch belongs to, counted from 0."""
        return next((part for part in self.parts if epoch < part.end), self.parts[-1])

    def work(self, step: int, steps_per_epoch: int) -> float:
        """What is done after so many steps, in steps at the full size: at the end of the i-th of n parts i / n of the
        budget, whatever the rounding of its end to an epoch. Without --curriculum, `step` itself."""
        share, before = self.budget / len(self.parts), 0.0
        for part in self.parts:
            epochs = part.end - part.first
            if epochs and (step <= part.end * steps_per_epoch or part is self.parts[-1]):
                return before * steps_per_epoch + (step - part.first * steps_per_epoch) * (share / epochs)
            before += share
        raise AssertionError("the last part has epochs")


def _check(text: str, sizes: list[tuple[int, int | None]], full: Size) -> None:
    if not isinstance(full, int):
        raise UserError(f"--curriculum {text} has sizes of squares: give a square --input-size, not {in_pixels(full)}")
    last, largest = sizes[-1][0], max(size for size, _ in sizes)
    if last != full or largest > full:
        wrong = f"{largest} is above" if largest > full else f"its last size, {last}, is not"
        raise UserError(
            f"--curriculum {text}: {wrong} that of the images, {full}: give parts SIZE:MAGNITUDE,... that end with "
            f"{full}, or another --input-size"
        )


def _read(text: str) -> list[tuple[int, int | None]]:
    """(size, magnitude or None) of each part."""
    parts = PUBLISHED.get(text, text).split(",")
    found = [re.fullmatch(r"([1-9]\d{0,4})(?::(\d{1,2}))?", part) for part in parts]
    with_magnitude = {match is not None and match[2] is not None for match in found}
    if not all(found) or len(with_magnitude) > 1:
        raise UserError(
            f"--curriculum {text}: give none, {', '.join(PUBLISHED)}, or parts of equal work SIZE:MAGNITUDE,... such "
            "as 14:0,21:5,28:9 (all with the magnitude of RandAugment, or none)"
        )
    return [(int(match[1]), None if match[2] is None else int(match[2])) for match in found if match]
