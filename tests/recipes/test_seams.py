"""The canary: each thing that the recipes use of torch and jsonargparse without a promise. A red test names what has changed."""

import logging
import re
from importlib import import_module
from pathlib import Path

import pytest

from lightning_plugins._support.errors import InputError, causes
from lightning_plugins.recipes import _seams
from lightning_plugins.recipes.launch_options import LAUNCH_OPTIONS

pytestmark = pytest.mark.adapter
WHERE = "lightning_plugins/recipes/_seams.py"
GIVEN = {"--nproc-per-node": "2", "--nnodes": "1:3", "--max-restarts": "4", "--node-rank": "0", "--rdzv-endpoint": "localhost:0"}
GIVEN |= {"--rdzv-backend": "c10d", "--rdzv-id": "x", "--rdzv-conf": "timeout=7", "--master-addr": "localhost"}
GIVEN |= {"--master-port": "1", "--local-addr": "localhost", "--monitor-interval": "0.5"}


def test_torchruns_options_still_make_a_configuration():
    assert set(GIVEN) == set(LAUNCH_OPTIONS)
    config = _seams.agent_configuration([f"{flag}={value}" for flag, value in GIVEN.items()])
    made = (
        config.nproc_per_node,
        config.min_nodes,
        config.max_nodes,
        config.max_restarts,
        config.run_id,
        config.monitor_interval,
    )
    assert made == (2, 1, 3, 4, "x", 0.5), f"torch.distributed.run.config_from_args gives other fields: {WHERE}"
    assert hasattr(config, "start_method"), f"LaunchConfig has no start_method: {WHERE}"
    assert hasattr(config, "logs_specs"), f"LaunchConfig has no logs_specs: {WHERE}"


@pytest.mark.parametrize("name", _seams.AGENT_LOGGERS)
def test_the_agents_loggers_have_their_names(name):
    import_module("torch.distributed.launcher.api")
    import_module(name)
    assert name in logging.root.manager.loggerDict, f"torchrun's agent no longer logs as {name}: {WHERE}"


def test_torch_still_reads_and_sets_the_variables():
    agent = Path(import_module("torch.distributed.elastic.agent.server.local_elastic_agent").__file__).read_text()
    assert f'"{_seams.RESTARTS_VARIABLE}"' in agent, f"the agent no longer counts restarts in {_seams.RESTARTS_VARIABLE}: {WHERE}"
    elastic = Path(import_module("torch.distributed.elastic").__file__).parent
    read = any(_seams.SHARED_STORE_VARIABLE in file.read_text() for file in elastic.rglob("*.py"))
    assert read, f"torch no longer reads {_seams.SHARED_STORE_VARIABLE}: {WHERE}"


def test_a_rank_leaves_its_error_where_it_is_looked_for(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

    specs = DefaultLogsSpecs(log_dir=str(tmp_path))
    for attempt in ("0", "1"):
        variables = {rank: {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": attempt} for rank in (0, 1)}
        files = specs.reify(variables).error_files
        for rank in (1, 0):
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", files[rank])
            handler = ErrorHandler()
            handler.initialize()
            try:
                raise InputError(f"rank {rank}, attempt {attempt}")
            except InputError as error:
                handler.record_exception(error)
    errors = list(_seams.rank_errors(tmp_path))
    messages = [message for message, _ in errors]
    assert messages == ["InputError: rank 1, attempt 1", "InputError: rank 0, attempt 1"], (
        f"torch records errors elsewhere: {WHERE}"
    )
    assert all("Traceback" in traceback for _, traceback in errors), f"torch records tracebacks under another key: {WHERE}"
    assert list(_seams.rank_errors(tmp_path / "nothing")) == []


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--rdzv-endpoint=localhost:abc", "port number"),
        ("--rdzv-backend=wibble", "wibble"),
        ("--rdzv-endpoint=nohost.invalid:29500", "nohost.invalid"),
    ],
)
def test_processes_that_cannot_meet_are_one_sentence(option, words, monkeypatch):
    from lightning_plugins.recipes.launching import _run_agent

    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM")  # the agent sets it: put back afterwards
    static = ["--nproc-per-node=1", "--rdzv-conf=timeout=1,join_timeout=1,read_timeout=1", option]
    with pytest.raises(InputError, match=r"the processes cannot meet at .+; give --rdzv-endpoint HOST:PORT") as raised:
        _run_agent(static, False, print, ())
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


class Thing:
    def __init__(self, size: int = 3):
        self.size = size


@pytest.fixture
def parser():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Thing, "thing")
    parser.add_subclass_arguments(Thing, "other", required=False)
    parser.add_argument("--number", type=int, required=False)
    return parser


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--wibble=3"], "UNRECOGNIZED"),
        (["--thing={wibble: 3}"], "UNKNOWN"),
        (["--number=x"], "EXPECTED"),
        (["--number=x"], "KEY"),
        (["--other=collections.Counter"], "NO_SUBCLASS"),
        ([f"--other={{class_path: {__name__}.Nothing}}"], "WRAPPERS"),
        ([f"--other={{class_path: {Thing.__module__}.Thing, init_args: {{size: x}}}}"], "CLASS_PATH"),
        (["--required"], "REQUIRED"),
    ],
)
def test_jsonargparse_still_says_it_so(parser, arguments, pattern, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, Thing.__module__, sys.modules[__name__])
    if arguments == ["--required"]:
        parser.add_argument("--needed", type=int, required=True)
        arguments = []
    with pytest.raises(Exception) as raised:  # noqa: PT011 (which class it is, is no part of the seam)
        parser.parse_args(arguments)
    texts = [str(cause).strip() for cause in causes(raised.value)]
    wanted = getattr(_seams, pattern)
    found = any(wanted.search(text) if isinstance(wanted, re.Pattern) else text.startswith(wanted) for text in texts)
    assert found, f"jsonargparse says it in other words, {pattern} in {WHERE} must follow: {texts}"


def test_a_parser_still_lists_its_options(parser):
    assert {"number", "thing.size"} <= set(_seams.option_names(parser)), f"jsonargparse keeps its options elsewhere: {WHERE}"


def test_one_key_is_instantiated_alone(parser, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, Thing.__module__, sys.modules[__name__])
    config = parser.parse_args([f"--other={Thing.__module__}.Thing", "--other.size=5"])
    one, two = (_seams.instantiate_key(parser, config, "other") for _ in range(2))
    assert type(one).__name__ == "Thing", f"jsonargparse instantiates differently: {WHERE}"
    assert one.size == two.size == 5
    assert one is not two
