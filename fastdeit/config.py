"""Every setting of a training run. Field names are the flags, with the names of facebookresearch/deit main.py (and,
where that has none, timm's train.py); deit_flags.py reads the rest of an existing command line.

A recipe (fastdeit/recipes) is a function that returns a filled `Config`; the command line overrides its fields.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from fastdeit.errors import UserError


@dataclass(kw_only=True)
class Run:
    """What is run, where it writes."""

    recipe: str | None = None
    """Defaults to start from: a file in fastdeit/recipes. Without it: demo without --data-path, deit_small with one."""
    output_dir: Path | None = None
    """Folder of this run. Default: runs/RECIPE-DATE-TIME."""
    resume: str | None = None
    """Folder of a run to go on with, at the very step it had saved. auto: the same command again goes on with
    --output-dir where there is one, and starts it elsewhere."""
    eval: bool = False
    """Only evaluate --resume or --finetune on the validation images."""
    checkpoint_minutes: float = 10
    """Minutes between checkpoints within an epoch; one is written after each epoch anyway."""
    keep_epochs: int = 0
    """Keep the checkpoint of every so many epochs, beside last and best. 0: none."""
    keep_count: int | None = None
    """The newest so many of those. Default: all."""
    skip_nonfinite: int = 0
    """Leave out up to so many steps whose loss or gradient is not finite, then stop."""
    seed: int = 0
    """Seed of everything random: weights, order, augmentation, mixing, drop path."""
    device: str | None = None
    """cuda, cuda:N or cpu. Default: cuda where present."""
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] | None = None
    """Where the figures of metrics.jsonl also go. Default: tensorboard where installed."""
    dry_run: bool = False
    """Build everything, take two steps, report memory and the first batch's shapes, write nothing."""
    print_config: bool = False
    """Print the settings as JSON and stop."""


@dataclass(kw_only=True)
class Data:
    """Images and their augmentation."""

    data_path: Path | None = None
    """DIR/train/CLASS/* and DIR/val/CLASS/*, or shards (see the README); `synthetic`: noise that is already there, for
    benchmarks. Default: scikit-learn's digits, written to data/digits."""
    classes: Path | None = None
    """Text file, a class a line: their order in the model's outputs. Default: class folders sorted as strings (10
    before 2), or classes.txt beside shards."""
    label_column: str | None = None
    """Column of Parquet files that holds the labels. Default: label, labels, ..., or the one with class names."""
    input_size: int = 224
    """Pixels on a side."""
    batch_size: int = 64
    """Images per process that go through the model at once; --accumulate multiplies what a step sees."""
    num_workers: int | None = None
    """Threads that read and decode. Default: the processor's cores, shared between the processes of this machine."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Random resized crop: share of the image's area, lowest and highest."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random resized crop: width over height, lowest and highest."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    src: bool = False
    """Simple random crop (resize, pad 4, crop) in place of the random resized crop, as in DeiT III."""
    aa: str = "rand-m9-mstd0.5-inc1"
    """none, 3aug (DeiT III), or RandAugment in timm's notation."""
    color_jitter: float = 0.3
    """Strength of brightness, contrast and saturation jitter; used with --aa none or 3aug only, as in timm."""
    reprob: float = 0.25
    """Probability of random erasing (one rectangle of pixel noise)."""
    repeated_aug: bool = True
    """Each image three times an epoch, each time augmented anew; a third of the images is seen per epoch."""
    mixup: float = 0.8
    """Mixup alpha; 0 turns it off."""
    cutmix: float = 1.0
    """CutMix alpha; 0 turns it off."""
    mixup_prob: float = 1.0
    """Probability of mixing at all."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix when both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """One lambda per batch, pair or sample."""
    eval_crop_ratio: float = 0.875
    """Evaluation: share of the resized image's side that the centre crop keeps."""
    max_bad: float = 0.01
    """Stop when more than this share of the images cannot be read."""


@dataclass(kw_only=True)
class Model:
    """The student."""

    model: str = "deit_small_distilled_patch16_224"
    """deit_*, deit3_* (fastdeit.models.deit.model_names()), or any other timm model name."""
    patch_size: int | None = None
    """Pixels on a side of a patch. Default: the model's."""
    drop_path: float = 0.1
    """Stochastic depth: rate of the last block, rising linearly from 0 (DeiT III: the same in every block)."""
    finetune: str | None = None
    """Checkpoint to start from: a run's folder, or a file of timm or facebookresearch/deit."""
    pretrained: bool = False
    """Start from timm's published weights (timm model names only)."""
    model_ema: bool = True
    """Keep, evaluate and save an exponential moving average of the weights."""
    model_ema_decay: float = 0.99996
    """Decay of the moving average per step, reached by a warm-up: min(decay, (1 + step) / (10 + step))."""
    grad_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""


@dataclass(kw_only=True)
class Distillation:
    """The teacher and what the student takes from it."""

    distillation_type: Literal["none", "soft", "hard"] = "none"
    """hard: cross entropy with the teacher's decision. soft: KL divergence at temperature tau."""
    distillation_alpha: float = 0.5
    """Weight of the teacher's term: loss = (1 - alpha) * class term + alpha * teacher term, as in the original code.
    Some texts weigh the other way round: alpha * cross entropy + (1 - alpha) * teacher."""
    distillation_tau: float = 1.0
    """Temperature of soft distillation."""
    distillation_reduction: Literal["batchmean", "numel"] = "batchmean"
    """Soft distillation: mean over the batch, or (numel) over batch * classes as in the original code."""
    teacher_model: str = "regnety_160"
    """timm model name (its published weights), local-dir:FOLDER or hf-hub:NAME as timm has them."""
    teacher_path: str | None = None
    """The teacher as a run's folder (--teacher-model is then not needed), or a checkpoint file of --teacher-model."""
    teacher_classes: str | None = None
    """File that says which of the teacher's classes stand for the data's, by name or index: JSON {"cat": 281, ...}, or
    a line for each of the data's classes. Default: both have the same classes."""
    teacher_input_size: int | None = None
    """Pixels on a side at which the teacher looks. Default: the size it was trained for."""
    teacher_precision: Literal["fp32", "bf16", "fp16"] | None = None
    """The teacher's weights and arithmetic. Default: fp16 on CUDA, fp32 on the CPU."""
    teacher_store: str | None = None
    """Logit cache to train from, with no teacher in memory: a folder of `python -m fastdeit.teach store`."""
    unlabelled_path: Path | None = None
    """Folder of further images, however deep, without classes: mixed into the training set, they carry the teacher's
    term only."""
    attention_distillation_weight: float = 0.0
    """Weight of the distance between the student's attention and that of a vision transformer as teacher, added to the
    loss. Over 20 teachers it helped with 7 and hurt with 4 (arXiv 2605.07191): compare with 0 before you trust it."""
    attention_distillation_layers: str = "last"
    """Blocks that are compared: last, every-N (of the student; the teacher's at the same share of its depth), or pairs
    STUDENT:TEACHER counted from 0, such as 5:5,11:23."""
    attention_distillation_variant: Literal["maps", "rows", "scores", "relations"] = "maps"
    """maps: KL between attention maps. rows: the class and distillation tokens' rows only. scores: mean squared
    difference before the softmax. relations: KL of queries with queries, keys with keys, values with values."""
    attention_distillation_heads: str = "equal"
    """equal: head by head. mean: maps averaged over the heads. A number: channels regrouped into so many relation
    heads (MiniLMv2), whatever the heads and widths of the two models."""
    compare_undistilled: bool = False
    """Train the same student a second time without teacher and distillation token, and put it in the table."""


@dataclass(kw_only=True)
class Optimization:
    """Optimizer and schedule."""

    epochs: int = 300
    """Passes over the training images."""
    accumulate: int = 1
    """Batches of --batch-size per process whose gradients add up to one step."""
    opt: Literal["adamw", "lamb", "sgd"] = "adamw"
    """Optimizer."""
    lr: float = 5e-4
    """Peak learning rate for a global batch of 512 images; scaled linearly with the batch."""
    unscale_lr: bool = False
    """Take --lr, --warmup-lr and --min-lr as they are."""
    weight_decay: float = 0.05
    """Decoupled weight decay; none on biases, norms, tokens and position embedding."""
    opt_eps: float = 1e-8
    """Epsilon of AdamW and LAMB."""
    opt_betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW and LAMB."""
    clip_grad: float | None = None
    """Clip the gradient's norm to this. Default: no clipping."""
    warmup_epochs: float = 5
    """Epochs of linear warm-up."""
    warmup_lr: float = 1e-6
    """Learning rate of step 0; scaled like --lr for global batches below 512, and left as it is for larger ones."""
    min_lr: float = 1e-5
    """Learning rate at the end; scaled as --warmup-lr is."""
    smoothing: float = 0.1
    """Label smoothing of the class term."""
    bce_loss: bool = False
    """Binary cross entropy for the class term, as in DeiT III."""


@dataclass(kw_only=True)
class Speed:
    """How the arithmetic is done."""

    compile: bool = False
    """torch.compile the student."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Autocast type of the student's step. Default: bf16 on CUDA, fp32 on the CPU."""
    attention: Literal["fused", "sdpa", "xformers"] = "sdpa"
    """fused: fastdeit's Triton kernel. sdpa: PyTorch's. xformers: its memory-efficient attention (CUDA)."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """With several processes, ddp: each holds all weights. fsdp: each holds a share of weights and optimizer."""
    deterministic: bool = False
    """Take only algorithms that give the same bits each time. The CPU does anyway; a GPU is slower for it."""


@dataclass(kw_only=True)
class Config:
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    distillation: Distillation = field(default_factory=Distillation)
    optimization: Optimization = field(default_factory=Optimization)
    speed: Speed = field(default_factory=Speed)
    typed: ClassVar[frozenset[str]] = frozenset()
    """The flags that stood on the command line (command.typed_flags); the other settings are defaults."""

    def to_dict(self) -> dict:
        """Plain JSON types, one dictionary per group."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_dict(cls, groups: dict) -> "Config":
        """The inverse of `to_dict`; settings this version does not know are refused by name."""
        config = cls()
        for group, values in groups.items():
            target = getattr(config, group, None)
            unknown = values if target is None else [key for key in values if not hasattr(target, key)]
            if unknown:
                raise UserError(f"the saved settings hold {group}.{', '.join(unknown)}, unknown to this version")
            for key, value in values.items():
                if isinstance(value, list):
                    value = tuple(value)
                if key in ("data_path", "output_dir", "unlabelled_path", "classes") and value is not None:
                    value = Path(value)
                setattr(target, key, value)
        return config
