"""The recipe as a user runs it, with processes that are killed for real; what it finds is compared with its raw journals."""

import csv
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.recipes.survive import checks, epochs, kill_rows, last_start, main, origins_s
from lightning_plugins.recipes.survive_journal import Attempt, Journal, Kill, Step, Tail, read_attempts, that_count
from lightning_plugins.recipes.survive_kills import Watch, drawn_delays_s
from lightning_plugins.recipes.survive_learner import Digits
from lightning_plugins.recipes.survive_options import CLI
from tests.recipes.programs import lightning, only_run, signalled

pytestmark = pytest.mark.adapter

STEPS, EPOCH, EVERY = 80, 40, 5
SHORT = ("run", "survive", "--epochs", "2", "--kills", "2", "--capture_every", EVERY, "--wandb", "disabled")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """A folder of its own for the keeper, which is gone with the run."""
    folder = tmp_path_factory.mktemp("runtime")
    folder.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def survived(tmp_path_factory, runtime):
    """A short run with two kills."""
    folder = tmp_path_factory.mktemp("survived")
    done = lightning(folder, *SHORT)
    assert done.returncode == 0, done.stderr
    return folder, only_run(folder, "survive"), done.stdout


def table(run, name):
    with (run / name).open(newline="") as file:
        return list(csv.DictReader(file))


def raw(run, training, process):
    return [json.loads(line) for line in (run / training / "0" / f"process{process}.jsonl").read_text().splitlines()]


def test_two_processes_were_killed_and_the_run_went_on_from_a_capture(survived):
    _, run, said = survived
    kills = table(run, "kills.csv")
    assert len(kills) == len(re.findall("SIGKILL of process", said)) == 2
    assert len(re.findall("went on after step", said)) == 2
    pids = {line["pid"] for process in (0, 1) for line in raw(run, "killed", process) if line["kind"] == "start"}
    assert len(pids) == 2 * 3, "all processes are others after each kill"
    for kill in kills:
        back_to, at = int(kill["went_on_after_step"]), int(kill["after_step"])
        assert back_to % EVERY == 0
        assert at - 2 * EVERY <= back_to <= at + 1, "nothing older than the capture before the last"
        assert 0 < float(kill["seconds_to_next_step"]) < 60
    assert int(kills[-1]["went_on_after_step"]) > 0


def test_bits_and_samples_are_those_of_the_run_that_was_left_alone(survived):
    _, run, said = survived
    assert {row["equal"] for row in table(run, "evaluation.csv")} == {"True"}
    assert "ended with the same bits" in said
    seen = {training: {} for training in ("undisturbed", "killed")}
    for process in (0, 1):
        alone, killed = (raw(run, training, process) for training in ("undisturbed", "killed"))
        assert alone[-1]["kind"] == killed[-1]["kind"] == "end"
        assert alone[-1]["checksums"] == killed[-1]["checksums"]
        facts = [
            {line["step"]: (line["loss"], line["samples"]) for line in of if line["kind"] == "step"} for of in (alone, killed)
        ]
        assert facts[0] == facts[1]
        assert list(facts[0]) == list(range(1, STEPS + 1))
        for step, (_, samples) in facts[1].items():
            seen["killed"].setdefault((step - 1) // EPOCH, []).extend(samples)
    assert [sorted(of) for of in seen["killed"].values()] == [list(range(len(of))) for of in seen["killed"].values()]
    assert raw(run, "killed", 0)[-1]["checksums"] != raw(run, "killed", 1)[-1]["checksums"], "statistics are every process's own"


def test_the_net_has_learnt_and_processes_draw_numbers_of_their_own(survived):
    losses = [float(row["killed_loss"]) for row in table(survived[1], "metrics.csv")]
    assert len(losses) == STEPS
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_pictures_and_report_are_there_and_the_keeper_is_gone(survived, runtime):
    run = survived[1]
    for name in ("loss", "progress"):
        pixels = np.asarray(Image.open(run / f"{name}.png").convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    report = (run / "report.html").read_text()
    assert report.count("data:image/png") == 2
    assert "2 kills, and the run ended with the same bits" in report
    deadline = time.monotonic() + 10
    while (left := list(runtime.glob("*/*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda line: line | {"loss": np.nextafter(line["loss"], 9.0)}, "losses of all steps, also of those done twice"),
        (lambda line: line | {"samples": line["samples"][::-1]}, "samples of all steps"),
        (lambda line: line | {"samples": [0, *line["samples"][1:]]}, "every sample seen once in each epoch"),
    ],
)
def test_a_difference_of_one_bit_or_sample_is_found(survived, tmp_path, change, what):
    shutil.copytree(survived[1], tmp_path / "run")
    path = tmp_path / "run" / "killed" / "0" / "process1.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    number = max(i for i, line in enumerate(lines) if line["kind"] == "step")
    lines[number] = change(lines[number])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone = last_start(read_attempts(tmp_path / "run" / "undisturbed"))
    found = {row["what"]: row["equal"] for row in checks(alone, read_attempts(tmp_path / "run" / "killed"))}
    assert not found[what]
    assert found["weights of process 1 in the end"]
    lines[-1]["checksums"]["weights"] = "0"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {row["what"]: row["equal"] for row in checks(alone, read_attempts(tmp_path / "run" / "killed"))}
    assert not found["weights of process 1 in the end"]


def test_a_resumed_run_trains_nothing_twice_and_reports_again(survived):
    run = survived[1]
    before = {name: (run / name).read_bytes() for name in ("evaluation.csv", "kills.csv", "metrics.csv", "loss.png")}
    for name in (*before, "report.html"):
        (run / name).unlink()
    folder = RunFolder.open(run)
    assert folder.read()["finished"] == ["undisturbed", "killed", "run"]
    main(folder.read()["options"], folder, True)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert (run / "report.html").exists()
    assert [path.name for training in ("undisturbed", "killed") for path in (run / training).iterdir()] == ["0", "0"]


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_from_memory_with_the_kills_that_are_left(tmp_path, runtime):
    code, _, said = signalled(tmp_path, signal.SIGTERM, "run", "survive", "--wandb", "disabled", sign="went on")
    assert code == 143
    assert "to go on: lightning run --resume" in said
    run = only_run(tmp_path, "survive")
    done = lightning(tmp_path, "run", "--resume", run)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (run / "undisturbed").iterdir()] == ["0"]
    assert sorted(path.name for path in (run / "killed").iterdir()) == ["0", "1"]
    assert len(re.findall("SIGKILL", done.stdout)) == 2
    second = [json.loads(line) for line in (run / "killed" / "1" / "process0.jsonl").read_text().splitlines()]
    assert second[0]["step"] > 0, "it began afresh"
    assert {row["equal"] for row in table(run, "evaluation.csv")} == {"True"}


@pytest.mark.slow
def test_three_processes_end_with_the_same_bits_as_well(tmp_path, runtime):
    done = lightning(tmp_path, *SHORT, "--processes", "3")
    assert done.returncode == 0, done.stderr
    rows = table(only_run(tmp_path, "survive"), "evaluation.csv")
    assert len(rows) == 3 + 4 * 3
    assert {row["equal"] for row in rows} == {"True"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--processes", "0"], r"processes must be 1 to 16, got 0"),
        (["--kills", "-1"], r"kills must be 0 to 100, got -1"),
        (["--capture_every", "0"], r"capture_every must be 1 to 10000, got 0"),
        (["--seed_everything", "false"], r"seed_everything must be a number from 0 on"),
        (["--trainer.max_steps", "5"], r"trainer.max_steps cannot act, got 5: the recipe sets it; use --epochs"),
        (["--kils", "2"], r"kils"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(tmp_path, words, sentence):
    with pytest.raises(InputError, match=sentence):
        CLI(RunFolder(tmp_path), words)


def test_it_refuses_to_be_one_of_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as torchrun's agent does
    with pytest.raises(InputError, match=r"given options of the launch .* leave them out and use --processes and --kills"):
        main([], RunFolder(tmp_path), False)
    assert not list(tmp_path.iterdir())


def steps(numbers, loss=1.0, at_s=0.0):
    return [Step(number, loss, [number], at_s + number) for number in numbers]


def test_only_what_the_next_start_begins_after_counts():
    attempts = [
        Attempt(0, 0, 0, {0: steps([1, 2, 3, 4], 1.0), 1: steps([1, 2, 3], 1.0)}),
        Attempt(0, 1, 2, {0: steps([3], 2.0)}),
        Attempt(1, 0, 2, {0: steps([3, 4], 3.0), 1: steps([3, 4], 3.0)}),
    ]
    counting = that_count(attempts)
    assert [(step.number, step.loss) for step in counting[0]] == [(1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0)]
    assert [(step.number, step.loss) for step in counting[1]] == [(1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0)]
    assert that_count([*attempts, Attempt(2, 0, 0, {0: steps([1], 4.0)})]) == {0: steps([1], 4.0), 1: []}
    assert epochs({0: steps([1, EPOCH, EPOCH + 1]), 1: steps([2])}) == [[1, EPOCH, 2], [EPOCH + 1]]


def test_time_between_two_launches_does_not_count():
    attempts = [
        Attempt(0, 0, 0, {0: steps(range(1, 11), at_s=100.0)}),
        Attempt(0, 1, 8, {0: steps(range(9, 12), at_s=105.0)}),
        Attempt(1, 0, 10, {0: steps([11, 12], at_s=3.0)}),
    ]
    assert origins_s(attempts) == {0: 101.0, 1: 14.0 - 15.0}
    (row,) = kill_rows(attempts, [Kill(0, 0, 1, 10, 110.5), Kill(0, 1, 0, 11, 116.0)])
    assert (row["process"], row["went_on_after_step"], row["steps_done_again"]) == (1, 8, 2)
    assert row["seconds_to_next_step"] == pytest.approx(114.0 - 110.5)
    assert row["at_seconds"] == pytest.approx(9.5)


def test_a_line_without_its_end_is_read_when_it_is_whole(tmp_path):
    path = tmp_path / "lines"
    tail, journal = Tail(path), Journal(path, always=1)
    assert [line["a"] for line in (*tail(), {"a": "none yet"})] == ["none yet"]
    journal.write(a=2, seconds=3.0)
    with path.open("ab") as file:
        file.write(b'{"a": ')
        file.flush()
        assert tail() == [{"always": 1, "seconds": 3.0, "a": 2}]
        file.write(b"4}\n")
    assert tail() == [{"a": 4}]
    assert tail() == []
    journal.close()


def test_moments_are_spread_over_the_training():
    counts = Counter()
    for seed in range(400):
        delays_s = drawn_delays_s(3, 10.0, random.Random(seed))
        assert len(delays_s) == 3
        assert min(delays_s) >= 0
        counts.update(int(moment / 3) for moment in np.cumsum(delays_s))
    assert set(counts) == {0, 1, 2}
    assert min(counts.values()) > 300, "of 1200 in three thirds of the first nine seconds"
    assert drawn_delays_s(0, 10.0, random.Random(0)) == []


@pytest.fixture
def victims():
    """Two processes that only wait."""
    started = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    yield started
    for victim in started:
        victim.kill()
        victim.wait()


def test_one_process_is_killed_when_its_time_has_come_and_none_after_that(tmp_path, victims):
    said, delay_s = [], 0.3

    def write(restart, **entry):
        for rank, victim in enumerate(victims):
            journal = Journal(tmp_path / f"process{rank}.jsonl", restart=restart)
            journal.write(kind="start", pid=victim.pid, step=0)
            if entry:
                journal.write(kind="step", loss=1.0, samples=[], **entry)
            journal.close()

    with Watch(tmp_path, 2, 100, [delay_s], lambda step: None, said.append, random.Random(1)):
        write(0)
        time.sleep(2 * delay_s)
        assert [victim.poll() for victim in victims] == [None, None], "nothing has been trained yet"
        began_s = time.monotonic()
        write(0, step=1, seconds=began_s)
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        (kill,) = map(json.loads, (tmp_path / "kills.jsonl").read_text().splitlines())
        assert kill["seconds"] - began_s >= delay_s
        assert victims[kill["process"]].wait(5) == -signal.SIGKILL
        assert said == [f"SIGKILL of process {kill['process']} after step 1 of 100"]
        write(0, step=2)  # by the one that is left, which does not know yet
        victims[kill["process"]] = spared = victims[1 - kill["process"]]
        write(1, step=2, seconds=kill["seconds"] + 0.25)
        time.sleep(3 * delay_s)
        assert spared.poll() is None, "there was one kill to come"
        assert said[1:] == ["went on after step 1, 0.2 s after the kill"]


def test_a_run_near_its_end_is_killed_at_once(tmp_path, victims):
    journal = Journal(tmp_path / "process0.jsonl", restart=0)
    journal.write(kind="start", pid=victims[0].pid, step=0)
    journal.write(kind="step", step=90, loss=1.0, samples=[])
    journal.close()
    with Watch(tmp_path, 1, 100, [1000.0], lambda step: None, lambda said: None, random.Random(1)):
        assert victims[0].wait(5) == -signal.SIGKILL


def test_noise_is_drawn_from_two_generators_and_digits_differ():
    data = Digits(20)

    def seeded(torch_seed, python_seed, index=3):
        torch.manual_seed(torch_seed)
        random.seed(python_seed)
        return data[index]

    first, again = seeded(0, 0), seeded(0, 0)
    assert torch.equal(first[0], again[0])
    assert first[1:] == (3, 3)
    assert not torch.equal(first[0], seeded(1, 0)[0])
    assert not torch.equal(first[0], seeded(0, 1)[0])
    assert data[13][1:] == (3, 13)
    for one, other in pairwise(data.plain):
        assert not torch.equal(one, other)
    assert len({image.numpy().tobytes() for image in data.plain}) == 10
