"""Teachers: fit one on your own classes; write its logits for the training runs to come to a cache; verify a cache.

    python -m fastdeit.teach fit --data-path DIR --model resnet50
    python -m fastdeit.teach store --views 30 --output CACHE ...
    python -m fastdeit.teach verify CACHE

Each of them has a --help of its own.
"""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

from fastdeit.cli import fold, parse, parse_config
from fastdeit.config import Config, setting
from fastdeit.errors import UserError, run

STORE = """Write a teacher's logits for the epochs of a training run to come, once, for runs with no teacher in memory.

    FLAGS="--data-path DIR --distillation-type hard"
    python -m fastdeit.teach store $FLAGS --teacher-path RUN \\
        --views 30 --output CACHE
    torchrun --nproc-per-node 8 -m fastdeit.teach store ...
    python -m fastdeit.train $FLAGS --teacher-store CACHE

FLAGS: all those of the run to come, since they decide what the images look like. The same command resumes an
interrupted cache."""


def main() -> int | None:
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
    config = parse_config(arguments, recipe="teacher", prog="python -m fastdeit.teach fit")
    if config.distillation.distillation_type != "none":
        raise UserError("a teacher is fitted on the labels alone: omit --distillation-type")
    from fastdeit.distributed.world import join
    from fastdeit.train import train

    with join(config.run.device) as world:
        train(config, world)
        if world.is_main:
            data = "" if config.data.data_path is None else f" --data-path {config.data.data_path}"
            folder, what = config.run.output_dir or "RUN", "" if config.run.output_dir else " (RUN: the folder above)"
            command = f"python -m fastdeit.train{data} --distillation-type hard --teacher-path {folder}"
            print(f"teach a student with it{what}:\n\n    {command}")


@dataclass(kw_only=True)
class LogitCacheOptions:
    """Size and place of the logit cache."""

    views: int | None = setting(None, at_least=1)
    """Required: how many epochs of augmented views to write; later epochs use them again."""
    output: Path | None = None
    """Required: folder of the logit cache."""
    top: int = setting(10, at_least=1)
    """Soft targets: how many classes keep their probability."""


@dataclass(kw_only=True)
class _CommandLine(Config):
    """The settings of the run to come, and those of the cache."""

    cache: LogitCacheOptions = field(default_factory=LogitCacheOptions)


def store(arguments: list[str]) -> None:
    """Write a logit cache."""
    given = parse_config(arguments, prog="python -m fastdeit.teach store", kind=_CommandLine, description=STORE)
    options, config = given.cache, Config(**{group.name: getattr(given, group.name) for group in fields(Config)})
    _check(options, config)
    from fastdeit.demo import with_digits
    from fastdeit.distill.cache_writer import write_cache
    from fastdeit.distributed.world import join

    with join(config.run.device) as world:
        write_cache(with_digits(config, world), world, options.output, epochs=options.views, top=options.top)


def _check(options: LogitCacheOptions, config: Config) -> None:
    if options.views is None or options.output is None:
        raise UserError("teach store needs --views N, the number of epochs to write, and --output FOLDER")
    if config.distillation.distillation_type == "none":
        raise UserError("teach store needs --distillation-type hard or soft, that of the training run")
    if config.distillation.teacher_store is not None:
        raise UserError("teach store needs a live teacher: omit --teacher-store")
    if config.distillation.teacher_patches < 1:
        raise UserError("teach store: which patches --teacher-patches leaves depends on the student: omit the flag")


def verify(arguments: list[str]) -> None:
    """Compare the contents of a logit cache with the checksums recorded when they were written."""
    import tyro

    @dataclass(kw_only=True)
    class Verify:
        cache: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CACHE")]
        """The folder that teach store wrote."""

    folder = parse(Verify, prog="python -m fastdeit.teach verify", args=arguments, description=verify.__doc__).cache
    from fastdeit.distill.logit_cache import LogitCache

    if damaged := LogitCache(folder).damaged():
        places = ", ".join(f"epoch {epoch} steps {first} to {end - 1}" for epoch, first, end in damaged[:3])
        raise UserError(
            f"the logit cache {folder} is damaged: checksums differ at {places}; remove it and write it again"
        )
    print(f"{folder}: all checksums agree")


if __name__ == "__main__":
    run(main)
