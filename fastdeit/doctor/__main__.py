"""One page about this machine: what is installed, which kernels, decoders and libraries work here, what to install.

    python -m fastdeit.doctor           under 20 seconds on a CPU
    python -m fastdeit.doctor --slow    also what compiles for minutes on a CPU
    python -m fastdeit.doctor --json    the same for programs

Everything is tried with a small call and compared with plain PyTorch or Pillow, in a process of its own and with a time
limit. Put the page into a report of a bug. The exit code is 0 unless something is broken that training needs.
"""

import argparse
import json

from fastdeit.errors import run


def main() -> int:
    from fastdeit.cli import FoldedHelp, program

    prog = program("python -m fastdeit.doctor")
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=FoldedHelp)
    parser.add_argument("--json", action="store_true", help="print JSON in place of a page")
    parser.add_argument("--slow", action="store_true", help="try what takes long, too")
    parser.add_argument("--seconds", type=float, default=120.0, help="limit of each try (default: 120)")
    arguments = parser.parse_args()

    from . import checks, machine, page

    facts = machine.facts()
    if not arguments.json:
        print(page.of_machine(facts), flush=True)
    found = checks.results(slow=arguments.slow, on_gpu=bool(facts["GPU"]), seconds=arguments.seconds)
    if arguments.json:
        listed = {"checks": [vars(one) for one in found], "install": checks.to_install(found)}
        print(json.dumps(facts | listed, indent=2))
    else:
        print(page.of_checks(found))
    return int(any(one.breaks_training for one in found))


if __name__ == "__main__":
    run(main)
