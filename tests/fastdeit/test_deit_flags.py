"""Command lines of facebookresearch/deit at 7e160fe: what its README files tell to type, and every flag of main.py."""

import pytest

from fastdeit import deit_flags
from fastdeit.cli import parse_config
from fastdeit.config import Config
from fastdeit.errors import UserError
from fastdeit.train import main

from .conftest import refused

pytest.importorskip("tyro")

# main.py's get_args_parser and run_with_submitit.py's parse_args.
FLAGS = (
    "--batch-size --epochs --bce-loss --unscale-lr --model --input-size --drop --drop-path --model-ema --no-model-ema "
    "--model-ema-decay --model-ema-force-cpu --opt --opt-eps --opt-betas --clip-grad --momentum --weight-decay --sched "
    "--lr --lr-noise --lr-noise-pct --lr-noise-std --warmup-lr --min-lr --decay-epochs --warmup-epochs "
    "--cooldown-epochs --patience-epochs --decay-rate --dr --color-jitter --aa --smoothing --train-interpolation "
    "--repeated-aug --no-repeated-aug --train-mode --no-train-mode --ThreeAugment --src --reprob --remode --recount "
    "--resplit --mixup --cutmix --cutmix-minmax --mixup-prob --mixup-switch-prob --mixup-mode --teacher-model "
    "--teacher-path --distillation-type --distillation-alpha --distillation-tau --cosub --finetune --attn-only "
    "--data-path --data-set --inat-category --output_dir --device --seed --resume --start_epoch --eval "
    "--eval-crop-ratio --dist-eval --num_workers --pin-mem --no-pin-mem --distributed --world_size --dist_url "
    "--ngpus --nodes --timeout --job_dir --partition --use_volta32 --comment"
).split()


def test_every_flag_of_the_original_is_known():
    known = {*deit_flags.flags(Config), *deit_flags.NO_EFFECT, *deit_flags.NOT_IMPLEMENTED, *deit_flags.RENAMED}
    known |= {*deit_flags.LAUNCHER, "--job-dir"}
    assert [flag for flag in FLAGS if flag.replace("_", "-") not in known] == []


# README_deit.md and README_revenge.md, with a file where they have an address; the rest of the command line is theirs.
README = {
    "train, 4 GPUs": (
        4,
        "--model deit_small_patch16_224 --batch-size 256 --data-path /path/to/imagenet --output_dir /path/to/save",
        {"model": "deit_small_patch16_224", "batch_size": 256, "output_dir": "/path/to/save"},
    ),
    "hard distillation": (
        1,
        "--model deit_base_distilled_patch16_224 --distillation-type hard --teacher-model regnety_160 --teacher-path "
        "regnety_160-a5fe301d.pth --use_volta32",
        {"distillation_type": "hard", "teacher_model": "regnety_160", "teacher_path": "regnety_160-a5fe301d.pth"},
    ),
    "fine-tuning at 384": (
        16,
        "--model deit_base_patch16_384 --batch-size 32 --finetune deit_base_patch16_224-b5f2ef4d.pth --input-size 384 "
        "--use_volta32 --nodes 2 --lr 5e-6 --weight-decay 1e-8 --epochs 30 --min-lr 5e-6",
        {"model": "deit_base_patch16_384", "lr": 5e-6, "min_lr": 5e-6, "weight_decay": 1e-8, "epochs": 30},
    ),
    "DeiT III, ViT-B": (
        8,
        "--model deit_base_patch16_LS --data-path /path/to/imagenet --batch 256 --lr 3e-3 --epochs 800 --weight-decay "
        "0.05 --sched cosine --input-size 192 --eval-crop-ratio 1.0 --reprob 0.0 --nodes 1 --ngpus 8 --smoothing 0.0 "
        "--warmup-epochs 5 --drop 0.0 --nb-classes 1000 --seed 0 --opt fusedlamb --warmup-lr 1e-6 --mixup .8 "
        "--drop-path 0.2 --cutmix 1.0 --unscale-lr --repeated-aug --bce-loss  --color-jitter 0.3 --ThreeAugment",
        {
            "model": "deit3_base_patch16_224", "batch_size": 256, "lr": 3e-3, "opt": "lamb", "aa": "3aug", "reprob": 0,
            "input_size": 192, "bce_loss": True, "unscale_lr": True, "mixup": 0.8, "drop_path": 0.2, "smoothing": 0,
        },
    ),
    "DeiT III, 20 epochs at 224": (
        16,
        "--model deit_huge_patch14_LS --data-path /path/to/imagenet --batch 32 --lr 1e-5 --epochs 20 --weight-decay "
        "0.1 --sched cosine --input-size 224 --eval-crop-ratio 1.0 --reprob 0.0 --nodes 2 --ngpus 8 --smoothing 0.1 "
        "--warmup-epochs 5 --drop 0.0 --nb-classes 1000 --seed 0 --opt adamw --warmup-lr 1e-6 --mixup .8 --drop-path "
        "0.55 --cutmix 1.0 --unscale-lr  --aa rand-m9-mstd0.5-inc1 --no-repeated-aug --finetune model_path",
        {"model": "deit3_huge_patch14_224", "opt": "adamw", "repeated_aug": False, "finetune": "model_path"},
    ),
    "DeiT III, ImageNet-22k": (
        32,
        "--model deit_large_patch16_LS --data-path /path/to/imagenet --batch 64 --lr 0.001 --epochs 240 --weight-decay "
        "0.02 --sched cosine --input-size 224 --eval-crop-ratio 1.0 --reprob 0.0 --nodes 4 --ngpus 8 --smoothing 0.1 "
        "--warmup-epochs 5 --drop 0.0 --nb-classes 1000 --seed 0 --opt fusedlamb --warmup-lr 1e-6 --mixup 0 "
        "--drop-path 0.3 --cutmix 1.0 --unscale-lr --no-repeated-aug   --color-jitter 0.3 --ThreeAugment --src",
        {"model": "deit3_large_patch16_224", "src": True, "mixup": 0, "aa": "3aug", "weight_decay": 0.02},
    ),
    "evaluation": (
        1,
        "--eval --resume deit_tiny_patch16_224-a1311bcf.pth --model deit_tiny_patch16_224 --data-path /data",
        {"eval": True, "resume": "deit_tiny_patch16_224-a1311bcf.pth"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", README)
def test_the_commands_of_the_original_carry_over(name, monkeypatch, capsys):
    processes, line, expected = README[name]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = parse_config(line.split())
    values = {key: value for group in config.to_dict().values() for key, value in group.items()}
    assert {key: values[key] for key in expected} == expected
    err = capsys.readouterr().err
    if "LS" in line:
        assert "--sched cosine, --drop 0.0, --nb-classes 1000" in err and "change nothing here" in err
        assert "--batch as --batch-size" in err
    assert ("--ThreeAugment as --aa 3aug --reprob 0" in err) == ("--ThreeAugment" in line)
    assert ("--opt fusedlamb as --opt lamb" in err) == ("fusedlamb" in line)
    assert err.count("\n") <= 2


def read(line):
    return deit_flags.read(line.split(), deit_flags.flags(Config))


def test_what_both_call_the_same_is_left_alone(capsys):
    line = "--model deit_tiny_patch16_224 --batch-size 8 --opt adamw --opt-betas 0.9 0.95 --no-model-ema --output-dir=x"
    reading = read(line)
    assert reading.arguments == line.split() and reading.told() == []


def test_ours_with_underscores_or_an_equals_sign():
    assert read("--output_dir=a_b --num_workers 3").arguments == ["--output-dir=a_b", "--num-workers", "3"]
    assert read("--opt=AdamW --model=cait_S24").arguments == ["--opt", "adamw", "--model", "cait_s24_384"]


def test_nothing_given_is_nothing():
    """The original's defaults of these are empty strings."""
    assert deit_flags.read(["--finetune", "", "--teacher-path=", "--epochs", "3"], set()).arguments == ["--epochs", "3"]


@pytest.mark.parametrize(
    "line", ["--sched cosine", "--recount 1", "--drop 0", "--momentum 0.90", "--decay-epochs 30 --dr 0.1", "--pin-mem"]
)
def test_a_flag_that_changes_nothing_is_removed(line):
    reading = read(f"{line} --epochs 3")
    assert reading.arguments == ["--epochs", "3"]
    assert reading.told() == [
        f"flags of facebookresearch/deit that change nothing here: {', '.join(reading.no_effect)}"
    ]
    assert " ".join(reading.no_effect) == line


def test_a_translated_flag_outranks_one_after_it():
    assert read("--ThreeAugment --aa none --reprob 0.25").arguments[-4:] == ["--aa", "3aug", "--reprob", "0"]
    assert parse_config("--ThreeAugment --reprob 0.25 --data-path x".split()).data.reprob == 0
    assert parse_config("--no-train-mode --drop-path 0.1 --data-path x".split()).model.drop_path == 0


@pytest.mark.parametrize(
    "line, words",
    [
        ("--sched step", ["--sched step", "cosine"]),
        ("--lr-noise 0.4 0.9", ["--lr-noise 0.4 0.9", "no noise"]),
        ("--drop 0.1", ["--drop 0.1", "--drop-path"]),
        ("--momentum 0.8", ["0.9"]),
        ("--data-set CIFAR", ["--data-set CIFAR", "--data-path DIR"]),
        ("--remode const", ["--remode const", "noise"]),
        ("--recount 3", ["one rectangle"]),
        ("--train-interpolation random", ["bicubic"]),
        ("--start_epoch 10", ["--start-epoch 10", "--resume RUN"]),
        ("--cutmix-minmax 0.2 0.8", ["--cutmix-minmax", "--cutmix ALPHA"]),
        ("--cosub", ["README_cosub.md"]),
        ("--dist_url tcp://a:1", ["MASTER_ADDR"]),
        ("--nodes 1 --ngpus 8", ["torchrun --nnodes 1 --nproc-per-node 8"]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(cli, line, words):
    refused(cli, main, *line.split(), words=words)


def test_the_beginning_of_several_flags_is_none(cli):
    code, _, err = cli(main, "--model-e", "--epochs", "1")
    assert code == 2 and "--model-e" in err
    with pytest.raises(UserError, match="must be numbers"):
        read("--nodes two")
