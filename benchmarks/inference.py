"""Claim: what inference costs by each way out of here, beside timm's model with the same weights.

    python -m benchmarks inference [--model deit_tiny_distilled_patch16_224] [--batch-size 8]

Latency is a batch of one image, throughput one of --batch-size, from normalised images on the device to logits; the
decoding is measured by `benchmarks pipeline`. In turns, medians; every contender first has to give timm's logits.

    fastdeit       the module, as predict and evaluate call it
    compiled       the same by torch.compile
    timm           timm's module of this name
    onnx           export --format onnx, run by onnxruntime
    aotinductor    export --format aotinductor

On the CPU float32 on one thread, in CPU time; on a GPU autocast's fp16 for the modules, and float32 for the exports, as
they are written.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor

from fastdeit.errors import UserError
from fastdeit.export import formats
from fastdeit.models.deit import IMAGENET_MEAN, IMAGENET_STD, create_model
from fastdeit.models.loading import LoadedModel

from . import steps
from .record import Headline, Record, parser
from .timing import Timing

COLUMNS = ("measured", "runner", "batch", "ms", "ms_p10", "ms_p90", "images_per_s", "ratio_to_timm")
Runner = Callable[[Tensor], Tensor]


def contenders(arguments: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Runner]:
    torch.manual_seed(0)
    model = create_model(arguments.model, img_size=arguments.pixels).to(device).eval()
    theirs = timm.create_model(arguments.model, img_size=arguments.pixels).to(device).eval()
    theirs.load_state_dict(model.state_dict())
    loaded = LoadedModel(
        name=arguments.model, architecture=arguments.model, model=model, input_size=arguments.pixels,
        mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip
    backend = "eager" if arguments.quick else "inductor"
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    made: dict[str, Runner] = {"fastdeit": model, "compiled": compiled, "timm": theirs}
    if device.type == "cuda":
        made = {name: _in_half(runner) for name, runner in made.items()}
    exporters = {"onnx": lambda: _onnx(loaded, folder, device)}
    if not arguments.quick:  # which compiles for a minute
        exporters["aotinductor"] = lambda: formats.write_aotinductor(loaded, _new(folder / "aotinductor"))
    for name, export in exporters.items():
        try:
            made[name] = export()
        except UserError as lacking:
            print(f"{name:14}left out: {lacking}")
    return made


def _in_half(runner: Runner) -> Runner:
    def run(images: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.float16):
            return runner(images)

    return run


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _onnx(loaded: LoadedModel, folder: Path, device: torch.device) -> Runner:
    formats.write_onnx(loaded, _new(folder / "onnx"), 23)
    import onnxruntime

    providers = [*(["CUDAExecutionProvider"] if device.type == "cuda" else []), "CPUExecutionProvider"]
    if providers[0] not in onnxruntime.get_available_providers():
        raise UserError(f"this onnxruntime has no {providers[0]}: pip install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", options, providers=providers)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.cpu().numpy()})[0])

    return run


@torch.inference_mode()
def compare(arguments: argparse.Namespace, runners: dict[str, Runner], batch: int, device) -> dict[str, Timing]:
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, arguments.pixels, arguments.pixels, generator=generator).to(device)
    expected, tolerance = runners["timm"](images).float().cpu(), 0.05 if device.type == "cuda" else 1e-3
    for name, runner in runners.items():
        for _ in range(1 if arguments.quick else 3):
            logits = runner(images).float().cpu()
        off = (logits - expected).abs().max() / expected.abs().max()
        if not off <= tolerance:
            raise UserError(f"{name} gives other logits than timm: one is off by {off:.1e} of the largest")
    calls = {name: lambda runner=runner: runner(images) for name, runner in runners.items()}
    return steps.in_turn(calls, device, arguments.rounds)


def report(record: Record, measured: str, batch: int, timings: dict[str, Timing]) -> None:
    for name, t in timings.items():
        ratio = timings["timm"].median / t.median
        figures = [f"{value / 1e3:.2f}" for value in (t.median, t.low, t.high)]
        record.rows.append([measured, name, batch, *figures, f"{1e6 * batch / t.median:.1f}", f"{ratio:.3f}"])
        if record.quick:
            print(f"{measured:12}{name:14} runs")
            continue
        speed = f"{1e6 * batch / t.median:9.1f} images/s"
        print(f"{measured:12}{name:14}{t.median / 1e3:9.2f} ms a batch of {batch}{speed}{ratio:7.2f} x timm")


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--model", help="default: DeiT-S, on the CPU DeiT-Ti, both distilled")
    own.add_argument("--batch-size", type=int)
    own.add_argument("--rounds", type=int)
    arguments = steps.fill_in(
        own.parse_args(), batch_size=(256, 8, 2), rounds=(30, 25, 1), pixels=(224, 224, 16),
        model=(
            "deit_small_distilled_patch16_224", "deit_tiny_distilled_patch16_224", "deit_tiny_distilled_patch16_224"
        ),
    )  # fmt: skip
    record = Record("inference", arguments, COLUMNS)
    record.conditions |= {name: getattr(arguments, name) for name in ("model", "batch_size", "rounds", "pixels")}
    device = steps.pick_world(arguments.device).device
    with tempfile.TemporaryDirectory() as folder:
        runners = contenders(arguments, device, Path(folder))
        for measured, batch in (("latency", 1), ("throughput", arguments.batch_size)):
            timings = compare(arguments, runners, batch, device)
            report(record, measured, batch, timings)
            ours, theirs = (1e6 * batch / timings[name].median for name in ("fastdeit", "timm"))
            what = f"inference, {arguments.model}, batch {batch}"
            speeds = (steps.speed(ours, device), "timm", steps.speed(theirs, device))
            record.headlines.append(Headline(what, *speeds, round(ours / theirs, 3)))
            record.write()


if __name__ == "__main__":
    main()
