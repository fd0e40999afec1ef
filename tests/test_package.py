"""What an installation from a wheel holds: the package with its data files, and nothing of the repository around it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "lightning_plugins", "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in the wheel of a copy of the repository, built with the setuptools that is installed."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    build = f"import setuptools.build_meta as backend; print(backend.build_wheel({str(built)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = built.glob("lightning_plugins-*.whl")
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_package(wheel):
    package = ROOT / "lightning_plugins"
    files = {f"lightning_plugins/{file.relative_to(package).as_posix()}" for file in package.rglob("*") if file.is_file()}
    assert {name for name in files if "__pycache__" not in name} == {
        name for name in wheel if name.startswith("lightning_plugins/")
    }


@pytest.mark.parametrize(
    "name", ["py.typed", "__init__.pyi", "recipes/panoramic_depth.yaml", "reporting/templates/report.html.j2"]
)
def test_the_wheel_holds_the_files_that_are_no_code(wheel, name):
    assert f"lightning_plugins/{name}" in wheel


def test_the_wheel_holds_nothing_else(wheel):
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"lightning_plugins"}
    assert any(name.endswith("/LICENSE") for name in wheel)
