"""Settings that no run can work with, or that would not do what they seem to: refused, each by its flag and with a
remedy. The bounds of single settings stand in config.py."""

from pathlib import Path

from fastdeit import recipes
from fastdeit.config import check_bounds, listed
from fastdeit.curriculum import Curriculum
from fastdeit.errors import UserError


def check(config) -> None:
    """Raises UserError for values no run can work with."""
    check_bounds(config)
    _check_together(config)


def _check_together(config) -> None:
    """Settings that do not go with each other."""
    data, distillation = config.data, config.distillation
    for flag, (low, high) in {"--scale": data.scale, "--ratio": data.ratio}.items():
        if low > high:
            raise UserError(f"{flag} {low} {high}: the lowest comes first, then the highest")
    for flag, given in {
        "--teacher-path": distillation.teacher_path,
        "--teacher-store": distillation.teacher_store,
    }.items():
        if given is not None and distillation.distillation_type == "none":
            raise UserError(f"{flag} has no effect without --distillation-type hard or soft: give one of them too")
    if distillation.teacher_path is not None and distillation.teacher_store is not None:
        raise UserError("--teacher-path gives a live teacher, --teacher-store its logit cache: give one of them")
    several = len(distillation.teachers()) > 1 and distillation.distillation_type != "none"
    for what, weight in {
        "attention": distillation.attention_distillation_weight,
        "feature": distillation.feature_distillation_weight,
    }.items():
        if weight > 0 and several:
            raise UserError(f"--{what}-distillation-weight compares with one teacher: give one, or omit the flag")
        if weight > 0 and distillation.teacher_store is not None:
            raise UserError(
                f"--{what}-distillation-weight needs a live teacher: omit --teacher-store, since a logit cache holds "
                f"no {'attention maps' if what == 'attention' else 'features'}"
            )
    if distillation.unlabelled_path is not None and distillation.distillation_type == "none":
        raise UserError(
            "--unlabelled-path: images without labels need a teacher: give --distillation-type hard or soft"
        )
    model = config.model
    if model.freeze is not None and model.attn_only:
        raise UserError("--freeze and --attn-only both say what learns: give one of them")
    if (model.freeze is not None or model.attn_only) and not (model.finetune or model.pretrained):
        flag = "--attn-only" if model.attn_only else f"--freeze {model.freeze}"
        raise UserError(f"{flag}: random weights would stay random: give --finetune CHECKPOINT, or --pretrained")
    if model.patch_drop > 0 and distillation.attention_distillation_weight > 0:
        raise UserError(
            f"--patch-drop {model.patch_drop:g}: of a student without some patches the attention cannot be compared "
            "with the teacher's: omit one of --patch-drop and --attention-distillation-weight"
        )
    if data.in_chans not in (1, 3):
        raise UserError(f"--in-chans {data.in_chans}: images are decoded to red, green and blue: give 3, or 1 for grey")
    if (data.batch_size or 0) % 2 and (data.mixup > 0 or data.cutmix > 0):
        raise UserError(
            f"--batch-size {data.batch_size}: mixup and cutmix pair the samples of a batch; use an even size"
        )
    if config.run.extend and distillation.compare_undistilled:
        raise UserError("--compare-undistilled trains a second student from the beginning: omit it with --extend")
    if distillation.teacher_patches < 1 and distillation.distillation_type != "none":
        for flag, given in {
            "several teachers": several, "--teacher-store": distillation.teacher_store is not None,
            "--attention-distillation-weight": distillation.attention_distillation_weight > 0,
            "--patch-drop": model.patch_drop > 0, "--curriculum": len(Curriculum.of(config).sizes) > 1,
        }.items():  # fmt: skip
            if given:
                raise UserError(
                    f"--teacher-patches {distillation.teacher_patches:g} does not go with {flag}: one live teacher "
                    "must see some of the very patches that the student sees; omit one of them"
                )
    _check_curriculum(config)
    if config.speed.sharding == "fsdp" and config.speed.precision == "fp16":
        raise UserError("--sharding fsdp has no loss scaling for --precision fp16: choose bf16 or fp32")


def _check_curriculum(config) -> None:
    curriculum, flag = Curriculum.of(config), f"--curriculum {config.optimization.curriculum}"
    if curriculum.magnitudes and not config.data.aa.startswith("rand"):
        raise UserError(
            f"{flag}: its magnitudes are RandAugment's, and --aa is {config.data.aa}: give sizes alone, as in "
            "96,160,224, or --aa rand-m9-mstd0.5-inc1"
        )
    if config.optimization.curriculum != "none" and config.run.extend:
        raise UserError(f"{flag} begins with small images, which --extend has behind it: give --curriculum none")
    if len(curriculum.sizes) > 1 and config.distillation.attention_distillation_weight > 0:
        raise UserError(
            f"{flag}: the teacher sees full images, and attention is compared patch by patch: omit "
            "--attention-distillation-weight, or --curriculum"
        )


# ---------------------------------------------------------------------------------------------------------------------
# A command line that starts a run


def check_start(config) -> None:
    """Refuse to fine-tune random weights."""
    model, name = config.model, config.run.recipe
    if not recipes.starts_from_weights(name) or model.finetune or model.pretrained or config.run.eval:
        return
    raise UserError(
        f"--recipe {name} starts from trained weights: give --pretrained for those that timm publishes for --model, or "
        "--finetune CHECKPOINT (a run's folder, a file, hf-hub:NAME or a URL); from random weights take --recipe "
        "deit_small"
    )


def unread(config, given: set[str]) -> list[str]:
    """A warning for each group of flags on the command line (as --batch-size) that have no effect in this run."""
    sentences = []
    for fields, reason in _without_use(config):
        if flags := [flag for name in fields.split() if (flag := f"--{name.replace('_', '-')}") in given]:
            sentences.append(f"warning: {', '.join(flags)} changes nothing: {reason}")
    return sentences


def _without_use(config):
    """(fields without effect under these settings, why)"""
    data, model, distillation, optimization = config.data, config.model, config.distillation, config.optimization
    kind, of_kinds = distillation.distillation_type, "distillation_tau distillation_reduction distillation_nontarget"
    of_attention = "attention_distillation_layers attention_distillation_variant attention_distillation_heads"
    of_teacher = "teacher_model teacher_input_size teacher_patches teacher_precision teacher_classes"
    if kind == "none":
        yield (
            f"distillation_alpha {of_kinds} logit_standardization {of_attention} {of_teacher} compare_undistilled",
            "there is no teacher without --distillation-type hard or soft",
        )
    else:
        if kind == "hard":
            yield "distillation_tau", "it belongs to --distillation-type soft, dkd, dist and nkd"
        if kind != "soft":
            yield "distillation_reduction", "it belongs to --distillation-type soft"
        if kind not in ("dkd", "nkd"):
            yield "distillation_nontarget", "it belongs to --distillation-type dkd and nkd"
        if kind not in ("soft", "dkd"):
            yield "logit_standardization", "it belongs to --distillation-type soft and dkd"
        if distillation.attention_distillation_weight == 0:
            yield of_attention, "--attention-distillation-weight is 0"
        if distillation.teacher_store is not None:
            yield of_teacher, "--teacher-store has the teacher's logits"
        elif distillation.teacher_path is not None and all(map(_says_its_model, listed(distillation.teacher_path))):
            yield "teacher_model", "the folder of --teacher-path says which model it holds"
    if str(data.data_path) == "synthetic":
        yield "val_share", "synthetic images have a validation set of their own"
    if data.mixup == 0 and data.cutmix == 0:
        yield "mixup_prob mixup_switch_prob mixup_mode", "--mixup and --cutmix are 0"
    if data.aa.startswith("rand"):
        yield "color_jitter", "it is used with --aa none or 3aug only, as in timm"
    if data.src:
        yield "scale ratio", "they belong to the random resized crop, which --src replaces"
    if config.run.extend:
        yield "finetune pretrained", "the weights are those of --extend"
    if model.finetune:
        yield "pretrained", "the weights are those of --finetune"
    if not model.model_ema:
        yield "model_ema_decay", "no moving average is kept"
    if optimization.opt == "sgd":
        yield "opt_eps opt_betas", "they belong to adamw, lamb and muon"
    if optimization.warmup_epochs == 0:
        yield "warmup_lr", "--warmup-epochs is 0"
    if config.run.keep_epochs == 0:
        yield "keep_count", "it counts what --keep-epochs keeps"


def _says_its_model(path: str) -> bool:
    return path.startswith("hf-hub:") or Path(path).is_dir()
