"""Claim: the pointwise operations move the bytes they must and no more.

    python -m benchmarks norm [--only mix_normalize add_layer_norm bias_gelu mlp]

Beside what torch.compile makes of them by itself, and beside eager PyTorch.

add_layer_norm, bias_gelu and mlp are worth having in the model only where they beat torch.compile: that is what the
table decides, forward and forward with backward, at the widths of DeiT-Ti, S and B; mlp at that of DeiT-Ti alone. It is
no pointwise operation, and claims to be faster than those it is made of. mix_normalize claims to be bound by the
bytes of a batch: uint8 in, half precision out. Its peers on a batch of 224-pixel images that is normalised, erased
(a quarter of it) and mixed:

    timm            PrefetchLoader's arithmetic, RandomErasing in pixel mode and Mixup, as its trainer runs them, with
                    the random draws they make on the way
    torch.compile   the same by dense tensor operations over ready draws; its noise comes from PyTorch's generator

The floor is the bytes that must move over the memory's bandwidth (see each kernel's file).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastdeit.kernels import add_layer_norm, bias_gelu, mix_normalize, mlp

from .kernel_table import KernelTable
from .record import parser
from .timing import compiled

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Contenders = dict[str, Callable[[], object]]


def forward_and_backward(function: Callable, inputs: list[torch.Tensor], grads: list[torch.Tensor]) -> Callable:
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]

    def call():
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return *outputs, *torch.autograd.grad(outputs, wanted, grads)

    return call


def add_layer_norm_definition(x, residual, weight, bias, layer_scale, drop_path_scale):
    new_residual = residual + drop_path_scale[:, None, None] * (layer_scale * x)
    return F.layer_norm(new_residual, x.shape[-1:], weight, bias, 1e-6), new_residual


def add_layer_norm_ours(x, residual, weight, bias, layer_scale, drop_path_scale):
    return add_layer_norm(x, residual, weight, bias, layer_scale=layer_scale, drop_path_scale=drop_path_scale)


def bias_gelu_definition(x, bias):
    return F.gelu(x + bias)


def sides(ours: Callable, definition: Callable, inputs, grads, quick: bool) -> dict[str, Contenders]:
    """Contenders by direction. Compiled, ours is what a compiled model would call."""
    functions = {"fastdeit": ours, "torch.compile": compiled(definition, quick=quick), "eager": definition}

    def forward(function):
        def call():
            with torch.no_grad():
                return function(*inputs)

        return call

    return {
        "forward": {name: forward(function) for name, function in functions.items()},
        "forward + backward": {n: forward_and_backward(f, inputs, grads) for n, f in functions.items()},
    }


def add_layer_norm_case(batch: int, tokens: int, channels: int, dtype: torch.dtype, table: KernelTable):
    device = table.device
    x, residual, *grads = (torch.randn(batch, tokens, channels, device=device, dtype=dtype) for _ in range(4))
    vectors = [torch.randn(channels, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    keep = torch.rand(batch, device=device, dtype=dtype).lt(0.9).to(dtype) / 0.9
    inputs = [x.requires_grad_(), residual.requires_grad_(), *vectors, keep]
    tensor_bytes = x.numel() * x.element_size()
    floors = {"forward": 4 * tensor_bytes, "forward + backward": 10 * tensor_bytes}
    return sides(add_layer_norm_ours, add_layer_norm_definition, inputs, grads, table.quick), floors


def bias_gelu_case(batch: int, tokens: int, channels: int, dtype: torch.dtype, table: KernelTable):
    device = table.device
    x, grad = (torch.randn(batch, tokens, channels, device=device, dtype=dtype) for _ in range(2))
    bias = torch.randn(channels, device=device, dtype=dtype)
    tensor_bytes = x.numel() * x.element_size()
    floors = {"forward": 2 * tensor_bytes, "forward + backward": 5 * tensor_bytes}
    return sides(
        bias_gelu, bias_gelu_definition, [x.requires_grad_(), bias.requires_grad_()], [grad], table.quick
    ), floors


def mlp_definition(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def mlp_case(batch: int, tokens: int, channels: int, dtype: torch.dtype, table: KernelTable):
    device, hidden = table.device, 4 * channels
    x, grad = (torch.randn(batch, tokens, channels, device=device, dtype=dtype) for _ in range(2))
    shapes = (hidden, channels), (hidden,), (channels, hidden), (channels,)
    weights = [(torch.randn(shape, device=device) * channels**-0.5).to(dtype).requires_grad_() for shape in shapes]
    tensor_bytes = x.numel() * x.element_size()
    floors = {"forward": 2 * tensor_bytes, "forward + backward": 23 * tensor_bytes}
    return sides(mlp, mlp_definition, [x.requires_grad_(), *weights], [grad], table.quick), floors


def mix_normalize_draws(batch: int, size: int, cutmix: bool, device: str) -> dict[str, torch.Tensor]:
    """Every fourth sample erased, a sixth of it; all mixed by one lambda or one box, as in timm's batch mode."""
    generator = torch.Generator().manual_seed(0)
    side = int(size * 0.4)
    corner = torch.randint(0, size - side, (batch, 2), generator=generator)
    erased = (torch.arange(batch) % 4 == 0)[:, None]
    box = torch.tensor([0.1, 0.2, 0.7, 0.9]) * size if cutmix else torch.zeros(4)
    draws = {
        "partner": torch.arange(batch).flip(0),
        "lam": torch.full((batch,), 0.58 if cutmix else 0.7),
        "box": box.int().expand(batch, 4).contiguous(),
        "erase_box": (torch.cat((corner, corner + side), 1) * erased).int(),
        "erase_seed": torch.arange(batch),
    }
    return {name: tensor.to(device) for name, tensor in draws.items()}


def dense_mix_normalize(images, shift, scale, partner, lam, box, erase_box, dtype):
    """What one would write for torch.compile: no loops over samples, no shapes that depend on the draws."""
    _, H, W, _ = images.shape
    y, x = torch.arange(H, device=images.device)[:, None], torch.arange(W, device=images.device)

    def inside(boxes):
        y0, x0, y1, x1 = boxes[:, :, None, None].unbind(1)
        return ((y >= y0) & (y < y1) & (x >= x0) & (x < x1))[..., None]

    clean = (images.float() - shift) * scale
    clean = torch.where(inside(erase_box), torch.randn_like(clean), clean)
    weight = torch.where((box[:, 2] > 0)[:, None, None, None], (~inside(box)).float(), lam[:, None, None, None])
    return (weight * clean + (1 - weight) * clean[partner]).to(dtype).permute(0, 3, 1, 2)


def timm_mix_normalize(images_BCHW, cutmix: bool, dtype: torch.dtype, device: str) -> Callable[[], object]:
    from timm.data.mixup import Mixup
    from timm.data.random_erasing import RandomErasing

    erasing = RandomErasing(0.25, mode="pixel", device=device)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=float(cutmix), num_classes=1000)
    labels = torch.zeros(len(images_BCHW), dtype=torch.int64, device=device)
    mean, std = (255 * torch.tensor(v, device=device, dtype=dtype).view(1, 3, 1, 1) for v in (MEAN, STD))

    def call():
        return mixup(erasing(images_BCHW.to(dtype).sub_(mean).div_(std)), labels)

    return call


def mix_normalize_case(batch: int, size: int, cutmix: bool, dtype: torch.dtype, table: KernelTable):
    device = table.device
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    draws = mix_normalize_draws(batch, size, cutmix, device)
    shift, scale = 255 * torch.tensor(MEAN, device=device), 1 / (255 * torch.tensor(STD, device=device))
    dense_draws = [draws[name] for name in ("partner", "lam", "box", "erase_box")]
    dense = compiled(dense_mix_normalize, quick=table.quick)
    contenders = {
        "fastdeit": lambda: mix_normalize(images, MEAN, STD, **draws, dtype=dtype),
        "torch.compile": lambda: dense(images, shift, scale, *dense_draws, dtype),
        "timm": timm_mix_normalize(images.permute(0, 3, 1, 2).contiguous(), cutmix, dtype, device),
    }
    # The partner's pixels come from the same batch, which the cache may or may not hold: counted once.
    return contenders, images.numel() * (1 + dtype.itemsize)


def measure(table: KernelTable, operation: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    make = {"add_layer_norm": add_layer_norm_case, "bias_gelu": bias_gelu_case, "mlp": mlp_case}[operation]
    directions, floors = make(*shape, dtype, table)
    for direction, contenders in directions.items():
        case = f"{direction}, {' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
        headline = direction == "forward + backward" and shape[2] % 384 == 0 and shape[2] % 768 != 0
        table.measure(operation, case, contenders, floor_bytes=floors[direction], headline=headline)
    table.write()


def measure_mix_normalize(table: KernelTable, batch: int, size: int, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    for kind in ("mixup", "cutmix"):
        contenders, floor_bytes = mix_normalize_case(batch, size, kind == "cutmix", dtype, table)
        case = f"{kind}, {batch} x {size} x {size} x 3 {str(dtype).removeprefix('torch.')}"
        table.measure(
            "mix_normalize", case, contenders, floor_bytes=floor_bytes, uncaptured=("timm",), headline=kind == "cutmix"
        )
    table.write()


def main() -> None:
    own = parser(__doc__)
    operations = ("mix_normalize", "add_layer_norm", "bias_gelu", "mlp")
    own.add_argument(
        "--only", nargs="+", choices=operations, default=operations, metavar="NAME", help=", ".join(operations)
    )
    own.add_argument("--seconds", type=float, default=0.3, help="of measuring for each contender")
    arguments = own.parse_args()
    dtype, batch, tokens, size, widths = torch.bfloat16, 256, 198, 224, (192, 384, 768)
    if arguments.device == "cpu":  # the interpreter's bfloat16 is wrong
        dtype, batch, tokens, size, widths = torch.float32, 4, 3, 16, (8,)
    table = KernelTable("norm", arguments, dtype, arguments.seconds)
    for operation in arguments.only:
        if operation == "mix_normalize":
            measure_mix_normalize(table, batch, size, dtype)
            continue
        factor = 4 if operation == "bias_gelu" else 1  # the MLP's hidden width
        for width in (192 if arguments.device != "cpu" else 64,) if operation == "mlp" else widths:
            measure(table, operation, (batch, tokens, factor * width), dtype)


if __name__ == "__main__":
    main()
