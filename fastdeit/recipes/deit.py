"""DeiT-S on your own folder or on ImageNet, after arXiv 2012.12877.

    python -m fastdeit.train --data-path DIR

Without distillation by default; with a teacher: `--distillation-type hard --teacher-path TEACHER`. The paper's batch
is 1,024 images over all processes and its 300 epochs took 53 hours for DeiT-B on 8 V100. Top-1 on ImageNet-1k reported
by the paper: DeiT-S 79.8, distilled (hard, both heads) 81.2.
"""

from ..config import Config


def config() -> Config:
    return Config()
