"""The choice itself: candidates compared with the default, then timed, and who takes whose word.

An answer is sought where it was given before: in the checkpoint that a run resumes from, or its bits would differ; then
in the machine's cache; else it is measured, by rank 0 for all. No failure of a candidate ends a run, but one: where the
GPU's context is lost, nothing computes any more.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdeit.config import Config
from fastdeit.distributed.world import World
from fastdeit.errors import UserError

from . import cache, timing
from .table import table

MARGIN = 0.98  # of the default's time, which a challenger must stay below

WORTH_IT = 1000  # steps of a run for which auto measures: compiling the candidates takes minutes

Candidate = Callable[[], Callable[[], object]]
Mode = Literal["auto", "off", "fresh"]


@dataclass(frozen=True)
class Row:
    """One candidate: median milliseconds, the largest relative difference of its tensors from the default's, and why it
    was excluded, "" if it was not."""

    candidate: str
    ms: float | None = None
    error: float | None = None
    excluded: str = ""


@dataclass(frozen=True)
class Choice:
    """The answer to a question, and how it came about.

    key: what it depends on beside the machine. here: the machine and the versions (cache.circumstances).
    origin: measured, cache, checkpoint, or default where nothing was measured. seconds: what measuring took.
    notes: sentences
    """

    question: str
    chosen: str
    default: str
    key: dict
    here: dict
    origin: str = "default"
    rows: tuple[Row, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict) -> "Choice":
        """Raises TypeError or KeyError for what another version wrote."""
        rows = tuple(Row(**row) for row in saved["rows"])
        return cls(**saved | {"rows": rows, "notes": tuple(saved["notes"])})


@dataclass
class Tuner:
    """Answers questions and keeps the answers, in `choices`.

    mode: auto; off, the default is the answer to all; fresh, the cache is not read
    measures: whether auto measures what nobody has measured before; None: on a GPU
    deterministic: leave out candidates that give other bits each time
    say: takes a sentence before something is measured
    earlier: choices of the checkpoint that the run resumes from, as `to_dict` gives them
    file: the cache on disk; None: the user's
    """

    world: World
    mode: Mode = "auto"
    measures: bool | None = None
    deterministic: bool = False
    say: Callable[[str], object] = lambda sentence: None
    earlier: Collection[dict] = ()
    file: Path | None = None
    choices: list[Choice] = field(default_factory=list)

    def choose(
        self, question: str, candidates: dict[str, Candidate], *, default: str, key: dict, dtype: torch.dtype,
        cold: bool = False, tolerance: float | None = None, nondeterministic: Collection[str] = (),
    ) -> Choice:  # fmt: skip
        """The fastest of `candidates` that agrees with the one named `default`; the same on every rank.

        question: a few words, the same in every run. key: what the answer depends on beside the machine, in JSON types:
        model, shapes, whether compiled. dtype: of the arithmetic; it goes into the key.
        tolerance: of the norm of each returned tensor, be it output or gradient; None: `tolerance_of` the dtype.
        cold: timing.in_turns. nondeterministic: names of candidates that give other bits each time.

        Builders run on rank 0 only, with a random state of their own, and must not change what the run uses.
        """
        assert not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()), "tuning inside a graph"
        assert default in candidates and default not in nondeterministic
        if self.mode == "off":
            return Choice(question, default, default, key, {})
        if self.world.is_main:
            if self.deterministic:
                candidates = {name: one for name, one in candidates.items() if name not in nondeterministic}
            key = json.loads(json.dumps({**key, "dtype": str(dtype).removeprefix("torch.")}))
            begun = Choice(question, default, default, key, cache.circumstances(self.world.device))
            tolerance = tolerance_of(dtype, self.world.device) if tolerance is None else tolerance
            choice = self._answer(begun, candidates, _Measurement(tolerance, cold, self.world))
            self.world.broadcast(choice)
        else:
            while (choice := self.world.broadcast(None)) is None:  # rank 0 is at the next candidate
                pass
        self.choices.append(choice)
        return choice

    # What torch._dynamo.forbid_in_graph sets, without its import: a compiled function that asks raises AssertionError.
    choose._dynamo_forbidden = True

    def table(self) -> str:
        """What was measured and chosen so far, to print; "" where nothing was."""
        return table([choice.to_dict() for choice in self.choices])

    def to_json(self) -> list[dict]:
        return [choice.to_dict() for choice in self.choices]

    # -----------------------------------------------------------------------------------------------------------------
    # Rank 0

    def _answer(self, begun: Choice, candidates: dict[str, Candidate], measurement: "_Measurement") -> Choice:
        file = self.file or cache.default_file()
        earlier, notes = self._earlier(begun, candidates)
        if earlier is not None:
            return earlier
        if len(candidates) == 1:
            return _with(begun, notes=notes)
        asked = {"question": begun.question, **begun.key, "candidates": sorted(candidates), **begun.here}
        key = json.dumps(asked, sort_keys=True)
        known = {} if self.mode == "fresh" else cache.read(file).get(key, {})
        try:
            found = Choice.from_dict(known)
            if found.chosen in candidates:
                return _with(found, origin="cache", notes=notes)
        except (TypeError, KeyError):
            pass  # nothing is known, or by another version
        if self.mode == "auto" and not (self.measures if self.measures is not None else _on_gpu(self.world)):
            return _with(begun, notes=notes)
        self.say(f"measuring {begun.question}: {', '.join(candidates)}")
        broken = known.get("broken", {}) if isinstance(known, dict) else {}
        try:
            choice = measurement.choose(begun, candidates, broken)
        except _ContextLost as lost:
            cache.add(file, key, {"broken": {**broken, lost.candidate: lost.reason}})
            raise UserError(
                f"{begun.question}: the candidate {lost.candidate} has broken the GPU's context ({lost.reason}); "
                "start again: it will be left out. --tune off tries none"
            ) from None
        if choice.origin == "measured":
            cache.add(file, key, choice.to_dict())
        return _with(choice, notes=(*notes, *choice.notes))

    def _earlier(self, begun: Choice, candidates: Collection[str]) -> tuple[Choice | None, tuple[str, ...]]:
        """The checkpoint's choice, if it exists here; else why not, in a sentence."""
        saved = next((one for one in self.earlier if one.get("question") == begun.question), None)
        if saved is None:
            return None, ()
        try:
            saved = Choice.from_dict(saved)
        except (TypeError, KeyError):
            return None, ("the checkpoint's choice is of another form",)
        other = [
            f"{name} {saved.here.get(name, 'none')}, here {value}" for name, value in begun.here.items()
            if name != "driver" and saved.here.get(name, "none") != value
        ]  # fmt: skip
        if other:
            return None, (f"the checkpoint's choice, {saved.chosen}, was made elsewhere ({'; '.join(other)})",)
        if saved.chosen not in candidates:
            return None, (f"the checkpoint's choice, {saved.chosen}, does not exist here",)
        return _with(saved, origin="checkpoint", notes=()), ()


def of_run(config: Config, world: World, description: dict | None, *, steps: int | None = None) -> Tuner:
    """The Tuner that a run's settings ask for.

    description: config.json of the checkpoint that it resumes from, whose choices it takes unless the command line says
    --tune fresh; None for a run that begins. steps: of the run; auto measures for no short one.
    """
    mode = config.speed.tune
    if description is not None and mode == "fresh" and "--tune" not in config.typed:
        mode = "auto"  # fresh when it was started
    earlier = description.get("tuning", ()) if description is not None and mode == "auto" else ()
    measures = False if steps is not None and steps < WORTH_IT else None
    return Tuner(
        world, mode=mode, measures=measures, deterministic=config.speed.deterministic, say=say, earlier=earlier
    )


def say(sentence: str) -> None:
    """Before the run has a log; rank 0 alone measures."""
    print(sentence, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def tolerance_of(dtype: torch.dtype, device: torch.device) -> float:
    """Half of the dtype's digits: rounding through a network stays below it, a wrong operation does not. In float32 a
    GPU's convolutions multiply in TF32, unless told otherwise, which has float16's digits."""
    if dtype == torch.float32 and device.type == "cuda":
        dtype = torch.float16
    return torch.finfo(dtype).eps ** 0.5


class _ContextLost(Exception):
    def __init__(self, candidate: str, reason: str):
        self.candidate, self.reason = candidate, reason


class _Excluded(Exception):
    """Why, in words."""


@dataclass
class _Measurement:
    tolerance: float
    cold: bool
    world: World

    def choose(self, begun: Choice, candidates: dict[str, Candidate], broken: dict[str, str]) -> Choice:
        """broken: candidates not to be tried, and why. The default is the answer if it fails itself."""
        start, device = time.perf_counter(), self.world.device
        rows = {name: Row(name, excluded=broken.get(name, "")) for name in (begun.default, *candidates)}
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            calls = self._agreeing(rows, candidates)
            self._time(rows, calls)
            fastest, notes = _fastest(rows, begun.default), ()
            if fastest != begun.default and not self._wins_again(fastest, begun.default, calls):
                fastest, notes = begun.default, (f"{fastest} won the first of two measurements only",)
        calls.clear()
        _free(device)
        choice = _with(begun, rows=tuple(rows.values()), seconds=round(time.perf_counter() - start, 3))
        if rows[begun.default].excluded:
            return _with(choice, notes=("the default failed, so nothing was chosen",))
        return _with(choice, chosen=fastest, origin="measured", notes=notes)

    def _time(self, rows: dict[str, Row], calls: dict[str, timing.Call]) -> None:
        times = timing.in_turns(calls, self.world.device, cold=self.cold) if len(calls) > 1 else {}
        for name, ms in times.items():
            failed = isinstance(ms, Exception)
            rows[name] = self._failed(name, _in_words(ms)) if failed else Row(name, round(ms, 5), rows[name].error)

    def _wins_again(self, fastest: str, default: str, calls: dict[str, timing.Call]) -> bool:
        """On a busy machine the luckiest of many wins once."""
        rows = {name: Row(name) for name in (default, fastest)}
        self._time(rows, {name: calls[name] for name in rows})
        return _fastest(rows, default) == fastest

    def _agreeing(self, rows: dict[str, Row], candidates: dict[str, Candidate]) -> dict[str, timing.Call]:
        """Build and call each once, the default first; fill in its row. Returns those that agree with the default."""
        calls: dict[str, timing.Call] = {}
        expected = None
        for name in [name for name in rows if not rows[name].excluded]:
            self.world.broadcast(None)  # for the ranks that wait, so that their patience does not end
            call, reason = None, ""
            try:
                torch.manual_seed(0)
                call = candidates[name]()
                tensors = _tensors(call())
                expected = tensors if expected is None else expected
                rows[name] = Row(name, error=_agreement(tensors, expected, self.tolerance))
                calls[name] = call
            except Exception as error:
                reason = _in_words(error)
            call = tensors = None
            if reason:  # only now has the exception let go of what the candidate had allocated
                _free(self.world.device)
                rows[name] = self._failed(name, reason)
                if expected is None:
                    break
        return calls

    def _failed(self, name: str, reason: str) -> Row:
        device = self.world.device
        if device.type == "cuda":
            try:
                torch.zeros(1, device=device).item()
            except Exception:
                raise _ContextLost(name, reason) from None
        return Row(name, excluded=reason)


def _fastest(rows: dict[str, Row], default: str) -> str:
    times = {name: row.ms for name, row in rows.items() if row.ms is not None}
    challengers = {name: ms for name, ms in times.items() if default in times and ms < MARGIN * times[default]}
    return min(challengers, key=challengers.__getitem__, default=default)


def _agreement(tensors: list[Tensor], expected: list[Tensor], tolerance: float) -> float:
    """The largest ||tensor - expected|| / ||expected||. Raises _Excluded above the tolerance."""
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in expected]:
        raise _Excluded("returns other shapes")
    errors = [
        float((tensor - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float32).tiny))
        for tensor, wanted in zip(tensors, expected)
    ]
    worst = max(errors, key=lambda error: float("inf") if error != error else error)
    if not worst <= tolerance:
        raise _Excluded(f"disagrees: {worst:.1e} of the norm, {tolerance:.1e} allowed")
    return worst


def _tensors(returned: object) -> list[Tensor]:
    """Copies, in float32 or better, of the tensors in nested tuples, lists and dictionaries."""
    found = [leaf.detach() for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
    assert found, "a candidate returned no tensor"
    return [leaf.to(torch.promote_types(leaf.dtype, torch.float32), copy=True) for leaf in found]


def _in_words(error: Exception) -> str:
    if isinstance(error, (_Excluded, UserError)):
        return str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _free(device: torch.device) -> None:
    if "torch._dynamo" in sys.modules:  # what candidates compiled counts against the run's own recompilations
        torch._dynamo.reset()
    if device.type == "cuda":
        gc.collect()  # compiled modules hold themselves
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the run's peak is its own


def _on_gpu(world: World) -> bool:
    return world.device.type == "cuda"


def _with(choice: Choice, **changes) -> Choice:
    return Choice(**{**vars(choice), **changes})
