"""How alike class and distillation token are, block by block."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .deit import DeiT


@torch.no_grad()
def token_cosine_similarity(model: DeiT, images: Tensor) -> Tensor:
    """Cosine similarity of class and distillation token, (depth + 1,) float32: at the input, then after each block.

    Averaged over the batch, in eval mode. The first value compares the learned tokens with their positions, which is
    all the network sees of them (the DeiT paper, section 4: 0.06 at the input, 0.93 at the last layer). The final
    LayerNorm is not applied. Raises ValueError for a model without a distillation token.
    """
    if not model.arch.distilled:
        raise ValueError("this model has no distillation token; choose one with 'distilled' in its name")
    was_training = model.training
    model.eval()
    x_BND = model.embed(images)
    similarity = [F.cosine_similarity(x_BND[:, 0].float(), x_BND[:, 1].float(), dim=-1).mean()]
    for block in model.blocks:
        x_BND = block(x_BND)
        similarity.append(F.cosine_similarity(x_BND[:, 0].float(), x_BND[:, 1].float(), dim=-1).mean())
    model.train(was_training)
    return torch.stack(similarity)
