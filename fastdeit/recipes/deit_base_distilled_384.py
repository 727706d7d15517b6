"""Distilled DeiT-B, trained at 224 pixels, fine-tuned at 384 with the teacher at work; after arXiv 2012.12877,
section 5.

    python -m fastdeit.train --recipe deit_base_distilled_384 --data-path DIR --finetune FILE --teacher-path TEACHER

As deit_base_384, and distilled, the teacher at 384 pixels too: the original code refuses this combination, the paper
used it and found labels alone to be worse. Top-1 on ImageNet-1k that the paper reports, not measured here: 84.5 %.
"""

from fastdeit.config import Config, Distillation

from .deit_base_384 import config as from_labels

FINETUNES = True  # refused without weights to begin with


def config() -> Config:
    config = from_labels()
    config.model.model = "deit_base_distilled_patch16_384"
    config.distillation = Distillation(distillation_type="hard", teacher_model="regnety_160", teacher_input_size=384)
    return config
