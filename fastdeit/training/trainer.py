"""The training loop: one batch's road from uint8 pixels to a step of the optimizer, and what happens around it."""

import copy
import gc
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastdeit.checkpoint import files, resume
from fastdeit.config import Config
from fastdeit.data import precision_of, prepare, split
from fastdeit.distill.attention import AttentionDistillation
from fastdeit.distill.loss import Objective
from fastdeit.distributed import parallel
from fastdeit.distributed.world import World
from fastdeit.evaluation.metrics import accuracy
from fastdeit.models.deit import DeiT
from fastdeit.models.heads import logits_by_head
from fastdeit.models.loading import mean_std

from .checkpointing import Keeper
from .log import Log, PhaseTimer
from .nonfinite import TERMS, Guard
from .optimizer import build_optimizer, learning_rate, scaled_rates
from .trackers import open_tracker
from .update import Update

LOG_STEPS = 50  # the host waits for the device only this often


class Trainer:
    """One student and what its training needs. `fit()` runs it; `step(batch)` is where to read first.

    `folder` is the run's folder, None for nothing to be written (dry run, ranks above 0). `teacher` answers
    (batch, classes) logits to normalised images (teacher.py), or gives cached targets (cached_teacher.py), or is None.
    `on_micro_batch(trainer)`, if given, is called before each micro-batch: --accumulate of them make a step.
    """

    def __init__(
        self, config: Config, world: World, model: nn.Module, teacher, loaders, classes, folder: Path | None, title="",
        on_micro_batch: Callable[["Trainer"], None] | None = None,
    ):  # fmt: skip
        self.config, self.world, self.teacher, self.folder, self.classes = config, world, teacher, folder, classes
        self.train_loader, self.val_loader = loaders
        self.on_micro_batch = on_micro_batch
        settings, device = config.optimization, world.device
        self.mean, self.std = mean_std(model)
        self.precision = precision_of(config, device)

        self.model = model.to(device)
        if device.type == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)
        if config.distillation.distillation_type == "none" and hasattr(model, "set_distilled_training"):
            model.set_distilled_training(False)  # with labels only, both heads learn them through their average
        self.ema = copy.deepcopy(model).requires_grad_(False) if config.model.model_ema else None
        self.attention = AttentionDistillation.of(config, model, teacher)  # before anything is compiled
        if config.speed.compile:
            parallel.compile_model(model, world)
        self.forward = parallel.spread(model, self.ema, config.speed.sharding, world)
        self.objective = Objective.from_config(config)
        self.global_batch = config.data.batch_size * settings.accumulate * world.world_size
        self.rates = scaled_rates(
            settings.lr, settings.warmup_lr, settings.min_lr, self.global_batch, scale=not settings.unscale_lr
        )
        self.optimizer = build_optimizer(
            model, settings.opt, lr=self.rates.peak, weight_decay=settings.weight_decay, eps=settings.opt_eps,
            betas=settings.opt_betas,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.guard = Guard(device, config.run.skip_nonfinite)
        self.update = Update(model, self.ema, self.optimizer, self.scaler, self.guard, config)
        self.timer = PhaseTimer(device)

        self.steps_per_epoch = len(self.train_loader)
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.warmup_steps = round(settings.warmup_epochs * self.steps_per_epoch)
        tracker = open_tracker(config.run.tracker, folder, config.to_dict()) if folder else None
        self.log = Log(folder, total_steps=self.total_steps, title=title, quiet=not world.is_main, tracker=tracker)
        self.keeper = Keeper(self)
        self.warm = False  # compiled, by its first step in this process

        # Where the run stands; with weights, moving average, optimizer and scaler all that a checkpoint holds.
        self.steps_done = self.epochs_evaluated = 0
        self.best = -1.0
        self.accuracies: dict[str, dict] = {}
        self.sums = torch.zeros(len(TERMS) + 1, device=device)  # losses and steps since the last line of the log

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def step(self, batch) -> torch.Tensor:
        """Train on one batch. Returns a detached (4,) tensor on the device, the means over all processes: the loss and
        its terms, as nonfinite.TERMS names them."""
        parts = split(batch, self.config.optimization.accumulate)
        randomness = self._randomness(len(parts))
        self.update.begin()
        own_losses = 0
        for i, part in enumerate(parts):
            if self.on_micro_batch is not None:
                self.on_micro_batch(self)
            with parallel.without_exchange(self.forward, last=i == len(parts) - 1):
                own_losses = own_losses + self._learn(part, randomness[i], share=1 / len(parts))
        self.timer.enter("optimizer")
        losses = self.keeper.exchange(batch, own_losses)
        hold = self.update.apply(self.steps_done, self.lr(), losses, own_losses)
        self.sums += torch.where(hold > 0, 0, torch.cat([losses, torch.ones_like(losses[:1])]))
        self.steps_done += 1
        self.keeper.after_step()
        self.timer.stop()
        return losses

    def _learn(self, batch, randomness: dict, share: float) -> torch.Tensor:
        """Add a share of the step's gradient. Returns that share of its losses, (4,), detached."""
        enter = self.timer.enter
        enter("prepare")
        images = self.prepare(batch)
        enter("teacher")
        answers = self.teacher(images, batch) if self.teacher is not None else None
        enter("forward")
        with self._autocast():
            outputs = self.forward(images, **randomness)
        enter("loss")
        attention = self.attention() if self.attention is not None else None
        loss, terms = self.objective(outputs, batch.labels, batch.mix, answers, attention)
        enter("backward")
        self.scaler.scale(loss * share).backward()
        return torch.cat([loss.detach().view(1), terms]) * share

    def prepare(self, batch) -> torch.Tensor:
        """The batch's images as the model sees them: normalised, erased, mixed, (batch, 3, height, width)."""
        return prepare(batch, self.mean, self.std, self.precision)

    def _autocast(self):
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.world.device.type, self.precision)

    def _randomness(self, parts: int) -> list[dict]:
        """The step's random numbers for each part of this process's batch, a pure function of (seed, step): the same on
        any number of processes."""
        seed = int(np.random.SeedSequence([self.config.run.seed, self.steps_done]).generate_state(1, np.uint64)[0] >> 1)
        if not isinstance(self.model, DeiT):
            torch.manual_seed(seed + self.world.rank)  # a model of timm draws for itself
            return [{}] * parts
        if self.model.drop_path == 0:
            return [{}] * parts
        generator = torch.Generator(self.world.device).manual_seed(seed)
        shape = (self.global_batch, len(self.model.blocks), 2)
        noise = torch.rand(shape, generator=generator, device=self.world.device)
        own = noise.chunk(self.world.world_size)[self.world.rank]
        return [{"drop_path_noise": part} for part in own.chunk(parts)]

    def lr(self) -> float:
        return learning_rate(
            self.steps_done, peak=self.rates.peak, total_steps=self.total_steps, warmup_steps=self.warmup_steps,
            warmup_lr=self.rates.start, min_lr=self.rates.floor,
        )  # fmt: skip

    # -----------------------------------------------------------------------------------------------------------------
    # The run

    def fit(self) -> dict[str, dict]:
        """Train to the last epoch. Returns the last accuracies: {"model": {"cls": ..., ...}, "ema": {...}}."""
        try:
            self.log.begin()
            with self.keeper:
                for epoch in range(self.epochs_evaluated, self.config.optimization.epochs):
                    figures = self.train_epoch(epoch)
                    self.keeper.save()  # before the evaluation, so that a signal may end that at once
                    self.keeper.poll(False)
                    since = time.perf_counter()
                    self.accuracies = self.evaluate()
                    self.epochs_evaluated = epoch + 1
                    self._tell(epoch, figures, time.perf_counter() - since)
        finally:
            self.log.close()
            gc.unfreeze()
        return self.accuracies

    def _tell(self, epoch: int, figures: dict, seconds: float) -> None:
        """Write down the accuracies after an epoch: in the log, and beside the weights they are of."""
        score = max(head["top1"] for head in self.accuracies["model"].values())
        best, self.best = score > self.best, max(score, self.best)
        if self.world.is_main:
            self.log.evaluated(
                step=self.steps_done, epoch=epoch, epochs=self.config.optimization.epochs, figures=figures,
                seconds=seconds,
                accuracy={
                    source: {head: value["top1"] for head, value in heads.items()}
                    for source, heads in self.accuracies.items()
                },
            )  # fmt: skip
            self.keeper.note(self.accuracies, best=best)

    def train_epoch(self, epoch: int) -> dict:
        """One pass over the training images, from where the run stands in it. Returns the last figures logged."""
        self.model.train()
        self.keeper.poll(self.warm)
        self.train_loader.set_epoch(epoch)
        self.train_loader.load_state_dict({"position": self.steps_done - epoch * self.steps_per_epoch})
        figures, waited, since = {}, 0.0, time.perf_counter()
        batches = iter(self.train_loader)
        while True:
            before = time.perf_counter()
            self.timer.enter("data")
            batch = next(batches, None)
            waited += time.perf_counter() - before
            if batch is None:
                self.timer.stop()
                break
            self.step(batch)
            if not self.warm:
                self.warm = True
                self.keeper.poll(True)
                gc.collect()
                gc.freeze()  # what exists now stays: later collections need not look at it again
            is_logged = self.steps_done % LOG_STEPS == 0 or self.steps_done == (epoch + 1) * self.steps_per_epoch
            save = self.keeper.look(everything=is_logged)
            if is_logged:
                figures = self._figures(waited, since)
                if self.world.is_main:
                    self.log.train(step=self.steps_done, epoch=epoch, **figures)
                waited, since = 0.0, time.perf_counter()
            if save:
                self.keeper.save()
        return figures

    def _figures(self, waited: float, since: float) -> dict:
        *sums, steps = self.sums.tolist()
        self.sums.zero_()
        loss, class_loss, teacher_loss, attention_loss = (value / max(steps, 1) for value in sums)
        seconds = time.perf_counter() - since
        return {
            "loss": loss, "class_loss": class_loss, "teacher_loss": teacher_loss, "attention_loss": attention_loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": steps * self.global_batch / seconds, "data_share": waited / seconds,
            "seconds": {phase: round(value, 4) for phase, value in self.timer.read().items()},
        }  # fmt: skip

    def evaluate(self) -> dict[str, dict]:
        """Accuracies on the validation images, of the weights and of their moving average."""
        sources = {"model": self.model} if self.ema is None else {"model": self.model, "ema": self.ema}
        result = {}
        for name, model in sources.items():
            model.eval()
            result[name] = self.accuracy_of(lambda images, model=model: logits_by_head(model, images))
            model.train()
        return result

    def accuracy_of(self, logits: Callable) -> dict[str, dict]:
        """Accuracies of `logits` (images -> logits by head) on the validation images."""
        with self._autocast():
            return accuracy(logits, self.val_loader, self.prepare, self.world)

    # -----------------------------------------------------------------------------------------------------------------
    # What a checkpoint holds

    def tensors(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "training": {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()},
        }

    def description(self) -> dict:
        return files.describe(self.model, self.config, self.classes, self.mean, self.std) | {
            "progress": {
                "epochs_evaluated": self.epochs_evaluated,
                "best": self.best,
                "skipped": self.keeper.bad_steps,
                "sums": self.sums.tolist(),
                "global_batch": self.global_batch,
                "data": self.train_loader.index.fingerprint,
                "teacher": self.teacher.fingerprint if self.teacher is not None else None,
            }
        }

    def load(self, saved: dict | None) -> None:
        """Go on from what `checkpoint.read` returned; None: from the beginning."""
        if saved is None:
            return
        description, progress = saved["description"], saved["description"]["progress"]
        resume.check_same(progress, self)
        parallel.load_weights(self.model, saved["model"])
        if self.ema is not None:
            parallel.load_weights(self.ema, saved["ema"])
        parallel.load_optimizer(self.optimizer, saved["training"]["optimizer"])
        self.scaler.load_state_dict(saved["training"]["scaler"])
        self.steps_done, self.epochs_evaluated = description["step"], progress["epochs_evaluated"]
        self.best, self.accuracies = progress["best"], description.get("accuracy", {})
        self.sums.copy_(torch.tensor(progress["sums"]))
        self.guard.count.fill_(progress["skipped"])
        self.keeper.loaded(saved)
        self.log.say(f"going on at step {self.steps_done} of {self.total_steps}")


def deterministic() -> None:
    """Only algorithms that give the same bits each time, for the whole process; an operation without one raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
