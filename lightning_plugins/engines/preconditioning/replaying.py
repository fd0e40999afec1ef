"""The batch of a step once more, after the optimizer moved: what quasi-Newton methods compare its first pass with.

The closures compute the same losses from the same inputs and targets. Their passes leave nothing behind: gradients come from
``torch.autograd.grad``, so that no ``.grad`` changes; buffers (the statistics of batch norm) are put back; and the random numbers
that the program draws next are those that it would have drawn. Dropout after the first tapped layer drops what it dropped before:
the generators' states are taken there in the first pass, and set there in the second. Activation checkpoints must not be
reentrant: torch gives those to ``backward`` alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.blocks import ReplayedBlock
from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.losses import Loss, read_loss
from lightning_plugins.engines.preconditioning.sharing import Sharing
from lightning_plugins.engines.preconditioning.taps import Taps

Closure = Callable[[], Tensor]


class Replayer:
    """Runs the micro-batches of a step again, and hands the blocks what goes through their layers.

    Args:
        module: whose buffers are kept.
        layers: layer by tapped module.
        blocks: block by id of its layer.
        sharing: adds the sums over ranks.
        reduction: of losses of unknown form, as in :func:`~lightning_plugins.engines.preconditioning.losses.read_loss`.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[tuple[nn.Module, Layer]],
        blocks: dict[int, ReplayedBlock],
        sharing: Sharing,
        reduction: str,
    ) -> None:
        self._module = module
        self._blocks = blocks
        self._sharing = sharing
        self._reduction = reduction
        self._parameters = list({id(p): p for _, layer in layers for p in layer.parameters}.values())
        self._taps = Taps(layers, self._receive)
        self._taps.armed = False
        enter = torch.compiler.disable(self._enter)  # traced, it would be compiled anew with every change of a flag
        self._handles = [tapped.register_forward_pre_hook(enter) for tapped, _ in layers]
        self._expected: list[ReplayedBlock] = []
        self._noise: list[list[Tensor] | None] = []  # of every micro-batch of the step
        self._captured: list[Tensor] | None = None
        self._replayed: list[Tensor] | None = None
        self._running = False
        self._loss: Loss | None = None

    def observed(self) -> None:
        """Note that the forward pass of a micro-batch is over.

        Raises:
            InputError: if the last step still waits for its replay.
        """
        if self._expected:
            raise InputError(
                "the method compares every batch before and after the step, and the last one was not replayed; call "
                "replay(closure) after optimizer.step(), with a closure that computes the loss of the same batch"
            )
        self._noise.append(self._captured)
        self._captured = None

    def expect(self, blocks: Sequence[ReplayedBlock]) -> None:
        """Note that a step ended, and which blocks wait for its replay."""
        self._expected += blocks
        if not self._expected:
            self._noise, self._captured = [], None

    def run(self, closures: Sequence[Closure], damping: float) -> bool:
        """Replay what is expected; return whether all sums were finite, so that they count.

        Raises:
            InputError: if there is not one closure per micro-batch.
        """
        if not self._expected:
            return True
        if len(closures) != len(self._noise):
            raise InputError(
                f"the step had {len(self._noise)} micro-batches and replay was given {len(closures)} closures; "
                "give one per micro-batch, in their order"
            )
        terms = 0.0
        self._running = self._taps.armed = True
        try:
            devices = sorted({p.device.index for p in self._parameters if p.device.type == "cuda"})
            with _kept_buffers(self._module), torch.random.fork_rng(devices), torch.enable_grad():
                for noise, closure in zip(self._noise, closures, strict=True):
                    self._replayed = noise
                    loss = closure()
                    self._loss = read_loss(loss, self._reduction)
                    torch.autograd.grad(loss, [p for p in self._parameters if p.requires_grad], allow_unused=True)
                    terms += self._loss.terms or 0.0
            return self._fold(terms, damping)
        finally:
            self._running = self._taps.armed = False
            self._replayed = self._loss = None
            self._expected.clear()
            self.expect([])

    def remove(self) -> None:
        """Leave the modules without a hook of ours."""
        self._taps.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, _module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        """Keep, or set, the generators' states at the first tapped layer of a pass."""
        if self._running:
            if self._replayed is not None:
                _set_generators(self._replayed, self._parameters)
                self._replayed = None
        # Within a backward pass, activation checkpointing computes the last micro-batch again.
        elif self._captured is None and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            self._captured = _generators(self._parameters)

    def _receive(self, layer: Layer, x: Tensor, gradient: Tensor) -> None:
        assert self._loss is not None
        if self._loss.terms is None:
            self._loss.terms = float(layer.output_gradients(gradient).shape[1])
        block = self._blocks[id(layer)]
        if block in self._expected and gradient.numel():
            block.accumulate_replayed(layer, x, gradient, self._loss.scale(self._loss.terms))

    def _fold(self, terms: float, damping: float) -> bool:
        with torch.autocast(self._parameters[0].device.type, enabled=False):
            return self._fold_sums(terms, damping)

    def _fold_sums(self, terms: float, damping: float) -> bool:
        sums = [tensor for block in self._expected for tensor in block.replayed()]
        count = sums[0].new_tensor([terms], dtype=torch.float64)
        self._sharing.add([*sums, count])
        totals = torch.stack([tensor.sum(dtype=torch.float64) for tensor in sums]).sum()
        finite, all_terms = torch.stack([totals.isfinite().double(), count[0]]).tolist()
        for block in self._expected:
            block.fold_replayed(all_terms if finite else 0.0, damping)
        return bool(finite)


@contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Put every buffer back, values and object."""
    kept = [
        (part, name, buffer, buffer.clone()) for part in module.modules() for name, buffer in part.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, name, buffer, value in kept:
                setattr(part, name, buffer.copy_(value))


def _cuda_devices(parameters: Sequence[Tensor]) -> list[torch.device]:
    return list(dict.fromkeys(p.device for p in parameters if p.device.type == "cuda"))


def _generators(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _cuda_devices(parameters))]


def _set_generators(states: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(_cuda_devices(parameters), states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)
