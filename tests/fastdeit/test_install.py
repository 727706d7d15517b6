"""An editable install of a clone named fastdeit, used from the folder that holds the clone: there a folder `fastdeit`
that is no package stands in the way."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parent(tmp_path_factory):
    """A folder with the clone `fastdeit`, and `site` with what pip would put into site-packages."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("pyproject.toml needs setuptools 77")
    parent = tmp_path_factory.mktemp("parent")
    (clone := parent / "fastdeit").mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "fastdeit", "kernels", "pipelines"):
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    code = f"import setuptools.build_meta as backend; backend.build_editable({str(parent)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True, capture_output=True)
    (wheel,) = parent.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(parent / "site")
    return parent


def run(parent, code):
    """In a Python that knows nothing of the install these tests run on, but of its packages."""
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    start = f"import site, sys; sys.path.insert(0, ''); site.addsitedir('site'); sys.path += {sorted(paths)}\n"
    done = subprocess.run([sys.executable, "-S", "-c", start + code], cwd=parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_the_folder_that_holds_the_clone(parent):
    pytest.importorskip("tyro")
    code = (
        "import fastdeit, fastdeit.pipelines, importlib.util, runpy\n"
        "from fastdeit.kernels import attention\n"
        "print(fastdeit.__file__, attention.__module__, importlib.util.find_spec('kernels'), flush=True)\n"
        "sys.argv = ['train', '--help']; runpy.run_module('fastdeit.train', None, '__main__')"
    )
    first, *rest = run(parent, code).splitlines()
    package = parent / "fastdeit" / "src" / "fastdeit" / "__init__.py"
    assert first == f"{package} fastdeit.kernels.attention.api None"
    assert any("--data-path" in line for line in rest)


def test_the_console_script(parent):
    pytest.importorskip("tyro")
    code = (
        "from importlib.metadata import distributions\n"
        "found, = [one for part in distributions(path=['site']) for one in part.entry_points]\n"
        "sys.argv = ['fastdeit', 'train', '--help']; print(found.group, found.name); found.load()()"
    )
    first, *rest = run(parent, code).splitlines()
    assert first == "console_scripts fastdeit" and rest[0].startswith("usage: fastdeit train ")
