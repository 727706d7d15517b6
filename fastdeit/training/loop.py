"""A run: epochs of steps; what of them is logged, evaluated and saved, and how a run resumes."""

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastdeit.checkpoint import files, resume
from fastdeit.config import Config, in_pixels
from fastdeit.curriculum import Curriculum, Part
from fastdeit.data import compiles
from fastdeit.errors import UserError
from fastdeit.evaluation.metrics import accuracies

from .checkpointing import Checkpointing
from .log import Log
from .remaining import Remaining
from .trackers import open_tracker
from .trainer import Trainer

NAMES = ("loss", "class_loss", "teacher_loss", "attention_loss", "feature_loss")  # of nonfinite.TERMS, in the log
LOG_STEPS = 50  # about: the host waits for the device only this often


class Loop:
    """`fit()` trains to the last epoch. folder: the run's, None where nothing is written (dry run, ranks above 0).
    choices: what tuning has chosen for it, in JSON types; it goes into the checkpoints."""

    def __init__(
        self, trainer: Trainer, loaders, classes, folder: Path | None, title: str = "", choices: Sequence[dict] = ()
    ):
        self.trainer, self.state, self.world, self.config = trainer, trainer.state, trainer.world, trainer.config
        self.choices = list(choices)
        self.classes, (self.train_loader, self.val_loader) = classes, loaders
        self.steps_per_epoch = len(self.train_loader)
        tracker = open_tracker(self.config.run.tracker, folder, self.config.to_dict()) if folder else None
        self.log = Log(
            folder, total_steps=trainer.total_steps, title=title, quiet=not self.world.is_main, tracker=tracker,
            remaining=self._remaining(),
        )  # fmt: skip
        self.checkpointing = Checkpointing(trainer, self.train_loader.index, folder, self.log, self.description)
        self.warm = False  # compiled, by its first step in this process
        self.evaluation_is_warm = not trainer.evaluation.is_compiled
        self.epochs = trainer.curriculum.epochs
        self.part: Part | None = None  # of the curriculum: that of the last epoch

    def fit(self) -> dict[str, dict]:
        """Returns the last accuracies: {"model": {"cls": {"top1": ...}, ...}, "ema": {...}}."""
        try:
            self.log.begin()
            with self.checkpointing:
                for epoch in range(self.state.epochs_evaluated, self.epochs):
                    if self._has_lost_patience():
                        break
                    figures = self.train_epoch(epoch)
                    self.checkpointing.save()  # before the evaluation, so that a signal may end that at once
                    self.checkpointing.poll(False)
                    self.end_epoch(epoch, figures)
        finally:
            self.trainer.release()  # another run may follow in this process
            self.log.close()
            gc.unfreeze()
        return self.state.accuracies

    def train_epoch(self, epoch: int) -> dict:
        """One pass over the training images, from where the run stands in it. Returns the last figures logged."""
        self._begin_part(epoch)
        self.trainer.model.train()
        self.checkpointing.poll(self.warm)
        self.train_loader.set_epoch(epoch)
        self.train_loader.load_state_dict({"position": self.state.step - epoch * self.steps_per_epoch})
        figures, waited, since, first = {}, 0.0, time.perf_counter(), self.state.step
        batches = iter(self.train_loader)
        while True:
            before = time.perf_counter()
            self.trainer.timer.enter("data")
            batch = next(batches, None)
            waited += time.perf_counter() - before
            if batch is None:
                self.trainer.timer.stop()
                return figures
            self.step(batch)
            is_logged = ends_part(self.state.step, self.steps_per_epoch)
            save = self.checkpointing.look(everything=is_logged)
            if is_logged:
                figures = self._figures(self.state.step - first, waited, time.perf_counter() - since)
                if self.world.is_main:
                    self.log.train(step=self.state.step, epoch=epoch, **figures)
                waited, since, first = 0.0, time.perf_counter(), self.state.step
            if save:
                self.checkpointing.save()

    def _begin_part(self, epoch: int) -> None:
        """Take the size of images of this epoch's part of the curriculum, and say where a part begins."""
        self.trainer.begin_epoch(epoch)
        part, before = self.trainer.curriculum.part(epoch), self.part
        self.part = part
        if part != before and self.config.optimization.curriculum != "none":
            until = f"epochs {epoch + 1} to {part.end}" if epoch + 1 < part.end else f"epoch {part.end}"
            magnitude = "" if part.magnitude is None else f", RandAugment of magnitude {part.magnitude}"
            self.log.say(f"{until} of {self.epochs}: images of {in_pixels(part.size)} pixels{magnitude}")

    def step(self, batch) -> Tensor:
        """Trainer.step, and what the processes tell each other with it. Returns the losses, as that does."""
        if not self.warm and compiles(self.config, self.world.device):
            others = len(self.trainer.turns()) - 1
            of_each = f" for each of the {others + 1} sizes of its input" if others else ""
            self.log.say(f"compiling the training step{of_each}: the first takes longer ...")
            if others:
                self.trainer.rehearse(batch)
        losses = self.trainer.step(batch, self.checkpointing.exchange)
        while self.trainer.news:
            self.log.say(self.trainer.news.pop(0))
        self.checkpointing.after_step(batch)
        self.log.stepped(self.state.step, self.trainer.global_batch)
        if not self.warm:
            self.warm = True
            self.checkpointing.poll(True)
            gc.collect()
            gc.freeze()  # what exists now stays: later collections need not look at it again
        return losses

    def _figures(self, steps: int, waited: float, seconds: float) -> dict:
        """Of the log's next line. steps: made in these seconds; the losses of a resumed run are over more."""
        losses, _ = self.state.take_means()
        return {
            **dict(zip(NAMES, losses)),
            "lr": self.trainer.lr(self.state.step - 1),
            "images_per_s": steps * self.trainer.global_batch / seconds, "data_share": waited / seconds,
            "seconds": {phase: round(value, 4) for phase, value in self.trainer.timer.read().items()},
        }  # fmt: skip

    def end_epoch(self, epoch: int, figures: dict) -> None:
        """Evaluate, if it is time to, and say how the epoch ended."""
        state, evaluates = self.state, is_evaluated(epoch, self.config)
        since = time.perf_counter()
        if evaluates:
            if not self.evaluation_is_warm:
                self.log.say("compiling the evaluation: the first takes longer ...")
            state.accuracies = self.evaluate()
        state.epochs_evaluated = epoch + 1
        if evaluates:
            self._report(epoch, figures, time.perf_counter() - since)
        elif self.world.is_main:
            self.log.epoch(step=state.step, epoch=epoch, epochs=self.epochs, figures=figures)

    def _report(self, epoch: int, figures: dict, seconds: float) -> None:
        """Write down the accuracies after an epoch: in the log, and beside the weights they are of."""
        state = self.state
        self.log.remaining.evaluated(seconds, compiled=not self.evaluation_is_warm)
        self.evaluation_is_warm = True
        score = max(head["top1"] for head in state.accuracies["model"].values())
        best, state.best = score > state.best, max(score, state.best)
        state.stale = 0 if best else state.stale + 1
        if not self.world.is_main:
            return
        top1 = {
            source: {head: value["top1"] for head, value in heads.items()} for source, heads in state.accuracies.items()
        }
        self.log.evaluated(
            step=state.step, epoch=epoch, epochs=self.epochs, figures=figures, seconds=seconds, accuracy=top1,
        )  # fmt: skip
        self.checkpointing.note(state.accuracies, best=best)

    def _has_lost_patience(self) -> bool:
        patience, state = self.config.run.patience, self.state
        if patience is None or state.stale < patience:
            return False
        self.log.say(
            f"--patience {patience}: no top-1 above {100 * state.best:.2f} in {state.stale} evaluations; ends at epoch "
            f"{state.epochs_evaluated} of {self.epochs}"
        )
        return True

    def evaluate(self) -> dict[str, dict]:
        """Accuracies on the validation images, of the weights and of their moving average."""
        trainer = self.trainer
        return trainer.evaluation(self.val_loader, trainer.prepare, trainer.autocast)

    def accuracy_of(self, logits: Callable) -> dict[str, dict]:
        """Accuracies of `logits` (images -> logits by head) on the validation images."""
        with self.trainer.autocast():
            return accuracies({"": logits}, self.val_loader, self.trainer.prepare, self.world)[""]

    def _remaining(self) -> Remaining:
        config, (train, val), trainer = self.config, (self.train_loader, self.val_loader), self.trainer
        epochs = range(trainer.curriculum.epochs)
        ends = [(epoch + 1) * self.steps_per_epoch for epoch in epochs if is_evaluated(epoch, config)]
        images = len(val) * val.plans.batch_size * len(trainer.evaluation.modules)
        live = trainer.teacher is not None and config.distillation.teacher_store is None
        work = float if live else trainer.cost  # most of such a step is the teacher's, whatever the student sees
        return Remaining(trainer.total_steps, ends, forwards=images / train.plans.batch_size, work=work)

    # -----------------------------------------------------------------------------------------------------------------
    # Resuming

    def description(self) -> dict:
        """What a checkpoint's config.json says."""
        trainer, state = self.trainer, self.state
        return files.describe(trainer.model, self.config, self.classes, trainer.mean, trainer.std) | {
            "tuning": self.choices,
            "progress": {
                "epochs_evaluated": state.epochs_evaluated,
                "best": state.best,
                "stale": state.stale,
                "schedule_start": state.schedule_start,
                "skipped": self.checkpointing.bad_steps,
                "sums": state.sums.tolist(),
                "global_batch": trainer.global_batch,
                "data": self.train_loader.index.fingerprint,
                "teacher": trainer.teacher.fingerprint if trainer.teacher is not None else None,
            },
        }

    def load(self, saved: dict | None) -> None:
        """Resume from what `checkpoint.files.read` returned; None begins at step 0."""
        if saved is None:
            return
        description, progress = saved["description"], saved["description"]["progress"]
        resume.check_same(progress, self.trainer, self.train_loader.index)
        self.trainer.load(saved)
        state = self.state
        state.step, state.epochs_evaluated = description["step"], progress["epochs_evaluated"]
        state.stale, state.schedule_start = progress.get("stale", 0), progress.get("schedule_start", 0)
        state.best, state.accuracies = progress["best"], description.get("accuracy", {})
        *sums, steps = progress["sums"]
        sums += [0.0] * (len(state.sums) - 1 - len(sums))  # an earlier version knew fewer terms
        state.sums.copy_(torch.tensor([*sums, steps]))
        self.checkpointing.load(description)
        self.log.say(f"resumes at step {state.step} of {self.trainer.total_steps}")

    def extend(self, run: Path) -> None:
        """Begin where the finished `run` ended, with a learning rate that begins anew (--extend)."""
        saved = files.read(run / "last")
        if saved["description"]["classes"] != list(self.classes):
            raise UserError(
                f"--extend {run}: the data have other classes than it was trained on: give --finetune {run}"
            )
        training = saved["training"]
        training["optimizer"]["param_groups"] = self.trainer.optimizer.state_dict()["param_groups"]  # weight decay, ...
        training["scaler"] = training["scaler"] or self.trainer.scaler.state_dict()
        self.trainer.load(saved)
        state = self.state
        state.epochs_evaluated = saved["description"]["progress"]["epochs_evaluated"]
        state.step = state.schedule_start = state.epochs_evaluated * self.steps_per_epoch
        self.log.say(
            f"extends {run} from epoch {state.epochs_evaluated} to {self.epochs}: another run; the "
            "learning rate begins anew, everything else continues"
        )


def is_evaluated(epoch: int, config: Config) -> bool:
    """Whether there is an evaluation after this epoch, counted from 0."""
    return (epoch + 1) % config.run.eval_every == 0 or epoch + 1 == Curriculum.of(config).epochs


def ends_part(step: int, steps_per_epoch: int) -> bool:
    """Whether a line of the log is due after so many steps of a run. It stands for the mean of one of the equal parts,
    of about LOG_STEPS, of an epoch: of some few steps, left over at its end, the mean would be noise."""
    parts = max(1, round(steps_per_epoch / LOG_STEPS))
    place = (step - 1) % steps_per_epoch
    return (place + 1) * parts // steps_per_epoch > place * parts // steps_per_epoch
