"""One step of training: a batch of uint8 pixels in, new weights and a new moving average out."""

import copy
from bisect import bisect_left
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastdeit.config import Config, height_width
from fastdeit.curriculum import Curriculum
from fastdeit.data import compiles, precision_of, prepare, split
from fastdeit.distill.attention import AttentionDistillation
from fastdeit.distill.features import FeatureDistillation
from fastdeit.distill.loss import Objective
from fastdeit.distill.patches import TeacherPatches
from fastdeit.distributed import parallel
from fastdeit.distributed.world import World
from fastdeit.models import patch_drop
from fastdeit.models.build import mean_std
from fastdeit.models.deit import DeiT
from fastdeit.models.positions import take_sizes

from .evaluation import Evaluation
from .log import PhaseTimer
from .low_frequencies import LowFrequencies
from .nonfinite import TERMS, Guard
from .optimizer import Update, average_decay, build_optimizer, learning_rate, scaled_rates
from .step_graph import Capture, CudaCapture, StepGraph
from .student_tuning import Arrangement

Average = Callable[[Tensor], Tensor]


class Inputs(NamedTuple):
    """What a step is given; all tensors but the batch's indices are on the device."""

    batch: Any  # Batch, or BatchWithTargets from a logit cache
    noise: Tensor | None  # (images, depth, 2) float32 in [0, 1): the model's drop_path_noise
    numbers: Tensor  # (3,) float64: the step's number, its learning rate, the decay of the moving average
    seed: int | None  # of PyTorch's own generators, for a model that draws for itself
    patches: Tensor | None = None  # (images, kept) int64: those that the model sees; None: all


@dataclass
class State:
    """Where a run stands: with weights, moving average, optimizer and scaler, all that a checkpoint holds. Shared by
    the step, the loop and the checkpointing.

    step: optimizer steps taken, of the whole run
    schedule_start: the step at which the learning rate's schedule begins; not 0 in a run that extends another
    stale: evaluations since the best one
    epochs_evaluated: epochs that are finished: evaluated, unless --eval-every leaves them out
    best: the highest top-1 so far (fraction), of any head of the weights; -1 before the first evaluation
    accuracies: of the last evaluation, {"model": {"cls": {"top1": ...}, ...}, "ema": {...}}
    sums: (len(TERMS) + 1,) float32 on the device: losses, and steps that were applied, since the log's last line
    """

    sums: Tensor
    step: int = 0
    schedule_start: int = 0
    stale: int = 0
    epochs_evaluated: int = 0
    best: float = -1.0
    accuracies: dict = field(default_factory=dict)

    @classmethod
    def begin(cls, device: torch.device) -> "State":
        return cls(torch.zeros(len(TERMS) + 1, device=device))

    def add(self, losses: Tensor, hold: Tensor) -> None:
        """losses: (len(TERMS),); hold: (), 1 where the step changed nothing and its losses are left out."""
        self.sums += torch.where(hold > 0, 0, torch.cat([losses, torch.ones_like(losses[:1])]))

    def take_means(self) -> tuple[list[float], int]:
        """The mean of each loss since the last call, and the steps it is over. Waits for the device."""
        *sums, steps = self.sums.tolist()
        self.sums.zero_()
        return [value / max(steps, 1) for value in sums], int(steps)


class Trainer:
    """A student and what its steps need. Read `step` first; the epochs around it are in loop.py.

    teacher: gives (batch, classes) logits for normalised images (distill/teacher.py), or brings them along with the
        batch (distill/cached_teacher.py); None to train on the labels alone
    steps_per_epoch: for the learning rate
    on_micro_batch: called with the trainer before each micro-batch; --accumulate of them make a step
    arrangement: what tuning has decided (student_tuning.ask); None: nothing
    """

    def __init__(
        self, config: Config, world: World, model: nn.Module, teacher, *, steps_per_epoch: int,
        on_micro_batch: Callable[["Trainer"], None] | None = None, arrangement: Arrangement | None = None,
    ):  # fmt: skip
        self.config, self.world, self.teacher, self.on_micro_batch = config, world, teacher, on_micro_batch
        settings, device = config.optimization, world.device
        self.on_cuda = device.type == "cuda"
        arrangement = arrangement or Arrangement.default(device)
        self.mean, self.std = mean_std(model)
        self.precision = precision_of(config, device)
        self.curriculum = Curriculum.of(config)
        self.size = config.data.input_size  # of the student's images
        self.low_frequencies: LowFrequencies | None = None

        self.model = model.to(device)
        self.model = self.model.to(memory_format=arrangement.memory_format)
        if isinstance(model, DeiT):
            take_sizes(model, [height_width(size) for size in self.curriculum.sizes if size != self.size])
        if config.distillation.distillation_type == "none" and hasattr(model, "set_distilled_training"):
            model.set_distilled_training(False)  # with labels only, both heads learn them through their average
        self.ema = copy.deepcopy(model).requires_grad_(False) if config.model.model_ema else None
        self.evaluation = Evaluation(model, self.ema, config, world, arrangement.inductor)
        self.attention = AttentionDistillation.of(config, model, teacher)  # before anything is compiled
        self.features = FeatureDistillation.of(config, model, teacher)
        self.teacher_patches = TeacherPatches.of(config, model, teacher)
        if compiles(config, device):
            sizes = len(self.curriculum.sizes) + (config.model.patch_drop > 0)  # with some patches, and with all
            parallel.compile_model(model, world, config.speed.sharding, arrangement.inductor, sizes=sizes)
        self.forward = parallel.distribute(model, self.ema, config.speed.sharding, world)
        if self.features is not None:
            self.features.distribute(world, config.speed.sharding)
        self.objective = Objective.from_config(config)

        self.global_batch = config.data.batch_size * settings.accumulate * world.world_size
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = self.curriculum.epochs * steps_per_epoch
        self.total_work = settings.epochs * steps_per_epoch  # in steps at the full size, as the warm-up
        self.warmup_steps = round(settings.warmup_epochs * steps_per_epoch)
        self.patch_drop = 0.0  # the rate of the last step
        self.all_patches_from = bisect_left(range(self.total_steps), True, key=self._is_in_last_tenth)
        self.rates = scaled_rates(
            settings.lr, settings.warmup_lr, settings.min_lr, self.global_batch, scale=not settings.unscale_lr
        )
        self.optimizer = build_optimizer(
            model, settings.opt, lr=self.rates.peak, weight_decay=settings.weight_decay, eps=settings.opt_eps,
            betas=settings.opt_betas, layer_decay=settings.layer_decay, others=self._projection(),
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.guard = Guard(device, config.run.skip_nonfinite)
        self.update = Update(model, self.ema, self.optimizer, self.scaler, self.guard, config)
        self.timer = PhaseTimer(device)
        self.state = State.begin(device)
        self.news: list[str] = []  # sentences for the log, which takes them from here
        self.graph: StepGraph | None = None
        alone = self.on_cuda and world.world_size == 1 and on_micro_batch is None  # the graph would not call that
        if alone and config.speed.cuda_graph != "off":
            self.capture_steps(CudaCapture(device))

    def capture_steps(self, capture: Capture) -> None:
        """Have the steps to come captured."""
        self.capture = capture

        def compute(inputs: Inputs) -> Tensor:
            return self.compute(inputs, self.world.mean)

        self.graph = StepGraph(compute, self.changed, capture, self.news.append, self.update.forget)

    def _capture_anew(self) -> None:
        """For steps of other shapes."""
        if self.graph is not None and not self.graph.failed:
            self.graph = None  # its memory first
            self.capture_steps(self.capture)

    def release(self) -> None:
        """Give up the graph and its memory; steps are made as they are."""
        self.graph = None

    def begin_epoch(self, epoch: int) -> None:
        """Show the student images of the size that the curriculum has in this epoch. The next steps at another size
        than before are captured anew."""
        size, full = self.curriculum.part(epoch).size, self.config.data.input_size
        if size == self.size:
            return
        self.size = size
        self.low_frequencies = None if size == full else LowFrequencies(full, size, self.world.device, self.precision)
        self._capture_anew()

    def rehearse(self, batch) -> None:
        """Make the gradients of one batch at every other size of images, and number of patches, that the run will come
        to, and throw them away. Then all is compiled, and has found its memory, before training begins."""
        now, news = self.state.step, list(self.news)
        for step in (*self.turns()[1:], now):
            self.state.step = step
            self.begin_epoch(step // self.steps_per_epoch)
            self._drop_patches()
            if step != now:
                self._gradients(self.inputs(batch))
                self.update.take_back()
        self.news = news
        if self.on_cuda:
            torch.cuda.synchronize()
        self.timer.stop()
        self.timer.read()  # of these seconds the log says nothing

    def turns(self) -> list[int]:
        """The step to come, and those after it from which on the student sees images of a size, or a number of patches,
        that it has not seen since."""
        steps = [part.first * self.steps_per_epoch for part in self.curriculum.parts if part.end > part.first]
        if self.config.model.patch_drop > 0:
            steps.append(self.all_patches_from)
        kinds: dict[tuple, int] = {}
        for step in sorted({self.state.step, *(step for step in steps if step > self.state.step)}):
            part = self.curriculum.part(step // self.steps_per_epoch)
            kinds.setdefault((part.size, self._rate(step)), step)
        return list(kinds.values())

    def step(self, batch, average: Average | None = None) -> Tensor:
        """Train on one batch. Returns its losses, (5,) detached on the device: the loss and its terms, as
        nonfinite.TERMS names them, means over all processes.

        average: from this process's losses to that mean; the loop's sends more along with them.
        """
        self._drop_patches()
        inputs, average = self.inputs(batch), average or self.world.mean
        if self.graph is None:
            losses = self.compute(inputs, average)
        else:
            self.timer.enter("step")
            losses = average(self.graph(inputs))  # of one process, so the same: what is sent along goes its way
        self.state.step += 1
        self.timer.stop()
        return losses

    def inputs(self, batch) -> Inputs:
        """What is new in the step to come, on the device."""
        sequence = np.random.SeedSequence([self.config.run.seed, self.state.step])
        seed, of_patches = (int(word >> 1) for word in sequence.generate_state(2, np.uint64))
        noise, patches, of_model = None, None, None
        if not isinstance(self.model, DeiT):
            of_model = seed + self.world.rank
            torch.manual_seed(of_model)
        else:
            if self.model.drop_path > 0:
                noise = self._noise(seed, len(self.model.blocks), 2)
            if self.patch_drop > 0:
                height, width = height_width(self.size)
                count = height * width // self.model.arch.patch_size**2
                patches = patch_drop.chosen(self._noise(of_patches, count), self.patch_drop)
        decay = average_decay(self.state.step, self.config.model.model_ema_decay)
        numbers = torch.tensor([self.state.step, self.lr(), decay], dtype=torch.float64, pin_memory=self.on_cuda)
        return Inputs(batch, noise, numbers.to(self.world.device, non_blocking=True), of_model, patches)

    def compute(self, inputs: Inputs, average: Average) -> Tensor:
        """The step itself, a function of its inputs and of what `changed` lists: all of it is done by the device, and
        nothing waits for it."""
        own_losses = self._gradients(inputs)
        self.timer.enter("optimizer")
        losses = average(own_losses)
        hold = self.update.apply(inputs.numbers, losses, own_losses)
        self.state.add(losses, hold)
        return losses

    def _gradients(self, inputs: Inputs) -> Tensor:
        """Add those of all micro-batches. Returns this process's losses, (5,), detached."""
        micro_batches = split(inputs.batch, self.config.optimization.accumulate)
        parts = len(micro_batches)
        options: list[dict] = [{} for _ in range(parts)]
        for name, drawn in (("drop_path_noise", inputs.noise), ("patches", inputs.patches)):
            for option, part in zip(options, () if drawn is None else drawn.chunk(parts)):
                option[name] = part
        self.update.begin()
        own_losses = 0
        for i, micro_batch in enumerate(micro_batches):
            with parallel.gradient_sync(self.forward, self.features and self.features.forward, when=i == parts - 1):
                own_losses = own_losses + self._backward(micro_batch, options[i], weight=1 / parts)
        return own_losses

    def _backward(self, batch, options: dict, weight: float) -> Tensor:
        """Add `weight` times the batch's gradient. Returns `weight` times its losses, (5,), detached. options: of the
        model's forward."""
        if self.on_micro_batch is not None:
            self.on_micro_batch(self)
        enter = self.timer.enter
        enter("prepare")
        images = self.prepare(batch)
        targets = None
        if self.teacher is not None and self.teacher_patches is None:  # first, while no activations are kept
            enter("teacher")
            targets = self.teacher(images, batch)
        enter("forward")
        if self.low_frequencies is not None:
            images = self.low_frequencies(images)
        with self.autocast():
            outputs = self.forward(images, **options)
        if self.teacher_patches is not None:
            enter("teacher")
            targets = self.teacher(images, batch, self.teacher_patches())
        enter("loss")
        attention = self.attention() if self.attention is not None else None
        features = self.features() if self.features is not None else None
        loss, terms = self.objective(outputs, batch.labels, batch.mix, targets, attention, features)
        enter("backward")
        self.scaler.scale(loss * weight).backward()
        return torch.cat([loss.detach().view(1), terms]) * weight

    def prepare(self, batch) -> Tensor:
        """The batch's images as the model sees them: normalised, erased, mixed, (batch, 3, height, width)."""
        return prepare(batch, self.mean, self.std, self.precision)

    def autocast(self):
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.world.device.type, self.precision)

    def lr(self, step: int | None = None) -> float:
        """Of a step, by default of the one to come."""
        step = self.state.step if step is None else step
        return learning_rate(
            self.work(step) - self.state.schedule_start, peak=self.rates.peak, warmup_steps=self.warmup_steps,
            total_steps=self.total_work - self.state.schedule_start, warmup_lr=self.rates.start,
            min_lr=self.rates.floor,
        )  # fmt: skip

    def work(self, step: int) -> float:
        """What is done after so many steps, in steps at the full size; of that, the learning rate is a function."""
        return self.curriculum.work(step, self.steps_per_epoch)

    def cost(self, step: int) -> float:
        """What the student's part of so many steps takes, in steps of all patches at the full size; roughly, since it
        counts a step of half the patches as half a step."""
        dropped = self.work(min(step, self.all_patches_from))
        return self.work(step) - self.config.model.patch_drop * dropped

    def _noise(self, seed: int, *shape: int) -> Tensor:
        """The step's random numbers for this process's images, (images, *shape) float32 in [0, 1), the same on any
        number of processes."""
        generator = torch.Generator(self.world.device).manual_seed(seed)
        noise = torch.rand(self.global_batch, *shape, generator=generator, device=self.world.device)
        return noise.chunk(self.world.world_size)[self.world.rank]

    def _drop_patches(self) -> None:
        """Set the rate of the step to come."""
        rate = self._rate(self.state.step)
        if rate == self.patch_drop:
            return
        if rate == 0:
            self.news.append(f"from step {self.state.step + 1} on, the student sees all patches")
        self.patch_drop = rate
        patch_drop.set_rate(self.model, rate)
        self._capture_anew()

    def _rate(self, step: int) -> float:
        """Of the patches that are dropped: --patch-drop, in the last tenth of the work none."""
        return self.config.model.patch_drop if step < self.all_patches_from else 0.0

    def _is_in_last_tenth(self, step: int) -> bool:
        return 10 * (self.total_work - self.work(step + 1)) < self.total_work

    def _projection(self) -> list[nn.Parameter]:
        """What learns beside the model."""
        return [] if self.features is None else list(self.features.projection.parameters())

    def changed(self) -> dict[str, list[Tensor]]:
        """All that a step changes, by kind: after the first step always the same tensors."""
        kinds = {
            "weights": [*self.model.parameters(), *self._projection()], "statistics": list(self.model.buffers()),
            "moving average": [] if self.ema is None else [*self.ema.parameters(), *self.ema.buffers()],
        }  # fmt: skip
        for values in self.optimizer.state.values():
            for key, value in values.items():
                kinds.setdefault(key, []).append(value)
        scale = [self.scaler._scale, self.scaler._growth_tracker] if self.scaler.is_enabled() else []
        guard = [self.guard.count, self.guard.rows]
        return {**kinds, "gradient scale": scale, "guard": guard, "sums": [self.state.sums]}

    # -----------------------------------------------------------------------------------------------------------------
    # What a checkpoint holds of it

    def tensors(self) -> dict:
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = self.lr() * group.get("lr_scale", 1.0)  # in memory a tensor, which each step fills
        training = {"optimizer": optimizer, "scaler": self.scaler.state_dict()}
        if self.features is not None:
            training["projection"] = self.features.projection.state_dict()
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "training": training,
        }

    def load(self, saved: dict) -> None:
        """The inverse of `tensors`, from full tensors on the CPU."""
        parallel.load_weights(self.model, saved["model"])
        if self.ema is not None:
            parallel.load_weights(self.ema, saved["ema"])
        if self.features is not None:
            parallel.load_weights(self.features.projection, saved["training"]["projection"])
        parallel.load_optimizer(self.optimizer, saved["training"]["optimizer"])
        self.scaler.load_state_dict(saved["training"]["scaler"])
        assert self.graph is None or self.graph.warm == 0, "the graph has the addresses of the former state"
