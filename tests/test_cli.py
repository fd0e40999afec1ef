"""The words of `lightning` that run nothing: their output, their speed, and whose a word is that we do not know."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_plugins._support.methods import METHODS, RECIPES

ROOT = Path(__file__).parents[1]


def lightning(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "lightning_plugins.cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin"},
        check=False,
    )


def test_ls_names_everything_in_half_a_second(tmp_path):
    took_s = []
    for _ in range(3):
        start = time.perf_counter()
        done = lightning(tmp_path, "ls")
        took_s.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert all(name in done.stdout for name in [*METHODS, *RECIPES])
    assert min(took_s) < 0.5


def test_info_cp_and_help(tmp_path):
    assert "any timm model" in lightning(tmp_path, "info", "PanoramicDepth").stdout
    assert "recipe: panoramic_depth" in lightning(tmp_path, "info", "panoramic_depth").stdout
    copied = lightning(tmp_path, "cp", "panoramic_depth", "mine.yaml")
    assert (copied.returncode, copied.stdout) == (0, "mine.yaml\n")
    again = lightning(tmp_path, "cp", "panoramic_depth", "mine.yaml")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "exists already" in again.stderr
    for words in ((), ("--help",)):
        assert "usage: lightning COMMAND" in lightning(tmp_path, *words).stdout
    for word in ("run", "ls", "info", "cp", "validate", "doctor"):
        done = lightning(tmp_path, word, "--help")
        assert done.returncode == 0
        assert f"lightning {word}" in done.stdout
    assert "--max-restarts" in lightning(tmp_path, "run", "--help").stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["info", "PanoramicDept"], "there is no 'PanoramicDept'; did you mean PanoramicDepth"),
        (["info"], "the following arguments are required: NAME; see: lightning info --help"),
        (["ls", "--all"], "unrecognized arguments: --all"),
        (
            ["vaildate", "x"],
            "there is no command 'vaildate' (if it is one of lightning-sdk: pip install lightning-sdk); did you mean validate?",
        ),
        (["validate", "no.yaml"], "there is no file no.yaml"),
    ],
)
def test_wrong_words_are_one_sentence(tmp_path, words, sentence):
    done = lightning(tmp_path, *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert sentence in done.stderr


SDK = """
import sys
class Group:
    commands = {"studio": None, "ls": None}
    def __call__(self, args, prog_name):
        print("sdk", prog_name, args)
        sys.exit(4)
main_cli = Group()
"""


def install_sdk(folder, source):
    (folder / "fake_sdk.py").write_text(source)
    info = folder / "lightning_sdk-2026.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-sdk\nVersion: 2026.1\n")
    (info / "entry_points.txt").write_text(
        "[console_scripts]\nlightning = fake_sdk:main_cli\nlightning-sdk = fake_sdk:main_cli\n"
    )


def test_words_of_the_sdk_are_handed_to_it_and_no_others(tmp_path):
    install_sdk(tmp_path, SDK)
    handed = lightning(tmp_path, "studio", "start", "--name", "x")
    assert (handed.returncode, handed.stdout) == (4, "sdk lightning ['studio', 'start', '--name', 'x']\n")
    ours = lightning(tmp_path, "ls")
    assert "sdk" not in ours.stdout
    unknown = lightning(tmp_path, "studoi")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("lightning: there is no command 'studoi', here or in lightning-sdk; did you mean studio?")


def test_an_sdk_that_cannot_be_loaded_is_said_to_be_so(tmp_path):
    install_sdk(tmp_path, "raise ImportError('no module rich_click')")
    done = lightning(tmp_path, "studio")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "there is no command 'studio', and that of lightning-sdk cannot be loaded (no module rich_click)" in done.stderr


def test_the_version_stands_once():
    from lightning_plugins import __version__

    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == __version__
    assert __version__ not in (ROOT / "setup.py").read_text()
