"""Which Lightning a YAML is run with, decided before any is imported; stand-ins for both, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASK = """
import os, sys
from pathlib import Path
from lightning_plugins.cli import _report
from lightning_plugins.recipes.targets import choose_yaml_namespace
try:
    choose_yaml_namespace(Path("my.yaml").resolve(), sys.argv[1:])
except Exception as error:
    sys.exit(_report(error, False))
print(os.environ.get("LIGHTNING_PLUGINS_NAMESPACE"))
"""


def choose(folder, yaml, *options, namespace=None):
    for package in ("pytorch_lightning", "lightning/pytorch"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("")
    (folder / "lightning" / "__init__.py").write_text("")
    (folder / "new_parts.py").write_text("import lightning.pytorch\n")
    (folder / "old_parts.py").write_text("import pytorch_lightning\n")
    (folder / "photo.py").write_text("raise AssertionError('a value that looks like a path was imported')\n")
    (folder / "my.yaml").write_text(yaml)
    environ = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    if namespace:
        environ["LIGHTNING_PLUGINS_NAMESPACE"] = namespace
    command = [sys.executable, "-c", ASK, *options]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("yaml", "options", "namespace", "chosen"),
    [
        ("trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.Timer}]}", [], None, "lightning.pytorch"),
        ("trainer: {callbacks: pytorch_lightning.callbacks.Timer}", [], None, "pytorch_lightning"),
        ("trainer: {}", ["--trainer.callbacks+=lightning.pytorch.callbacks.Timer"], None, "lightning.pytorch"),
        ("trainer: {}", ["--trainer.callbacks", "lightning.pytorch.callbacks.Timer"], None, "lightning.pytorch"),
        ("model: {class_path: new_parts.Boring}", [], None, "lightning.pytorch"),
        ("model: {class_path: old_parts.Boring}", [], None, "pytorch_lightning"),
        ("model: {class_path: new_parts.Boring}", [], "pytorch_lightning", "pytorch_lightning"),
        ("model: {class_path: lightning_plugins.PanoramicDepth}", [], None, "None"),
        ("model: {class_path: nowhere.Boring}\nimage: photo.jpg", [], None, "None"),
    ],
)
def test_class_paths_decide_then_what_the_users_modules_import(tmp_path, yaml, options, namespace, chosen):
    done = choose(tmp_path, yaml, *options, namespace=namespace)
    assert done.stdout.strip() == chosen, done.stderr


@pytest.mark.parametrize(
    ("yaml", "namespace", "sentence"),
    [
        (
            "a: {class_path: lightning.pytorch.callbacks.Timer}\nb: {class_path: pytorch_lightning.callbacks.Timer}",
            None,
            "names classes of both pytorch_lightning and lightning.pytorch, which do not fit together; keep to one",
        ),
        (
            "a: {class_path: lightning.pytorch.callbacks.Timer}",
            "pytorch_lightning",
            "names classes of lightning.pytorch, but LIGHTNING_PLUGINS_NAMESPACE is pytorch_lightning; unset the variable",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path, yaml, namespace, sentence):
    done = choose(tmp_path, yaml, namespace=namespace)
    assert done.returncode == 2
    assert sentence in done.stderr
