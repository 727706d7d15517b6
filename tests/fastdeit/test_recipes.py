"""The recipes beside what their authors published. Whatever is not named here is the default of the original's main.py.

main.py, README_*.md: facebookresearch/deit at 7e160fe. A value in no published command line says where it is from.
"""

import dataclasses

import pytest

from fastdeit import recipes
from fastdeit.config import Config

from .test_config import ORIGINAL  # facebookresearch/deit main.py

# What main.py leaves to timm 0.3.2 and PyTorch, and what it has no flag for.
IMPLIED = {
    "scale": (0.08, 1.0),  # timm/data/transforms_factory.py, transforms_imagenet_train
    "ratio": (3 / 4, 4 / 3),  # the same
    "hflip": 0.5,  # the same
    "opt_betas": (0.9, 0.999),  # torch.optim.AdamW
    "clip_grad": None,  # main.py --clip-grad
    "accumulate": 1,
    "distillation_reduction": "batchmean",  # arXiv 2012.12877, equation 2 (losses.py divides by the classes too)
    "attention_distillation_weight": 0.0,
    "patch_size": None,
    "pretrained": False,
    "grad_checkpointing": False,
    "finetune": None,
    "teacher_input_size": None,
    "compare_undistilled": False,
    "curriculum": "none",
}

DEIT3 = {  # README_revenge.md, "Training on ImageNet-1k", the command of ViT-S; B and L are alike but for what is below
    "epochs": 800,  # --epochs 800
    "opt": "lamb",  # --opt fusedlamb
    "weight_decay": 0.05,  # --weight-decay 0.05
    "unscale_lr": True,  # --unscale-lr
    "warmup_epochs": 5,  # --warmup-epochs 5
    "warmup_lr": 1e-6,  # --warmup-lr 1e-6
    "smoothing": 0.0,  # --smoothing 0.0
    "bce_loss": True,  # --bce-loss
    "eval_crop_ratio": 1.0,  # --eval-crop-ratio 1.0
    "reprob": 0.0,  # --reprob 0.0
    "mixup": 0.8,  # --mixup .8
    "cutmix": 1.0,  # --cutmix 1.0
    "color_jitter": 0.3,  # --color-jitter 0.3
    "aa": "3aug",  # --ThreeAugment
    "repeated_aug": True,  # --repeated-aug
    "src": False,
}
HARD = {  # README_deit.md, "To train DeiT-base with hard distillation using a RegNetY-160 as teacher"
    "distillation_type": "hard",  # --distillation-type hard
    "teacher_model": "regnety_160",  # --teacher-model regnety_160
}
AT_384 = {  # README_deit.md, "To finetune a DeiT-base on 384 resolution images for 30 epochs"
    "model": "deit_base_patch16_384",  # --model deit_base_patch16_384
    "input_size": 384,  # --input-size 384
    "lr": 5e-6,  # --lr 5e-6, scaled by 512 / 512
    "min_lr": 5e-6,  # --min-lr 5e-6
    "weight_decay": 1e-8,  # --weight-decay 1e-8
    "epochs": 30,  # --epochs 30
    "drop_path": 0.0,  # main.py --no-train-mode: the model stays in evaluation mode, see facebookresearch/deit#177
    "eval_crop_ratio": 1.0,  # timm/models/deit.py, deit_base_patch16_384.fb_in1k: crop_pct 1.0
}
FAST = {  # LeapLabTHU/EfficientTrain at 2b9011c, _ET_pp_main_deitS.py with --epoch 100, of main_buffer.py
    "epochs": 100,  # EVAL.md, "DeiT-Small ... 79.9% ... 100"
    "curriculum": "efficienttrain",  # res_list, --aa rand-m{ET_index}-mstd0.5-inc1
    "warmup_epochs": 20,  # 0.2 * args.epoch
    "drop_path": 0.05,  # --drop_path {0.1 * args.epoch / 200}
    "clip_grad": 5.0,  # --clip_grad 5.0
    "lr": 5e-4,  # --lr 4e-3 for 4,096 images
    "warmup_lr": 0.0,  # utils_buffer.py, cosine_scheduler, start_warmup_value
    "min_lr": 1e-6,  # main_buffer.py --min_lr
    "model_ema": False,  # the same, --model_ema
    "repeated_aug": False,  # the same, DistributedSampler
    "weight_decay": 0.05,  # the same, --weight_decay
    "reprob": 0.25,  # the same, --reprob
}
PUBLISHED = {
    "deit_tiny": {"model": "deit_tiny_patch16_224"},  # README_deit.md, "DeiT-tiny"
    "deit_small": {"model": "deit_small_patch16_224"},  # README_deit.md, "DeiT-small"
    "deit_base": {"model": "deit_base_patch16_224"},  # README_deit.md, "To train DeiT-base model"
    "deit_tiny_distilled": {**HARD, "model": "deit_tiny_distilled_patch16_224"},  # arXiv 2012.12877, table 2
    "deit_small_distilled": {**HARD, "model": "deit_small_distilled_patch16_224"},  # the same
    "deit_base_distilled": {**HARD, "model": "deit_base_distilled_patch16_224"},  # README_deit.md --model
    "deit_small_fast": {**FAST, "model": "deit_small_patch16_224"},  # --model deit_small_patch16_224
    "deit_small_distilled_fast": {**FAST, **HARD, "model": "deit_small_distilled_patch16_224"},  # see its docstring
    "deit_base_384": AT_384,
    "deit_base_distilled_384": {
        **AT_384,
        **HARD,  # arXiv 2012.12877, section 5.2: distilled at the higher resolution too
        "model": "deit_base_distilled_patch16_384",  # models.py
        "teacher_input_size": 384,  # the same section: a teacher of the target resolution
    },
    "deit3_small": {
        **DEIT3,
        "model": "deit3_small_patch16_224",  # --model deit_small_patch16_LS
        "lr": 4e-3,  # --lr 4e-3
        "input_size": 224,  # --input-size 224
        "drop_path": 0.05,  # --drop-path 0.05
    },
    "deit3_base": {
        **DEIT3,
        "model": "deit3_base_patch16_224",  # --model deit_base_patch16_LS
        "lr": 3e-3,  # --lr 3e-3
        "input_size": 192,  # --input-size 192
        "drop_path": 0.2,  # --drop-path 0.2
    },
    "deit3_large": {
        **DEIT3,
        "model": "deit3_large_patch16_224",  # --model deit_large_patch16_LS
        "lr": 3e-3,  # --lr 3e-3
        "input_size": 192,  # --input-size 192
        "drop_path": 0.45,  # --drop-path 0.45
    },
    "deit3_finetune": {  # README_revenge.md, "Finetuning on ImageNet-1k", the command of ViT-B at 224
        "model": "deit3_base_patch16_224",  # --model deit_base_patch16_LS
        "lr": 1e-5,  # --lr 1e-5
        "unscale_lr": True,  # --unscale-lr
        "epochs": 20,  # --epochs 20
        "weight_decay": 0.1,  # --weight-decay 0.1
        "eval_crop_ratio": 1.0,  # --eval-crop-ratio 1.0
        "reprob": 0.0,  # --reprob 0.0
        "smoothing": 0.1,  # --smoothing 0.1
        "drop_path": 0.2,  # --drop-path 0.2
        "aa": "rand-m9-mstd0.5-inc1",  # --aa rand-m9-mstd0.5-inc1
        "repeated_aug": False,  # --no-repeated-aug
        "mixup": 0.8,  # --mixup .8
        "cutmix": 1.0,  # --cutmix 1.0
    },
}
BATCHES = {  # images a step, over all processes
    "deit3_small": 2048, "deit3_base": 2048, "deit3_large": 2048,  # --batch 256 --ngpus 8; L: 64 on 32
    "deit_base_384": 512, "deit_base_distilled_384": 512,  # --batch-size 32 --nodes 2, of 8
    "deit_small_fast": 4096, "deit_small_distilled_fast": 4096,  # bs_list x up_freq_list x 8
    "deit3_finetune": 512,  # --batch 64 --nodes 1 --ngpus 8
}  # fmt: skip
OWN = {"demo", "finetune", "teacher", "teacher_digits"}  # published by nobody


def flat(config: Config) -> dict:
    groups = (config.data, config.model, config.distillation, config.optimization)
    return {key: value for group in groups for key, value in dataclasses.asdict(group).items()}


def test_every_recipe_is_pinned_or_our_own():
    assert set(recipes.names()) == set(PUBLISHED) | OWN
    assert {recipes.paper_batch(name) for name in (*OWN, None)} == {None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_values(name):
    got = flat(recipes.load(name))
    expected = {**ORIGINAL, **IMPLIED, **PUBLISHED[name]}
    assert got["batch_size"] is None and recipes.paper_batch(name) == BATCHES.get(name, 1024)  # arXiv 2012.12877: 1,024
    assert {key: got[key] for key in expected if key in got} == {key: expected[key] for key in expected if key in got}
    assert expected.keys() - got.keys() == {"seed"}  # every name is a setting
