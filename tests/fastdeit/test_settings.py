"""Every setting reaches what it is for: each case changes one, and what it says of the run that is built must be wrong
before and right after. A new field of the settings needs a case here."""

import copy
import dataclasses
import importlib
import io
import json
from functools import cached_property
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastdeit import data
from fastdeit.config import Config
from fastdeit.distill.teachers import load_teachers
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.models.build import build_student
from fastdeit.models.deit import create_model
from fastdeit.pipelines import SyntheticIndex
from fastdeit.training import run
from fastdeit.training.trainer import Trainer

CLASSES = ("a", "b", "c")
ROTATED = [2, 0, 1]
PLACE = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of a student and of two teachers; the teacher's classes and the data's in another order; a table."""
    folder = tmp_path_factory.mktemp("settings")
    timm = pytest.importorskip("timm")
    for number, name in enumerate(("student", "teacher", "other")):
        torch.manual_seed(number)
        model = create_model("deit_nano_patch4_16") if name == "student" else timm.create_model("test_resnet")
        model.reset_classifier(len(CLASSES))
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    (folder / "classes").write_text(json.dumps(dict(zip(CLASSES, ROTATED))))
    (folder / "order").write_text("red\nblue\ngreen\n")
    image = io.BytesIO()
    Image.new("RGB", (20, 20)).save(image, "png")
    (folder / "tables").mkdir()
    for split in ("train", "validation"):
        table = pa.table({"image": [image.getvalue()] * 2, "label": ["x", "y"], "kind": ["p", "q"]})
        pq.write_table(table, folder / "tables" / f"{split}.parquet")
    return folder


class Built:
    """What is made of settings, each part when it is asked for. `before`: what was made without the setting."""

    def __init__(self, config: Config, folder, before=None):
        self.config, self.folder, self.before = config, folder, before
        self.index = SyntheticIndex(images=240, classes=len(CLASSES))  # of 256 x 256 pixels
        self.index.labels[:60] = 0  # so that half of them are of this class

    @cached_property
    def loaders(self):
        return data.loaders(self.config, (self.index, self.index), PLACE, None)

    @cached_property
    def plans(self):
        """The training plans of an epoch."""
        return [self.loaders[0].plans[step] for step in range(len(self.loaders[0]))]

    def all(self, what):
        """Of every sample of an epoch."""
        return np.concatenate([what(plan) for plan in self.plans])

    @property
    def windows(self):
        """Height and width of every crop, in pixels."""
        return self.all(lambda plan: plan.views.geometry.window)[:, 2:].T

    @cached_property
    def student(self):
        return build_student(self.config, len(CLASSES))[0]

    @cached_property
    def teacher(self):
        ours = {"student_mean": (0.5, 0.5, 0.5), "student_std": (0.5, 0.5, 0.5)}
        return load_teachers(self.config, CLASSES, **ours, world=PLACE)

    @property
    def teacher_logits(self):
        return self.teacher(torch.linspace(-1, 1, 3072).view(1, 3, 32, 32))[0]

    @cached_property
    def trainer(self):
        student, teacher = copy.deepcopy(self.student), None
        if self.config.distillation.distillation_type != "none":
            torch.manual_seed(1)
            hookable = create_model("deit_nano_patch4_16", num_classes=len(CLASSES)).eval().requires_grad_(False)
            teacher = SimpleNamespace(hookable=lambda: hookable, name="nano", fingerprint="nano")
        trainer = Trainer(self.config, PLACE, student, teacher, steps_per_epoch=len(self.loaders[0]))
        trainer.model.train()
        return trainer

    def lr(self, share: float) -> float:
        """The learning rate after that share of all steps."""
        self.trainer.state.step = round(share * self.trainer.total_steps)
        return self.trainer.lr()

    def step(self):
        """The trainer after one step, and how far its largest weight moved."""
        trainer = self.trainer
        trainer.step(next(iter(self.loaders[0])))
        pairs = zip(trainer.model.parameters(), self.student.parameters())
        return trainer, max((new - old).abs().max().item() for new, old in pairs)

    @property
    def inputs(self):
        """Of the first step."""
        self.trainer._drop_patches()
        return self.trainer.inputs(next(iter(self.loaders[0])))

    @property
    def refused(self) -> str:
        """Why no run is built."""
        return refusal(lambda: run.build(self.config, PLACE, (self.index, self.index)))


def near(*pair):
    return pair[0] == pytest.approx(pair[1], rel=0.05)


RESNET = {"distillation.teacher_model": "test_resnet", "distillation.teacher_path": "FILES/teacher.safetensors"}
ATTENTION = {"distillation.distillation_type": "soft", "distillation.attention_distillation_weight": 1.0}
PEAK_1 = {"optimization.unscale_lr": True, "optimization.lr": 1.0}
SGD = {"optimization.opt": "sgd", "optimization.warmup_epochs": 0, "optimization.unscale_lr": True}

# setting: (its value; what then holds of what is built; what else is set, before and after).
CASES = {
    "data.data_path": (
        "FOLDER",
        lambda b: set(data.open_images(b.config, PLACE)[0].classes) == {"blue", "green", "red"},
        {"data.data_path": "synthetic"},
    ),
    "data.val_share": (
        0.25,
        lambda b: refusal(lambda: data.open_images(b.config, PLACE)) == "",
        {"data.data_path": "FOLDER/train"},
    ),
    "data.classes": (
        "FILES/order",
        lambda b: tuple(data.open_images(b.config, PLACE)[0].classes) == ("red", "blue", "green"),
        {"data.data_path": "FOLDER"},
    ),
    "data.label_column": (
        "kind",
        lambda b: tuple(data.open_images(b.config, PLACE)[0].classes) == ("p", "q"),
        {"data.data_path": "FILES/tables"},
    ),
    "data.input_size": (32, lambda b: b.plans[0].views.geometry.resized[0].tolist() == [32, 32], {}),
    "data.in_chans": (1, lambda b: b.trainer.prepare(next(iter(b.loaders[0]))).shape == (10, 1, 16, 16), {}),
    "data.batch_size": (6, lambda b: len(b.plans[0].indices) == 6 == len(b.loaders[1].plans[0].indices), {}),
    "data.num_workers": (3, lambda b: data.threads(b.config) == 3, {}),
    "data.scale": ((0.25, 0.25), lambda b: near(b.windows.prod(0), np.full(240, 0.25 * 256**2)), {}),
    "data.ratio": (
        (2.0, 2.0),
        lambda b: near(b.windows[1] / b.windows[0], np.full(240, 2.0)),
        {"data.scale": (0.2, 0.2)},
    ),
    "data.hflip": (1.0, lambda b: b.all(lambda plan: plan.views.flip).all(), {}),
    "data.src": (
        True,
        lambda b: (b.windows == 256).all() and np.ptp(b.all(lambda plan: plan.views.geometry.corner)) == 8,
        {},
    ),
    "data.aa": ("none", lambda b: b.plans[0].views.ops.shape[1] == 0, {"data.color_jitter": 0.0}),
    "data.color_jitter": (
        0.1,
        lambda b: 0.05 < np.abs(b.all(lambda plan: plan.views.args) - 1).max() < 0.1,
        {"data.aa": "none"},
    ),
    "data.reprob": (1.0, lambda b: b.all(lambda plan: plan.views.erase_box)[:, 2].all(), {}),
    "data.repeated_aug": (False, lambda b: len(set(b.all(lambda plan: plan.indices))) == 240, {}),
    "data.class_balance": (
        1.0,
        lambda b: near(np.bincount(b.all(lambda plan: b.index.labels[plan.indices])), np.full(3, 80)),
        {},
    ),
    "data.mixup": (1e6, lambda b: near(b.all(lambda plan: plan.lam), np.full(240, 0.5)), {"data.cutmix": 0.0}),
    "data.cutmix": (
        1e6,  # boxes of half the image, where they are not cut off at its border
        lambda b: b.all(lambda plan: plan.lam).min() == 1 - 11**2 / 16**2,
        {"data.mixup": 0.0},
    ),
    "data.mixup_prob": (0.0, lambda b: (b.all(lambda plan: plan.lam) == 1).all(), {}),
    "data.mixup_switch_prob": (1.0, lambda b: b.all(lambda plan: plan.box)[:, 2].all(), {"data.cutmix": 1e6}),
    "data.mixup_mode": ("elem", lambda b: len(set(b.plans[0].lam)) > 4, {"data.cutmix": 0.0}),
    "data.eval_crop_ratio": (
        0.5,
        lambda b: b.loaders[1].plans[0].views.geometry.resized[0].tolist() == [32, 32],
        {},
    ),
    "data.max_bad": (0.5, lambda b: [loader.bad_files.limit for loader in b.loaders] == [0.5, 0.5], {}),
    "model.model": ("deit_nano_patch4_16", lambda b: not b.student.arch.distilled, {}),
    "model.patch_size": (8, lambda b: b.student.patch_embed.proj.weight.shape[-1] == 8, {}),
    "model.drop_path": (0.9, lambda b: b.student.drop_path == 0.9, {}),
    "model.patch_drop": (0.5, lambda b: b.inputs.patches is not None and b.inputs.patches.shape == (10, 8), {}),
    "model.finetune": (
        "FILES/student.safetensors",
        lambda b: torch.equal(b.student.pos_embed, load_file(b.folder / "student.safetensors")["pos_embed"]),
        {"model.model": "deit_nano_patch4_16"},
    ),
    "model.pretrained": (True, lambda b: "timm publishes no weights" in b.refused, {}),
    "model.freeze": ("backbone", lambda b: len(learning(b)) == 4, {}),
    "model.attn_only": (True, lambda b: len(learning(b)) == 6 * 4 + 1 + 4, {}),
    "model.model_ema": (False, lambda b: b.trainer.ema is None, {}),
    "model.model_ema_decay": (
        0.0,
        lambda b: all(map(torch.allclose, b.step()[0].ema.parameters(), b.trainer.model.parameters())),
        {**PEAK_1, "optimization.warmup_epochs": 0},
    ),
    "model.grad_checkpointing": (True, lambda b: b.student.grad_checkpointing, {}),
    "distillation.distillation_type": ("hard", lambda b: b.trainer.objective.kind == "hard", {}),
    "distillation.distillation_alpha": (0.3, lambda b: b.trainer.objective.alpha == 0.3, {}),
    "distillation.distillation_tau": (3.0, lambda b: b.trainer.objective.tau == 3.0, {}),
    "distillation.distillation_reduction": ("numel", lambda b: b.trainer.objective.soft_reduction == "numel", {}),
    "distillation.distillation_nontarget": (
        3.0,
        lambda b: b.trainer.objective.nontarget == 3.0,
        {"distillation.distillation_type": "nkd"},
    ),
    "distillation.logit_standardization": (
        True, lambda b: b.trainer.objective.standardize, {"distillation.distillation_type": "soft"},
    ),
    "distillation.teacher_model": (
        "test_efficientnet",
        lambda b: refusal(lambda: b.teacher),  # the file is a test_resnet's
        RESNET,
    ),
    "distillation.teacher_path": (
        "FILES/other.safetensors",
        lambda b: b.before is not None and not torch.equal(b.teacher_logits, b.before.teacher_logits),
        RESNET,
    ),
    "distillation.teacher_classes": (
        "FILES/classes",
        lambda b: b.before is not None and torch.equal(b.teacher_logits, b.before.teacher_logits[ROTATED]),
        RESNET,
    ),
    "distillation.teacher_input_size": (64, lambda b: b.teacher.input_size == 64, RESNET),
    "distillation.teacher_patches": (
        0.5,
        lambda b: b.trainer.teacher_patches is not None and b.trainer.teacher_patches.kept == 8,
        {"distillation.distillation_type": "soft"},
    ),
    "distillation.teacher_precision": (
        "bf16",
        lambda b: next(b.teacher.network.parameters()).dtype == torch.bfloat16,
        RESNET,
    ),
    "distillation.teacher_store": ("FILES/nowhere", lambda b: "nowhere" in b.refused, {}),
    "distillation.unlabelled_path": (
        "FOLDER/val",
        lambda b: len(data.open_images(b.config, PLACE)[0]) == 36 + 12,
        {"data.data_path": "FOLDER"},
    ),
    "distillation.attention_distillation_weight": (
        2.0,
        lambda b: b.trainer.attention is not None and b.trainer.objective.attention_weight == 2.0,
        {"distillation.distillation_type": "soft"},
    ),
    "distillation.attention_distillation_layers": ("every-2", lambda b: len(b.trainer.attention.taps) == 3, ATTENTION),
    "distillation.attention_distillation_variant": (
        "scores",
        lambda b: b.trainer.attention.options["objective"] == "mse",
        ATTENTION,
    ),
    "distillation.attention_distillation_heads": (
        "mean",
        lambda b: b.trainer.attention.options["heads"] == "mean",
        ATTENTION,
    ),
    "distillation.feature_distillation_weight": (
        2.0,
        lambda b: b.trainer.features is not None and b.trainer.objective.feature_weight == 2.0,
        {"distillation.distillation_type": "soft"},
    ),
    "optimization.epochs": (4, lambda b: b.trainer.total_steps == 4 * 24, {}),
    "optimization.curriculum": (
        "8:0,16:9",  # of two epochs of work, 4 at 8 pixels and 1 at 16
        lambda b: b.trainer.total_steps == 5 * 24
        and b.trainer.begin_epoch(3) is None
        and b.trainer.low_frequencies(torch.zeros(2, 3, 16, 16)).shape == (2, 3, 8, 8)
        and b.trainer.begin_epoch(4) is None
        and b.trainer.low_frequencies is None
        and b.loaders[0].plans.augmentation.magnitudes == ((0, 0), (4, 9)),
        {},
    ),
    "optimization.accumulate": (2, lambda b: b.trainer.global_batch == 20 == len(b.plans[0].indices), {}),
    "optimization.opt": ("lamb", lambda b: type(b.trainer.optimizer).__name__ == "Lamb", {}),
    "optimization.lr": (0.5, lambda b: near(b.lr(0), 0.5), SGD),
    "optimization.unscale_lr": (True, lambda b: near(b.lr(0), 5e-4), {"optimization.warmup_epochs": 0}),
    "optimization.weight_decay": (0.3, lambda b: [g["weight_decay"] for g in groups(b)] == [0.3, 0.0], {}),
    "optimization.layer_decay": (
        0.5,
        lambda b: [g.get("lr_scale") for g in groups(b)] == [0.5**i for i in range(8) for _ in "wb"],
        {},
    ),
    "optimization.opt_eps": (1e-4, lambda b: {g["eps"] for g in groups(b)} == {1e-4}, {}),
    "optimization.opt_betas": ((0.5, 0.6), lambda b: {g["betas"] for g in groups(b)} == {(0.5, 0.6)}, {}),
    "optimization.clip_grad": (
        1e-6,
        lambda b: b.step()[1] < 2e-6,
        {**PEAK_1, **SGD, "optimization.weight_decay": 0.0},
    ),
    "optimization.warmup_epochs": (1, lambda b: near(b.lr(0.25), (b.lr(0) + 1) / 2), PEAK_1),
    "optimization.warmup_lr": (0.01, lambda b: near(b.lr(0), 0.01), PEAK_1),
    "optimization.min_lr": (0.01, lambda b: near(b.lr(1), 0.01), {**PEAK_1, "optimization.warmup_epochs": 0}),
    "optimization.smoothing": (0.3, lambda b: b.trainer.objective.smoothing == 0.3, {}),
    "optimization.bce_loss": (True, lambda b: b.trainer.objective.binary, {"optimization.smoothing": 0.0}),
}  # fmt: skip

# What only a whole run shows; the tests that do.
ELSEWHERE = {
    "distillation.compare_undistilled": ("test_resume", "test_the_comparison_run_goes_on_too"),
}


def groups(built):
    return built.trainer.optimizer.param_groups


def learning(built):
    return [name for name, parameter in built.student.named_parameters() if parameter.requires_grad]


def refusal(call) -> str:
    try:
        call()
    except (UserError, ValueError) as error:
        return str(error)
    return ""


def settings(changes: dict, places: dict) -> Config:
    config = Config()
    base = {
        "data.input_size": 16, "data.batch_size": 10, "model.model": "deit_nano_distilled_patch4_16",
        "model.drop_path": 0.0, "optimization.epochs": 2, "run.dry_run": True, "data.num_workers": 1,
    }  # fmt: skip
    for key, value in {**base, **changes}.items():
        group, name = key.split(".")
        if isinstance(value, str):
            for word, path in places.items():
                value = value.replace(word, str(path))
        assert hasattr(getattr(config, group), name)
        setattr(getattr(config, group), name, value)
    return config


@pytest.mark.parametrize("setting", CASES)
def test_a_setting_reaches_what_it_is_for(setting, files, request):
    value, holds, others = CASES[setting]
    places = {"FILES": files}
    if "FOLDER" in str((value, others)):
        places["FOLDER"] = request.getfixturevalue("colors")
    before = Built(settings(others, places), files)
    assert not holds(before), "nothing would be noticed"
    assert holds(Built(settings({**others, setting: value}, places), files, before))


def test_repeated_augmentation_shows_each_image_three_times(files):
    """As facebookresearch/deit samplers.py (num_repeats=3): a third of the images an epoch, three times each."""
    shown = Built(settings({}, {}), files).all(lambda plan: plan.indices)
    assert np.unique(shown, return_counts=True)[1].max() == 3


def test_every_setting_has_its_case():
    config = Config()
    fields = {
        f"{group}.{field.name}"
        for group in ("data", "model", "distillation", "optimization")
        for field in dataclasses.fields(getattr(config, group))
    }
    assert fields == set(CASES) | set(ELSEWHERE)
    for module, test in ELSEWHERE.values():
        assert callable(getattr(importlib.import_module(f".{module}", __package__), test))
