"""From gradients to new weights: the optimizers of the DeiT recipes, the learning rate, and one guarded update with its
moving average."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdeit.config import Config
from fastdeit.distributed.parallel import full, is_sharded, local_shard
from fastdeit.errors import UserError
from fastdeit.models.trainable import depths, hidden_matrices

from .lamb import Lamb
from .muon import Muon
from .nonfinite import Guard


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict]:
    """Two groups: weights with decay; biases, norms, LayerScale, tokens and position embedding without. With
    `layer_decay` two for each depth (models.trainable.depths), whose learning rate is lr_scale = layer_decay^(largest
    depth - depth) times that of the heads: BEiT's layer-wise decay, with timm's depths (param_groups_layer_decay). The
    largest come first.

    Frozen parameters are in none of them. A parameter is left undecayed when it has fewer than two dimensions or when
    the model's `no_weight_decay()` names it. facebookresearch/deit decays `dist_token` (it is missing from the
    original's list); timm and we do not.
    """
    skip = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain = [parameter for name, parameter in named if parameter.ndim <= 1 or name in skip]
    decayed = [parameter for name, parameter in named if not (parameter.ndim <= 1 or name in skip)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return groups if layer_decay is None else _by_depth(groups, model, layer_decay)


def _by_depth(groups: list[dict], model: nn.Module, layer_decay: float) -> list[dict]:
    depth = depths(model)
    by_parameter = {id(parameter): depth[name] for name, parameter in model.named_parameters()}
    divided = []
    for here in sorted(set(depth.values()), reverse=True):
        for group in groups:
            params = [parameter for parameter in group["params"] if by_parameter[id(parameter)] == here]
            if params:
                divided.append({**group, "params": params, "lr_scale": layer_decay ** (max(depth.values()) - here)})
    return divided


def _by_matrices(groups: list[dict], model: nn.Module) -> list[dict]:
    """Muon's parameters in groups of their own, by the number of matrices that each holds."""
    counts = hidden_matrices(model)
    by_parameter = {id(parameter): counts.get(name, 0) for name, parameter in model.named_parameters()}
    divided = []
    for group in groups:
        for matrices in sorted({by_parameter[id(parameter)] for parameter in group["params"]}):
            params = [parameter for parameter in group["params"] if by_parameter[id(parameter)] == matrices]
            divided.append({**group, "params": params, "matrices": matrices})
    return divided


def build_optimizer(
    model: nn.Module, name: str, *, lr: float, weight_decay: float, eps: float, betas, layer_decay: float | None = None,
    others: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:  # fmt: skip
    """AdamW (fused), LAMB (for the DeiT III recipes), SGD with Nesterov momentum, or Muon for the matrices inside the
    network and AdamW for the rest. others: what learns beside the model, without decay."""
    groups = parameter_groups(model, weight_decay, layer_decay)
    if name == "muon":
        groups = _by_matrices(groups, model)
    if others:
        groups.append({"params": list(others), "weight_decay": 0.0})
    if name == "adamw":
        # fused: one kernel for all parameters, which on the device itself can leave a step out (see Update).
        # capturable: no difference to it, but without it PyTorch refuses to have it in a CUDA graph.
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True, capturable=True)
        optimizer._warned_capturable_if_run_uncaptured = True  # that it may be slower, which a fused one is not
        return optimizer
    if name == "lamb":
        return Lamb(groups, lr=lr, betas=betas, eps=eps)
    if name == "muon":
        return Muon(groups, lr=lr, betas=betas, eps=eps)
    if name == "sgd":
        sharded = is_sharded(groups[0]["params"][0])
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=not sharded)
        for parameter in [parameter for group in groups for parameter in group["params"]]:
            # Left to PyTorch, the momentum of a first step that is left out would be whatever was in its memory.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    raise UserError(f"--opt {name}: choose adamw, lamb, sgd or muon")


def learning_rate(
    step: float, *, peak: float, total_steps: int, warmup_steps: int, warmup_lr: float = 1e-6, min_lr: float = 1e-5
) -> float:
    """Linear warm-up from `warmup_lr` to `peak`, then half a cosine down to `min_lr`.

    Step 0 runs at `warmup_lr` (at `peak` without warm-up) and step `total_steps` would run at `min_lr`. As in timm's
    cosine scheduler without `warmup_prefix`, the cosine's clock starts at step 0, so the rate after the warm-up is a
    little below `peak`. Unlike facebookresearch/deit, where epochs 0 and 1 both train at `warmup_lr` and the schedule
    lags by one epoch, the rate moves at every step. A function rather than a scheduler, so that a resumed run has no
    state of it to restore.
    """
    if step < warmup_steps:
        return warmup_lr + (peak - warmup_lr) * step / warmup_steps
    progress = min(step / max(total_steps, 1), 1.0)
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


REFERENCE_BATCH = 512  # images: the global batch for which --lr is given


def scaled_peak(lr: float, global_batch: int, *, scale: bool = True) -> float:
    """lr * global_batch / 512: the linear rule of facebookresearch/deit main.py (`--unscale-lr` turns it off)."""
    return lr * global_batch / REFERENCE_BATCH if scale else lr


@dataclass(frozen=True)
class Rates:
    """Learning rates of a run: at step 0, at their highest, at the end."""

    start: float
    peak: float
    floor: float


def scaled_rates(lr: float, warmup_lr: float, min_lr: float, global_batch: int, *, scale: bool = True) -> Rates:
    """The rates for steps of `global_batch` images; scale=False (`--unscale-lr`) takes them as they are given.

    facebookresearch/deit scales the peak alone (`scaled_peak`), so that with a batch of 10 it lies below the floor.
    Here start and floor shrink with it below a batch of 512; from there on, where the published recipes lie, they are
    the original's. Neither is ever above the peak.
    """
    peak = scaled_peak(lr, global_batch, scale=scale)
    share = min(global_batch / REFERENCE_BATCH, 1.0) if scale else 1.0
    return Rates(start=min(warmup_lr * share, peak), peak=peak, floor=min(min_lr * share, peak))


def average_decay(step: int, decay: float) -> float:
    """Decay of the weights' moving average at `step` (counted from 0): min(decay, (1 + step) / (10 + step)).

    The average spans about a ninth of the steps made, until that is 1 / (1 - decay). So it has left the random weights
    behind after ten steps, and a run long enough for `decay` (225,000 steps for 0.99996) ends with it. This is the
    warm-up of TensorFlow's ExponentialMovingAverage (`num_updates`). timm's ModelEmaV3 has another, off by default:
    1 - (1 + step)^(-2/3), which would reach the recipes' 0.99996 after 4 million steps only, ten times their length.
    """
    return min(decay, (1 + step) / (10 + step))


def rates_in_words(rates: Rates, *, lr: float, global_batch: int, total_steps: int, warmup_steps: int) -> str:
    """What the settings come to with this batch; a warning where the rate hardly moves. lr: as it was given."""
    scaled = rates.peak != lr
    peak = f"{rates.peak:.3g}" + (f" (--lr {lr:g} x {global_batch} / {REFERENCE_BATCH})" if scaled else "")
    if 0 < total_steps <= warmup_steps:
        return (
            f"warning: the learning rate is on its way from {rates.start:.3g} to {peak} all the time: the warm-up of "
            f"{warmup_steps:,} steps is as long as the run of {total_steps:,}; give a shorter --warmup-epochs"
        )
    rise = f"from {rates.start:.3g} in {warmup_steps:,} steps to " if warmup_steps else ""
    if rates.floor == rates.peak:
        return f"learning rate {rise}{peak}, where it stays, as --min-lr is not below it"
    return f"learning rate {rise}{peak}, then down to {rates.floor:.3g}"


def average_in_words(decay: float, total_steps: int) -> str:
    """Over how many steps the moving average reaches at the end of the run."""
    span = round(1 / (1 - average_decay(total_steps - 1, decay)))
    short = average_decay(total_steps - 1, decay) < decay
    more = f", a ninth of the run: --model-ema-decay {decay:g} is for longer ones" if short else ""
    return f"moving average at the end over the last {f'{span:,} steps' if span > 1 else 'step'}{more}"


class Update:
    """One optimizer's step at a time, on the device alone: it can be captured in a CUDA graph (step_graph.py). `ema` is
    the moving average's model, or None."""

    def __init__(self, model: nn.Module, ema: nn.Module | None, optimizer, scaler, guard: Guard, config: Config):
        self.optimizer, self.scaler, self.guard = optimizer, scaler, guard
        self.clip = config.optimization.clip_grad
        # Fused optimizers take `hold` themselves (they call it found_inf); for others the host has to wait and decide.
        self.decides_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        # Lists, because walking through a model takes the host as long as a dozen launches.
        self.parameters, self.buffers = list(model.parameters()), list(model.buffers())
        self.buffers_before: list[Tensor] = []
        self.weights = [local_shard(parameter) for parameter in self.parameters]
        own, learning = set(map(id, self.parameters)), (p for group in optimizer.param_groups for p in group["params"])
        self.parameters += [parameter for parameter in learning if id(parameter) not in own]
        averaged = ([], []) if ema is None else (ema.parameters(), ema.buffers())
        self.averages, self.averaged_buffers = [local_shard(average) for average in averaged[0]], list(averaged[1])
        scales, device = [group.get("lr_scale", 1.0) for group in optimizer.param_groups], self.weights[0].device
        self.scales = torch.tensor(scales, dtype=torch.float64, device=device)
        self.rates = torch.zeros(len(scales), device=device)
        self.rate_of_group = self.rates.unbind()
        self.average_rate = torch.zeros((), device=device)

    def begin(self) -> None:
        """Before the forward pass: remember running statistics, which it changes (a DeiT has none)."""
        self.buffers_before = [buffer.clone() for buffer in self.buffers]

    def forget(self) -> None:
        """Take back what a step that was not finished has left behind on the host."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.found_inf, self.buffers_before = None, []
        if self.scaler.is_enabled():
            self.scaler._per_optimizer_states.clear()

    @torch.no_grad()
    def take_back(self) -> None:
        """The opposite of `apply`: throw the gradients away, and what the forward pass did to running statistics."""
        for buffer, before in zip(self.buffers, self.buffers_before):
            buffer.copy_(before)
        self.forget()

    @torch.no_grad()
    def apply(self, numbers: Tensor, losses: Tensor, own_losses: Tensor) -> Tensor:
        """Use the gradients up. Returns () float32 on the device: 1 where nothing was changed.

        numbers: (3,) float64 on the device: the step's number, its learning rate, the decay of the moving average
        losses: (terms,) of all processes; own_losses: (terms,) of this one, see Guard.hold
        """
        step, rate, decay = numbers.unbind()
        self.rates.copy_(rate * self.scales)
        self.average_rate.copy_(decay - 1)
        for group, rate in zip(self.optimizer.param_groups, self.rate_of_group, strict=True):
            group["lr"] = rate  # a loaded state has another's
        self.scaler.unscale_(self.optimizer)
        norm = self._gradient_norm()
        # A norm that is not finite while the loss is: the scaler's next scale is lower, and the next step will do.
        excused = self.scaler.scale(torch.ones_like(norm)) > 1 if self.scaler.is_enabled() else None
        hold = self.guard.hold(step, losses, own_losses, norm, excused)
        if self.decides_on_device:
            self.optimizer.found_inf = hold
            self.optimizer.step()
            self.optimizer.found_inf = None
        elif hold.item() == 0:
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.buffers, self.buffers_before):
            buffer.copy_(torch.where(hold > 0, before, buffer))
        self.buffers_before = []
        if self.averages:
            self._average(hold)
        return hold

    def _gradient_norm(self) -> Tensor:
        parameters = [parameter for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return full(norm)

    def _average(self, hold: Tensor) -> None:
        """average -= average_rate * (weights - average), in one pass: SGD's, whose fused kernel takes its rate and
        `hold` from the device, with the weights as gradient and a weight decay of -1. What is made for it
        (AveragedModel, timm's ModelEmaV3, torch._foreach_lerp_) takes a number of the host's."""
        torch._fused_sgd_(
            self.averages, self.weights, [], weight_decay=-1.0, momentum=0.0, lr=self.average_rate, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False, found_inf=hold,
        )  # fmt: skip
        if self.averaged_buffers:
            torch._foreach_copy_(self.averaged_buffers, self.buffers)
