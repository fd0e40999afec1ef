"""Each trap, on a fake installation on disk: distributions with metadata, seen by a Python that sees no others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEALTHY = {
    "torch": "2.11.0",
    "torchvision": "0.26.0",
    "numpy": "2.4.6",
    "pytorch-lightning": "2.6.6",
    "lightning": "2.6.6",
    "click": "8.0",
    "opencv-python-headless": "5.0",
    "deepspeed": "0.19.8",
}
REQUIRES = {"torchvision": "Requires-Dist: torch==2.11.0\n"}
MODULES = {"torchvision": "class ops: nms = 1\n", "deepspeed": ""}


class Machine:
    """A folder of fake distributions, and a Python whose ``lightning`` script stands beside it."""

    def __init__(self, root):
        self.root = root
        self.site = root / "site"
        self.bin = root / "bin"
        self.site.mkdir()
        self.bin.mkdir()
        (self.bin / "python").symlink_to(sys.executable)
        self.script("lightning_plugins.cli")

    def install(self, versions, files=(), modules=MODULES):
        for name, version in versions.items():
            folder = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir()
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{REQUIRES.get(name, '')}"
            (folder / "METADATA").write_text(metadata)
            (folder / "RECORD").write_text("".join(f"{file},,\n" for file in files))
            if name in modules:
                (self.site / f"{name}.py").write_text(modules[name])

    def script(self, module):
        (self.bin / "lightning").write_text(f"#!/usr/bin/python\nimport sys\nfrom {module} import main\nsys.exit(main())\n")

    def doctor(self, prelude="", **environ):
        """Return the exit code and the report, by subject."""
        code = f"import sys\n{prelude}\nfrom lightning_plugins.cli import main\nsys.exit(main(['doctor']))"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "LIGHTNING", "NETRC"))}
        path = f"{self.site}{os.pathsep}{ROOT}"
        environ = {**inherited, "PYTHONPATH": path, "HOME": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", **environ}
        command = [str(self.bin / "python"), "-S", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
        assert not done.stderr, done.stderr
        return done.returncode, {line[6:].partition(":")[0]: line for line in done.stdout.splitlines()}


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def the_trap(machine, **environ):
    """Return the only trap that the doctor reports."""
    code, report = machine.doctor(**environ)
    traps = [line for line in report.values() if not line.startswith("ok    ")]
    assert code == 1
    assert len(traps) == 1, traps
    assert traps[0].startswith("trap  ")
    assert "; fix: " in traps[0]
    return traps[0]


def test_a_healthy_machine_has_no_trap(machine):
    machine.install(HEALTHY)
    code, report = machine.doctor()
    assert code == 0, report
    assert len(report) == 11
    assert "both can be imported" in report["import style"]
    assert report["lightning command"].endswith("is ours")


def test_an_empty_machine_has_no_trap(machine):
    (machine.bin / "lightning").unlink()
    code, report = machine.doctor()
    assert code == 0, report


@pytest.mark.parametrize(
    ("changed", "says", "fix"),
    [
        ({"lightning": "2.6.2", "pytorch-lightning": "2.6.2"}, "lightning 2.6.2 is a malicious release", "change every secret"),
        (
            {"pytorch-lightning": "2.5.1"},
            "2.5.1 and lightning 2.6.6 differ",
            "pip install 'pytorch-lightning==2.6.6' 'lightning==2.6.6'",
        ),
        (
            {"torch": "2.10.0+cu128"},
            "built for torch 2.11.0, installed is 2.10.0+cu128",
            "pip install 'torch==2.10.0' torchvision",
        ),
        ({"numpy": "2.0.0", "torch": "2.2.1", "torchvision": None}, "2.0.0 breaks torch 2.2.1", "pip install 'numpy<2'"),
        ({"opencv-python": "4.10"}, "opencv-python and opencv-python-headless both own cv2", "pip uninstall -y opencv-python"),
        ({"deepspeed": "0.15.4"}, "0.15.4 does not work with torch 2.11.0", "pip install 'deepspeed>=0.16'"),
        ({"wandb": "0.31.0"}, "no key is set", "wandb login, or export WANDB_MODE=offline"),
        ({"click": None}, "needs click, which is not installed", "pip install click"),
        ({"apex": "0.9.8.dev0"}, "an unrelated package of that name", "pip uninstall -y apex"),
    ],
)
def test_a_trap_in_the_metadata(machine, changed, says, fix):
    machine.install({name: version for name, version in {**HEALTHY, **changed}.items() if version})
    trap = the_trap(machine)
    assert says in trap
    assert fix in trap.partition("; fix: ")[2]


def test_a_torchvision_of_another_flavour_is_found_by_importing_it_elsewhere(machine):
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    machine.install(HEALTHY, modules={**MODULES, "torchvision": broken})
    trap = the_trap(machine)
    assert "operator torchvision::nms does not exist" in trap
    assert "fix: pip install --force-reinstall --no-deps 'torch==2.11.0' 'torchvision==0.26.0'" in trap


def test_a_crash_on_import_does_not_take_the_doctor_along(machine):
    machine.install(HEALTHY, modules={**MODULES, "torchvision": "import os; os.abort()"})
    assert "exit code -6" in the_trap(machine)


def test_a_deepspeed_without_its_toolkit(machine):
    machine.install(HEALTHY, modules={**MODULES, "deepspeed": "raise RuntimeError('MissingCUDAException')"})
    assert "set CUDA_HOME" in the_trap(machine)


def test_nvidias_apex_is_no_trap(machine):
    machine.install(HEALTHY)
    machine.install({"apex": "0.1"}, files=["apex/__init__.py", "apex/optimizers/__init__.py"])
    code, report = machine.doctor()
    assert code == 0
    assert report["apex"] == "ok    apex: NVIDIA's"


@pytest.mark.parametrize("environ", [{"WANDB_API_KEY": "x"}, {"WANDB_MODE": "offline"}, {"NETRC": "netrc"}])
def test_a_wandb_with_a_key_or_offline_is_no_trap(machine, environ):
    machine.install({**HEALTHY, "wandb": "0.31.0"})
    (machine.root / "netrc").write_text("machine wandb.example login user password x\n")
    environ = {name: str(machine.root / value) if name == "NETRC" else value for name, value in environ.items()}
    assert machine.doctor(**environ)[0] == 0


def test_another_owner_of_the_command_is_named(machine):
    machine.install(HEALTHY)
    machine.script("lightning_sdk.cli.entrypoint")
    trap = the_trap(machine)
    assert "belongs to lightning_sdk" in trap
    assert "use lightning-plugins, the same program" in trap


def test_the_variable_is_named_and_an_old_python_is_a_trap(machine):
    machine.install(HEALTHY)
    _, report = machine.doctor(LIGHTNING_PLUGINS_NAMESPACE="lightning.pytorch")
    assert report["import style"] == "ok    import style: lightning.pytorch, by LIGHTNING_PLUGINS_NAMESPACE"
    trap = the_trap(machine, prelude="import lightning_plugins.cli; sys.version_info = (3, 9, 18)")
    assert "3.9.18 is too old; fix: install Python 3.10 or newer" in trap
