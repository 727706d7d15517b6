"""The plan of a small student's step, kernel by kernel, against what such a step must do."""

import pytest
import torch

from fastdeit.models.deit import create_model

NANO = "deit_nano_distilled_patch4_16"
BATCH = 4


@pytest.mark.skipif(torch.__version__ < "2.15", reason="imitates a device by internals of PyTorch 2.15")
def test_the_plan_of_a_step():
    from benchmarks.step_traffic import planned, table

    model = create_model(NANO)
    blocks = len(model.blocks)
    kernels = planned(NANO, BATCH)
    counts = {(row["pass"], row["kind"]): row["kernels"] for row in table(kernels)}
    products = 4 * blocks + 1 + 2  # qkv, proj, fc1, fc2; patches; heads
    assert counts["forward", "products, convolutions"] == products
    assert counts["backward", "products, convolutions"] == 2 * products - 1  # the images need no gradient
    assert counts["forward", "attention"] == counts["forward", "GELU"] == blocks
    tokens = (blocks - 1) * model.pos_embed.shape[1] + 2  # the last block computes two
    hidden = BATCH * tokens * 4 * model.embed_dim
    gelu = sum(kernel.bytes for kernel in kernels["forward"] if kernel.kind == "GELU")
    assert gelu == 2 * 2 * hidden  # bf16, in and out


@pytest.mark.skipif(torch.__version__ < "2.15", reason="imitates a device by internals of PyTorch 2.15")
def test_the_plan_with_a_fused_mlp():
    from benchmarks.step_traffic import planned

    model = create_model(NANO)
    kernels = planned(NANO, BATCH, fused_mlp=True)
    assert not [kernel for kernel in kernels["forward"] + kernels["backward"] if kernel.kind == "GELU"]
    fused = [kernel.bytes for kernel in kernels["forward"] if kernel.kind == "fused MLP"]
    rows, width = BATCH * model.pos_embed.shape[1], model.embed_dim
    biases = 4 * 5 * width  # float32
    assert len(fused) == len(model.blocks) and max(fused) == 2 * 2 * rows * width + 2 * 8 * width**2 + biases


@pytest.mark.skipif(torch.__version__ < "2.15", reason="imitates a device by internals of PyTorch 2.15")
def test_joined_convolutions_move_less():
    from benchmarks.step_traffic import planned_teacher

    apart, joined = (planned_teacher("regnety_002", 4, joined=joined) for joined in (False, True))
    assert len(joined) < len(apart)
    assert sum(kernel.bytes for kernel in joined) < 0.9 * sum(kernel.bytes for kernel in apart)
