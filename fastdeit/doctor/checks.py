"""What is tried, what it needs, and what became of it."""

import importlib.util
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from fastdeit.pipelines.child import Call, Outcome, outcomes

TRAIN, EXPORT, XFORMERS = (f"pip install 'fastdeit[{extra}]'" for extra in ("train", "export", "xformers"))
NEEDED = (
    "PIL", "jinja2", "matplotlib", "nvidia.dali", "pyarrow", "rich", "safetensors", "scipy", "sklearn", "timm",
    "torchvision", "tyro",
)  # fmt: skip
OPERATIONS = (
    "attention", "add_layer_norm", "bias_gelu", "mlp", "distillation_loss", "attention_distillation_loss",
    "mix_normalize",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """modules: without which it is not tried. install: what brings them. needed: by training.
    gpu: on a GPU only. slow: half a minute or more on a CPU."""

    section: str
    name: str
    function: str
    arguments: tuple = ()
    modules: tuple[str, ...] = ()
    install: str = ""
    needed: bool = False
    gpu: bool = False
    slow: bool = False


@dataclass(frozen=True)
class Result:
    """outcome: works; fails; missing, not installed; skipped, not tried here. detail: in words."""

    section: str
    name: str
    outcome: Literal["works", "fails", "missing", "skipped"]
    detail: str
    needed: bool
    install: str = ""

    @property
    def breaks_training(self) -> bool:
        return self.needed and self.outcome in ("fails", "missing")


def checks() -> list[Check]:
    def check(section: str, name: str, function: str, *arguments, **more) -> Check:
        return Check(section, name, f"fastdeit.doctor.tries:{function}", arguments, **more)

    peers, attention = "other attention", "other_attention"
    return [
        check("PyTorch", "torch", "torch_works", needed=True),
        check("PyTorch", "torch.compile", "compiles", slow=True),
        check("PyTorch", "packages of the trainer", "imports", NEEDED, modules=NEEDED, install=TRAIN, needed=True),
        *(check("kernels", name, "kernel", name, needed=True) for name in OPERATIONS),
        *(check(peers, f"SDPA {name}", attention, name) for name in ("flash", "efficient", "cudnn", "math")),
        check(peers, "xformers", attention, "xformers", modules=("xformers",), install=XFORMERS, gpu=True),
        check(peers, "FA3", attention, "FA3", modules=("flash_attn_interface",), gpu=True),
        check(peers, "FA4", attention, "FA4", modules=("flash_attn.cute",), gpu=True,
              install="pip install 'flash-attn-4[cu13]'"),
        check("decoders", "CPU", "decoder", "cpu", False, modules=("nvidia.dali",), install=TRAIN, needed=True),
        check("decoders", "GPU, whole images", "decoder", "whole", True, modules=("nvidia.dali",), gpu=True),
        check("decoders", "GPU, regions", "decoder", "regions", True, modules=("nvidia.dali",), gpu=True),
        *(
            check("trackers", name, "tracker", name, modules=(name,), install=f"pip install {name}")
            for name in ("tensorboard", "wandb", "trackio")
        ),
        check("exporters", "timm", "exporter", "timm", modules=("timm",), install=TRAIN),
        check("exporters", "transformers", "exporter", "transformers", modules=("transformers",), install=EXPORT),
        check("exporters", "onnx", "exporter", "onnx", modules=("onnx", "onnxscript", "onnxruntime"), install=EXPORT),
        check("exporters", "torch-export", "exporter", "torch-export"),
        check("exporters", "aotinductor", "exporter", "aotinductor", slow=True),
    ]  # fmt: skip


def results(*, slow: bool, on_gpu: bool, seconds: float, wanted: Iterable[Check] | None = None) -> list[Result]:
    """Of every check, in order. The exporters', which take as long as all the others, share a process as long as it
    lives, and the others another one beside it.

    on_gpu: whether the machine has one. slow: whether slow checks are made without one. seconds: limit of each
    """
    wanted = list(checks() if wanted is None else wanted)
    found = {check: _not_tried(check, slow, on_gpu) for check in wanted}
    tried = [check for check in wanted if found[check] is None]
    groups = [[check for check in tried if (check.section == "exporters") is exporters] for exporters in (True, False)]
    with ThreadPoolExecutor(len(groups)) as pool:
        calls = [[Call(check.function, check.arguments) for check in group] for group in groups]
        for group, made in zip(groups, pool.map(lambda some: outcomes(some, seconds=seconds), calls)):
            found |= {check: _result(check, outcome) for check, outcome in zip(group, made)}
    return [found[check] for check in wanted]


def to_install(found: Iterable[Result]) -> list[str]:
    """The lines that bring what is missing, each once."""
    return list(dict.fromkeys(one.install for one in found if one.outcome == "missing" and one.install))


def _not_tried(check: Check, slow: bool, on_gpu: bool) -> Result | None:
    if check.gpu and not on_gpu:
        return _result_of(check, "skipped", "needs a GPU")
    if lacking := [module for module in check.modules if not installed(module)]:
        return _result_of(check, "missing", f"{', '.join(lacking)} not installed")
    if check.slow and not slow and not on_gpu:
        return _result_of(check, "skipped", "takes long on a CPU: --slow tries it")
    return None


def installed(module: str) -> bool:
    """Whether it can be found; it is not imported, but the package around it may be."""
    top = importlib.util.find_spec(module.partition(".")[0])
    # A plain folder of that name in the working directory has neither a file nor a package's parts.
    if top is None or (top.origin is None and "." not in module):
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # of the package around it, as it is imported
        return False


def _result(check: Check, outcome: Outcome) -> Result:
    if outcome.failure is None:
        return _result_of(check, "works", outcome.value)
    kind, _, words = outcome.failure.partition(": ")
    if kind == "NotHere":
        return _result_of(check, "skipped", words)
    return _result_of(check, "fails", outcome.failure[:300])


def _result_of(check: Check, outcome: Literal["works", "fails", "missing", "skipped"], detail: str) -> Result:
    return Result(check.section, check.name, outcome, detail, check.needed, check.install)
