"""TensorRT builds an engine from the ONNX files, float and int8, where it is installed."""

import shutil
import subprocess

import pytest

from fastdeit.export.__main__ import main

TOOL = shutil.which("trtexec") or shutil.which("trtexec", path="/usr/src/tensorrt/bin")


@pytest.mark.gpu
@pytest.mark.skipif(TOOL is None, reason="needs trtexec")
@pytest.mark.parametrize("kind", ["onnx", "onnx-int8"])
def test_an_engine_from_onnx(run, colors, cli, tmp_path, kind):
    data = ["--data-path", colors] if kind == "onnx-int8" else []
    code, _, err = cli(main, run, "--format", kind, "--opset", "20", "--output", tmp_path / "model", *data)
    assert code == 0, err
    shapes = [f"--{name}Shapes=images:{batch}x3x16x16" for name, batch in {"min": 1, "opt": 4, "max": 8}.items()]
    precision = ["--fp16", *(["--int8"] if data else [])]
    command = [TOOL, f"--onnx={tmp_path}/model/model.onnx", *shapes, *precision, "--duration=1", "--warmUp=50"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout[-3000:] + done.stderr
