"""`lightning doctor`: the known traps of the installed packages, each with the command that mends it.

Everything is read from package metadata, except what only an import can tell (is this torchvision built for this torch?): that
import happens in a process of its own, which may crash without taking the doctor along.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lightning_plugins._support.namespace import MALICIOUS, VARIABLE, installed_versions

OLDEST_PYTHON = (3, 10)
_PINNED_TORCH = re.compile(r"torch\s*\(?==([\w.]+)")
_PROBE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        subject: what was looked at.
        text: what is so.
        fix: the command that mends it; None if all is well.
    """

    subject: str
    text: str
    fix: str | None = None

    @property
    def is_trap(self) -> bool:
        """Whether there is something to mend."""
        return self.fix is not None

    def __str__(self) -> str:
        return f"trap  {self.subject}: {self.text}; fix: {self.fix}" if self.is_trap else f"ok    {self.subject}: {self.text}"


def examine() -> list[Finding]:
    """Return a finding for every check, in the order of the report."""
    return [check() for check in CHECKS]


def check_python() -> Finding:
    """Python must be as new as the package asks for."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("python", f"{version} is too old", "install Python 3.10 or newer and make the environment with it")
    return Finding("python", version)


def check_malicious_lightning() -> Finding:
    """Lightning 2.6.2 and 2.6.3 stole credentials on import."""
    versions = installed_versions()
    bad = [f"{name} {version}" for name, version in versions.items() if version in MALICIOUS]
    if bad:
        packages = "'pytorch-lightning!=2.6.2,!=2.6.3,<3' 'lightning!=2.6.2,!=2.6.3,<3'"
        fix = f"pip install {packages}, and change every secret that this machine holds"
        return Finding("lightning", f"{', '.join(bad)} is a malicious release that steals credentials when imported", fix)
    return Finding("lightning", ", ".join(f"{name} {version}" for name, version in versions.items()) or "not installed")


def check_namespaces() -> Finding:
    """Both import styles may be installed, but their classes do not fit together."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Finding("import style", f"{chosen}, by {VARIABLE}")
    versions = installed_versions()
    if len(set(versions.values())) > 1:
        newest = max(versions.values(), key=_numbers)
        text = f"pytorch_lightning {versions['pytorch-lightning']} and lightning {versions['lightning']} differ"
        return Finding("import style", text, f"pip install 'pytorch-lightning=={newest}' 'lightning=={newest}'")
    if len(versions) > 1:
        text = f"both can be imported, the one a program imports first is built for; mixing them fails, {VARIABLE} decides"
        return Finding("import style", text)
    return Finding("import style", "one")


def check_torchvision() -> Finding:
    """A torchvision built for another torch, or for another CUDA, breaks `import pytorch_lightning` itself."""
    torch, vision = _version("torch"), _version("torchvision")
    if torch is None or vision is None:
        return Finding("torchvision", "not installed" if torch else "torch is not installed")
    pinned = next((match[1] for text in metadata.requires("torchvision") or () if (match := _PINNED_TORCH.match(text))), None)
    if pinned and _public(torch) != pinned:
        fix = f"pip install 'torch=={_public(torch)}' torchvision"
        return Finding("torchvision", f"{vision} was built for torch {pinned}, installed is {torch}", fix)
    failure = _probe("import torchvision; torchvision.ops.nms")
    if failure:
        text = f"{vision} cannot be loaded with torch {torch} ({failure}): one is built for a GPU, the other is not"
        return Finding(
            "torchvision",
            text,
            f"pip install --force-reinstall --no-deps 'torch=={_public(torch)}' 'torchvision=={_public(vision)}'",
        )
    return Finding("torchvision", f"{vision} with torch {torch}")


def check_apex() -> Finding:
    """The index's ``apex`` is an unrelated package of 2013; NVIDIA's is built from its source."""
    distribution = _distribution("apex")
    if distribution is None:
        return Finding("apex", "not installed")
    names = {str(file) for file in distribution.files or ()}
    if any(name.startswith(("apex/optimizers/", "amp_C")) for name in names):
        return Finding("apex", "NVIDIA's")
    return Finding(
        "apex",
        "an unrelated package of that name is installed",
        "pip uninstall -y apex, and build NVIDIA's from its source if you want it",
    )


def check_opencv() -> Finding:
    """Two distributions that own the same ``cv2`` overwrite each other; removing one breaks both."""
    names = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
    owners = [name for name in names if _version(name)]
    if len(owners) > 1:
        fix = f"pip uninstall -y {' '.join(owners)} && pip install opencv-python-headless"
        return Finding("opencv", f"{' and '.join(owners)} both own cv2", fix)
    return Finding("opencv", owners[0] if owners else "not installed")


def check_deepspeed() -> Finding:
    """deepspeed must fit torch (0.16 or newer from torch 2.6 on), and compiles with a CUDA toolkit at first use."""
    version, torch = _version("deepspeed"), _version("torch")
    if version is None:
        return Finding("deepspeed", "not installed")
    if _numbers(version) < (0, 16):
        return Finding("deepspeed", f"{version} does not work with torch {torch}", "pip install 'deepspeed>=0.16'")
    if torch and "+cpu" not in torch and _probe("import deepspeed"):
        fix = "install the CUDA toolkit of your torch and set CUDA_HOME, or pip uninstall -y deepspeed"
        return Finding("deepspeed", f"{version} cannot be imported, as it does without a CUDA toolkit", fix)
    return Finding("deepspeed", version)


def check_wandb() -> Finding:
    """Without a key, an online run of wandb stops to ask for one, or fails where it cannot ask."""
    if _version("wandb") is None:
        return Finding("wandb", "not installed")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return Finding("wandb", f"WANDB_MODE is {os.environ['WANDB_MODE']}")
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    logged_in = netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="replace")
    if os.environ.get("WANDB_API_KEY") or logged_in:
        return Finding("wandb", "a key is set")
    return Finding(
        "wandb", "no key is set, so a logger of your own stops to ask for one", "wandb login, or export WANDB_MODE=offline"
    )


def check_numpy() -> Finding:
    """numpy 2 came with torch 2.3."""
    numpy, torch = _version("numpy"), _version("torch")
    if numpy and torch and _numbers(numpy) >= (2,) and _numbers(torch) < (2, 3):
        return Finding("numpy", f"{numpy} breaks torch {torch}", "pip install 'numpy<2', or a torch from 2.6 on")
    return Finding("numpy", numpy or "not installed")


def check_fabric() -> Finding:
    """Lightning's ``fabric`` command needs click and does not ask for it."""
    if _version("lightning") and not _version("click"):
        return Finding("fabric command", "it needs click, which is not installed", "pip install click")
    return Finding("fabric command", "click is installed" if _version("click") else "not installed")


def check_command() -> Finding:
    """The word ``lightning`` belongs to whichever of us and lightning-sdk was installed last."""
    script = Path(sys.executable).with_name("lightning")
    if not script.is_file():
        return Finding("lightning command", "none beside this Python; lightning-plugins is the same program")
    owner = re.search(r"^from ([\w.]+) import", script.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    package = owner[1].partition(".")[0] if owner else "an unknown package"
    if package == "lightning_plugins":
        return Finding("lightning command", f"{script} is ours")
    fix = "use lightning-plugins, the same program, or run in the checkout of lightning_plugins: pip install --no-deps -e ."
    return Finding("lightning command", f"{script} belongs to {package}", fix)


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_malicious_lightning,
    check_namespaces,
    check_torchvision,
    check_numpy,
    check_apex,
    check_opencv,
    check_deepspeed,
    check_wandb,
    check_fabric,
    check_command,
)


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _version(name: str) -> str | None:
    distribution = _distribution(name)
    return distribution.version if distribution else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", _public(version)))


def _public(version: str) -> str:
    """Return a version without the local part that names its CPU or CUDA flavour."""
    return version.partition("+")[0]


def _probe(statement: str) -> str | None:
    """Run Python code in a process of its own; return its last error line, or None if it succeeded."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", statement], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {_PROBE_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"
