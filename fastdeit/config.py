"""Every setting of a training run, declared once: default, bounds, help, and whether a resumed run may change it.

Field names are the flags, with the names of facebookresearch/deit main.py (and, where that has none, timm's train.py);
deit_flags.py reads the rest of an existing command line. A recipe (fastdeit/recipes) is a function that returns a
filled `Config`; the command line overrides its fields.
"""

import dataclasses
import json
import math
import operator
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from fastdeit.errors import UserError

Size = int | tuple[int, int]  # of images, in pixels: a square's side, or height and width


def height_width(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def size_of(height_and_width: Sequence[int]) -> Size:
    """As the settings have it: one number for a square."""
    height, width = height_and_width
    return height if height == width else (height, width)


def in_pixels(size: Size) -> str:
    """224 or 192 x 256"""
    return str(size) if isinstance(size, int) else f"{size[0]} x {size[1]}"


def listed(value: Any) -> tuple:
    """The values of a setting that takes one or several; () of None."""
    return value if isinstance(value, tuple) else () if value is None else (value,)


LIMITS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def setting(default: Any, *, resumable: bool = False, remedy: str = "", **bounds: float) -> Any:
    """A field of a dataclass of flags; the docstring below it is its help, and states the unit.

    bounds: at_least, above, at_most, below: of a number, or of each number of a tuple. remedy: what to add where they
    are broken. resumable: a resumed run may change it, because the weights do not depend on it; of data and teacher,
    what counts is the content, of the batch the product over micro-batches and processes (checkpoint.resume).
    """
    assert bounds.keys() <= LIMITS.keys()
    return field(default=default, metadata={"bounds": bounds, "remedy": remedy, "resumable": resumable})


def check_bounds(settings: Any) -> None:
    """Raises UserError for a field of this dataclass, or of the dataclasses in it, whose value is out of bounds."""
    for one in dataclasses.fields(settings):
        value, bounds = getattr(settings, one.name), one.metadata.get("bounds")
        if dataclasses.is_dataclass(value):
            check_bounds(value)
        if not bounds or value is None or isinstance(value, str):
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        finite = all(map(math.isfinite, numbers))
        if not finite or not all(LIMITS[name](n, limit) for name, limit in bounds.items() for n in numbers):
            flag, shown = f"--{one.name.replace('_', '-')}", " ".join(map(str, numbers))
            wanted = [] if finite else ["finite"]
            wanted += [f"{name.replace('_', ' ')} {limit}" for name, limit in bounds.items()]
            raise UserError(f"{flag} {shown}: must be {' and '.join(wanted)}{one.metadata['remedy']}")


@dataclass(kw_only=True)
class Run:
    """What is run and where it is written."""

    recipe: str | None = None
    """The settings to start from: a function in fastdeit/recipes. If omitted: deit_small, on a CPU deit_tiny, and
    without --data-path demo."""
    config: Path | None = setting(None, resumable=True)
    """File of settings (.yaml, .toml or .json), as --print-config prints them or a run's settings.json; any part of
    them will do. Flags outrank it, it outranks the recipe."""
    output_dir: Path | None = setting(None, resumable=True)
    """Folder of this run. None: runs/RECIPE-DATE-TIME."""
    resume: str | None = setting(None, resumable=True)
    """Folder of a run to resume, at the very step it had saved. auto: the run in --output-dir if there is one, so that
    the same command starts it and resumes it."""
    extend: str | None = None
    """Folder of a finished run to train on up to --epochs, the number of them all. This is another run, in a folder of
    its own, with that one's settings as defaults: weights, moving average, optimizer and order continue from its end,
    and the learning rate begins its warm-up and cosine anew."""
    patience: int | None = setting(None, at_least=1, resumable=True)
    """Stop after so many evaluations in a row without a better top-1 of the weights (of any head). None: at the last
    epoch. The learning rate follows --epochs all the same."""
    eval: bool = setting(False, resumable=True)
    """Only evaluate --resume or --finetune on the validation images."""
    eval_every: int = setting(1, at_least=1, resumable=True)
    """Evaluate after every N-th epoch, and after the last."""
    checkpoint_minutes: float = setting(10, at_least=0, resumable=True)
    """Minutes between checkpoints within an epoch; one is written after each epoch anyway."""
    keep_epochs: int = setting(0, at_least=0, resumable=True)
    """Keep the checkpoint of every N-th epoch, beside last and best. 0: none."""
    keep_count: int | None = setting(None, at_least=0, resumable=True)
    """How many of those to keep, the newest. None: all."""
    skip_nonfinite: int = setting(0, at_least=0, resumable=True)
    """Skip up to this many steps whose loss or gradient is not finite, then stop."""
    seed: int = setting(0, at_least=0)
    """Seed of everything random: weights, order, augmentation, mixing, drop path."""
    device: str | None = setting(None, resumable=True)
    """cuda, cuda:N or cpu. None: cuda where present."""
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] | None = setting(None, resumable=True)
    """Where the metrics of metrics.jsonl are logged too. None: tensorboard where installed."""
    dry_run: bool = setting(False, resumable=True)
    """Build everything, take two steps, report memory and the first batch's shapes, write nothing."""
    print_config: bool = setting(False, resumable=True)
    """Print the settings as JSON and stop."""


@dataclass(kw_only=True)
class Data:
    """Images and their augmentation."""

    data_path: Path | None = setting(None, resumable=True)
    """DIR/train/CLASS/* and DIR/val/CLASS/*, or shards (see the README); `synthetic`: noise in memory, for benchmarks.
    None: scikit-learn's digits, written to data/digits, or to data/digits-100 for a student with a teacher: 100 of them
    with labels, the others without."""
    val_share: float | None = setting(None, above=0, below=1)
    """Validate on this share of each class's training images, held out by --seed: for data without val, which may then
    be one folder of classes, DIR/CLASS/*. None: --data-path has val."""
    classes: Path | None = setting(None, resumable=True)
    """Text file, a class a line: their order in the model's outputs. None: class folders sorted as strings (10 before
    2), or classes.txt beside shards."""
    label_column: str | None = setting(None, resumable=True)
    """Column of Parquet files that holds the labels. None: label, labels, ..., or the one with class names."""
    input_size: Size = setting(224, at_least=1)
    """Height and width of the images in pixels; one number for squares."""
    in_chans: int = setting(3, at_least=1)
    """Channels of the images as models see them: 3, or 1 for grey."""
    batch_size: int | None = setting(None, at_least=1, resumable=True)
    """Images per process and forward pass; --accumulate multiplies what a step sees. None: on a GPU as many images a
    step as in the recipe's paper, accumulated where its memory needs that; on a CPU, or without a paper, 64."""
    num_workers: int | None = setting(None, at_least=0, resumable=True)
    """Threads that read and decode. None: the machine's cores, divided among its processes."""
    scale: tuple[float, float] = setting((0.08, 1.0), above=0, at_most=1)
    """Random resized crop: fraction of the image's area, lowest and highest."""
    ratio: tuple[float, float] = setting((3 / 4, 4 / 3), above=0)
    """Random resized crop: width over height, lowest and highest."""
    hflip: float = setting(0.5, at_least=0, at_most=1)
    """Probability of a horizontal flip."""
    src: bool = False
    """Simple random crop (resize, pad 4, crop) in place of the random resized crop, as in DeiT III."""
    aa: str = "rand-m9-mstd0.5-inc1"
    """none, 3aug (DeiT III), or RandAugment in timm's notation."""
    color_jitter: float = setting(0.3, at_least=0)
    """Strength of brightness, contrast and saturation jitter; used with --aa none or 3aug only, as in timm."""
    reprob: float = setting(0.25, at_least=0, at_most=1)
    """Probability of random erasing (one rectangle of pixel noise)."""
    class_balance: float = setting(0.0, at_least=0, at_most=1)
    """Draw rare classes more often. 1: every class as often as any other. 0.5: in proportion to the square root of its
    images. 0: each image once. An epoch keeps its length."""
    repeated_aug: bool = True
    """Each image three times an epoch, augmented differently each time; a third of the images is seen per epoch."""
    mixup: float = setting(0.8, at_least=0)
    """Mixup alpha; 0 turns it off."""
    cutmix: float = setting(1.0, at_least=0)
    """CutMix alpha; 0 turns it off."""
    mixup_prob: float = setting(1.0, at_least=0, at_most=1)
    """Probability of mixing at all."""
    mixup_switch_prob: float = setting(0.5, at_least=0, at_most=1)
    """Probability of CutMix when both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """One lambda per batch, pair or sample."""
    eval_crop_ratio: float = setting(0.875, above=0, at_most=1)
    """Evaluation: side of the centre crop over that of the resized image (crop_pct in timm)."""
    max_bad: float = setting(0.01, at_least=0, at_most=1, resumable=True)
    """Stop when more than this fraction of the images cannot be read."""


@dataclass(kw_only=True)
class Model:
    """The student."""

    model: str = "deit_small_distilled_patch16_224"
    """deit_*, deit3_* (fastdeit.models.deit.model_names()), or any other timm model name."""
    patch_size: int | None = setting(None, at_least=1)
    """Height and width of a patch in pixels. None: the model's."""
    drop_path: float = setting(0.1, at_least=0, at_most=1)
    """Stochastic depth: rate of the last block, rising linearly from 0 (DeiT III: the same in every block)."""
    patch_drop: float = setting(0.0, at_least=0, below=1)
    """Share of each image's patches that a training step leaves out, others in each step: 0.5 halves the student's
    arithmetic (PatchDropout, arXiv 2208.07220). The last tenth of the run, and evaluations, see all. It did not pay for
    a nano student on Fashion-MNIST (docs/training.md)."""
    finetune: str | None = None
    """Weights to start from: a run's folder; a folder of timm or transformers; a file, of timm or facebookresearch/deit
    too; hf-hub:ORG/NAME; a URL."""
    pretrained: bool = False
    """Start from the weights that timm publishes for --model, NAME or NAME.TAG."""
    freeze: int | Literal["backbone"] | None = setting(None, at_least=0)
    """What keeps the weights of --finetune or --pretrained. backbone: all but the heads. N: patch embedding, tokens,
    positions and the first N blocks. None: nothing."""
    attn_only: bool = False
    """Fine-tune attention, position embedding and heads only (arXiv 2203.09795): all else keeps its weights."""
    model_ema: bool = True
    """Keep, evaluate and save an exponential moving average of the weights."""
    model_ema_decay: float = setting(0.99996, at_least=0, at_most=1)
    """Decay of the moving average per step, reached by a warm-up: min(decay, (1 + step) / (10 + step))."""
    grad_checkpointing: bool = setting(False, resumable=True)
    """Recompute each block in the backward pass: less memory, about a third more time."""


@dataclass(kw_only=True)
class Distillation:
    """The teacher and what the student takes from it."""

    distillation_type: Literal["none", "soft", "hard", "dkd", "dist", "nkd"] = "none"
    """hard: cross entropy with the teacher's most probable class. soft: KL divergence at temperature tau. dkd: that of
    the target class and, apart, that of the others (arXiv 2203.08679). nkd: likewise, with cross entropies (arXiv
    2303.13005). dist: correlation of probabilities, over classes and over the batch (arXiv 2205.10536)."""
    distillation_alpha: float = setting(0.5, at_least=0, at_most=1)
    """Weight of the teacher's term: loss = (1 - alpha) * class term + alpha * teacher term, as in the original code.
    Some texts weigh the other way round: alpha * cross entropy + (1 - alpha) * teacher."""
    distillation_tau: float = setting(1.0, above=0)
    """Temperature of soft, dkd, dist and nkd; 1 is what the last three take on ImageNet."""
    distillation_reduction: Literal["batchmean", "numel"] = "batchmean"
    """Soft distillation: mean over the batch, or (numel) over batch * classes as in the original code."""
    distillation_nontarget: float | None = setting(None, at_least=0)
    """dkd, nkd: weight of the classes other than the target's, their papers' beta and gamma. None: 0.5 for dkd, as from
    ResNet-34 to ResNet-18 on ImageNet (2 from ResNet-50 to MobileNetV1), 1 for nkd, as with DeiT students there."""
    logit_standardization: bool = False
    """soft, dkd: each image's logits, the teacher's and the student's, less their mean and over their standard
    deviation (arXiv 2403.01427, whose code takes a tau of 2 to 3 and a weight of 9, which is an alpha of 0.9). It did
    not pay for a nano student on Fashion-MNIST (docs/training.md)."""
    teacher_model: str | tuple[str, ...] = "regnety_160"
    """timm model name, NAME or NAME.TAG, for its published weights. Several: their probabilities' mean teaches."""
    teacher_path: str | tuple[str, ...] | None = setting(None, resumable=True)
    """The teacher as a run's folder, a folder of timm or transformers, or hf-hub:ORG/NAME (--teacher-model is then not
    needed); or as a file or URL of weights of --teacher-model. Several: their probabilities' mean teaches."""
    teacher_classes: str | tuple[str, ...] | None = setting(None, resumable=True)
    """File that says which of the teacher's classes stand for the data's, by name or index: JSON {"cat": 281, ...}, or
    a line for each of the data's classes. Of several teachers, one for all of them or one each. None: both have the
    same classes."""
    teacher_input_size: Size | None = setting(None, at_least=1)
    """Height and width of the teacher's images in pixels; one number for squares. None: the size it was trained
    with."""
    teacher_patches: float = setting(1.0, above=0, at_most=1)
    """Share of the patches that a vision transformer as teacher sees: those to which the student's class token attends
    most in its last block (MaskedKD, arXiv 2302.10494, which reports no loss of accuracy with half of them)."""
    teacher_precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of the teacher's weights and activations. None: fp16 on CUDA, fp32 on the CPU."""
    teacher_store: str | None = setting(None, resumable=True)
    """Logit cache to train from, with no teacher in memory: a folder that `python -m fastdeit.teach store` wrote."""
    unlabelled_path: Path | None = setting(None, resumable=True)
    """Folder of further images without classes, searched with its sub-folders: they join the training set, with the
    teacher's term only."""
    attention_distillation_weight: float = setting(0.0, at_least=0)
    """Weight of the distance between the student's attention and that of a vision transformer as teacher, added to the
    loss. Of 20 teachers it helped with 7 and hurt with 4 (arXiv 2605.07191): compare with 0."""
    attention_distillation_layers: str = "last"
    """Blocks to compare: last, every-N (of the student; the teacher's at the same relative depth), or pairs
    STUDENT:TEACHER counted from 0, such as 5:5,11:23."""
    attention_distillation_variant: Literal["maps", "rows", "scores", "relations"] = "maps"
    """maps: KL between attention maps. rows: the class and distillation tokens' rows only. scores: mean squared
    difference before the softmax. relations: KL of queries with queries, keys with keys, values with values."""
    attention_distillation_heads: str = "equal"
    """equal: head by head. mean: maps averaged over the heads. A number: channels regrouped into that many relation
    heads (MiniLMv2), for models of any widths and numbers of heads."""
    feature_distillation_weight: float = setting(0.0, at_least=0)
    """Weight of the distance between the teacher's features and an orthogonal projection of the student's, added to
    the loss (VkD, arXiv 2403.06213): 0.5 with --distillation-type soft and alpha 0.5 is half of the paper's loss. With
    RegNetY-160 its authors report 79.2 and 82.3 % for DeiT-Ti and DeiT-S with convolutions in place of the patch
    embedding, where DeiT's own loss gives 74.5 and 81.2 without them (roymiles/VkD)."""
    compare_undistilled: bool = False
    """Train the same student a second time without teacher and distillation token, and put it in the table."""

    def teachers(self) -> list["Distillation"]:
        """These settings for each teacher alone. Raises UserError where it is not clear what belongs to which."""
        given = {name: listed(getattr(self, name)) for name in ("teacher_path", "teacher_model", "teacher_classes")}
        count = max(1, len(given["teacher_path"] or given["teacher_model"]))
        for name, values in given.items():
            if len(values) not in (0, 1, count):
                raise UserError(
                    f"--{name.replace('_', '-')} has {len(values)} values for {count} teacher{'s' * (count != 1)}: "
                    "give one for each, or one for all of them"
                )
        each = {name: values * (count if len(values) == 1 else 1) or (None,) * count for name, values in given.items()}
        return [dataclasses.replace(self, **dict(zip(each, one))) for one in zip(*each.values())]


@dataclass(kw_only=True)
class Optimization:
    """Optimizer and schedule."""

    epochs: int = setting(300, at_least=1)
    """Passes over the training images; with --curriculum, the work of so many at the full size."""
    curriculum: str = "none"
    """Smaller images and weaker RandAugment at first (EfficientTrain++). efficienttrain: as published for DeiT at 224
    pixels. SIZE:MAGNITUDE,...: parts of equal work, as 14:0,21:5,28:9; SIZE,...: with the magnitude of --aa. none: all
    epochs alike. It did not pay for a nano student on Fashion-MNIST (docs/training.md)."""
    accumulate: int = setting(1, at_least=1, resumable=True)
    """Micro-batches of --batch-size per process whose gradients make one step."""
    opt: Literal["adamw", "lamb", "sgd", "muon"] = "adamw"
    """Optimizer. muon: Muon for the matrices within the network, AdamW for the rest, both at AdamW's learning rate and
    weight decay."""
    lr: float = setting(5e-4, at_least=0)
    """Peak learning rate for a global batch of 512 images; scaled linearly with the batch."""
    unscale_lr: bool = False
    """Do not scale --lr, --warmup-lr and --min-lr with the batch."""
    weight_decay: float = setting(0.05, at_least=0)
    """Decoupled weight decay; none on biases, norms, tokens and position embedding."""
    layer_decay: float | None = setting(None, above=0, at_most=1)
    """Learning rate of a block over that of the next one, as in BEiT and timm: 0.75, say, for fine-tuning. The heads
    have --lr, the blocks below less and less, the patch embedding least. None: all have --lr."""
    opt_eps: float = setting(1e-8, at_least=0)
    """Epsilon of AdamW (muon's too) and LAMB."""
    opt_betas: tuple[float, float] = setting((0.9, 0.999), at_least=0, below=1)
    """Betas of AdamW (muon's too) and LAMB."""
    clip_grad: float | None = setting(
        None, above=0, remedy="; omit it for no clipping (0 would leave nothing of any gradient)"
    )
    """Clip the gradient's norm to this. None: no clipping."""
    warmup_epochs: float = setting(5, at_least=0)
    """Epochs of linear warm-up."""
    warmup_lr: float = setting(1e-6, at_least=0)
    """Learning rate of step 0; scaled like --lr for global batches below 512, not scaled for larger ones."""
    min_lr: float = setting(1e-5, at_least=0)
    """Learning rate at the end; scaled as --warmup-lr is."""
    smoothing: float = setting(0.1, at_least=0, at_most=1)
    """Label smoothing of the class term."""
    bce_loss: bool = False
    """Binary cross entropy for the class term, as in DeiT III."""


@dataclass(kw_only=True)
class Speed:
    """Precision, kernels, sharding."""

    compile: bool | None = setting(None, resumable=True)
    """torch.compile student and teacher (--compile, --no-compile). None: on a GPU, where a C compiler is installed."""
    cuda_graph: Literal["auto", "on", "off"] = setting("auto", resumable=True)
    """The whole step as one CUDA graph, for one process on a GPU. auto: where possible, once a replay has proved to be
    the step. on: refuse to start where it is not possible."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Autocast type of the student's step. None: bf16 on CUDA, fp32 on the CPU."""
    attention: Literal["auto", "fused", "sdpa", "xformers"] = setting("auto", resumable=True)
    """auto: the fastest here (--tune), sdpa where nothing is measured. fused: fastdeit's Triton kernel. sdpa:
    PyTorch's. xformers: its memory-efficient attention (CUDA)."""
    tune: Literal["auto", "off", "fresh"] = setting("auto", resumable=True)
    """Which of several ways to compute the same thing is taken. auto: the fastest, measured when a run of 1,000 steps
    or more starts on a GPU, and remembered; otherwise, where measuring costs more than it gains, only what such a run
    or `python -m fastdeit.tune` has measured before. off: plain PyTorch's. fresh: measured again, on a CPU too."""
    sharding: Literal["ddp", "fsdp"] = setting("ddp", resumable=True)
    """With several processes, ddp: full weights in each. fsdp: a shard of weights and optimizer state in each."""
    deterministic: bool = setting(False, resumable=True)
    """Only algorithms that give the same bits each time. On a CPU they all do; on a GPU they are slower."""


@dataclass(kw_only=True)
class Config:
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    distillation: Distillation = field(default_factory=Distillation)
    optimization: Optimization = field(default_factory=Optimization)
    speed: Speed = field(default_factory=Speed)
    typed: ClassVar[frozenset[str]] = frozenset()
    """The flags that stood on the command line (cli.typed_flags); the other settings are defaults."""

    def to_dict(self) -> dict:
        """Plain JSON types, one dictionary per group."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_dict(cls, groups: dict) -> "Config":
        """The inverse of `to_dict`; settings this version does not know are refused by name."""
        config = cls()
        for group, values in groups.items():
            target = getattr(config, group, None)
            types = {} if target is None else {one.name: one.type for one in dataclasses.fields(target)}
            if unknown := [key for key in values if key not in types]:
                raise UserError(f"the saved settings hold {group}.{', '.join(unknown)}, unknown to this version")
            for key, value in values.items():
                if isinstance(value, list):
                    value = tuple(value)
                if value is not None and Path in (types[key], *typing.get_args(types[key])):
                    value = Path(value)
                setattr(target, key, value)
        return config
