"""Teachers: fit one on your own classes; store its answers to the views of a training run to come; verify a store.

    python -m fastdeit.teach fit --data-path DIR --model resnet50
    python -m fastdeit.teach store --views 30 --output STORE ...
    python -m fastdeit.teach verify STORE

Each of them has a --help of its own.
"""

import sys

from fastdeit.cli import fold
from fastdeit.errors import UserError, run


def main() -> int | None:
    from fastdeit.distill.cache_writer import store, verify

    arguments = sys.argv[1:]
    commands = {"fit": fit, "store": store, "verify": verify}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(fold(__doc__))
        return None
    if arguments[0] not in commands:
        raise UserError(f"teach {arguments[0]}: there is no such command; choose one of {', '.join(commands)}")
    return commands[arguments[0]](arguments[1:])


def fit(arguments: list[str]) -> None:
    """Train a classifier to teach with: any timm model, by default from its published weights with a fresh head."""
    from fastdeit.cli import parse_config
    from fastdeit.distributed.world import join
    from fastdeit.train import train

    config = parse_config(arguments, recipe="teacher", prog="python -m fastdeit.teach fit")
    if config.distillation.distillation_type != "none":
        raise UserError("a teacher is fitted on the labels alone: leave --distillation-type away")
    with join(config.run.device) as world:
        train(config, world)
        if world.is_main:
            data = "" if config.data.data_path is None else f" --data-path {config.data.data_path}"
            folder, what = config.run.output_dir or "RUN", "" if config.run.output_dir else " (RUN: the folder above)"
            command = f"python -m fastdeit.train{data} --distillation-type hard --teacher-path {folder}"
            print(f"teach a student with it{what}:\n\n{fold(f'    {command}')}")


if __name__ == "__main__":
    run(main)
