"""A training run that writes down what each of its epochs costs: `python -m benchmarks.metered` takes the flags of
fastdeit.train, --output-dir among them.

RUN/cost.jsonl has a line for each epoch, and for each part of one where the run was stopped: the epoch, the steps, and
the process time they took, in seconds of all threads; decoding is in it, evaluations and the start are not.
"""

import json
import time
from pathlib import Path

from fastdeit.checkpoint import metrics_log
from fastdeit.errors import run
from fastdeit.training.loop import Loop

FILE = "cost.jsonl"


def main() -> None:
    from fastdeit import train
    from fastdeit.cli import parse_config
    from fastdeit.distributed.world import join

    config = parse_config()
    meter(config.run.output_dir / FILE)
    with join(config.run.device) as world:
        train.train(config, world)


def meter(file: Path) -> None:
    """From here on, in this process."""
    train_epoch = Loop.train_epoch

    def metered(loop: Loop, epoch: int) -> dict:
        since, first = time.process_time(), loop.state.step
        try:
            return train_epoch(loop, epoch)
        finally:
            line = {"epoch": epoch, "steps": loop.state.step - first, "cpu_seconds": time.process_time() - since}
            with file.open("a") as opened:
                opened.write(json.dumps(line) + "\n")

    Loop.train_epoch = metered


def costs(folder: Path) -> dict[int, float]:
    """Seconds a step, by epoch."""
    steps: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for line in metrics_log.json_lines(folder / FILE):
        steps[line["epoch"]] = steps.get(line["epoch"], 0) + line["steps"]
        seconds[line["epoch"]] = seconds.get(line["epoch"], 0.0) + line["cpu_seconds"]
    return {epoch: seconds[epoch] / count for epoch, count in steps.items() if count}


if __name__ == "__main__":
    run(main)
