"""The check of the number of processes: absent unless several were launched, and for either Lightning."""

import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest

from lightning_plugins.recipes import world_size


class Base:
    """Stands in for a namespace's Callback."""


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_each_namespace_has_its_factory_and_gets_its_own_callback(monkeypatch, namespace):
    (entry,) = metadata.entry_points(group=f"{namespace}.callbacks_factory", name="lightning_plugins")
    factory = entry.load()
    monkeypatch.delenv(world_size.LAUNCHED, raising=False)
    assert factory() == []
    stand_in = ModuleType(namespace)
    stand_in.Callback = Base
    monkeypatch.setitem(sys.modules, namespace, stand_in)
    monkeypatch.setenv(world_size.LAUNCHED, "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    (callback,) = factory()
    assert isinstance(callback, Base)
    callback.setup(SimpleNamespace(world_size=4), None, "fit")
    with pytest.raises(ValueError, match="4 processes were launched, but the Trainer expects 3"):
        callback.setup(SimpleNamespace(world_size=3), None, "fit")
