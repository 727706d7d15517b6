"""Every Triton kernel at representative shapes, for tests/kernels/test_compile.py and compile_report.py."""

from collections.abc import Iterator

import torch

from fastdeit.kernels.add_layer_norm import triton_kernels as add_layer_norm
from fastdeit.kernels.attention import triton_backward, triton_bias, triton_forward, triton_varlen
from fastdeit.kernels.attention.configs import FULL_GPU, BackwardConfig, ForwardConfig, backward_config, forward_config
from fastdeit.kernels.attention.tiles import backward_columns
from fastdeit.kernels.attention_distillation_loss import triton_kernels as attention_distillation_loss
from fastdeit.kernels.backend import column_parts
from fastdeit.kernels.bias_gelu import triton_kernels as bias_gelu
from fastdeit.kernels.distillation_loss import triton_kernels as distillation_loss
from fastdeit.kernels.mix_normalize import triton_kernels as mix_normalize
from fastdeit.kernels.mlp import triton_kernels as mlp

from .compile_case import ARCHITECTURES, CompileCase

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def all_cases() -> Iterator[tuple[str, CompileCase]]:
    """(operation, case)"""
    operations = (
        add_layer_norm_cases, attention_cases, attention_bias_cases, attention_distillation_loss_cases,
        attention_varlen_cases, bias_gelu_cases, distillation_loss_cases, mix_normalize_cases, mlp_cases,
    )  # fmt: skip
    for cases in operations:
        for case in cases():
            yield cases.__name__.removesuffix("_cases"), case


def add_layer_norm_cases() -> Iterator[CompileCase]:
    vectors = dict.fromkeys(("mean_ptr", "rstd_ptr", "weight_ptr", "gamma_ptr", "drop_path_ptr"), "*fp32")
    forward = ("x_ptr", "residual_ptr", "normed_ptr", "new_residual_ptr")
    forward = dict.fromkeys(forward, "*bf16") | vectors | {"bias_ptr": "*fp32"}
    forward |= {"rows": "i32", "rows_per_sample": "i32", "eps": "fp32"}
    backward = ("grad_normed_ptr", "grad_residual_ptr", "x_ptr", "new_residual_ptr", "dx_ptr", "d_residual_ptr")
    backward = dict.fromkeys(backward, "*bf16") | vectors | {"partial_ptr": "*fp32"}
    backward |= dict.fromkeys(("rows", "rows_per_program", "rows_per_sample"), "i32")
    for name, kernel, signature, numbers in (
        ("forward", add_layer_norm.add_layer_norm_forward_kernel, forward, add_layer_norm.FORWARD_TILE),
        ("backward", add_layer_norm.add_layer_norm_backward_kernel, backward, add_layer_norm.BACKWARD_TILE),
    ):
        for C in (384, 768):
            tile = add_layer_norm._tile(C, numbers)
            warps = tile.pop("num_warps")
            yield CompileCase(
                f"add_layer_norm {name} C={C} bf16", kernel, signature, {"C": C, **tile}, ("rows",), warps
            )


def attention_cases() -> Iterator[CompileCase]:
    """The shapes DeiT trains at, and the largest tiles of the other head_dims."""
    for tokens, head_dim in ((198, 64), (578, 64), (198, 72), (578, 128)):
        yield from shape_cases(tokens, head_dim, torch.bfloat16)
    yield from shape_cases(198, 64, torch.float32)


def shape_cases(tokens: int, head_dim: int, dtype: torch.dtype) -> Iterator[CompileCase]:
    """The kernels of one shape, once for every group of architectures that share a configuration."""
    shape = tokens, sum(column_parts(head_dim)), dtype
    name = f"N={tokens} D={head_dim} {TYPES[dtype]}"
    for config, architectures in _by_config(forward_config, shape):
        yield forward_case(f"attention forward {name}", tokens, head_dim, dtype, config, architectures)
    # With many heads and with few, which may take one launch and two.
    for items, few in ((FULL_GPU, ""), (1, " few heads")):
        for config, architectures in _by_config(backward_config, (*shape, items)):
            if not few or backward_config(architectures[0], *shape, FULL_GPU) != config:
                title = f"attention backward{few} {name}"
                yield from backward_cases(title, tokens, head_dim, dtype, config, architectures)


def forward_case(
    name: str, tokens: int, head_dim: int, dtype: torch.dtype, config: ForwardConfig, architectures=ARCHITECTURES
) -> CompileCase:
    tiles = config.tiles(tokens)
    constexprs = {
        "HEAD_DIM": head_dim, "COLS": column_parts(head_dim), "PRECISION": "ieee", "BLOCK_M": config.block_m,
        "TILES": tiles, "STARTS": tuple(sum(tiles[:i]) for i in range(len(tiles))),
    }  # fmt: skip
    resident = config.keys == "resident"
    constexprs |= {"splits": 1} if resident else {"BLOCK_N": config.block_n}
    kernel = triton_forward.resident_kernel if resident else triton_forward.streaming_kernel
    return _attention_case(name, kernel, constexprs, dtype, architectures, *config[-3:])


def backward_cases(
    name: str, tokens: int, head_dim: int, dtype: torch.dtype, config: BackwardConfig, architectures=ARCHITECTURES
) -> Iterator[CompileCase]:
    shared = {"HEAD_DIM": head_dim, "COLS": backward_columns(config, head_dim), "PRECISION": "ieee"}
    if config.one is not None:
        keys, queries, *launch = config.one
        blocks = -(-tokens // keys)
        one = {**shared, "KV_ROWS": keys, "BLOCK_M": queries, "BLOCKS": blocks, "grad_lse_ptr": None}
        one |= {"dq_sum_ptr": None} if blocks == 1 else {}
        yield _attention_case(name, triton_backward.backward_kernel, one, dtype, architectures, *launch)
        return
    kv = {**shared, "KV_ROWS": config.kv.keys, "BLOCK_M": config.kv.queries}
    q = {**shared, "BLOCK_M": config.q.queries, "BLOCK_N": config.q.keys, "grad_lse_ptr": None}
    yield _attention_case(f"{name} dK dV", triton_backward.backward_kv_kernel, kv, dtype, architectures, *config.kv[2:])
    yield _attention_case(f"{name} dQ", triton_backward.backward_q_kernel, q, dtype, architectures, *config.q[2:])


def _attention_case(name, kernel, constexprs, dtype, architectures, num_warps, num_stages, maxnreg) -> CompileCase:
    floats = ("lse_ptr", "rows_ptr", "grad_lse_ptr", "dq_sum_ptr")
    types = {"scale": "fp32"} | dict.fromkeys(floats, "*fp32")
    names = [argument for argument in kernel.arg_names if argument not in constexprs]
    signature = {a: types.get(a, f"*{TYPES[dtype]}" if a.endswith("_ptr") else "i32") for a in names}
    strides = tuple(a for a in names if a[-2:] in ("_b", "_n", "_h") or a == "padded")
    half = dtype != torch.float32
    return CompileCase(
        name, kernel, signature, constexprs, strides, num_warps, num_stages, maxnreg, half, architectures
    )


def _by_config(config_of, shape) -> Iterator[tuple]:
    configs = {arch: config_of(arch, *shape) for arch in ARCHITECTURES}
    for config in dict.fromkeys(configs.values()):
        yield config, tuple(arch for arch in ARCHITECTURES if configs[arch] == config)


def attention_bias_cases() -> Iterator[CompileCase]:
    """BEiT-B's and SAM-H's, with a bias of as many keys as 16 bytes do not divide."""
    half, single = "*bf16", "*fp32"
    strides = tuple(f"{x}_{axis}" for x in "qkv" for axis in "bnh")
    sizes = ("heads", "queries", "keys", "period")
    inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "bias_ptr"), half) | {"scale": "fp32"}
    inputs |= dict.fromkeys((*sizes, *strides, "bias_b", "bias_h", "bias_n"), "i32")
    rows = {"grad_out_ptr": half, "lse_ptr": single, "delta_ptr": single}
    for head_dim in (64, 80):
        dims = {"HEAD_DIM": head_dim, "COLS": column_parts(head_dim), "BLOCK_M": 64, "BLOCK_N": 64, "PRECISION": "ieee"}
        for name, kernel, more in (
            ("forward", triton_bias.bias_forward_kernel, {"out_ptr": half, "lse_ptr": single}),
            (
                "backward q",
                triton_bias.bias_backward_q_kernel,
                rows | {"out_ptr": half, "grad_lse_ptr": single, "dq_ptr": half},
            ),
            ("backward kv", triton_bias.bias_backward_kv_kernel, rows | {"dk_ptr": half, "dv_ptr": half}),
            (
                "gradient",
                triton_bias.bias_gradient_kernel,
                rows | {"partial_ptr": single, "batch": "i32", "bias_heads": "i32"},
            ),
        ):
            tiles = dims | (triton_bias.BY_KEY if name == "backward kv" else {})
            name = f"attention bias {name} N=197 D={head_dim} bf16"
            yield CompileCase(name, kernel, inputs | more, tiles, strides, num_stages=2, dots_on_wgmma=True)


def attention_distillation_loss_cases() -> Iterator[CompileCase]:
    def case(name, kernel, pointers, tensors, sizes, blocks):
        strides = tuple(f"{tensor}_{axis}" for tensor in tensors for axis in "bnh")
        scalars = dict.fromkeys(("student_scale", "teacher_scale"), "fp32") | dict.fromkeys((*sizes, *strides), "i32")
        losses = {"student_lse_ptr": "*fp32", "teacher_lse_ptr": "*fp32"}
        signature = pointers | losses | {f"{tensor}_ptr": "*bf16" for tensor in tensors} | scalars
        dims = dict.fromkeys(("DIM_S", "DIM_T", "CHUNK_S", "CHUNK_T", blocks[0]), 64) | {blocks[1]: kernels.STREAMED}
        constexprs = {"MSE": False, "PRECISION": "ieee", **dims} | ({"OF_KEYS": True} if "grad_ptr" in pointers else {})
        name = f"attention_distillation_loss {name} D=64 bf16"
        return CompileCase(name, kernel, signature, constexprs, strides, num_stages=kernels.STAGES, dots_on_wgmma=True)

    kernels, gradient = attention_distillation_loss, {"dloss_ptr": "*fp32", "grad_ptr": "*bf16", "coefficient": "fp32"}
    yield case(
        "forward", kernels.forward_kernel, {"losses_ptr": "*fp32"},
        ("sq", "sk", "tq", "tk"), ("H", "R", "M"), ("BLOCK_R", "BLOCK_M"),
    )  # fmt: skip
    yield case(
        "gradient of keys", kernels.gradient_kernel, gradient,
        ("sx", "sy", "tx", "ty"), ("H", "X", "Y"), ("BLOCK_X", "BLOCK_Y"),
    )  # fmt: skip


def attention_varlen_cases() -> Iterator[CompileCase]:
    """SigLIP so400m's head_dim too; that of 128 has more warps."""
    half, single = "*bf16", "*fp32"
    strides = tuple(f"{x}_{axis}" for x in "qkv" for axis in "nh")
    inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), half) | dict.fromkeys(("cu_q_ptr", "cu_k_ptr"), "*i32")
    inputs |= dict.fromkeys(("heads", "total_q", "total_k", "blocks", *strides), "i32")
    inputs |= {"scale": "fp32", "lse_ptr": single}
    rows = inputs | {"grad_out_ptr": half, "delta_ptr": single}
    for head_dim, num_warps in ((64, 4), (72, 4), (128, 8)):
        dims = {"HEAD_DIM": head_dim, "COLS": column_parts(head_dim), "BLOCK_M": 64, "BLOCK_N": 64, "PRECISION": "ieee"}
        for name, kernel, signature in (
            ("forward", triton_varlen.varlen_forward_kernel, inputs | {"out_ptr": half}),
            (
                "backward q",
                triton_varlen.varlen_backward_q_kernel,
                rows | {"out_ptr": half, "grad_lse_ptr": single, "dq_ptr": half},
            ),
            ("backward kv", triton_varlen.varlen_backward_kv_kernel, rows | {"dk_ptr": half, "dv_ptr": half}),
        ):
            tiles = dims | (triton_bias.BY_KEY if name == "backward kv" else {})
            name = f"attention varlen {name} D={head_dim} bf16"
            yield CompileCase(name, kernel, signature, tiles, strides, num_warps, num_stages=2, dots_on_wgmma=True)


def bias_gelu_cases() -> Iterator[CompileCase]:
    tensors = {"x_ptr": "*bf16", "bias_ptr": "*bf16"}
    yield CompileCase(
        "bias_gelu forward C=3072 bf16",
        bias_gelu.bias_gelu_forward_kernel,
        tensors | {"y_ptr": "*bf16", "numel": "i32"},
        {"C": 3072, "BLOCK": bias_gelu.FORWARD_BLOCK},
        ("numel",),
    )
    yield CompileCase(
        "bias_gelu backward C=3072 bf16",
        bias_gelu.bias_gelu_backward_kernel,
        tensors
        | {"grad_ptr": "*bf16", "dx_ptr": "*bf16", "partial_ptr": "*fp32", "rows": "i32", "rows_per_program": "i32"},
        {"C": 3072, "BLOCK_R": bias_gelu.BLOCK_ROWS, "BLOCK_C": bias_gelu.BLOCK_COLUMNS},
        ("rows", "rows_per_program"),
        num_warps=8,
    )


def distillation_loss_cases() -> Iterator[CompileCase]:
    for classes, target, teacher in (
        (1000, "mixed labels", "hard_logits"), (32768, "labels", "soft_logits"), (1000, "labels", "soft_stored"),
    ):  # fmt: skip
        yield from distillation_loss_pair(classes, target, teacher)


def distillation_loss_pair(classes: int, target: str, teacher: str) -> Iterator[CompileCase]:
    stored = teacher == "soft_stored"
    inputs = {
        "statistics_ptr": "*fp32", "cls_ptr": "*bf16", "dist_ptr": "*bf16", "target_ptr": "*i64",
        "teacher_ptr": "*i64" if stored else "*bf16",
        "batch": "i32", "K": "i32", "class_weight": "fp32", "teacher_weight": "fp32", "tau": "fp32",
        "soft_scale": "fp32", "smoothing": "fp32",
    }  # fmt: skip
    constexprs = {
        "C": classes, "CLS_STRIDE": classes, "DIST_STRIDE": classes, "TARGET_STRIDE": 0,
        "TEACHER_STRIDE": 10 if stored else classes, "PROBS_STRIDE": 10 if stored else 0,
        "TARGET": "labels", "TEACHER": teacher, "BLOCK_K": 16 if stored else 1,
    }  # fmt: skip
    for names, types, there in (
        (("probs_ptr",), ("*fp16",), stored), (("second_ptr", "lam_ptr"), ("*i64", "*fp32"), target == "mixed labels"),
    ):  # fmt: skip
        inputs |= dict(zip(names, types)) if there else {}
        constexprs |= {} if there else dict.fromkeys(names)
    forward = distillation_loss.distillation_loss_forward_kernel, {"losses_ptr": "*fp32", "terms_ptr": "*fp32"}
    backward = (
        distillation_loss.distillation_loss_backward_kernel,
        {"grad_ptr": "*fp32", "dcls_ptr": "*bf16", "ddist_ptr": "*bf16"},
    )
    for direction, (kernel, outputs), largest, more in (
        ("forward", forward, distillation_loss.MAX_BLOCK, {"SMOOTHED": True}),
        ("backward", backward, distillation_loss.BACKWARD_BLOCK, {"TWO_HEADS": True, "GRAD_STRIDE": 0}),
    ):
        block = distillation_loss.block_of(classes, largest)
        warps = block.pop("num_warps")
        yield CompileCase(
            f"distillation_loss {direction} {target}, {teacher} C={classes} bf16", kernel, inputs | outputs,
            constexprs | more | {"BLOCK": block["BLOCK"]}, multiples_of_16=("batch",), num_warps=warps,
        )  # fmt: skip


def mlp_cases() -> Iterator[CompileCase]:
    """DeiT-Ti's and the nano model's."""
    for width in (192, 128):
        for direction, tiles_of in (("forward", mlp.forward_tiles), ("backward", mlp.backward_tiles)):
            for tiles, architectures in _by_config(tiles_of, ()):
                yield mlp_case(direction, width, tiles, architectures)


def mlp_case(direction: str, width: int, tiles: mlp.Tiles, architectures=ARCHITECTURES) -> CompileCase:
    half, single = "*bf16", "*fp32"
    signature = dict.fromkeys(("x_ptr", "w1_ptr", "w2_ptr"), half) | {"b1_ptr": single, "rows": "i32"}
    constexprs = {
        "WIDTH": width, "HIDDEN": 4 * width, "CHUNK": mlp.CHUNK, "BLOCK_M": tiles.rows, "BLOCK_H": tiles.hidden
    }  # fmt: skip
    if direction == "forward":
        kernel, signature = mlp.mlp_forward_kernel, signature | {"b2_ptr": single, "y_ptr": half}
    else:
        kernel, constexprs = mlp.mlp_backward_kernel, constexprs | {"BLOCK_S": mlp.BLOCK_S}
        signature |= dict.fromkeys(("dy_ptr", "dx_ptr", "h_ptr", "dt_ptr"), half) | {"db1_ptr": single}
    return CompileCase(
        f"mlp {direction} W={width} bf16", kernel, signature, constexprs, ("rows",), *tiles[2:], dots_on_wgmma=True,
        architectures=architectures,
    )  # fmt: skip


DRAWS = {
    "partner_ptr": "*i64",
    "lam_ptr": "*fp32",
    "box_ptr": "*i32",
    "erase_box_ptr": "*i32",
    "erase_seed_ptr": "*i64",
}
SCALARS = {"batch": "i32", "H": "i32"} | {f"{name}_{c}": "fp32" for name in ("shift", "scale") for c in "rgb"}


def mix_normalize_cases() -> Iterator[CompileCase]:
    constexprs = {"W": 224, "CHANNELS_LAST": True, "BLOCK": mix_normalize.BLOCK}
    images = {"images_ptr": "*u8", "out_ptr": "*bf16"} | SCALARS
    divisible = ("batch", "H")
    yield CompileCase(
        "mix_normalize train 224 bf16 channels_last",
        mix_normalize.mix_normalize_kernel,
        images | DRAWS,
        constexprs,
        divisible,
    )
    yield CompileCase(
        "mix_normalize eval 224 bf16 channels_last",
        mix_normalize.mix_normalize_kernel,
        images,
        constexprs | dict.fromkeys(DRAWS),
        divisible,
    )
