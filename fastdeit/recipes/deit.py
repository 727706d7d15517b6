"""DeiT from labels alone, distilled, and fine-tuned at 384 pixels; after arXiv 2012.12877 and facebookresearch/deit."""

from fastdeit.config import Config, Data, Distillation, Model, Optimization, Run


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


def deit_small_fast() -> Config:
    """DeiT-S on ImageNet-1k from labels alone, for the work of 100 epochs; after EfficientTrain++, arXiv 2405.08768.

        python -m fastdeit.train --recipe deit_small_fast --data-path DIR

    As deit_small, with small images and weak augmentation at first (--curriculum), 4,096 images a step over all
    processes, a warm-up over a fifth of the work. Top-1 on ImageNet-1k that LeapLabTHU/EfficientTrain reports (EVAL.md,
    README.md), not measured here: 79.9 % for the work of 100 epochs, a third of the time of 300 without, which have
    80.3 % there (79.8 % in DeiT's paper). More with --epochs E --warmup-epochs E/5 --drop-path E/2000: 80.6 % for 150,
    81.0 % for 200, 81.4 % for 300. For 100 it makes 235 passes over the images (150: 352, 200: 469, 300: 704), which
    must be decoded as fast as the smaller ones are trained on. The cosine counts from the first step, as always here;
    the authors' begins after the warm-up.
    """
    return Config(
        run=Run(eval_every=5),
        data=Data(repeated_aug=False),
        model=Model(model="deit_small_patch16_224", drop_path=0.05, model_ema=False),
        optimization=Optimization(
            epochs=100, curriculum="efficienttrain", warmup_epochs=20, warmup_lr=0.0, min_lr=1e-6, clip_grad=5.0
        ),
    )


def deit_small_distilled_fast() -> Config:
    """DeiT-S distilled from a RegNetY-16GF, the student's work that of 100 epochs: deit_small_fast with a teacher.

        python -m fastdeit.train --recipe deit_small_distilled_fast \\
            --data-path DIR --teacher-path TEACHER

    The teacher sees whole images in all 235 passes, so that its work is not less: give --teacher-store CACHE where one
    teacher is for several students (`python -m fastdeit.teach store --views 235`). Curriculum and distillation have
    not been published together, nor measured here. Each alone, on ImageNet-1k: 79.9 % with the curriculum, for the
    work of 100 epochs (arXiv 2405.08768); 81.2 % distilled, for 300 (arXiv 2012.12877).
    """
    config = deit_small_fast()
    config.model.model = "deit_small_distilled_patch16_224"
    config.distillation = Distillation(distillation_type="hard", teacher_model="regnety_160")
    return config
