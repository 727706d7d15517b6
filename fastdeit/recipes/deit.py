"""DeiT from labels alone, distilled, and fine-tuned at 384 pixels; after arXiv 2012.12877 and facebookresearch/deit."""

from fastdeit.config import Config, Data, Distillation, Model, Optimization


def deit_tiny() -> Config:
    """DeiT-Ti on ImageNet-1k or a folder of your own, from labels alone; after arXiv 2012.12877.

        python -m fastdeit.train --recipe deit_tiny --data-path DIR

    5.7 M parameters. The paper trains 300 epochs with 1,024 images a step over all processes, which is the default
    on GPUs (128 on each of eight). Top-1 on ImageNet-1k that the paper reports, not measured here: 72.2 %.
    """
    return Config(model=Model(model="deit_tiny_patch16_224"))


def deit_small() -> Config:
    """DeiT-S on ImageNet-1k or a folder of your own, from labels alone; after arXiv 2012.12877.

        python -m fastdeit.train --recipe deit_small --data-path DIR

    22 M parameters. The paper trains 300 epochs with 1,024 images a step over all processes, which is the default
    on GPUs (128 on each of eight). Top-1 on ImageNet-1k that the paper reports, not measured here: 79.8 %.
    """
    return Config(model=Model(model="deit_small_patch16_224"))


def deit_base() -> Config:
    """DeiT-B on ImageNet-1k or a folder of your own, from labels alone; after arXiv 2012.12877.

        python -m fastdeit.train --recipe deit_base --data-path DIR

    87 M parameters. The paper trains 300 epochs with 1,024 images a step over all processes, which is the default
    on GPUs (128 on each of eight), and reports 53 hours on 8 V100 for DeiT-B. Top-1 on ImageNet-1k that the paper
    reports, not measured here: 81.8 %.
    """
    return Config(model=Model(model="deit_base_patch16_224"))


def _distilled(model: str) -> Config:
    """Hard distillation from a RegNetY-16GF. For classes of your own, train a teacher first: `teach fit`."""
    return Config(
        model=Model(model=model), distillation=Distillation(distillation_type="hard", teacher_model="regnety_160")
    )


def deit_tiny_distilled() -> Config:
    """DeiT-Ti with distillation token, distilled from a RegNetY-16GF; after arXiv 2012.12877.

        python -m fastdeit.train --recipe deit_tiny_distilled \\
            --data-path DIR --teacher-path TEACHER

    As deit_tiny, with the teacher's forward pass on top of every step. Top-1 on ImageNet-1k that the paper reports, not
    measured here: 74.5 % with both heads averaged (74.6 by the distillation head alone); the same model from labels
    alone: 72.2 %. For classes of your own, train a teacher first: `python -m fastdeit.teach fit`.
    """
    return _distilled("deit_tiny_distilled_patch16_224")


def deit_small_distilled() -> Config:
    """DeiT-S with distillation token, distilled from a RegNetY-16GF; after arXiv 2012.12877.

        python -m fastdeit.train --recipe deit_small_distilled \\
            --data-path DIR --teacher-path TEACHER

    As deit_small, with the teacher's forward pass on top of every step. Top-1 on ImageNet-1k that the paper reports,
    not measured here: 81.2 % with both heads averaged; the same model from labels alone: 79.8 %. For classes of your
    own, train a teacher first: `python -m fastdeit.teach fit`.
    """
    return _distilled("deit_small_distilled_patch16_224")


def deit_base_distilled() -> Config:
    """DeiT-B with distillation token, distilled from a RegNetY-16GF; after arXiv 2012.12877.

        python -m fastdeit.train --recipe deit_base_distilled \\
            --data-path DIR --teacher-path TEACHER

    As deit_base, with the teacher's forward pass on top of every step. Top-1 on ImageNet-1k that the paper reports, not
    measured here: 83.4 % with both heads averaged; the same model from labels alone: 81.8 %. For classes of your own,
    train a teacher first: `python -m fastdeit.teach fit`.
    """
    return _distilled("deit_base_distilled_patch16_224")


def deit_base_384() -> Config:
    """DeiT-B, trained at 224 pixels, fine-tuned at 384; after facebookresearch/deit README_deit.md.

        python -m fastdeit.train --recipe deit_base_384 \\
            --data-path DIR --finetune CHECKPOINT

    512 images a step over all processes; the original's README reports 20 hours on 8 GPUs. Position embeddings are
    interpolated. The original fine-tunes with the model in evaluation mode, which for a DeiT means no stochastic depth.
    Top-1 on ImageNet-1k that the paper reports, not measured here: 83.1 %.
    """
    return Config(
        data=Data(input_size=384, eval_crop_ratio=1.0),
        model=Model(model="deit_base_patch16_384", drop_path=0.0),
        optimization=Optimization(epochs=30, lr=5e-6, min_lr=5e-6, weight_decay=1e-8),
    )


def deit_base_distilled_384() -> Config:
    """Distilled DeiT-B, trained at 224 pixels, fine-tuned at 384 with distillation; after arXiv 2012.12877, section 5.

        python -m fastdeit.train --recipe deit_base_distilled_384 \\
            --data-path DIR --finetune CHECKPOINT --teacher-path TEACHER

    As deit_base_384, and distilled, the teacher at 384 pixels too: the original code refuses this combination, the
    paper used it and found labels alone to be worse. Top-1 on ImageNet-1k that the paper reports, not measured here:
    84.5 %.
    """
    config = deit_base_384()
    config.model.model = "deit_base_distilled_patch16_384"
    config.distillation = Distillation(distillation_type="hard", teacher_model="regnety_160", teacher_input_size=384)
    return config
