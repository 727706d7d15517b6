"""DeiT's training loop once more, in plain PyTorch and float64, from the formulas alone: the oracle of the trainer.

It takes each step's batch as a whole, whatever the parts the trainer splits it into, and shares no code with the
trainer but the model and the batch. Sources: DeiT (arXiv 2012.12877, equations 2 and 3; facebookresearch/deit main.py,
engine.py, losses.py), DeiT III (arXiv 2204.07118), mixup (arXiv 1710.09412), cutmix (arXiv 1905.04899), AdamW (arXiv
1711.05101, algorithm 2), LAMB (arXiv 1904.00962, algorithm 2, with the clipping to norm 1 of apex's FusedLAMB), SGD
with Nesterov momentum 0.9 as timm's "sgd", Muon (kellerjordan.github.io/posts/muon, scaled as in arXiv 2502.16982) by
singular values, the cosine of arXiv 1608.03983 with timm's linear warm-up.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()  # ImageNet's


@dataclass(kw_only=True)
class Recipe:
    """What a run is made of; rates and steps as they are, nothing scaled."""

    total_steps: int
    peak: float
    warmup_steps: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    opt: str = "adamw"
    weight_decay: float = 0.05
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    ema_decay: float = 0.99996
    kind: str = "none"  # or "hard", "soft"
    alpha: float = 0.5
    tau: float = 1.0
    divided_by_classes: bool = False
    smoothing: float = 0.0
    binary: bool = False

    def lr(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.warmup_lr + (self.peak - self.warmup_lr) * step / self.warmup_steps
        return self.min_lr + (self.peak - self.min_lr) * (1 + math.cos(math.pi * step / self.total_steps)) / 2

    def decay(self, step: int) -> float:
        """Of the moving average, after step `step` (counted from 0); warmed up as TensorFlow's with num_updates."""
        return min(self.ema_decay, (1 + step) / (10 + step))


def train(model, batches, recipe: Recipe, teacher=None):
    """Yields after each step (lr, losses, weights, moments, moving average): the losses are the loss, the class term
    and the teacher's; the others dictionaries by parameter, the moving average with buffers."""
    model = copy.deepcopy(model).double().train()
    weights = dict(model.named_parameters())
    moments = {name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in weights.items()}
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    for step, batch in enumerate(batches):
        x = images(batch)
        losses = loss_terms(model(x), batch, None if teacher is None else teacher(x), recipe)
        gradients = dict(zip(weights, torch.autograd.grad(losses[0], list(weights.values()))))
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        factor = 1.0 if recipe.clip is None else min(1.0, recipe.clip / norm.item())
        factor *= min(1.0, 1 / (norm.item() * factor)) if recipe.opt == "lamb" else 1.0
        lr = recipe.lr(step)
        with torch.no_grad():
            for name, w in weights.items():
                w -= update(name, w, factor * gradients[name], moments[name], step + 1, lr, recipe)
            decay = recipe.decay(step)
            for name, value in model.state_dict().items():  # running statistics are taken as they are
                ema[name] = decay * ema[name] + (1 - decay) * value if name in weights else value.clone()
        yield lr, losses, weights, moments, ema


def decayed(name: str, w) -> bool:
    """Biases, norms and LayerScale have one dimension; tokens and positions are left alone too."""
    return w.ndim > 1 and name not in ("cls_token", "dist_token", "pos_embed")


def update(name: str, w, g, moments, t: int, lr: float, recipe: Recipe):
    """What is taken from the weights in step t, counted from 1. Changes the moments."""
    is_decayed = decayed(name, w)
    wd, (m, v), (b1, b2) = recipe.weight_decay if is_decayed else 0.0, moments, recipe.betas
    if recipe.opt == "muon" and name.startswith("blocks.") and w.ndim == 2:
        m.mul_(0.95).add_(0.05 * g)
        towards = (0.05 * g + 0.95 * m).chunk(3 if "qkv" in name else 1)  # queries, keys, values
        return lr * (torch.cat([0.2 * max(u.shape) ** 0.5 * nearly_orthogonal(u) for u in towards]) + wd * w)
    if recipe.opt == "sgd":
        g = g + wd * w
        m.mul_(0.9).add_(g)
        return lr * (g + 0.9 * m)
    m.mul_(b1).add_((1 - b1) * g)
    v.mul_(b2).add_((1 - b2) * g**2)
    u = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + recipe.eps) + wd * w
    ratio = w.norm() / u.norm() if recipe.opt == "lamb" and is_decayed and w.norm() > 0 else 1.0
    return lr * ratio * u


def nearly_orthogonal(u):
    """U p(S / |u|) V^T of u = U S V^T: five times the polynomial that Newton and Schulz's products come to."""
    left, s, right = torch.linalg.svd(u, full_matrices=False)
    s = s / u.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return left @ (s[:, None] * right)


def loss_terms(outputs, batch, teacher, recipe: Recipe):
    """(loss, class term, teacher's term), means over the batch."""
    cls, dist = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    if recipe.kind == "none":
        cls = (cls + dist) / 2  # without a teacher both heads learn the labels, through their average
    B, C = cls.shape
    lam, partner = batch.mix.lam.double()[:, None], batch.mix.partner
    labelled = batch.labels >= 0
    y = F.one_hot(batch.labels.clamp(min=0), C).double()
    if recipe.binary:  # each class that is in the picture is there in full
        present = torch.maximum(y * (lam > 0), y[partner] * (lam < 1))
        class_term = F.binary_cross_entropy_with_logits(cls, present)
        return torch.stack([class_term, class_term, 0 * class_term])
    q = (1 - recipe.smoothing) * (lam * y + (1 - lam) * y[partner]) + recipe.smoothing / C
    class_term = -((q * cls.log_softmax(1)).sum(1) * labelled).sum() / B
    if recipe.kind == "none":
        return torch.stack([class_term, class_term, 0 * class_term])
    if recipe.kind == "hard":
        teacher_term = -dist.log_softmax(1)[torch.arange(B), teacher.argmax(1)].mean()
    else:
        p, log_q = (teacher / recipe.tau).softmax(1), (dist / recipe.tau).log_softmax(1)
        teacher_term = recipe.tau**2 * (p * (p.log() - log_q)).sum() / (B * C if recipe.divided_by_classes else B)
    return torch.stack([(1 - recipe.alpha) * class_term + recipe.alpha * teacher_term, class_term, teacher_term])


def images(batch):
    """Normalised and mixed, (B, 3, height, width) float64."""
    x = (batch.images.double() / 255 - MEAN) / STD
    mixed = []
    for i, (other, lam, (y0, x0, y1, x1)) in enumerate(
        zip(batch.mix.partner.tolist(), batch.mix.lam.tolist(), batch.mix.box.tolist())
    ):
        if y1 > y0:
            mixed.append(x[i].clone())
            mixed[-1][y0:y1, x0:x1] = x[other, y0:y1, x0:x1]
        else:
            mixed.append(lam * x[i] + (1 - lam) * x[other])
    return torch.stack(mixed).permute(0, 3, 1, 2)
