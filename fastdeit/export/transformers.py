"""DeiT in the names of Hugging Face transformers, as its published checkpoints have them.

A distilled model is `DeiTForImageClassificationWithTeacher`, a plain one `ViTForImageClassification`.
"""

import torch
from torch import Tensor

from fastdeit.models.deit import DeiT
from fastdeit.models.loading import LoadedModel

_BICUBIC = 3  # PIL's number


def transformers_config(trained: LoadedModel) -> tuple[dict, dict]:
    """config.json and preprocessor_config.json for `trained` (a LoadedModel with a DeiT)."""
    arch = trained.model.arch
    size = trained.model.img_size
    config = {
        "model_type": "deit" if arch.distilled else "vit",
        "architectures": ["DeiTForImageClassificationWithTeacher" if arch.distilled else "ViTForImageClassification"],
        "hidden_size": arch.width,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "intermediate_size": 4 * arch.width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "image_size": size[0],
        "patch_size": arch.patch_size,
        "num_channels": 3,
        "id2label": {str(number): name for number, name in enumerate(trained.class_names)},
        "label2id": {name: number for number, name in enumerate(trained.class_names)},
    }
    processor = {
        "image_processor_type": "DeiTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": int(min(size) / trained.crop_pct)},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size[0], "width": size[1]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        # The class's own default is 0.5 for both, with which weights for ImageNet's normalisation do badly.
        "image_mean": list(trained.mean),
        "image_std": list(trained.std),
    }
    return config, processor


def transformers_weights(model: DeiT) -> dict[str, Tensor]:
    """The model's weights by the names of the published checkpoints (facebook/deit-*), on the CPU."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    base = "deit" if model.arch.distilled else "vit"
    theirs = {}

    def move(ours: str, name: str) -> None:
        for kind in ("weight", "bias"):
            theirs[f"{name}.{kind}"] = state.pop(f"{ours}.{kind}")

    embeddings = {"cls_token": "cls_token", "dist_token": "distillation_token", "pos_embed": "position_embeddings"}
    for ours, name in embeddings.items():
        if ours in state:
            theirs[f"{base}.embeddings.{name}"] = state.pop(ours)
    move("patch_embed.proj", f"{base}.embeddings.patch_embeddings.projection")
    for i in range(model.arch.depth):
        block, layer = f"blocks.{i}", f"{base}.encoder.layer.{i}"
        for kind in ("weight", "bias"):
            parts = state.pop(f"{block}.attn.qkv.{kind}").chunk(3)
            for part, name in zip(parts, ("query", "key", "value")):
                theirs[f"{layer}.attention.attention.{name}.{kind}"] = part
        move(f"{block}.attn.proj", f"{layer}.attention.output.dense")
        move(f"{block}.norm1", f"{layer}.layernorm_before")
        move(f"{block}.norm2", f"{layer}.layernorm_after")
        move(f"{block}.mlp.fc1", f"{layer}.intermediate.dense")
        move(f"{block}.mlp.fc2", f"{layer}.output.dense")
    move("norm", f"{base}.layernorm")
    move("head", "cls_classifier" if model.arch.distilled else "classifier")
    if model.arch.distilled:
        move("head_dist", "distillation_classifier")
    assert not state, f"left behind: {list(state)}"
    # A chunk is a view into the packed matrix; safetensors stores each tensor by itself.
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in theirs.items()}
