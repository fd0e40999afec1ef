"""Which errors become one sentence, judged on real ones: a device that is always full, torch writing to it."""

import re
from pathlib import Path

import pytest

from lightning_plugins._support.errors import InputError, as_input_error, nearest, one_line
from lightning_plugins._support.optional import EXTRAS, require


def raised(action):
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def write_to_full_device():
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def test_a_full_disk_is_a_sentence():
    assert "No space left on device; free space" in str(as_input_error(raised(write_to_full_device)))


def test_a_full_disk_deep_in_the_chain_is_found():
    def wrapped():
        try:
            write_to_full_device()
        except OSError as error:
            raise RuntimeError("the strategy failed") from error

    def swallowed():
        try:
            wrapped()
        except RuntimeError:
            raise KeyError("cleanup")  # noqa: B904 (a context, not a cause)

    assert "No space left" in str(as_input_error(raised(swallowed)))


def test_torch_writing_to_a_full_disk_is_a_sentence():
    import torch

    error = raised(lambda: torch.save({"x": torch.zeros(100_000)}, "/dev/full"))
    assert isinstance(error, RuntimeError)
    assert "checkpoint could not be written; free space" in str(as_input_error(error))


def test_a_forbidden_place_is_named():
    error = raised(lambda: Path("/dev/full/run.json").write_text(""))
    assert as_input_error(error) is None  # not a directory: that is not the storage's state
    place = as_input_error(PermissionError(13, "Permission denied", "/somewhere/run.json"))
    assert str(place).startswith("/somewhere/run.json: Permission denied; ")
    assert "--runs-dir DIR" in str(place)


@pytest.mark.parametrize(("package", "extra"), [("wandb", "wandb"), ("yaml", "cli"), ("PIL.Image", "report")])
def test_a_missing_package_names_the_extra(monkeypatch, package, extra):
    monkeypatch.setattr("lightning_plugins._support.optional.is_installed", lambda package: False)
    error = raised(lambda: require(package))
    assert isinstance(error, ImportError)
    assert str(as_input_error(error)).endswith(f"pip install -e '.[{extra}]'")


def test_every_package_that_is_required_has_an_extra():
    package = Path(__file__).parents[2] / "lightning_plugins"
    required = [name for file in package.rglob("*.py") for name in re.findall(r'require\("(\w+)', file.read_text())]
    assert "yaml" in required
    assert set(required) <= set(EXTRAS)


def test_refusals_pass_and_defects_do_not():
    refusal = InputError("got 2, valid is 1; give 1")
    chained = RuntimeError("outer")
    chained.__cause__ = refusal
    assert as_input_error(refusal) is refusal
    assert as_input_error(chained) is refusal
    for defect in (ValueError("x"), KeyError("x"), ImportError("x"), FileNotFoundError(2, "no file", "x")):
        assert as_input_error(defect) is None


def test_a_circle_of_causes_ends():
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert as_input_error(one) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [("panoramic_dept", "did you mean panoramic_depth?"), ("zzz", "valid are cp, panoramic_depth")],
)
def test_nearest_names_the_near_or_all(name, expected):
    assert nearest(name, ["panoramic_depth", "cp"]) == expected


def test_one_line():
    assert one_line(" a\n   b\tc ") == "a b c"
