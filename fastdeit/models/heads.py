"""The logits of a model by its heads: class token, distillation token, and the average of both."""

import torch
from torch import Tensor, nn

from fastdeit.distributed.parallel import is_sharded

HEADS = {"cls": "class head", "dist": "distillation head", "both": "both heads, averaged"}


def logits_by_head(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """(batch, classes) float32 logits by the names of HEADS, whether the model is in train() or eval().

    "both" is the average of the two heads' logits, which is what the model returns in eval() (facebookresearch/deit;
    the paper averages softmax outputs). A model with one head has "cls" alone.
    """
    if is_sharded(next(model.parameters())):
        # What FSDP gathers here serves training steps too, which cannot use tensors made in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return by_head(model, images)
    return by_head(model, images)


def by_head(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """`logits_by_head` of a model that is not sharded, for torch.compile."""
    if not hasattr(model, "forward_heads"):
        return {"cls": model(images).float()}
    cls_logits, dist_logits = model.forward_heads(images)
    if dist_logits is None:
        return {"cls": cls_logits.float()}
    logits = (cls_logits, dist_logits, (cls_logits + dist_logits) / 2)
    return {head: values.float() for head, values in zip(HEADS, logits)}
