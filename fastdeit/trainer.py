"""The training loop: one batch's road from uint8 pixels to a step of the optimizer, and what happens around it."""

import copy
import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastdeit.kernels import mix_normalize

from . import checkpoint
from .accuracy import accuracy
from .config import Config
from .distributed import Place
from .log import Log
from .model import DeiT
from .objective import Objective
from .optimizer import build_optimizer
from .schedule import learning_rate, scaled_peak
from .student import heads, mean_std
from .timer import PhaseTimer
from .trackers import open_tracker

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOG_STEPS = 50  # the host waits for the device only this often


class Trainer:
    """One student and what its training needs. `fit()` runs it; `step(batch)` is where to read first.

    `folder` is the run's folder, None for nothing to be written (dry run, ranks above 0). `teacher` answers
    (batch, classes) logits to normalised images, or is None.
    """

    def __init__(
        self, config: Config, place: Place, model: nn.Module, teacher, loaders, classes, folder: Path | None, title=""
    ):
        self.config, self.place, self.teacher, self.folder, self.classes = config, place, teacher, folder, classes
        self.train_loader, self.val_loader = loaders
        settings, device = config.optimization, place.device
        self.mean, self.std = mean_std(model)
        self.precision = PRECISIONS[config.speed.precision or ("bf16" if device.type == "cuda" else "fp32")]

        self.model = model.to(device)
        if device.type == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)
        if config.distillation.distillation_type == "none" and hasattr(model, "set_distilled_training"):
            model.set_distilled_training(False)  # with labels only, both heads learn them through their average
        self.ema = copy.deepcopy(model).requires_grad_(False) if config.model.model_ema else None
        self.objective = Objective.from_config(config)
        self.global_batch = config.data.batch_size * place.world_size
        self.peak_lr = scaled_peak(settings.lr, self.global_batch, scale=not settings.unscale_lr)
        self.optimizer = build_optimizer(
            model, settings.opt, lr=self.peak_lr, weight_decay=settings.weight_decay, eps=settings.opt_eps,
            betas=settings.opt_betas,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.forward = self._parallel_and_compiled()
        self.timer = PhaseTimer(device)

        self.steps_per_epoch = len(self.train_loader)
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.warmup_steps = round(settings.warmup_epochs * self.steps_per_epoch)
        self.steps_done = 0
        self.best = -1.0
        tracker = open_tracker(config.run.tracker, folder, config.to_dict()) if folder is not None else None
        self.log = Log(folder, total_steps=self.total_steps, title=title, quiet=not place.is_main, tracker=tracker)

    def _parallel_and_compiled(self):
        """The model as the step calls it. Blocks are compiled one by one under several processes, so that the exchange of
        gradients overlaps with the backward pass; a single process gains from compiling the whole."""
        model, parallel = self.model, self.place.world_size > 1
        if self.config.speed.compile and not parallel:
            model.compile()
        elif self.config.speed.compile:
            for block in model.blocks if hasattr(model, "blocks") else [model]:
                block.compile()
        if parallel:
            return DistributedDataParallel(
                model, device_ids=[self.place.device.index] if self.place.device.index is not None else None
            )
        return model

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def step(self, batch) -> torch.Tensor:
        """Train on one batch. Returns a detached (3,) tensor on the device: loss, class term, teacher term."""
        enter = self.timer.enter
        enter("prepare")
        images = self.prepare(batch)
        enter("teacher")
        answers = self.teacher(images) if self.teacher is not None else None
        enter("forward")
        with self._autocast():
            outputs = self.forward(images, **self._randomness())
        enter("loss")
        loss, terms = self.objective(outputs, batch.labels, batch.mix, answers)
        enter("backward")
        self.scaler.scale(loss).backward()
        enter("optimizer")
        self._update()
        self.timer.stop()
        return torch.cat([loss.detach().view(1), terms])

    def prepare(self, batch) -> torch.Tensor:
        """The batch's images as the model sees them: normalised, erased, mixed, (batch, 3, height, width)."""
        mix = {} if batch.mix is None else batch.mix._asdict()
        return mix_normalize(batch.images, self.mean, self.std, dtype=self.precision, **mix)

    def _autocast(self):
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.place.device.type, self.precision)

    def _randomness(self) -> dict:
        """The step's random numbers, a pure function of (seed, step): the same on any number of processes."""
        seed = int(np.random.SeedSequence([self.config.run.seed, self.steps_done]).generate_state(1, np.uint64)[0] >> 1)
        if not isinstance(self.model, DeiT):
            torch.manual_seed(seed + self.place.rank)  # a model of timm draws for itself
            return {}
        if self.model.drop_path == 0:
            return {}
        generator = torch.Generator(self.place.device).manual_seed(seed)
        shape = (self.global_batch, len(self.model.blocks), 2)
        noise = torch.rand(shape, generator=generator, device=self.place.device)
        return {"drop_path_noise": noise.chunk(self.place.world_size)[self.place.rank]}

    def _update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        if self.config.optimization.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimization.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            weight = 1 - self.config.model.model_ema_decay
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), weight)
                for average, buffer in zip(self.ema.buffers(), self.model.buffers()):
                    average.copy_(buffer)
        self.steps_done += 1

    def lr(self) -> float:
        settings = self.config.optimization
        return learning_rate(
            self.steps_done, peak=self.peak_lr, total_steps=self.total_steps, warmup_steps=self.warmup_steps,
            warmup_lr=min(settings.warmup_lr, self.peak_lr), min_lr=min(settings.min_lr, self.peak_lr),
        )  # fmt: skip

    # -----------------------------------------------------------------------------------------------------------------
    # The run

    def fit(self) -> dict[str, dict]:
        """Train to the last epoch. Returns the last accuracies: {"model": {"cls": ..., ...}, "ema": {...}}."""
        result = {}
        try:
            for epoch in range(self.steps_done // self.steps_per_epoch, self.config.optimization.epochs):
                figures = self.train_epoch(epoch)
                since = time.perf_counter()
                result = self.evaluate()
                seconds = time.perf_counter() - since
                if self.place.is_main:
                    self.log.evaluated(
                        step=self.steps_done, epoch=epoch, epochs=self.config.optimization.epochs, figures=figures,
                        seconds=seconds,
                        accuracy={source: {head: value["top1"] for head, value in heads.items()} for source, heads in result.items()},
                    )  # fmt: skip
                self.save(result)
        finally:
            self.log.close()
            gc.unfreeze()
        return result

    def train_epoch(self, epoch: int) -> dict:
        """One pass over the training images, from where the run stands in it. Returns the last figures logged."""
        self.model.train()
        self.train_loader.set_epoch(epoch)
        done = self.steps_done - epoch * self.steps_per_epoch
        if done:
            self.train_loader.load_state_dict({"position": done})
        figures, sums, steps, waited, since = {}, None, 0, 0.0, time.perf_counter()
        batches = iter(self.train_loader)
        while True:
            before = time.perf_counter()
            self.timer.enter("data")
            batch = next(batches, None)
            waited += time.perf_counter() - before
            if batch is None:
                self.timer.stop()
                break
            losses = self.step(batch)
            sums, steps = losses if sums is None else sums + losses, steps + 1
            if self.steps_done == 1:
                gc.collect()
                gc.freeze()  # what exists now stays: later collections need not look at it again
            if self.steps_done % LOG_STEPS == 0 or self.steps_done == (epoch + 1) * self.steps_per_epoch:
                figures = self._figures(sums, steps, waited, since)
                if self.place.is_main:
                    self.log.train(step=self.steps_done, epoch=epoch, **figures)
                sums, steps, waited, since = None, 0, 0.0, time.perf_counter()
        return figures

    def _figures(self, sums: torch.Tensor, steps: int, waited: float, since: float) -> dict:
        loss, class_loss, teacher_loss = (self.place.sum(sums) / (steps * self.place.world_size)).tolist()
        seconds = time.perf_counter() - since
        return {
            "loss": loss, "class_loss": class_loss, "teacher_loss": teacher_loss, "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": steps * self.global_batch / seconds, "data_share": waited / seconds,
            "seconds": {phase: round(value, 4) for phase, value in self.timer.read().items()},
        }  # fmt: skip

    def evaluate(self) -> dict[str, dict]:
        """Accuracies on the validation images, of the weights and of their moving average."""
        sources = {"model": self.model} if self.ema is None else {"model": self.model, "ema": self.ema}
        result = {}
        for name, model in sources.items():
            model.eval()
            result[name] = self.accuracy_of(lambda images, model=model: heads(model, images))
            model.train()
        return result

    def accuracy_of(self, answer: Callable) -> dict[str, dict]:
        """Accuracies of `answer` (images -> class logits, distillation logits or None) on the validation images."""
        with self._autocast():
            return accuracy(answer, self.val_loader, self.prepare, self.place)

    def save(self, result: dict[str, dict]) -> None:
        score = max(head["top1"] for head in result["model"].values())
        best, self.best = score > self.best, max(score, self.best)
        if self.folder is not None:
            checkpoint.save(
                self.folder,
                checkpoint.describe(self.model, self.config, self.classes, self.mean, self.std) | {"accuracy": result},
                step=self.steps_done,
                model=self.model.state_dict(),
                ema=self.ema.state_dict() if self.ema is not None else None,
                training={
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "best": self.best,
                },
                best=best,
            )
        self.place.barrier()

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint folder: weights, moving average, optimizer and the step."""
        from .weights import load_weights

        load_weights(self.model, folder)
        if self.ema is not None:
            load_weights(self.ema, folder / "ema.safetensors")
        state = checkpoint.training_state(folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps_done, self.best = checkpoint.description(folder)["step"], state["best"]
