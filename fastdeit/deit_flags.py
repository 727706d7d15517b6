"""Command lines of facebookresearch/deit (main.py and run_with_submitit.py) and what their flags are called here.

Most flags have the same names and defaults. The rest are in three tables: flags that change nothing here, flags with
another name, and flags for what is not implemented, each with a remedy.
"""

import dataclasses
import os
from dataclasses import dataclass

from fastdeit.errors import UserError, tell

ANY = None


@dataclass(frozen=True)
class NoEffect:
    """A flag that changes nothing here. values: those it can have, others are refused with `remedy`. words: how many
    values follow the flag, -1 for one or more."""

    values: tuple[str, ...] | None = ANY
    remedy: str = ""
    words: int = 1


NO_EFFECT = {
    "--sched": NoEffect(("cosine",), "the learning rate follows a cosine; omit the flag"),
    "--lr-noise": NoEffect((), "the learning rate has no noise; omit the flag", words=-1),
    "--lr-noise-pct": NoEffect(),  # of --lr-noise, as the next
    "--lr-noise-std": NoEffect(),
    "--decay-epochs": NoEffect(),  # of other schedules than the cosine, as the next four
    "--decay-rate": NoEffect(),
    "--dr": NoEffect(),
    "--patience-epochs": NoEffect(),
    "--cooldown-epochs": NoEffect(),  # main.py drops what it would lengthen
    "--momentum": NoEffect(("0.9",), "the momentum of --opt sgd is 0.9; omit the flag"),
    "--drop": NoEffect(("0",), "there is no dropout here; regularise by --drop-path, and give --drop 0"),
    "--model-ema-force-cpu": NoEffect(words=0),
    "--train-mode": NoEffect(words=0),
    "--train-interpolation": NoEffect(("bicubic",), "crops are resized bicubically; omit the flag"),
    "--remode": NoEffect(("pixel",), "erased rectangles are filled with noise by pixel; omit the flag"),
    "--recount": NoEffect(("1",), "one rectangle is erased; omit the flag"),
    "--resplit": NoEffect(words=0),  # of augmentation splits, which main.py does not have either
    "--nb-classes": NoEffect(),  # counted in the data, as in main.py, which does not know this flag of its README
    "--data-set": NoEffect(
        ("IMNET",), "bring the images as folders, --data-path DIR with DIR/train/CLASS/* and DIR/val/CLASS/*"
    ),
    "--inat-category": NoEffect(),  # of --data-set INAT
    "--start-epoch": NoEffect(("0",), "a run resumes at the very step it had saved: give --resume RUN alone"),
    "--dist-eval": NoEffect(words=0),
    "--pin-mem": NoEffect(words=0),
    "--no-pin-mem": NoEffect(words=0),
    "--distributed": NoEffect(words=0),
    "--world-size": NoEffect(),  # from the launcher, as in main.py
    "--dist-url": NoEffect(("env://",), "torchrun takes it as --rdzv-endpoint, SLURM as MASTER_ADDR and MASTER_PORT"),
    "--timeout": NoEffect(),  # for the scheduler, as the next three
    "--partition": NoEffect(),
    "--comment": NoEffect(),
    "--use-volta32": NoEffect(words=0),
}

RENAMED = {
    "--ThreeAugment": ["--aa", "3aug", "--reprob", "0"],  # main.py's new_data_aug_generator does not erase
    "--no-train-mode": ["--drop-path", "0"],  # all that the mode changes in a DeiT
}

NOT_IMPLEMENTED = {
    "--cutmix-minmax": "the size of CutMix's boxes follows --cutmix ALPHA",
    "--cosub": "training two sub-models together (README_cosub.md) is not implemented",
}

OPTIMIZERS = {"fusedadamw": "adamw", "fusedlamb": "lamb", "nesterov": "sgd", "fusedsgd": "sgd"}

# models_v2.py, cait_models.py, resmlp_models.py: what the names are in this project and in timm.
MODELS = {
    "deit_small_patch16_LS": "deit3_small_patch16_224", "deit_medium_patch16_LS": "deit3_medium_patch16_224",
    "deit_base_patch16_LS": "deit3_base_patch16_224", "deit_large_patch16_LS": "deit3_large_patch16_224",
    "deit_huge_patch14_LS": "deit3_huge_patch14_224",
    "cait_XXS24_224": "cait_xxs24_224", "cait_XXS24": "cait_xxs24_384", "cait_XXS36_224": "cait_xxs36_224",
    "cait_XXS36": "cait_xxs36_384", "cait_XS24": "cait_xs24_384", "cait_S24_224": "cait_s24_224",
    "cait_S24": "cait_s24_384", "cait_S36": "cait_s36_384", "cait_M36": "cait_m36_384", "cait_M48": "cait_m48_448",
    "resmlp_12": "resmlp_12_224", "resmlp_24": "resmlp_24_224", "resmlp_36": "resmlp_36_224",
    "resmlpB_24": "resmlp_big_24_224",
}  # fmt: skip

FILES = ("--finetune", "--resume", "--teacher-path")  # "" is none, as in main.py
LAUNCHER = {"--nodes": 2, "--ngpus": 8}  # run_with_submitit.py, with its defaults


@dataclass
class Reading:
    """What became of a command line."""

    arguments: list[str]
    no_effect: list[str] = dataclasses.field(default_factory=list)
    renamed: list[str] = dataclasses.field(default_factory=list)

    def told(self) -> list[str]:
        sentences = []
        if self.no_effect:
            sentences.append(f"flags of facebookresearch/deit that change nothing here: {', '.join(self.no_effect)}")
        if self.renamed:
            sentences.append(f"read {', '.join(self.renamed)}")
        return sentences


def read(arguments: list[str], names: set[str]) -> Reading:
    """The command line in this project's flags. names: those, as --batch-size.

    Raises UserError, with a remedy, for a flag of the original that is not implemented. A flag that neither has is left
    for the parser to refuse.
    """
    reading, last, launched = Reading([]), [], {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            reading.arguments.append(word)
            continue
        flag = _in_full(flag.replace("_", "-"), names)
        if flag in NO_EFFECT:
            meant = NO_EFFECT[flag]
            values = [value] if equals else _take(rest, meant.words)
            if meant.values is not ANY and not all(_among(value, meant.values) for value in values):
                raise UserError(f"{' '.join([flag, *values])}: {meant.remedy}")
            reading.no_effect.append(" ".join([flag, *values]))
        elif flag in NOT_IMPLEMENTED:
            raise UserError(f"{flag}: {NOT_IMPLEMENTED[flag]}; omit the flag")
        elif flag in RENAMED:
            last += RENAMED[flag]  # as in the original it outranks a flag after it
            reading.renamed.append(f"{flag} as {' '.join(RENAMED[flag])}")
        elif flag in LAUNCHER:
            launched[flag] = value if equals else "".join(_take(rest, 1))
        elif flag == "--job-dir":
            reading.arguments += ["--output-dir", value if equals else "".join(_take(rest, 1))]
            reading.renamed.append("--job-dir as --output-dir")
        elif flag in ("--opt", "--model", *FILES) and (equals or rest):
            value = value if equals else rest.pop(0)
            reading.arguments += _named(flag, value, reading)
        else:
            if flag != word.partition("=")[0].replace("_", "-"):
                reading.renamed.append(f"{word.partition('=')[0]} as {flag}")
            reading.arguments.append(flag + equals + value)
    _check_processes(launched, reading)
    reading.arguments += last
    return reading


def _named(flag: str, value: str, reading: Reading) -> list[str]:
    if flag in FILES:
        return [flag, value] if value else []
    ours = MODELS.get(value, value) if flag == "--model" else OPTIMIZERS.get(value.lower(), value.lower())
    if ours != value:
        reading.renamed.append(f"{flag} {value} as {flag} {ours}")
    return [flag, ours]


def _in_full(flag: str, names: set[str]) -> str:
    """Completes an unambiguous prefix of a flag, as argparse does and the original's README relies on."""
    known = names | NO_EFFECT.keys() | NOT_IMPLEMENTED.keys() | RENAMED.keys() | LAUNCHER.keys()
    if flag in known or flag in ("--", "--help"):
        return flag
    found = [name for name in known if name.startswith(flag)]
    return found[0] if len(found) == 1 else flag


def _take(rest: list[str], count: int) -> list[str]:
    """The values behind a flag: `count` of them, or as many as there are for -1."""
    values = []
    while rest and len(values) != count and not rest[0].startswith("--"):
        values.append(rest.pop(0))
    return values


def _among(value: str, values: tuple[str, ...]) -> bool:
    try:
        return any(float(value) == float(allowed) for allowed in values)
    except ValueError:
        return value in values


def _check_processes(launched: dict[str, str], reading: Reading) -> None:
    """run_with_submitit.py starts the processes; here torchrun or srun does."""
    if not launched:
        return
    try:
        nodes, each = (int(launched.get(flag, default)) for flag, default in LAUNCHER.items())
    except ValueError:
        raise UserError(f"{' '.join(' '.join(pair) for pair in launched.items())}: must be numbers") from None
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != nodes * each:
        raise UserError(
            f"--nodes {nodes} --ngpus {each}: this command starts no processes: there is {started} instead of "
            f"{nodes * each}; run it by `torchrun --nnodes {nodes} --nproc-per-node {each} -m fastdeit.train "
            "...`, or by srun (docs/training.md)"
        )
    reading.no_effect += [f"{flag} {value}" for flag, value in launched.items()]


def translate(arguments: list[str], kind: type) -> list[str]:
    """`read` for the settings `kind`, a dataclass of groups; tells the user what it changed."""
    reading = read(arguments, flags(kind))
    for sentence in reading.told():
        tell(sentence)
    return reading.arguments


def flags(kind: type) -> set[str]:
    """The flags of a dataclass of groups, as --batch-size and, for what is on or off, --no-compile."""
    names = set()
    for group in dataclasses.fields(kind):
        if dataclasses.is_dataclass(group.type):
            names |= flags(group.type)
        else:
            name = group.name.replace("_", "-")
            names |= {f"--{name}", f"--no-{name}"} if isinstance(group.default, bool) else {f"--{name}"}
    return names
