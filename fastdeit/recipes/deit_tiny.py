"""DeiT-Ti on ImageNet-1k or a folder of your own, from labels alone; after arXiv 2012.12877.

    python -m fastdeit.train --recipe deit_tiny --data-path DIR

5.7 M parameters. The paper trains 300 epochs with 1,024 images a step over all processes (--batch-size is per
process: 128 on eight GPUs). Top-1 on ImageNet-1k that the paper reports, not measured here: 72.2 %.
"""

from fastdeit.config import Config, Model


def config() -> Config:
    return Config(model=Model(model="deit_tiny_patch16_224"))
