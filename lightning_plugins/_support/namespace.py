"""The rule that chooses between the two class trees of Lightning, without importing either.

The variable LIGHTNING_PLUGINS_NAMESPACE; else the only one that is loaded; both loaded: the one that stands first in
``sys.modules``, with a warning; none loaded: ``pytorch_lightning``. ``_lightning.py`` acts on it; the command line and `doctor`
need the rule before, or without, the import.
"""

import warnings
from collections.abc import Iterable, Mapping
from importlib import metadata

from lightning_plugins._support.errors import InputError, PackageError

VARIABLE = "LIGHTNING_PLUGINS_NAMESPACE"
NAMESPACES = ("pytorch_lightning", "lightning.pytorch")
DISTRIBUTIONS = ("pytorch-lightning", "lightning")
MALICIOUS = ("2.6.2", "2.6.3")


def choose_namespace(environ: Mapping[str, str], loaded: Iterable[str]) -> str:
    """Return the namespace to build for.

    Args:
        environ: the environment variables.
        loaded: names of the loaded modules, in the order in which they were first imported.

    Raises:
        InputError: if the variable names neither namespace.
    """
    wanted = environ.get(VARIABLE)
    if wanted is not None:
        if wanted not in NAMESPACES:
            raise InputError(f"{VARIABLE} must be {' or '.join(NAMESPACES)}, got {wanted!r}; unset it to let the imports decide")
        return wanted
    present = [name for name in loaded if name in NAMESPACES]
    if len(present) > 1:
        warnings.warn(
            f"both pytorch_lightning and lightning.pytorch are imported; lightning_plugins builds for {present[0]}, "
            f"which came first; import only one, or set {VARIABLE}",
            stacklevel=3,
        )
    return present[0] if present else NAMESPACES[0]


def namespace_of(path: str) -> str | None:
    """Return the namespace that a class path such as ``lightning.pytorch.callbacks.Timer`` belongs to, if to either."""
    for namespace in NAMESPACES:
        if path == namespace or path.startswith(f"{namespace}."):
            return namespace
    return None


def installed_versions() -> dict[str, str]:
    """Return the versions of the installed distributions that hold a Lightning, from their metadata."""
    versions = {}
    for distribution in DISTRIBUTIONS:
        try:
            versions[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return versions


def refuse_malicious(versions: Mapping[str, str]) -> None:
    """Refuse the two releases of Lightning that stole credentials on import (advisory GHSA-w37p-236h-pfx3).

    Raises:
        PackageError: (an ImportError) if one of them is installed; it has not been imported then.
    """
    for distribution, version in versions.items():
        if version in MALICIOUS:
            raise PackageError(
                f"{distribution} {version} is installed, a malicious release that steals credentials when imported; "
                f"run: pip install '{distribution}!=2.6.2,!=2.6.3,<3', and change every secret this machine holds"
            )
