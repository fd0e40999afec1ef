"""One sentence out of jsonargparse's nested reports.

jsonargparse wraps each error once for every level of the YAML (class path, union of types, parser key). The sentence wants three
things of it: the dotted key, gathered from the wrappers; the innermost cause, the first exception that is no wrapper; and what
would have been valid. Its texts, which are in ``_seams.py``, are not an interface: an unknown one is passed on in one line.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from lightning_plugins._lightning import NAMESPACE
from lightning_plugins._support.errors import causes, nearest, one_line
from lightning_plugins._support.namespace import VARIABLE
from lightning_plugins.recipes._seams import (
    CLASS_PATH,
    EXPECTED,
    KEY,
    NO_SUBCLASS,
    REQUIRED,
    UNKNOWN,
    UNRECOGNIZED,
    WRAPPERS,
    option_names,
)


def innermost(error: BaseException) -> BaseException:
    """Return the first exception in the chain of causes that is not one of jsonargparse's wrappers."""
    chain = list(causes(error))
    return next((cause for cause in chain if not _is_wrapper(cause)), chain[-1])


def parsing_sentence(error: BaseException, parser: Any, options: Iterable[str]) -> str:
    """Return the sentence for an error that ``parser`` raised over ``options``.

    Args:
        error: what the parser raised, with its causes.
        parser: the parser, for the keys that would have been valid.
        options: the command line, to tell an option from a key of the YAML.
    """
    wrappers = [str(cause).strip() for cause in causes(error) if _is_wrapper(cause)]
    text = str(innermost(error)).strip()
    key = ".".join(dict.fromkeys(match[1] for wrapper in wrappers if (match := KEY.match(wrapper))))
    class_path = next((match[1] for wrapper in reversed(wrappers) if (match := CLASS_PATH.match(wrapper))), None)
    if match := UNRECOGNIZED.match(text):
        return _unrecognized(match["token"], parser)
    if match := UNKNOWN.match(text):
        prefix = match["group"] or key
        valid = _parameters(class_path) if class_path else _keys(parser, prefix)
        return _unknown(f"{prefix}.{match['name']}" if prefix else match["name"], prefix, valid, options)
    if match := EXPECTED.match(text):
        return _wrong_type(key, match["value"], text, wrappers)
    if match := REQUIRED.match(text):
        missing = match["keys"] or match["key"]
        return f"{missing} is missing; give it in the YAML or as --{missing.split(',')[0]}"
    if match := NO_SUBCLASS.match(text):
        other = f"if it is of the other Lightning, set {VARIABLE}"
        return f"{key} names {match['path']}, which is no {match['base']} of {NAMESPACE}; give one that is, or {other}"
    if class_path:
        return f"{key} names {class_path}: {one_line(text)}; give the full path of an importable class"
    return f"{key}: {one_line(text)}" if key else one_line(text)


def _is_wrapper(error: BaseException) -> bool:
    return str(error).lstrip().startswith(WRAPPERS)


def _unrecognized(token: str, parser: Any) -> str:
    name = token.lstrip("-").partition("=")[0]
    if not token.startswith("-"):
        return f"unexpected word {token!r}; options start with --, and a value follows its option"
    return f"unknown option --{name}; {_nearest_key(f'--{name}', [f'--{key}' for key in _keys(parser, '')])}"


def _unknown(key: str, prefix: str, valid: Iterable[str], options: Iterable[str]) -> str:
    name = key.rpartition(".")[2]
    spellings = (f"--{key}", f"--{prefix}.init_args.{name}")
    dashes = "--" if any(option.partition("=")[0] in spellings for option in options) else ""
    valid = valid if dashes else [word for word in valid if word != "config"]
    dotted = [f"{dashes}{prefix}.{word}" if prefix else f"{dashes}{word}" for word in valid]
    return f"unknown {'option' if dashes else 'key'} {dashes}{key}; {_nearest_key(f'{dashes}{key}', dotted)}"


def _nearest_key(key: str, valid: list[str]) -> str:
    """Name the nearest keys; if none is near, those of the outermost level that has any, rather than a hundred."""
    if get_close_matches(key, valid, cutoff=0.5):
        return nearest(key, valid)
    depth = min((name.count(".") for name in valid), default=0)
    return nearest(key, [name for name in valid if name.count(".") == depth])


def _wrong_type(key: str, value: str | None, text: str, wrappers: list[str]) -> str:
    # The wrapper nearest to the cause lists every type of a union; one more level out it lists other keys' types.
    union = wrappers[-1] if wrappers and wrappers[-1].startswith("Does not validate") else text
    types = dict.fromkeys(match["type"] for match in EXPECTED.finditer(union))
    return f"{key} must be {' or '.join(_type_word(name) for name in types)}, got {value}"


def _type_word(name: str) -> str:
    name = re.sub(r"<class '([^']+)'>", r"\1", name)
    return "null" if name == "NoneType" else re.sub(r"typing\.Literal\[(.+)\]", r"one of \1", name)


def _keys(parser: Any, prefix: str) -> list[str]:
    """Return the keys of a parser below ``prefix``, without it; all of them for an empty prefix."""
    names = option_names(parser)
    if prefix:
        return [name[len(prefix) + 1 :] for name in names if name.startswith(f"{prefix}.")]
    return names


def _parameters(class_path: str) -> list[str]:
    """Return the names of the options of a class, those it hands to its bases included."""
    from jsonargparse import ArgumentParser

    module, _, name = class_path.rpartition(".")
    parser = ArgumentParser()
    parser.add_class_arguments(getattr(import_module(module), name))
    return _keys(parser, "")
