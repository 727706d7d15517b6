"""Which vision transformers `apply_to` serves: families of timm, transformers, torchvision and open_clip, all small.

python -m benchmarks.coverage            prints the table
python -m benchmarks.coverage --write    and puts it into docs/kernels.md

Each model runs once as it came and once after `apply_to`, forward and backward in float64 on the CPU, with random
weights: the calls that ran fastdeit's operators, why the others did not, and the largest difference of the output, and
of all gradients, relative to the largest number of each. What is not installed is left out.
"""

import argparse
import copy
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from fastdeit.kernels import apply_to, attention_calls

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- table: coverage -->\n", "<!-- end -->\n"
SIZE = 64
SHALLOW = {"img_size": SIZE, "depth": 2}
TIMM = {  # family: model, changes, side of the images
    "DeiT, ViT": ("deit_small_distilled_patch16_224", SHALLOW, SIZE),
    "DeiT III": ("deit3_small_patch16_224", SHALLOW, SIZE),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2}, 56),
    "DINOv3": ("vit_small_patch16_dinov3", SHALLOW, SIZE),
    "EVA-02": ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}, 56),
    "Perception Encoder": ("vit_pe_core_tiny_patch16_384", SHALLOW, SIZE),
    "SigLIP so400m": ("vit_so400m_patch14_siglip_224", {"img_size": 56, "depth": 1}, 56),
    "NaFlexViT": ("naflexvit_base_patch16_gap", {"depth": 1}, SIZE),
    "CaiT": ("cait_xxs24_224", SHALLOW, SIZE),
    "XCiT": ("xcit_nano_12_p16_224", {"depth": 2}, SIZE),
    "BEiT": ("beit_base_patch16_224", {"img_size": SIZE, "depth": 1}, SIZE),
    "SAM": ("samvit_base_patch16", {"img_size": SIZE, "depth": 1}, SIZE),
    "Swin": ("swin_tiny_patch4_window7_224", {"img_size": SIZE, "depths": (1, 1, 1, 1)}, SIZE),
    "Hiera": ("hiera_tiny_224", {}, 224),
    "PVT v2": ("pvt_v2_b0", {}, SIZE),
    "Twins": ("twins_svt_small", {}, SIZE),
    "LeViT": ("levit_128s", {}, 224),
    "TinyViT": ("tiny_vit_5m_224", {}, 224),
    "ConViT": ("convit_tiny", SHALLOW, SIZE),
    "EfficientViT": ("efficientvit_b0", {}, SIZE),
    "MViT v2": ("mvitv2_tiny", {}, 224),
    "VOLO": ("volo_d1_224", {}, 224),
}
HF = {  # family: configuration, changes
    "ViT": ("ViTConfig", {}),
    "DeiT": ("DeiTConfig", {}),
    "DINOv2": ("Dinov2Config", {}),
    "DINOv3": ("DINOv3ViTConfig", {}),
    "SigLIP": ("SiglipVisionConfig", {}),
    "CLIP": ("CLIPVisionConfig", {}),
    "BEiT": ("BeitConfig", {"use_relative_position_bias": True}),
    "Segformer": ("SegformerConfig", {}),
}
HF_SMALL = {
    "image_size": SIZE, "patch_size": 16, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip


def models() -> Iterator[tuple[str, str, Callable[[], nn.Module], int]]:
    """Library, family, what makes the model, and the side of its images."""
    if importlib.util.find_spec("timm"):
        import timm

        timm.layers.set_fused_attn(experimental=True)  # Swin asks for this
        for family, (name, changes, size) in TIMM.items():
            yield "timm", family, lambda n=name, c=changes: timm.create_model(n, **c), size
    if importlib.util.find_spec("torchvision"):
        from torchvision.models import VisionTransformer

        yield "torchvision", "ViT", lambda: VisionTransformer(SIZE, 16, 2, 2, 64, 64), SIZE
    if importlib.util.find_spec("open_clip"):
        import open_clip

        yield "open_clip", "CLIP ViT-B/32, image", lambda: open_clip.create_model("ViT-B-32").visual, 224
    if importlib.util.find_spec("transformers"):
        import transformers

        for family, (name, changes) in HF.items():
            config = getattr(transformers, name)
            small = changes if name == "SegformerConfig" else HF_SMALL | changes
            yield "transformers", family, lambda c=config, s=small: transformers.AutoModel.from_config(c(**s)), SIZE


def row(make: Callable[[], nn.Module], size: int) -> tuple[str, str, str]:
    """Calls served of all attention calls, what was not and why, and the largest relative difference."""
    torch.manual_seed(0)
    model, images = make().double().eval(), torch.randn(1, 3, size, size, dtype=torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    before = run(copy.deepcopy(model), images)  # some keep a bias made in evaluation, with its graph
    report = apply_to(model)
    with attention_calls() as calls:
        after = run(model, images)
    served, others = calls.pop("fused", 0), [f"{count} x {reason}" for reason, count in calls.items()]
    left = [f"{count} layer{'s' * (count > 1)}: {reason}" for reason, count in Counter(report.kept.values()).items()]
    # All gradients together: some are zero but for rounding, such as that of a bias of the keys.
    pairs = list(zip(before, after))
    output, gradients = (largest(a - b for a, b in p) / largest(a for a, _ in p) for p in (pairs[:1], pairs[1:]))
    return str(served), "; ".join(others + left) or "-", f"{max(output, gradients):.0e}"


def largest(tensors: Iterable[torch.Tensor]) -> float:
    return max(x.abs().max().item() for x in tensors if x.numel())


def run(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    out = model(images)
    out = out if isinstance(out, torch.Tensor) else next(x for x in (out if isinstance(out, tuple) else out.values()))
    out.sin().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def table() -> str:
    lines = ["| library | family | fused calls | the rest | largest difference |", "| --- | --- | --- | --- | --- |"]
    for library, family, make, size in models():
        lines.append(f"| {library} | {family} | {' | '.join(row(make, size))} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    arguments = parser.parse_args()
    made = table()
    if arguments.write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + BEGIN + made + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    main()
