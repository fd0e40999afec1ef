"""`lightning run` of one process: recipes, their resumption, signals and refusals; a user's own scripts. It needs no torch."""

import json
import signal

import pytest

from tests.recipes.programs import lightning, only_run, signalled

RECIPE = """
import json
def main(options, run, resume):
    with open(run.path / "calls.jsonl", "a") as file:
        print(json.dumps([options, resume, run.read()["finished"]]), file=file)
    run.finish("teacher")
    if not resume and "--fail" in options:
        raise {error}
"""
WHERE = """
import os
def main(options, run, resume):
    with open(run.path / "seen", "a") as file:
        print(os.getcwd(), file=file)
    if not resume:
        raise KeyError
"""
WAITING = """
import time
def main(options, run, resume):
    (run.path / "phase").write_text("begun")
    print("ready", flush=True)
    time.sleep(30)
"""


def calls(path):
    return [json.loads(line) for line in (path / "calls.jsonl").read_text().splitlines()]


def test_a_recipe_gets_its_options_and_ends_with_its_folder(tmp_path):
    done = lightning(tmp_path, "run", "tiny", "--lr", "3", "--", "--debug", recipe=RECIPE)
    path = only_run(tmp_path, "tiny")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == str(path)
    assert calls(path) == [[["--lr", "3", "--debug"], False, []]]
    assert json.loads((path / "run.json").read_text())["finished"] == ["teacher", "run"]


def test_resume_repeats_the_recorded_options_once(tmp_path):
    failed = lightning(
        tmp_path, "run", "tiny", "--fail", "--runs-dir", "elsewhere", recipe=RECIPE.format(error="KeyError('a defect')")
    )
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    assert "KeyError: 'a defect'" in failed.stderr
    (path,) = (tmp_path / "elsewhere" / "tiny").iterdir()
    extra = lightning(tmp_path, "run", "--resume", path, "--lr", "3", recipe=RECIPE)
    assert (extra.returncode, extra.stderr.count("\n")) == (2, 1)
    assert "recorded options, but got --lr 3 as well; leave them out" in extra.stderr
    other = lightning(tmp_path, "run", "panoramic_depth", "--resume", path, recipe=RECIPE)
    assert other.returncode == 2
    assert "is a run of tiny, not of panoramic_depth" in other.stderr
    resumed = lightning(tmp_path, "run", "tiny", "--resume", path, recipe=RECIPE)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.splitlines()[-1] == str(path)
    again = lightning(tmp_path, "run", "--resume", path, recipe=RECIPE)
    assert again.returncode == 0
    assert "finished; there is nothing to resume" in again.stdout
    assert calls(path) == [[["--fail"], False, []], [["--fail"], True, ["teacher"]]]


def test_resume_looks_relative_paths_up_where_the_run_was_started(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert lightning(first, "run", "tiny", recipe=WHERE).returncode == 1
    path = only_run(first, "tiny")
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / ".last.ckpt.x1y2.part").write_bytes(b"of a killed writer")
    done = lightning(second, "run", "--resume", f"../first/{path.relative_to(first)}", recipe=WHERE)
    assert done.returncode == 0, done.stderr
    assert (path / "seen").read_text() == f"{first}\n{first}\n"
    assert list((path / "checkpoints").iterdir()) == []


def test_resume_says_if_the_place_of_the_start_is_gone(tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    assert lightning(first, "run", "tiny", "--runs-dir", tmp_path / "runs", recipe=WHERE).returncode == 1
    first.rename(tmp_path / "moved")
    done = lightning(tmp_path, "run", "--resume", only_run(tmp_path, "tiny"), recipe=WHERE)
    assert done.returncode == 0
    assert f"the run was started in {first}, which is gone" in done.stderr


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("OSError(28, 'No space left on device', 'weights.ckpt')", "weights.ckpt: No space left on device; free space"),
        ("OSError(30, 'Read-only file system')", "a file of the run: Read-only file system"),
        ("RuntimeError('[enforce fail] . PytorchStreamWriter failed writing file data/0')", "a checkpoint could not be written"),
    ],
)
def test_a_failing_disk_is_one_sentence_and_exit_code_2(tmp_path, error, sentence):
    done = lightning(tmp_path, "run", "tiny", "--fail", recipe=RECIPE.format(error=error))
    assert done.returncode == 2
    assert done.stderr.startswith(f"lightning: {sentence}")
    assert done.stderr.count("\n") == 1
    shown = lightning(tmp_path, "run", "tiny", "--fail", "--debug", recipe=RECIPE.format(error=error))
    assert shown.returncode == 2
    assert "Traceback" in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith(f"lightning: {sentence}")


def test_a_refusal_before_anything_was_written_leaves_no_folder(tmp_path):
    recipe = """
from lightning_plugins._support.errors import InputError
def main(options, run, resume):
    raise InputError('give less')
"""
    done = lightning(tmp_path, "run", "tiny", recipe=recipe)
    assert (done.returncode, done.stderr) == (2, "lightning: give less\n")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_recipe_with_the_line_that_resumes_it(tmp_path, number, code):
    ended = signalled(tmp_path, number, "run", "tiny", recipe=WAITING)
    assert ended[0] == code
    assert ended[2] == f"stopped; to go on: lightning run --resume {only_run(tmp_path, 'tiny')}\n"


def test_lightnings_own_answer_to_ctrl_c_is_understood(tmp_path):
    # A Trainer catches KeyboardInterrupt and leaves with SystemExit(1).
    recipe = WAITING.replace(
        "    time.sleep(30)", "    try:\n        time.sleep(30)\n    except KeyboardInterrupt:\n        raise SystemExit(1)"
    )
    code, _, errors = signalled(tmp_path, signal.SIGINT, "run", "tiny", recipe=recipe)
    assert code == 130
    assert "to go on: lightning run --resume" in errors


SCRIPT = """
import sys, time
print(sys.argv[1:], sys.stdin.read() if "read" in sys.argv else "", flush=True)
if "wait" in sys.argv:
    try:
        print("ready", flush=True)
        time.sleep(30)
    except KeyboardInterrupt:
        sys.exit(9)
sys.exit(7)
"""


def test_a_script_keeps_its_options_output_and_exit_code(tmp_path):
    (tmp_path / "my.py").write_text(SCRIPT)
    done = lightning(tmp_path, "run", "my.py", "--debug", "--resume", "x", "--lr=1")
    assert done.returncode == 7
    assert done.stdout == "['--debug', '--resume', 'x', '--lr=1'] \n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.py"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 9), (signal.SIGTERM, 143)])
def test_a_script_gets_the_signals(tmp_path, number, code):
    (tmp_path / "my.py").write_text(SCRIPT)
    assert signalled(tmp_path, number, "run", "my.py", "wait")[0] == code


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tinny"], "no recipe is called 'tinny', and a file is given with its ending, .yaml, .yml or .py; did you mean tiny?"),
        (["bare"], "no recipe is called 'bare'"),
        (["no.yaml"], "there is no file no.yaml; give the path of an existing .yaml"),
        (["no.py"], "there is no file no.py"),
        (["broken.yaml"], "broken.yaml is no valid YAML: while parsing"),
        (["list.yaml"], "list.yaml holds no mapping"),
        (["binary.yaml"], "binary.yaml cannot be read"),
        (["foreign.yaml"], "foreign.yaml says recipe: tinny, which is no recipe; did you mean tiny?"),
        ([], "lightning run needs a target"),
        (["--nproc", "2", "tiny"], "unknown option --nproc before the target; did you mean --nproc-per-node"),
        (["tiny", "--nproc-per-node", "0"], "argument --nproc-per-node: got 0, must be a number from 1"),
        (["tiny", "--nproc-per-node"], "argument --nproc-per-node: expected one argument"),
        (["tiny", "--nnodes=2:x"], "argument --nnodes: got 2:x, must be a number from 1, or two as MIN:MAX"),
        (["tiny", "--nnodes", "2"], "several machines (--nnodes) need --rdzv-endpoint HOST:PORT and --rdzv-id ID"),
        (["tiny", "--master-port", "abc"], "argument --master-port: got abc, must be a number from 0"),
        (["tiny", "--monitor-interval", "x"], "argument --monitor-interval: got x, must be a number of seconds"),
        (["tiny", "--max_restarts", "-1"], "argument --max-restarts"),
        (["--resume", "nowhere"], "--resume got nowhere, which holds no readable run.json"),
        (["tiny", "--runs-dir", "/dev/null"], "the run folder /dev/null/tiny cannot be written (Not a directory)"),
    ],
)
def test_wrong_words_are_one_sentence(tmp_path, words, sentence):
    (tmp_path / "bare").write_text("import os")
    (tmp_path / "broken.yaml").write_text("model: [1, 2\ntrainer: {")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "foreign.yaml").write_text("recipe: tinny\n")
    done = lightning(tmp_path, "run", *words, recipe="def main(options, run, resume): raise AssertionError")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert sentence in done.stderr


def test_a_copied_yaml_is_run_by_its_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("recipe: tiny\nlr: 3\n")
    done = lightning(tmp_path, "run", "mine.yaml", "--lr", "4", recipe=RECIPE)
    path = only_run(tmp_path, "mine")
    assert done.returncode == 0, done.stderr
    assert calls(path)[0][0] == ["--config", str(tmp_path / "mine.yaml"), "--lr", "4"]
