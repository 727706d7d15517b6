"""Imports point one way, and never in a circle; `kernels` and `pipelines` stand alone.

A package's docstring closes with a line "May import: a, b." (names of siblings inside fastdeit). Every import counts,
those inside functions too.
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The modules of fastdeit/ itself, which have no package to say it in.
MODULES = {
    "errors": "",
    "config": "errors",
    "curriculum": "config, errors",
    "data": "config, curriculum, distributed, errors, kernels, pipelines",
    "batch": "config, data, distributed, recipes",
    "config_check": "config, curriculum, errors, recipes",
    "deit_flags": "errors",
    "demo": "config, recipes, training",
    "settings_file": "errors",
    "cli": "checkpoint, config, config_check, deit_flags, errors, models, recipes, settings_file",
}
COMMANDS = ("api", "train", "evaluate", "predict", "teach", "tune")  # import anything, and only each other import them


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "fastdeit" else ("fastdeit", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_of(path): path for folder in ("fastdeit", "kernels", "pipelines") for path in (ROOT / folder).rglob("*.py")
}


def imports_of(module: str) -> set[str]:
    """The modules of this project that `module` imports, anywhere in its file."""
    path, found = FILES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{name.name}" if f"{base}.{name.name}" in FILES else base for name in node.names}
    return {name for name in found if name in FILES and name != module}


def part_of(module: str, inside: str = "fastdeit") -> str:
    """The sub-package of `inside`, or the module in its folder, that a module belongs to; "" for `inside` itself."""
    return f"{module.removeprefix(inside)}.".split(".")[1]


def packages(inside: str) -> dict[str, Path]:
    return {
        module.rpartition(".")[2]: path
        for module, path in FILES.items()
        if path.name == "__init__.py" and module.rpartition(".")[0] == inside
    }


def allowed(path: Path) -> set[str]:
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    line = re.search(r"May import: ([\w, ]+)\.$", text)
    assert line, f"the docstring of {path} does not close with what the package may import"
    return set() if line[1] == "nothing" else set(line[1].split(", "))


ALONE = ("kernels", "pipelines")
ROOMS = {
    "fastdeit": sorted(packages("fastdeit").keys() - ALONE),
    "fastdeit.pipelines": sorted(packages("fastdeit.pipelines")),
}
LAYERS = {name: set(filter(None, text.split(", "))) for name, text in MODULES.items()} | {name: set() for name in ALONE}


@pytest.mark.parametrize("inside, package", [(inside, room) for inside, rooms in ROOMS.items() for room in rooms])
def test_a_package_imports_what_its_docstring_says(inside, package):
    members = [module for module in FILES if f"{module}.".startswith(f"{inside}.{package}.")]
    used = {part_of(target, inside) for module in members for target in imports_of(module)}
    assert used - {package} <= allowed(packages(inside)[package])


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_what_is_below_it(module):
    assert {part_of(target) for target in imports_of(f"fastdeit.{module}")} - {module} <= LAYERS[module]


def test_what_may_be_imported_forms_no_circle():
    graph = LAYERS | {name: allowed(packages("fastdeit")[name]) for name in ROOMS["fastdeit"]}
    assert not set(COMMANDS) & set().union(*graph.values())
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_circle_of_files():
    TopologicalSorter({module: imports_of(module) for module in FILES}).prepare()


@pytest.mark.parametrize("package", ALONE)
def test_kernels_and_pipelines_stand_alone(package):
    for module in FILES:
        if part_of(module) == package:
            assert all(part_of(target) == package for target in imports_of(module)), module
