"""The choice between the two Lightnings, in processes of their own with stand-ins for both, and once with the real ones."""

import os
import subprocess
import sys

import pytest

# Modules in which every public name is a class.
STAND_IN = """
def __getattr__(name):
    if name.startswith("_"):
        raise AttributeError(name)
    return type(name, (), {"__module__": __name__})
"""
ROOT = f"""{STAND_IN}
__version__ = "2.6.6"
print("imported", __name__)
"""
ASK = "from lightning_plugins._lightning import Callback, NAMESPACE; print(NAMESPACE, Callback.__module__)"


@pytest.fixture
def site(tmp_path):
    for package in ("pytorch_lightning", "lightning/pytorch"):
        folder = tmp_path / package
        (folder / "plugins").mkdir(parents=True)
        (folder / "__init__.py").write_text(ROOT)
        for module in ("callbacks", "loggers", "plugins/io", "strategies"):
            (folder / f"{module}.py").write_text(STAND_IN)
    (tmp_path / "lightning" / "__init__.py").write_text("")
    return tmp_path


def install(site, distribution, version):
    folder = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


def python(site, code, namespace=None):
    environ = {name: value for name, value in os.environ.items() if name != "LIGHTNING_PLUGINS_NAMESPACE"}
    if namespace:
        environ["LIGHTNING_PLUGINS_NAMESPACE"] = namespace
    environ["PYTHONPATH"] = str(site) if site else ""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False)


@pytest.mark.parametrize(
    ("before", "variable", "chosen"),
    [
        ("", None, "pytorch_lightning"),
        ("import pytorch_lightning", None, "pytorch_lightning"),
        ("import lightning.pytorch", None, "lightning.pytorch"),
        ("import lightning", None, "pytorch_lightning"),
        ("import pytorch_lightning, lightning.pytorch", "lightning.pytorch", "lightning.pytorch"),
        ("import lightning.pytorch", "pytorch_lightning", "pytorch_lightning"),
    ],
)
def test_the_variable_then_what_is_loaded_then_pytorch_lightning(site, before, variable, chosen):
    done = python(site, f"{before}\n{ASK}", variable)
    assert done.stdout.splitlines()[-1] == f"{chosen} {chosen}"
    assert "both" not in done.stderr


@pytest.mark.parametrize("order", ["pytorch_lightning, lightning.pytorch", "lightning.pytorch, pytorch_lightning"])
def test_both_loaded_takes_the_first_with_one_warning(site, order):
    done = python(site, f"import {order}\n{ASK}\nimport lightning_plugins._lightning")
    first = order.split(",")[0]
    assert done.stdout.splitlines()[-1] == f"{first} {first}"
    assert done.stderr.count(f"builds for {first}, which came first") == 1


def test_a_wrong_variable_is_refused_with_the_valid_ones(site):
    done = python(site, ASK, "lightning")
    assert "must be pytorch_lightning or lightning.pytorch, got 'lightning'; unset it" in done.stderr


@pytest.mark.parametrize(("distribution", "version"), [("pytorch-lightning", "2.6.3"), ("lightning", "2.6.2")])
def test_a_malicious_release_is_refused_before_it_is_imported(site, distribution, version):
    install(site, distribution, version)
    done = python(site, ASK)
    assert "imported" not in done.stdout
    assert f"{distribution} {version} is installed, a malicious release" in done.stderr
    assert "change every secret" in done.stderr


def test_the_real_ones_do_not_load_each_other():
    code = f"import lightning.pytorch, sys\n{ASK}\nprint('pytorch_lightning' in sys.modules)"
    assert python(None, code).stdout.splitlines()[-2:] == ["lightning.pytorch lightning.pytorch.callbacks.callback", "False"]
