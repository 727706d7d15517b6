"""Fine-tuning on a folder of your own."""

from fastdeit.config import Config, Data, Model, Optimization


def finetune() -> Config:
    """A pretrained DeiT on a folder of your own with some hundred to some ten thousand images.

        python -m fastdeit.train --recipe finetune --data-path DIR

    From the weights that timm publishes for --model (if omitted: of DeiT-S, on a CPU of DeiT-Ti); --finetune CHECKPOINT
    starts from others: a run's folder, a file, a URL, hf-hub:NAME. The head is replaced by a new one if the number of
    classes differs. Milder than the recipe for training from scratch, which underfits small folders: crops of at least
    35 %, no erasing, weak mixing, no repeated augmentation, a moving average that follows within an epoch or two. No
    accuracy is claimed: it depends on the folder.
    """
    return Config(
        data=Data(
            batch_size=64, scale=(0.35, 1.0), aa="rand-m7-mstd0.5-inc1", reprob=0.0, mixup=0.1, cutmix=0.0,
            repeated_aug=False,
        ),
        model=Model(model="deit_small_patch16_224", pretrained=True, drop_path=0.1, model_ema_decay=0.999),
        optimization=Optimization(epochs=30, lr=1e-4, unscale_lr=True, warmup_epochs=2, min_lr=1e-6, smoothing=0.1),
    )  # fmt: skip
