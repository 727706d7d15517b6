"""DeiT-B with distillation token, taught by a RegNetY-16GF; after arXiv 2012.12877.

    python -m fastdeit.train --recipe deit_base_distilled --data-path DIR --teacher-path TEACHER

87 M parameters. The paper trains 300 epochs with 1,024 images a step over all processes (--batch-size is per
process: 128 on eight GPUs). The teacher's forward pass comes on top of every step. Top-1 on ImageNet-1k that the
paper reports, not measured here: 83.4 % with both heads averaged; the same model from labels alone: 81.8 %. For
classes of your own, fit a teacher first: `python -m fastdeit.teach fit`.
"""

from fastdeit.config import Config, Distillation, Model


def config() -> Config:
    return Config(
        model=Model(model="deit_base_distilled_patch16_224"),
        distillation=Distillation(distillation_type="hard", teacher_model="regnety_160"),
    )
