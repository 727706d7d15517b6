"""Train, distil, fine-tune and use Data-efficient Image Transformers (DeiT)."""

import difflib
import runpy
import sys

from fastdeit.errors import UserError, run

# Command: (its module, what it is for). `fastdeit NAME` is `python -m MODULE`.
COMMANDS = {
    "train": ("fastdeit.train", "train a student, with or without a teacher; resume a run"),
    "evaluate": ("fastdeit.evaluate", "accuracy and calibration on validation images"),
    "predict": ("fastdeit.predict", "classes of images, and what the model looks at"),
    "teach": ("fastdeit.teach", "fit a teacher; store its logits for training runs"),
    "tune": ("fastdeit.tune", "what a run would measure when it starts, in advance"),
    "export": ("fastdeit.export", "a checkpoint for timm, transformers, ONNX, ..."),
    "report": ("fastdeit.report", "one HTML page about a run"),
    "prepare": ("fastdeit.pipelines.prepare", "a data set in smaller images, which decode faster"),
    "doctor": ("fastdeit.doctor", "what works on this machine, and what to install"),
}


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(help_text())
    elif name == "--version":
        from fastdeit import __version__

        print(f"fastdeit {__version__}")
    else:
        if name not in COMMANDS:
            raise UserError(_unknown(name))
        import fastdeit.cli as cli

        cli.PROGRAM = "fastdeit "
        sys.argv[1:] = arguments
        runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


def help_text() -> str:
    lines = [f"    fastdeit {name:10}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([
        f"usage: fastdeit COMMAND ...\n\n{__doc__}\n", *lines,
        "\nEach has a --help. Several GPUs:\n\n    torchrun --nproc-per-node 8 -m fastdeit.train ...",
    ])  # fmt: skip


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    meant = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
    return f"fastdeit {name}: there is no such command; {meant}"


def script() -> None:
    """The console script."""
    run(main)


if __name__ == "__main__":
    script()
