"""A module as a function of its trainable parameters, which form one flat vector; nothing of the module changes.

Buffers are copied for each call, so that running statistics stay as they were. Fused attention has no derivative of a derivative,
so attention is computed step by step meanwhile.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_plugins._support.errors import InputError

Parameters = dict[str, Tensor]


class FlatModule:
    """A module and the order of its trainable parameters in a vector: that of ``named_parameters``, tied ones once.

    Args:
        module: in the mode (training or evaluation) in which it is to be looked at.

    Attributes:
        size: trainable scalars.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        InputError: if nothing is trainable, parameters differ in dtype or device, or are of half precision.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if not trainable:
            raise InputError(f"{type(module).__name__} has no trainable parameter; set requires_grad of those to look at")
        kinds = {(parameter.dtype, parameter.device) for parameter in trainable.values()}
        if len(kinds) > 1:
            said = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise InputError(f"the trainable parameters must share one dtype and device, got {said}; call module.to(...) first")
        ((self.dtype, self.device),) = kinds
        if self.dtype not in (torch.float32, torch.float64):
            raise InputError(f"parameters must be float32 or float64, got {self.dtype}; call module.float() first")
        self.shapes = {name: parameter.shape for name, parameter in trainable.items()}
        self.size = sum(math.prod(shape) for shape in self.shapes.values())

    def parameters(self) -> Parameters:
        """Return the trainable parameters as they are now, without their graph."""
        named = dict(self.module.named_parameters())
        return {name: named[name].detach() for name in self.shapes}

    def split(self, vector: Tensor) -> Parameters:
        """Return a vector ``(size,)`` as tensors of the parameters' shapes."""
        parts = vector.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def join(self, parts: Parameters) -> Tensor:
        """Return tensors of the parameters' shapes as a vector ``(size,)``."""
        return torch.cat([parts[name].flatten() for name in self.shapes])

    def __call__(self, parameters: Parameters, inputs: Tensor) -> Tensor:
        """Return the module's output for other parameters.

        Raises:
            InputError: if the output is no tensor.
        """
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        with _differentiable_attention():
            outputs = functional_call(self.module, {**parameters, **buffers}, (inputs,))
        if not isinstance(outputs, Tensor) or outputs.ndim == 0:
            raise InputError(
                f"the module must return one tensor with the examples on its first axis, got {type(outputs).__name__}; wrap it "
                "in a module that picks the tensor"
            )
        return outputs

    def check_deterministic(self, inputs: Tensor) -> None:
        """Refuse a module that draws random numbers, which would be another function in each product.

        Raises:
            InputError: if it does; the states of the generators are put back.
        """
        cpu = torch.get_rng_state()
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        with torch.no_grad():
            self(self.parameters(), inputs)
        drew = not torch.equal(cpu, torch.get_rng_state())
        torch.set_rng_state(cpu)
        if cuda is not None:
            drew = drew or not torch.equal(cuda, torch.cuda.get_rng_state(self.device))
            torch.cuda.set_rng_state(cuda, self.device)
        if drew:
            raise InputError(
                f"{type(self.module).__name__} draws random numbers in its forward pass (dropout), so it is another function "
                "each time; call module.eval() first"
            )

    def check_independent(self) -> None:
        """Refuse batch statistics, by which one example's output depends on the others.

        Raises:
            InputError: if a batch norm uses those of the batch.
        """
        for name, part in self.module.named_modules():
            batch_norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
            if batch_norm and (part.training or part.running_mean is None):
                raise InputError(
                    f"{name or 'the module'} is a batch norm that uses the batch's own statistics, so examples have no gradients "
                    "of their own; call module.eval() first"
                )


def pullback(function: Callable[[Any], Any], at: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return a function's value, and the map of ``u`` to ``J^T u`` for its Jacobian ``J`` there."""
    value, pull = vjp(function, at)  # type: ignore[misc]
    return value, lambda cotangents: pull(cotangents)[0]


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
