"""The tries. Each is called in a process of its own, imports what it needs, compares, and returns what to say of it.

An exception is a failure; NotHere is none: the machine or the version has no such thing.
"""

import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


class NotHere(Exception):
    """There is nothing to be tried here."""


TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}  # norm of the difference over the reference's norm


def torch_works() -> str:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        if built and Path("/proc/driver/nvidia/version").exists():
            torch.cuda.init()  # its exception says why, such as a driver that is too old
            raise RuntimeError(f"built for CUDA {built}, and finds no GPU though a driver is loaded")
        return f"on the CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    names = []
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        with torch.cuda.device(number):
            product = torch.full((64, 64), 0.5, device="cuda", dtype=torch.bfloat16) @ torch.eye(
                64, device="cuda", dtype=torch.bfloat16
            )
            assert bool((product == 0.5).all()), f"cuda:{number} multiplies wrongly"
        names.append(f"cuda:{number} {torch.cuda.get_device_name(number)} (sm_{major}{minor})")
    return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}: {', '.join(names)}"


def imports(names: list[str]) -> str:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise RuntimeError(f"{name} cannot be imported: {error}") from error
    return f"{len(names)} can be imported"


def compiles() -> str:
    """A function and its backward through Inductor: Triton on a GPU, C++ on a CPU."""
    import torch

    x = torch.linspace(-3, 3, 999, device=_device()).requires_grad_()
    function = torch.compile(lambda x: torch.nn.functional.gelu(x, approximate="tanh").square())
    function(x).sum().backward()
    y = x.detach().cpu().double().requires_grad_()
    torch.nn.functional.gelu(y, approximate="tanh").square().sum().backward()
    return f"forward and backward, {_compared([x.grad], [y.grad], 'float32')}"


def kernel(name: str) -> str:
    import torch

    from .operations import Inputs, call

    device = _device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = call(name, Inputs(device, dtype))
    expected = call(name, Inputs("cpu", dtype, torch.float64))
    return f"{_implementation(device)}, {_compared(found, expected, str(dtype)[6:])}"


def _implementation(device: str) -> str:
    import torch

    from fastdeit.kernels.backend import use_triton

    return "Triton" if use_triton(torch.empty(0, device=device)) else "PyTorch's operators, in place of Triton"


def other_attention(name: str) -> str:
    """DeiT-S's attention at 224 pixels, forward and backward."""
    import torch

    device = _device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    random = torch.Generator().manual_seed(0)
    rounded = [torch.randn(2, 198, 6, 64, generator=random).to(dtype) for _ in range(4)]
    leaves = [x.to(device, copy=True).requires_grad_() for x in rounded[:3]]
    output = _attend(name)(*leaves)
    output.backward(rounded[3].to(device))
    exact = [x.double().requires_grad_() for x in rounded[:3]]
    expected = _sdpa(*exact)
    expected.backward(rounded[3].double())
    tensors = [output, *(leaf.grad for leaf in leaves)], [expected, *(leaf.grad for leaf in exact)]
    return _compared(*tensors, str(dtype)[6:])


def _sdpa(q, k, v):
    """q, k, v: (batch, tokens, heads, head_dim)."""
    import torch

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _attend(name: str) -> Callable:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention
    if name in ("FA3", "FA4"):
        if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
            raise NotHere(f"torch {torch.__version__} cannot activate it")
        if name not in torch.nn.attention.list_flash_attention_impls():
            raise NotHere(f"torch {torch.__version__} does not know it")
        torch.nn.attention.activate_flash_attention_impl(name)
        name = "flash"
    backend = {
        "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
    }[name]  # fmt: skip
    if _device() == "cpu" and name in ("efficient", "cudnn"):
        raise NotHere("needs a GPU")

    def attend(q, k, v):
        with sdpa_kernel(backend):
            return _sdpa(q, k, v)

    return attend


def decoder(decoding: str, on_gpu: bool) -> str:
    """Photo-like JPEGs, and one image of each other format, against Pillow."""
    import numpy as np
    from PIL import Image

    from fastdeit.pipelines import open_files
    from fastdeit.pipelines.decode import probe

    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(32):
            noise = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
            picture = noise.resize((500 - 5 * number, 375), Image.Resampling.BICUBIC)
            name = f"{number:02d}.{'png' if number == 30 else 'webp' if number == 31 else 'jpg'}"
            picture.save(Path(folder) / name, quality=90)
        index = open_files([folder])
        samples, pixels = Path(folder) / "samples.npz", Path(folder) / "pixels.npz"
        expected = probe.write_samples(index, samples)
        version = probe.decode(decoding, str(samples), str(pixels), 0 if on_gpu else None, 4)
        _like_pillow(expected, folder)
        if reason := probe.reason_against(decoding, version, probe.read_images(pixels), expected):
            raise RuntimeError(f"{decoding} {reason}")
    nvjpeg = f", nvJPEG {'.'.join(map(str, version))}" if on_gpu and version else ""
    return f"{len(expected)} images agree{nvjpeg}"


def _like_pillow(images, folder: str) -> None:
    """The second half of the images: whole, in the order of the files."""
    import numpy as np
    from PIL import Image

    files = sorted(path for path in Path(folder).iterdir() if path.suffix != ".npz")
    for file, image in zip(files, images[len(images) // 2 :], strict=True):
        theirs = np.asarray(Image.open(file).convert("RGB")).astype(int)
        if (difference := np.abs(theirs - image).mean()) > 1:
            raise RuntimeError(f"{file.suffix} differs from Pillow's by {difference:.1f} levels on average")


def tracker(name: str) -> str:
    """One figure, offline."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": folder}
        os.environ.pop("TRACKIO_SPACE_ID", None)  # it would be sent there
        from fastdeit.training.trackers import open_tracker

        run = Path(folder) / "run"
        run.mkdir()
        opened = open_tracker(name, run, {"doctor": True})
        opened.log(1, {"loss": 0.5})
        opened.close()
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    if not written:
        raise RuntimeError("it starts, and writes nothing")
    return "starts and writes"


def exporter(kind: str) -> str:
    """The smallest student, written and read back."""
    import torch

    from fastdeit.export import formats
    from fastdeit.models.deit import create_model
    from fastdeit.models.loading import LoadedModel

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(0)
    name, size = "deit_nano_distilled_patch4_16", 16
    model = create_model(name, num_classes=3).eval().to(_device() if kind == "aotinductor" else "cpu")
    trained = LoadedModel(
        name=name, model=model, input_size=size, mean=(0.5,) * 3, std=(0.5,) * 3, classes=("a", "b", "c"),
        architecture=name,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        difference = formats.export(trained, kind, Path(folder) / kind)
    return f"read back, largest difference of a logit {difference:.1g}"


# ---------------------------------------------------------------------------------------------------------------------
# For several of them


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _compared(found, expected, dtype: str) -> str:
    """Raises RuntimeError where a tensor is further from the reference than rounding explains."""
    errors = [_error(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
    if not (worst := max(errors)) <= TOLERANCE[dtype]:
        raise RuntimeError(f"disagrees with the reference: {dtype}, relative error {worst:.2g}")
    return f"{dtype}, relative error {worst:.1g}"


def _error(ours, theirs) -> float:
    import torch

    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    if not bool(torch.isfinite(ours).all()):
        return float("inf")
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()
