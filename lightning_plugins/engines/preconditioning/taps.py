"""Taps: what goes into every layer, paired with the gradient of what came out of it.

A forward hook registers a hook on the output *tensor*, whose closure owns the input. So the two always belong together, also when
a module is called several times, when an in-place activation follows it (a module's full backward hook raises there), under both
kinds of activation checkpointing, and when some calls never reach the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.layers import Layer

Sink = Callable[[Layer, Tensor, Tensor], None]


class Taps:
    """Forward hooks on layers, which hand ``(layer, input, gradient of the output)`` to a sink during every backward pass.

    Args:
        layers: layer by tapped module; two modules that share a weight share a layer.
        sink: called from within the backward pass; what is expensive may be queued there and done later.

    Attributes:
        armed: whether forward passes are tapped at all. A plain bool, so that a compiled module recompiles at most once for it.
        receiving: whether backward passes hand anything to the sink.
    """

    def __init__(self, layers: Sequence[tuple[nn.Module, Layer]], sink: Sink) -> None:
        self.armed = True
        self.receiving = True
        self._sink = sink
        compiled = [layer.name for module, layer in layers if getattr(module, "_compiled_call_impl", None) is not None]
        if compiled:
            raise InputError(
                f"{compiled[0]} was compiled before the preconditioner was attached, and compiled code ignores later hooks; "
                "attach first, then call torch.compile"
            )
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(self._hook(layer), with_kwargs=True) for module, layer in layers
        ]

    def _hook(self, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        # A compiler would trace what happens in the backward pass with the values that hold now; so it breaks the graph here, at
        # every layer, but only while the taps are armed.
        register = torch.compiler.disable(self._register)

        def tap(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            if not self.armed or not layer.weight.requires_grad or not output.requires_grad:
                return
            given = inputs[0] if inputs else named["input"]
            register(layer, given.detach(), output)

        return tap

    def _register(self, layer: Layer, given: Tensor, output: Tensor) -> None:
        def receive(gradient: Tensor) -> None:
            if self.receiving:
                # Manual optimization runs backward within autocast: statistics must not become half precision there.
                with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                    self._sink(layer, given, gradient.detach())

        output.register_hook(receive)

    def remove(self) -> None:
        """Leave the modules without a hook of ours."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
