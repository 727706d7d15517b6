"""From image files to batches on the device. Knows images only: nothing of models, losses or the trainer."""
