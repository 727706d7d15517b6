import dataclasses
import json
import math
import shlex
import typing
from functools import partial

import pytest

from fastdeit import recipes
from fastdeit.cli import parse_config
from fastdeit.config import Config, check_bounds
from fastdeit.errors import UserError
from fastdeit.teach import LogitCacheOptions
from fastdeit.train import main

pytest.importorskip("tyro")

# facebookresearch/deit main.py; those of its flags this project has must keep their names and defaults.
ORIGINAL = {
    "epochs": 300, "input_size": 224, "drop_path": 0.1, "model_ema": True, "model_ema_decay": 0.99996,
    "opt": "adamw", "opt_eps": 1e-8, "weight_decay": 0.05, "lr": 5e-4, "warmup_lr": 1e-6, "min_lr": 1e-5,
    "warmup_epochs": 5, "color_jitter": 0.3, "aa": "rand-m9-mstd0.5-inc1", "smoothing": 0.1, "repeated_aug": True,
    "reprob": 0.25, "mixup": 0.8, "cutmix": 1.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch",
    "teacher_model": "regnety_160", "distillation_type": "none", "distillation_alpha": 0.5, "distillation_tau": 1.0,
    "seed": 0, "eval_crop_ratio": 0.875, "src": False, "bce_loss": False, "unscale_lr": False,
}  # fmt: skip


def flat(config):
    return {key: value for group in config.to_dict().values() for key, value in group.items()}


def test_names_and_defaults_are_those_of_the_original():
    ours = flat(Config())
    assert {key: ours.get(key, "missing") for key in ORIGINAL} == ORIGINAL


def test_an_existing_command_line_carries_over():
    config = parse_config(
        "--model deit_tiny_patch16_224 --batch-size 256 --data-path /imagenet --output_dir /out --no-repeated-aug "
        "--distillation-type hard --teacher-path t.pth --lr 1e-3".split()
    )
    assert config.run.recipe == "deit_small"
    assert (config.data.batch_size, config.data.repeated_aug, config.optimization.lr) == (256, False, 1e-3)
    assert (config.distillation.distillation_type, str(config.run.output_dir)) == ("hard", "/out")


def test_json_round_trip():
    config = recipes.load("demo")
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_settings_of_another_version_are_refused_by_name():
    saved = Config().to_dict()
    saved["data"]["crop_colour"] = 1
    with pytest.raises(UserError, match=r"data\.crop_colour"):
        Config.from_dict(saved)


# What may start a command line of a recipe, and what it does with the flags behind.
STARTS = {
    "python -m fastdeit.train": parse_config,
    "python -m fastdeit.teach fit": partial(parse_config, recipe="teacher"),
}


@pytest.mark.parametrize("name", recipes.names())
def test_the_command_in_a_recipes_docstring_is_of_that_recipe(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # without a GPU the model may be smaller
    text = recipes.describe(name).replace("\\\n", "")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert len(lines) == 1
    (start,) = [start for start in STARTS if lines[0].startswith(start)]
    given = shlex.split(lines[0].removeprefix(start))
    config = STARTS[start](given)
    assert config.run.recipe == name
    changed = {key for key, value in flat(config).items() if value != flat(recipes.load(name))[key]} - {"recipe"}
    if config.model.pretrained:  # the weights say with which crop they are used
        changed -= {"eval_crop_ratio"}
    assert changed <= {flag.removeprefix("--").replace("-", "_") for flag in given}


def test_print_config_prints_json_and_runs_nothing(cli):
    code, out, _ = cli(main, "--print-config", "--epochs", "7")
    assert code == 0
    assert json.loads(out)["optimization"]["epochs"] == 7


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--batch-size", "0"], "--batch-size"),
        (["--epochs", "0"], "--epochs"),
        (["--drop-path", "1.5"], "--drop-path"),
        (["--distillation-alpha", "2"], "--distillation-alpha"),
        (["--distillation-tau", "0"], "--distillation-tau"),
        (["--batch-size", "7", "--mixup", "0.8"], "even size"),
        (["--lr", "-1"], "--lr -1"),
        (["--lr", "nan"], "--lr nan"),
        (["--min-lr", "inf"], "--min-lr inf"),
        (["--opt-eps", "-1"], "--opt-eps -1"),
        (["--opt-betas", "0.9", "1.5"], "--opt-betas 0.9 1.5"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--clip-grad", "-1"], "--clip-grad"),
        (["--clip-grad", "0"], "no clipping"),
        (["--scale", "0.9", "0.5"], "--scale 0.9 0.5"),
        (["--ratio", "2", "1"], "--ratio 2.0 1.0"),
        (["--recipe", "demo", "--recipe", "none"], "--recipe none"),
        (["--seed", "-1"], "--seed"),
        (["--model-ema-decay", "2"], "--model-ema-decay"),
        (["--mixup-prob", "3"], "--mixup-prob"),
        (["--num-workers", "-1"], "--num-workers"),
        (["--patch-size", "0"], "--patch-size"),
        (["--teacher-input-size", "0"], "--teacher-input-size"),
        (["--recipe", "nonsense"], "choose one of"),
        (["--resume", "nowhere"], "no run in this folder"),
    ],
)
def test_impossible_values_are_refused_in_a_sentence(cli, arguments, words):
    code, _, err = cli(main, *arguments)
    assert code == 2
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


def fields(kind=Config):
    """Every field of the settings, groups resolved."""
    for field in dataclasses.fields(kind):
        yield from fields(field.type) if dataclasses.is_dataclass(field.type) else [field]


def is_number(kind) -> bool:
    return kind in (int, float) or any(map(is_number, typing.get_args(kind)))


@pytest.mark.parametrize("kind", [Config, LogitCacheOptions])
def test_every_number_has_bounds(kind):
    numbers = [field for field in fields(kind) if is_number(field.type)]
    assert len(numbers) > 1
    assert [field.name for field in numbers if not field.metadata.get("bounds")] == []


@pytest.mark.parametrize("field", [field for field in fields() if field.metadata.get("bounds")], ids=lambda f: f.name)
def test_a_bound_holds_at_the_limit_and_not_beyond(field):
    """The limits themselves, the next number beyond each of them, infinity and NaN."""
    step = 1 if int in (field.type, *typing.get_args(field.type)) else 1e-9
    for name, limit in field.metadata["bounds"].items():
        beyond = limit + (step if name in ("at_most", "below") else -step)
        taken = {"at_least": limit, "at_most": limit, "above": limit + step, "below": limit - step}[name]
        refused = [beyond, math.inf, -math.inf, math.nan] + [limit] * (name in ("above", "below"))
        for value in [taken, *refused]:
            config = Config()
            (group,) = [group for group in vars(config).values() if hasattr(group, field.name)]
            setattr(group, field.name, (value, value) if isinstance(field.default, tuple) else value)
            if value == taken:
                check_bounds(config)
                continue
            flag = f"--{field.name.replace('_', '-')}"
            with pytest.raises(UserError, match=rf"^{flag} .*: must be .*{name.replace('_', ' ')} {limit}"):
                check_bounds(config)


def test_settings_that_a_resumed_run_may_change():
    """Those on which the weights do not depend; of data and teacher the content counts, of the batch the product."""
    free = {field.name for field in fields() if field.metadata.get("resumable")}
    run = "config output_dir resume eval device tracker dry_run print_config checkpoint_minutes keep_epochs keep_count"
    run += " skip_nonfinite patience eval_every"
    data = "data_path classes label_column batch_size num_workers max_bad unlabelled_path"
    teacher = "teacher_path teacher_classes teacher_store"
    speed = "grad_checkpointing accumulate compile attention tune cuda_graph sharding deterministic"
    assert free == {*run.split(), *data.split(), *teacher.split(), *speed.split()}


@pytest.mark.parametrize("recipe", ["finetune", "deit3_finetune", "deit_base_384", "deit_base_distilled_384"])
def test_fine_tuning_needs_weights(recipe):
    given = ["--recipe", recipe, "--data-path", "x", "--no-pretrained"]
    with pytest.raises(UserError, match="--finetune CHECKPOINT"):
        parse_config(given)
    assert parse_config([*given, "--finetune", "y"]).run.recipe == recipe
    assert parse_config([*given, "--pretrained", "--model", "vit_tiny_patch16_224"]).run.recipe == recipe
    assert parse_config([*given, "--eval", "--resume", "y"]).run.recipe == recipe


def test_the_recipes_of_fine_tuning_are_those_whose_command_says_so():
    told = {name for name in recipes.names() if "--finetune" in recipes.describe(name)}
    assert told == {name for name in recipes.names() if recipes.starts_from_weights(name)}


@pytest.mark.parametrize(
    "line, flags, reason",
    [
        ("--teacher-model resnet50 --distillation-tau 2", "--distillation-tau, --teacher-model", "no teacher"),
        ("--distillation-type hard --distillation-tau 2", "--distillation-tau", "soft"),
        ("--distillation-type dkd --distillation-reduction numel", "--distillation-reduction", "soft"),
        ("--distillation-type dist --distillation-nontarget 2", "--distillation-nontarget", "dkd and nkd"),
        ("--distillation-type nkd --logit-standardization", "--logit-standardization", "soft and dkd"),
        ("--compare-undistilled", "--compare-undistilled", "no teacher"),
        (
            "--distillation-type soft --attention-distillation-layers every-2",
            "--attention-distillation-layers",
            "weight is 0",
        ),
        ("--distillation-type hard --teacher-store s --teacher-precision fp16", "--teacher-precision", "store"),
        ("--distillation-type hard --teacher-path . --teacher-model resnet50", "--teacher-model", "folder"),
        ("--mixup 0 --cutmix 0 --mixup-mode elem", "--mixup-mode", "are 0"),
        ("--color-jitter 0.4", "--color-jitter", "as in timm"),
        ("--src --scale 0.2 1", "--scale", "--src"),
        ("--finetune x --pretrained", "--pretrained", "--finetune"),
        ("--no-model-ema --model-ema-decay 0.9", "--model-ema-decay", "no moving average"),
        ("--opt sgd --opt-eps 1e-3", "--opt-eps", "adamw, lamb and muon"),
        ("--warmup-epochs 0 --warmup-lr 1e-5", "--warmup-lr", "--warmup-epochs is 0"),
        ("--keep-count 3", "--keep-count", "--keep-epochs"),
    ],
)
def test_a_flag_that_changes_nothing_is_named(capsys, line, flags, reason):
    parse_config(["--recipe", "deit_small", "--data-path", "x", *line.split()])
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"warning: {flags} changes nothing: ") and reason in told


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--distillation-type soft --distillation-tau 2 --distillation-alpha 0.1 --teacher-model resnet50",
        "--distillation-type dkd --distillation-tau 2 --distillation-nontarget 2 --logit-standardization",
        "--aa 3aug --color-jitter 0.4",
        "--keep-count 3 --keep-epochs 50",
        "--opt lamb --opt-eps 1e-3 --warmup-lr 0 --mixup 0 --mixup-mode pair",
    ],
)
def test_of_flags_that_are_used_nothing_is_said(capsys, line):
    parse_config(["--recipe", "deit_small", "--data-path", "x", *line.split()])
    assert capsys.readouterr().err == ""


def test_the_digits_are_not_taken_without_a_word(capsys):
    assert parse_config(["--model", "deit_tiny_patch16_224"]).run.recipe == "demo"
    assert "without --data-path" in capsys.readouterr().err
    parse_config(["--recipe", "demo", "--epochs", "3"])
    assert capsys.readouterr().err == ""
