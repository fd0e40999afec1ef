"""The job's secret: sources, refusals by name, keys against the vectors of RFC 5869, and that it shows nowhere."""

import copy
import os
import pickle
import stat
import subprocess
import sys
import traceback

import pytest

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.secret import FILE_VARIABLE, VARIABLE, Secret, job_secret, new_secret_file

TEXT = "a secret of the tests, 0123456789"

# RFC 5869, appendix A, SHA-256: input key, salt, info, first 32 bytes of the output.
VECTORS = [
    (
        b"\x0b" * 22,
        bytes(range(13)),
        bytes(range(0xF0, 0xFA)),
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf",
    ),
    (
        bytes(range(0x50)),
        bytes(range(0x60, 0xB0)),
        bytes(range(0xB0, 0x100)),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c",
    ),
    (b"\x0b" * 22, b"", b"", "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"),
]


def same(one, other):
    return one.key(b"p", b"c") == other.key(b"p", b"c")


def refusal(environ):
    with pytest.raises(InputError) as caught:
        job_secret(environ)
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert TEXT[:8] not in told
    return str(caught.value)


@pytest.fixture
def secret_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text(TEXT + "\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(("secret", "salt", "info", "key"), VECTORS)
def test_keys_are_those_of_rfc_5869(secret, salt, info, key):
    assert Secret(secret).key(info, salt).hex() == key


def test_none_without_a_variable():
    assert job_secret({}) is None


def test_a_file_and_the_variable_give_the_same(secret_file):
    of_file, of_variable = job_secret({FILE_VARIABLE: str(secret_file)}), job_secret({VARIABLE: f" {TEXT}"})
    assert same(of_file, of_variable)
    assert same(of_file, Secret(TEXT.encode()))
    assert not same(of_file, Secret(TEXT.encode() + b"\n"))


def test_it_is_read_from_this_process(monkeypatch):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.setenv(VARIABLE, TEXT)
    assert same(job_secret(), Secret(TEXT.encode()))


def test_both_variables_are_refused(secret_file):
    assert "unset one" in refusal({FILE_VARIABLE: str(secret_file), VARIABLE: TEXT})


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602, 0o601, 0o700, 0o4600])
def test_a_file_that_others_may_use_is_refused(secret_file, mode):
    secret_file.chmod(mode)
    said = refusal({FILE_VARIABLE: str(secret_file)})
    assert str(secret_file) in said
    assert f"{mode:04o}" in said
    assert "chmod 600" in said


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_private_file_is_taken(secret_file, mode):
    secret_file.chmod(mode)
    assert same(job_secret({FILE_VARIABLE: str(secret_file)}), Secret(TEXT.encode()))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_owner_is_refused(secret_file):
    os.chown(secret_file, 12345, -1)
    said = refusal({FILE_VARIABLE: str(secret_file)})
    assert "belongs to user 12345" in said
    assert str(secret_file) in said


def test_what_is_no_file_is_refused(tmp_path):
    assert "cannot be opened" in refusal({FILE_VARIABLE: str(tmp_path / "missing")})
    assert "not a regular file" in refusal({FILE_VARIABLE: str(tmp_path)})
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "not a regular file" in refusal({FILE_VARIABLE: str(tmp_path / "pipe")})


@pytest.mark.parametrize("content", [b"", b"fifteen bytes..", b"fifteen bytes..\n\n\n"])
def test_too_short_is_refused(secret_file, content):
    secret_file.write_bytes(content)
    for said in [refusal({FILE_VARIABLE: str(secret_file)}), refusal({VARIABLE: content.decode()})]:
        assert f"has {len(content.strip())} bytes, at least 16" in said
        assert "fifteen bytes.." not in said
    with pytest.raises(InputError, match="at least 16"):
        Secret(content.strip())


def test_another_large_file_is_refused(secret_file):
    secret_file.write_bytes(b"x" * 4097)
    assert "4097" in refusal({FILE_VARIABLE: str(secret_file)})


def test_a_new_file_is_private_whatever_the_umask(tmp_path):
    made = []
    for number, umask in enumerate([0o000, 0o022, 0o777]):
        path = tmp_path / f"new{number}"
        before = os.umask(umask)
        try:
            secret = new_secret_file(path)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert same(job_secret({FILE_VARIABLE: str(path)}), secret)
        assert same(job_secret({VARIABLE: path.read_text()}), secret)
        made.append(bytes.fromhex(path.read_text()))
    assert len(set(made)) == 3
    assert {len(each) for each in made} == {32}
    assert len(list(tmp_path.iterdir())) == 3  # nothing unfinished


def test_a_new_file_replaces_none(secret_file):
    with pytest.raises(InputError, match="exists"):
        new_secret_file(secret_file)
    assert secret_file.read_text() == TEXT + "\n"
    assert list(secret_file.parent.iterdir()) == [secret_file]


def test_it_never_shows():
    secret = Secret(TEXT.encode())
    assert TEXT not in f"{secret} {secret!r} {[secret]} {vars(type(secret))}"
    assert not hasattr(secret, "__dict__")
    for leak in [pickle.dumps, copy.copy, copy.deepcopy]:
        with pytest.raises(TypeError, match="not copied or pickled") as caught:
            leak(secret)
        assert TEXT not in str(caught.value)


@pytest.mark.parametrize("module", ["secret", "peer_wire"])
def test_it_starts_without_torch(module):
    # The package of the engine itself may say more to import; what these two name is what counts here.
    program = f"import sys, lightning_plugins.engines.resilience.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
