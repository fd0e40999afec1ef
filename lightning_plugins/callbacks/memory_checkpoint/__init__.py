"""TRANSOM's checkpoint engine as a callback."""

from lightning_plugins.callbacks.memory_checkpoint.callback import MemoryCheckpoint as MemoryCheckpoint
