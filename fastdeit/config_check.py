"""Settings that no run can work with, or that would not do what they seem to: refused, each by its flag and with a
remedy."""

import math
from pathlib import Path

from fastdeit import recipes
from fastdeit.errors import UserError
from fastdeit.training import trackers


def check(config) -> None:
    """Refuse values no run can work with."""
    trackers.check(config.run.tracker)
    _check_ranges(config)
    _check_together(config)


def _check_ranges(config) -> None:
    """Each setting by itself."""
    data, optimization, distillation = config.data, config.optimization, config.distillation
    for flag, rate in {
        "--drop-path": config.model.drop_path,
        "--smoothing": optimization.smoothing,
        "--distillation-alpha": distillation.distillation_alpha,
        "--model-ema-decay": config.model.model_ema_decay,
        "--reprob": data.reprob,
        "--hflip": data.hflip,
        "--mixup-prob": data.mixup_prob,
        "--mixup-switch-prob": data.mixup_switch_prob,
        "--max-bad": data.max_bad,
    }.items():
        if not 0 <= rate <= 1:
            raise UserError(f"{flag} {rate}: must lie between 0 and 1")
    for flag, count in {
        "--batch-size": data.batch_size,
        "--epochs": optimization.epochs,
        "--input-size": data.input_size,
        "--accumulate": optimization.accumulate,
        "--patch-size": config.model.patch_size,
        "--teacher-input-size": distillation.teacher_input_size,
    }.items():
        if count is not None and count < 1:
            raise UserError(f"{flag} {count}: must be at least 1")
    for flag, value in {
        "--seed": config.run.seed,
        "--num-workers": data.num_workers or 0,
        "--lr": optimization.lr,
        "--warmup-lr": optimization.warmup_lr,
        "--min-lr": optimization.min_lr,
        "--warmup-epochs": optimization.warmup_epochs,
        "--weight-decay": optimization.weight_decay,
        "--opt-eps": optimization.opt_eps,
        "--attention-distillation-weight": distillation.attention_distillation_weight,
        "--checkpoint-minutes": config.run.checkpoint_minutes,
        "--keep-epochs": config.run.keep_epochs,
        "--keep-count": config.run.keep_count or 0,
        "--skip-nonfinite": config.run.skip_nonfinite,
    }.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{flag} {value}: must be a number, and not negative")
    if optimization.clip_grad is not None and not 0 < optimization.clip_grad < math.inf:
        raise UserError(
            f"--clip-grad {optimization.clip_grad}: a norm above 0; leave the flag away for no clipping (0 would leave "
            "nothing of any gradient)"
        )
    if not all(0 <= beta < 1 for beta in optimization.opt_betas):
        raise UserError(f"--opt-betas {' '.join(map(str, optimization.opt_betas))}: must lie from 0 to below 1")
    if not 0 < distillation.distillation_tau < math.inf:
        raise UserError(f"--distillation-tau {distillation.distillation_tau}: a temperature must be above 0")
    if not 0 < data.eval_crop_ratio <= 1:
        raise UserError(f"--eval-crop-ratio {data.eval_crop_ratio}: must lie above 0 and up to 1")


def _check_together(config) -> None:
    """Settings that do not go with each other."""
    data, distillation = config.data, config.distillation
    for flag, given in {
        "--teacher-path": distillation.teacher_path,
        "--teacher-store": distillation.teacher_store,
    }.items():
        if given is not None and distillation.distillation_type == "none":
            raise UserError(f"{flag}: nobody listens to a teacher; give --distillation-type hard or soft too")
    if distillation.teacher_path is not None and distillation.teacher_store is not None:
        raise UserError("--teacher-path gives a live teacher, --teacher-store its logit cache: give one of them")
    if distillation.unlabelled_path is not None and distillation.distillation_type == "none":
        raise UserError(
            "--unlabelled-path: without labels there must be a teacher: give --distillation-type hard or soft"
        )
    if data.batch_size % 2 and (data.mixup > 0 or data.cutmix > 0):
        raise UserError(
            f"--batch-size {data.batch_size}: mixup and cutmix pair the samples of a batch; use an even size"
        )
    if config.speed.sharding == "fsdp" and config.speed.precision == "fp16":
        raise UserError("--sharding fsdp goes with --precision bf16 or fp32: it does not know the loss scaling of fp16")


# ---------------------------------------------------------------------------------------------------------------------
# A command line that begins a run


def check_start(config) -> None:
    """Refuse to fine-tune random weights."""
    model, name = config.model, config.run.recipe
    if not recipes.starts_from_weights(name) or model.finetune or model.pretrained or config.run.eval:
        return
    raise UserError(
        f"--recipe {name} begins with trained weights: give --finetune CHECKPOINT (a run's folder, or a file of timm "
        "or facebookresearch/deit), or --pretrained with a --model of timm's; from random weights take --recipe "
        "deit_small"
    )


def unread(config, given: set[str]) -> list[str]:
    """A sentence for the flags on the command line (as --batch-size) that this run has no use for."""
    sentences = []
    for fields, reason in _without_use(config):
        if flags := [flag for name in fields.split() if (flag := f"--{name.replace('_', '-')}") in given]:
            sentences.append(f"warning: {', '.join(flags)} changes nothing: {reason}")
    return sentences


def _without_use(config):
    """(fields that nobody reads with these settings, why)"""
    data, model, distillation, optimization = config.data, config.model, config.distillation, config.optimization
    of_soft = "distillation_tau distillation_reduction"
    of_attention = "attention_distillation_layers attention_distillation_variant attention_distillation_heads"
    of_teacher = "teacher_model teacher_input_size teacher_precision teacher_classes"
    if distillation.distillation_type == "none":
        yield (
            f"distillation_alpha {of_soft} {of_attention} {of_teacher} compare_undistilled",
            "there is no teacher without --distillation-type hard or soft",
        )
    else:
        if distillation.distillation_type == "hard":
            yield of_soft, "it belongs to --distillation-type soft"
        if distillation.attention_distillation_weight == 0:
            yield of_attention, "--attention-distillation-weight is 0"
        if distillation.teacher_store is not None:
            yield of_teacher, "--teacher-store has the teacher's logits"
        elif distillation.teacher_path is not None and Path(distillation.teacher_path).is_dir():
            yield "teacher_model", "the folder of --teacher-path says which model it holds"
    if data.mixup == 0 and data.cutmix == 0:
        yield "mixup_prob mixup_switch_prob mixup_mode", "--mixup and --cutmix are 0"
    if data.aa.startswith("rand"):
        yield "color_jitter", "it is used with --aa none or 3aug only, as in timm"
    if data.src:
        yield "scale ratio", "they belong to the random resized crop, which --src replaces"
    if model.finetune:
        yield "pretrained", "the weights are those of --finetune"
    if not model.model_ema:
        yield "model_ema_decay", "no moving average is kept"
    if optimization.opt == "sgd":
        yield "opt_eps opt_betas", "they belong to adamw and lamb"
    if optimization.warmup_epochs == 0:
        yield "warmup_lr", "--warmup-epochs is 0"
    if config.run.keep_epochs == 0:
        yield "keep_count", "it counts what --keep-epochs keeps"
