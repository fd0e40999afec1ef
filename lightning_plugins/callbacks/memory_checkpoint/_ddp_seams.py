"""The private touches of DDP: that a resumed run sums its gradients in the order in which the whole run did.

After its first backward pass DDP lays its buckets out anew, in the order in which gradients have become ready. Where an element
stands in a bucket decides in which order three or more ranks are added up, so a run that starts again would round its first step
otherwise. The order of the first pass is noted, it travels with the state, and a resumed run plays it to DDP with gradients of
zero before its first step.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class GradientOrder:
    """Notes the order in which the gradients of a module first become ready.

    Attributes:
        names: of the parameters, in that order; as far as they have come.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names: list[str] = []
        self._handles = {
            name: parameter.register_post_accumulate_grad_hook(partial(self._note, name))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def close(self) -> None:
        """Take the hooks out."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def _note(self, name: str, parameter: Tensor) -> None:
        self.names.append(name)
        self._handles.pop(name).remove()


def replay(ddp: nn.Module | None, module: nn.Module, order: Sequence[str]) -> None:
    """Have DDP lay its buckets out for gradients that become ready in this order; collective.

    Args:
        ddp: of this rank; what lays nothing out anew is left alone: another wrapper, a hook that reduces by its own order, unused
            parameters that are looked for.
        module: whose parameters they are.
        order: names of all parameters that need gradients.
    """
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not isinstance(ddp, DistributedDataParallel) or ddp.find_unused_parameters or set(order) != set(parameters):
        return
    if ddp._comm_hooks:
        return
    ddp.reducer.prepare_for_forward()
    ddp.reducer.prepare_for_backward([])
    for name in order:
        (0.0 * parameters[name].flatten()[:1].sum()).backward()
    for parameter in parameters.values():
        parameter.grad = None
