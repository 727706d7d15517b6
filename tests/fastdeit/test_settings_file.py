"""--config FILE: settings from YAML, TOML and JSON, from --print-config and from a run."""

import json
import sys

import pytest

pytest.importorskip("tyro")

from fastdeit import train
from fastdeit.cli import parse_config
from fastdeit.errors import UserError

YAML = """
seed: 7
batch-size: 48
data:
  scale: [0.2, 0.9]
  repeated_aug: no
model: {drop_path: 0.25, model_ema: false}
optimization:
  lr: 1e-3
  clip_grad: null
run: {recipe: deit3_small}
"""
TOML = """
seed = 7
batch-size = 48
[data]
scale = [0.2, 0.9]
repeated_aug = false
[model]
drop_path = 0.25
model_ema = false
[optimization]
lr = 1e-3
[run]
recipe = "deit3_small"
"""
BY_FLAGS = (
    "--recipe deit3_small --seed 7 --batch-size 48 --scale 0.2 0.9 --no-repeated-aug --drop-path 0.25 --no-model-ema "
    "--lr 1e-3"
).split()


def parsed(*arguments):
    return parse_config(["--data-path", "x", *map(str, arguments)])


def written(tmp_path, text, name="c.yaml"):
    file = tmp_path / name
    file.write_text(text)
    return file


def settings(config):
    """All of them, but the file."""
    found = config.to_dict()
    found["run"]["config"] = None
    return found


@pytest.mark.parametrize("name, text, flags", [("c.yaml", YAML, ["--clip-grad", "None"]), ("c.toml", TOML, [])])
def test_a_file_says_what_the_flags_would(tmp_path, name, text, flags):
    if name == "c.toml" and sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    found, expected = parsed("--config", written(tmp_path, text, name)), parsed(*BY_FLAGS, *flags)
    assert settings(found) == settings(expected) and found.optimization.lr == 1e-3
    assert found.typed - {"--config"} == expected.typed | ({"--clip-grad"} if flags else set())


def test_flags_outrank_the_file_which_outranks_the_recipe(tmp_path):
    file = written(tmp_path, YAML)
    config = parsed("--config", file, "--seed", 8, "--model-ema", "--scale", 0.5, 1, "--recipe", "deit_small")
    assert (config.run.seed, config.model.model_ema, config.data.scale) == (8, True, (0.5, 1.0))
    assert config.run.recipe == "deit_small" and config.data.batch_size == 48


@pytest.mark.parametrize("name", ["c.json", "c.yaml"])
def test_what_print_config_prints_is_a_file_of_settings(tmp_path, cli, name):
    flags = [*BY_FLAGS, "--data-path", "x", "--opt-betas", 0.8, 0.95, "--compile", "True", "--output-dir", "runs/a"]
    _, printed, _ = cli(train.main, *flags, "--print-config")
    config = parse_config(["--config", str(written(tmp_path, printed, name))])
    config.run.print_config = True
    assert settings(config) == json.loads(printed)
    assert config.optimization.opt_betas == (0.8, 0.95) and config.speed.compile is True


def test_the_settings_of_a_run_start_another_run(run, tmp_path, capsys):
    config = parse_config(["--config", str(run / "settings.json"), "--output-dir", str(tmp_path / "again")])
    assert "changes nothing" not in capsys.readouterr().err  # a file holds all settings, those without use too
    saved = json.loads((run / "settings.json").read_text())
    saved["run"] |= {"output_dir": str(tmp_path / "again"), "config": None}
    assert settings(config) == saved
    assert parse_config(["--config", str(run / "settings.json")]).run.output_dir is None


def test_a_resumed_run_takes_the_same_file_and_no_other(run, tmp_path, cli):
    code, out, err = cli(train.main, "--resume", run, "--config", run / "settings.json")
    assert code == 0 and "is finished" in out, err
    other = written(tmp_path, "lr: 0.7")
    code, _, err = cli(train.main, "--resume", run, "--config", other)
    assert code == 2 and "--lr 0.7" in err


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("c.yaml", "data: {batch_sise: 3}", ["there is no setting data.batch_sise", "did you mean data.batch_size?"]),
        ("c.yaml", "model: {batch_size: 3}", ["no setting model.batch_size", "data.batch_size"]),
        ("c.yaml", "zzzzz: 1", ["no setting zzzzz", "--print-config"]),
        ("c.yaml", "- 1", ["names with values", "list"]),
        ("c.yaml", "", ["names with values", "NoneType"]),
        ("c.yaml", "a: [", ["c.yaml"]),
        ("c.yaml", "repeated_aug: 3", ["true or false"]),
        ("c.yaml", "lr: {a: 1}", ["lr takes a value"]),
        ("c.json", "{", ["c.json"]),
        ("c.toml", "a = ", ["c.toml"]),
        ("c.txt", "", [".yaml, .yml, .toml or .json"]),
        ("c.yaml", "drop_path: 3", ["--drop-path 3", "at most 1"]),
    ],
)
def test_what_a_file_must_not_say(tmp_path, name, text, words):
    with pytest.raises(UserError) as refused:
        parsed("--config", written(tmp_path, text, name))
    for word in words:
        assert word in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        parsed("--config", tmp_path / "absent.yaml")
