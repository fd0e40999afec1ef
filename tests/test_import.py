"""Importing the package: quick, without torch, and with the names of the table of methods."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_plugins
from lightning_plugins._support.methods import METHODS

PACKAGE = Path(lightning_plugins.__file__).parent


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_quick_and_loads_neither_torch_nor_lightning():
    code = """
import sys, time
start = time.perf_counter()
import lightning_plugins
took_s = time.perf_counter() - start
print(took_s, sorted({"torch", "pytorch_lightning", "lightning", "numpy", "yaml"} & set(sys.modules)))
"""
    took_s, loaded = min((python(code).split(maxsplit=1) for _ in range(3)), key=lambda words: float(words[0]))
    assert loaded == "[]"
    assert float(took_s) < 0.2


def test_the_command_line_imports_neither_torch_nor_lightning():
    code = (
        "import sys, lightning_plugins.cli; print(sorted({'torch', 'pytorch_lightning', 'lightning', 'rich'} & set(sys.modules)))"
    )
    assert python(code) == "[]"


def test_stubs_name_what_the_table_of_methods_names():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    stubs = {alias.asname: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert stubs == {name: method.module for name, method in METHODS.items()}
    assert lightning_plugins.__all__ == sorted(METHODS)
    assert set(METHODS) <= set(dir(lightning_plugins))


def test_every_method_is_defined_where_the_table_says():
    for name, method in METHODS.items():
        source = PACKAGE.parent / Path(*method.module.split(".")).with_suffix(".py")
        assert name in {node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)}, name
        assert f".{method.room}." in method.module


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no 'Wibble'; it has .*PanoramicDepth"):
        _ = lightning_plugins.Wibble
