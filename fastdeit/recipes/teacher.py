"""Training a teacher."""

from fastdeit.config import Config, Data, Model, Optimization


def teacher() -> Config:
    """A teacher for your own classes: fine-tune a CNN of timm with a new head.

        python -m fastdeit.teach fit --data-path DIR --model resnet50

    Mild augmentation, since the student's images are augmented more strongly anyway; no label smoothing, so that the
    teacher's probabilities stay informative.
    """
    return Config(
        data=Data(
            scale=(0.35, 1.0), aa="none", color_jitter=0.2, reprob=0.0, repeated_aug=False, mixup=0.0, cutmix=0.0
        ),
        model=Model(model="resnet50", pretrained=True, drop_path=0.0, model_ema=False),
        optimization=Optimization(epochs=20, lr=1e-3, weight_decay=0.05, warmup_epochs=1, smoothing=0.0),
    )
