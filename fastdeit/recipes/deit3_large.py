"""DeiT III ViT-L on ImageNet-1k, from labels alone; after arXiv 2204.07118.

    python -m fastdeit.train --recipe deit3_large --data-path DIR

304 M parameters, trained at 192 pixels for 800 epochs with 2,048 images a step over all processes (256 on eight
GPUs): LAMB, binary cross entropy, 3-Augment. The paper then fine-tunes 20 epochs at 224 pixels: recipe
deit3_finetune. Top-1 at 224 pixels that the original's README_revenge.md reports, not measured here: 84.9 %.
"""

from fastdeit.config import Config

from .deit3_small import deit3


def config() -> Config:
    return deit3("deit3_large_patch16_224", input_size=192, lr=0.003, drop_path=0.45)
