"""Where the recipes lean on what torch and jsonargparse do not promise; ``test_seams.py`` names what an upgrade changed.

- torchrun's agent: how its options become a configuration, where its ranks leave their errors, what its loggers and variables
  are called, which errors mean that the machines do not meet.
- jsonargparse: the texts of its errors (it has no other report), the list of a parser's options, instantiating one key alone.

One seam lies elsewhere: ``_support/errors.py`` knows torch's words for a failed write, since the cellar cannot look up here.
Nothing is imported before it is needed: the launcher starts its ranks' server before torch.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The loggers in which torchrun's agent repeats, at length, what the ranks have said themselves.
AGENT_LOGGERS = (
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.agent.server.api",
    "torch.multiprocessing.spawn",
)
# Ranks that are started again would find the dead ones' addresses in a store shared with the agent (pytorch issue 135712).
SHARED_STORE_VARIABLE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# How often the agent has started the ranks anew.
RESTARTS_VARIABLE = "TORCHELASTIC_RESTART_COUNT"


def agent_configuration(launch: list[str]) -> Any:
    """Return the agent's configuration for torchrun's own options.

    Raises:
        ValueError: if one of them is wrong.
    """
    from torch.distributed.run import config_from_args, get_args_parser

    settings = get_args_parser().parse_args([*launch, "the target is given elsewhere"])
    try:
        return config_from_args(settings)[0]
    except AssertionError as error:
        raise ValueError(str(error)) from error


def meeting_errors() -> tuple[type[Exception], ...]:
    """Return what the agent raises, in the launcher, when the machines cannot meet; a rank's own errors come as other classes."""
    from torch.distributed import DistError
    from torch.distributed.elastic.rendezvous import RendezvousError

    return (ValueError, DistError, RendezvousError)


def rank_errors(logs: Path) -> Iterator[tuple[str, str]]:
    """Yield message and traceback of each rank that raised in the last attempt, the first one first.

    Args:
        logs: the folder that the agent was given for its logs.
    """
    attempts = sorted(logs.glob("*/attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    for file in sorted(attempts[-1].rglob("error.json") if attempts else (), key=lambda path: path.stat().st_mtime_ns):
        message = json.loads(file.read_text(encoding="utf-8"))["message"]
        if isinstance(message, dict):
            yield message["message"], message["extraInfo"]["py_callstack"]
        else:
            yield message, message


# What jsonargparse says. WRAPPERS begin the errors that only say where in the YAML the cause stands.
WRAPPERS = ("Does not validate against", "Parser key ", "Problem with given class_path", "- Expected a path but")
KEY = re.compile(r'^Parser key "([^"]+)"')
CLASS_PATH = re.compile(r"^Problem with given class_path '([^']+)'")
UNKNOWN = re.compile(r"^(?:Group '(?P<group>[^']+)' does not accept o|O)ption '(?P<name>[^']+)'(?: is not accepted)?")
UNRECOGNIZED = re.compile(r"^unrecognized arguments: (?P<token>\S+)", re.IGNORECASE)
EXPECTED = re.compile(r"Expected an? (?P<type>.+?)(?:\. Got value: (?P<value>.*))?$", re.MULTILINE)
REQUIRED = re.compile(r"the following arguments are required: (?P<keys>.+)|Key \"(?P<key>[^\"]+)\" is required")
NO_SUBCLASS = re.compile(r"Import path (?P<path>\S+) does not correspond to a subclass of (?P<base>\S+)")


def option_names(parser: Any) -> list[str]:
    """Return the dotted names of a parser's options."""
    return [
        action.dest for action in parser._actions if not action.dest.endswith("help") and not action.dest.startswith("print_")
    ]


def instantiate_key(parser: Any, config: Any, key: str) -> Any:
    """Return what stands under one key of a parsed configuration with new instances in it, and instantiate nothing else."""
    alone = type(config)({key: config[key].clone()})
    return parser.instantiate(alone, instantiate_groups=False)[key]
