"""A training state taken apart: tensors on one side, a small skeleton of bytes on the other, and back.

    state = {"model": {"weight": W, "tied": W}, "step": 3}
    pack(state)  ->  tensors [W], skeleton of {"model": {"weight": <0>, "tied": <0>}, "step": 3}

So the bulk can be copied from memory to memory without a serializer, and the rest goes through ``torch.save`` and the safe
loader. In the skeleton a tensor's place is a tuple that begins with "tensor", and a tuple of the state is one that begins with
"tuple": no state can look like a place. Sparse, quantized and other tensors without strides stay in the skeleton.
"""

import io
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError, one_line

_TENSOR, _TUPLE = "tensor", "tuple"
_CONTAINERS = (dict, OrderedDict, list, tuple)
_SHOWN_CHARACTERS = 200


class Packed(NamedTuple):
    """A state taken apart.

    Attributes:
        skeleton: everything but the tensors, for ``unpack``.
        tensors: detached, in the state's own memory.
    """

    skeleton: bytes
    tensors: list[Tensor]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


def pack(state: Any) -> Packed:
    """Take a state apart without copying a tensor.

    Args:
        state: nested dicts, lists and tuples of tensors and of whatever ``torch.load(weights_only=True)`` accepts. Tensors of
            equal storage, offset, shape and strides appear once, and come back as one tensor; other views of one storage come
            back each with memory of its own.

    Raises:
        InputError: for a named tuple, a tensor subclass (a DTensor, say), or what cannot be pickled; it names the key path.
    """
    packer = _Packer()
    places = packer.encode(state, ())
    return Packed(_save(places, state), packer.tensors)


def unpack(skeleton: bytes, tensors: list[Tensor]) -> Any:
    """Return the state, with the given tensors in their places.

    Args:
        skeleton: from ``pack``; read by the safe loader.
        tensors: as many as ``pack`` gave, in the same order; they are not copied.

    Raises:
        InputError: if the skeleton does not belong to these tensors.
        pickle.UnpicklingError: if it holds what the safe loader does not accept; ``check_loads`` says where.
    """
    return _Unpacker(tensors).decode(torch.load(io.BytesIO(skeleton), map_location="cpu", weights_only=True))


def check_loads(state: Any) -> None:
    """Send all of a state but its tensors once through the safe loader.

    Raises:
        InputError: naming the key path and the type of the first value that would not load, or that ``pack`` refuses.
    """
    skeleton, tensors = pack(state)
    try:
        unpack(skeleton, tensors)
    except Exception as error:
        path, value, reason = _first_refused(state) or ((), state, error)
        raise _refusal(path, value, f"would not load again with weights_only=True: {reason}") from error


class _Packer:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._seen: dict[int, Any] = {}  # by identity: what is one object in the state stays one, loops included

    def encode(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            return self._encode_tensor(value, path)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            raise _refusal(path, value, "is a named tuple, which the safe loader does not accept; make it a dict or a tuple")
        if type(value) not in _CONTAINERS:
            return value
        if id(value) in self._seen:
            return self._seen[id(value)]
        if isinstance(value, tuple):
            return (_TUPLE, *(self.encode(item, (*path, number)) for number, item in enumerate(value)))
        if isinstance(value, list):
            items: list[Any] = []
            self._seen[id(value)] = items
            items.extend(self.encode(item, (*path, number)) for number, item in enumerate(value))
            return items
        mapping = type(value)()
        self._seen[id(value)] = mapping
        vars_of = getattr(value, "__dict__", None)
        if vars_of:  # a module's state_dict carries the versions of its layers there
            mapping.__dict__.update(vars_of)
        for key, item in value.items():
            mapping[key] = self.encode(item, (*path, key))
        return mapping

    def _encode_tensor(self, tensor: Tensor, path: tuple[Any, ...]) -> Any:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise _refusal(
                path, tensor, "is a tensor subclass, which cannot be kept; give a plain tensor, of a DTensor its full_tensor()"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta":
            return tensor
        # The storage's own identity: empty tensors all have the address 0.
        storage = tensor.untyped_storage()._cdata
        view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
        number = self._numbers.setdefault((storage, *view), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(tensor.detach())
        return (_TENSOR, number, type(tensor) is torch.nn.Parameter, tensor.requires_grad and tensor.is_leaf)


class _Unpacker:
    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self._made: dict[tuple[Any, ...], Tensor] = {}
        self._seen: dict[int, Any] = {}

    def decode(self, value: Any) -> Any:
        if type(value) is tuple:
            kind, *rest = value
            return self._tensor(*rest) if kind == _TENSOR else tuple(self.decode(item) for item in rest)
        if type(value) not in _CONTAINERS:
            return value
        if id(value) in self._seen:
            return value
        # The loader's containers are ours alone: filled in place.
        self._seen[id(value)] = value
        for key, item in enumerate(value) if isinstance(value, list) else value.items():
            value[key] = self.decode(item)
        return value

    def _tensor(self, number: int, is_parameter: bool, requires_grad: bool) -> Tensor:
        if number >= len(self.tensors):
            raise InputError(
                f"the skeleton names tensor {number}, but {len(self.tensors)} were given; give those of the same pack"
            )
        key = (number, is_parameter, requires_grad)
        if key not in self._made:
            tensor = self.tensors[number]
            if is_parameter:
                tensor = torch.nn.Parameter(tensor, requires_grad=requires_grad)
            elif requires_grad:
                tensor = tensor.detach().requires_grad_()
            self._made[key] = tensor
        return self._made[key]


def _save(places: Any, state: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(places, buffer)
    except Exception as error:
        path, value, reason = _first_refused(state) or ((), state, error)
        raise _refusal(path, value, f"cannot be saved: {reason}") from error
    return buffer.getvalue()


def _first_refused(state: Any) -> tuple[tuple[Any, ...], Any, Exception] | None:
    """Return path, value and reason of the innermost thing that the way there and back does not take."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), state)]
    seen = set()
    while waiting:
        path, value = waiting.pop()
        if type(value) in _CONTAINERS:
            if id(value) not in seen:
                seen.add(id(value))
                items = value.items() if isinstance(value, dict) else enumerate(value)
                waiting += reversed([((*path, key), item) for key, item in items])
                if isinstance(value, dict):
                    waiting += [((*path, key), key) for key in value if type(key) not in (str, int, float, bool)]
        elif not isinstance(value, Tensor):
            buffer = io.BytesIO()
            try:
                torch.save(value, buffer)
                buffer.seek(0)
                torch.load(buffer, weights_only=True)
            except Exception as error:
                return path, value, error
    return None


def _refusal(path: tuple[Any, ...], value: Any, reason: str) -> InputError:
    place = " / ".join(str(key) for key in path) or "the state itself"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return InputError(f"{place}: a value of type {kind} {one_line(reason)[:_SHOWN_CHARACTERS]}")
