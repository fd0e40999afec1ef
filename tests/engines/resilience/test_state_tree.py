"""States taken apart and put together, against plain Python comparisons, bit by bit."""

import io
import pickle
from collections import Counter, OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.state_tree import check_loads, pack, unpack
from tests.engines.resilience.keeper_parts import assert_same, wide_state

Point = namedtuple("Point", "x y")


def there_and_back(state):
    skeleton, tensors = pack(state)
    return unpack(skeleton, [tensor.clone() for tensor in tensors])


def test_everything_comes_back_with_the_same_bits():
    state = wide_state()
    assert_same(there_and_back(state), state)


def test_the_bits_of_nan_and_minus_zero_are_compared_at_all():
    one, other = torch.tensor([0x7FC00001, 0]).int().view(torch.float32), torch.tensor([0x7FC00002, 0]).int().view(torch.float32)
    with pytest.raises(AssertionError):
        assert_same(one, other)
    with pytest.raises(AssertionError):
        assert_same(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_nothing_is_copied_and_nothing_of_a_tensor_is_in_the_skeleton():
    tensor = torch.full((1000, 1000), 1.5)
    packed = pack({"a": tensor, "b": [tensor[:10]]})
    assert [part.data_ptr() for part in packed.tensors] == [tensor.data_ptr()] * 2
    assert len(packed.skeleton) < 4000
    assert packed.tensor_bytes == 4 * (1_000_000 + 10_000)


def test_one_tensor_in_two_places_stays_one():
    weight = torch.randn(4, 4)
    packed = pack({"embedding": weight, "decoder": weight, "alias": weight.view(4, 4), "transposed": weight.t()})
    assert len(packed.tensors) == 2
    state = unpack(*packed)
    assert state["embedding"] is state["decoder"] is state["alias"]
    assert state["embedding"] is not state["transposed"]


def test_a_conjugate_of_the_same_memory_is_another_tensor():
    values = torch.tensor([1 + 2j, 3 - 4j])
    state = {"values": values, "conjugate": values.conj()}
    assert_same(there_and_back(state)["conjugate"].resolve_conj(), torch.tensor([1 - 2j, 3 + 4j]))


def test_different_tensors_stay_different():
    state = unpack(*pack({"a": torch.zeros(3), "b": torch.zeros(3), "empty": [torch.empty(0), torch.empty(0)]}))
    assert state["a"] is not state["b"]
    assert state["empty"][0] is not state["empty"][1]


def test_parameters_and_what_needs_gradients():
    state = {"p": torch.nn.Parameter(torch.ones(2)), "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False)}
    state |= {"leaf": torch.ones(2, requires_grad=True), "plain": torch.ones(2), "result": state["p"] * 2}
    back = there_and_back(state)
    assert {name: type(value) for name, value in back.items()} == {name: type(value) for name, value in state.items()}
    assert [name for name, value in back.items() if value.requires_grad] == ["p", "leaf"]


def test_versions_of_layers_stay_with_the_state_dict():
    state = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).state_dict()
    back = there_and_back(state)
    assert isinstance(back, OrderedDict)
    assert back._metadata == state._metadata != {}


def test_one_list_in_two_places_stays_one_and_loops_end():
    shared = [torch.ones(1)]
    loop = {"a": shared, "b": shared}
    loop["self"] = loop
    back = there_and_back(loop)
    assert back["a"] is back["b"]
    assert back["self"] is back


def test_sets_counters_sizes_and_sparse_tensors():
    state = {"set": {1, 2}, "counter": Counter("abba"), "size": torch.Size([2, 3]), "dtype": torch.bfloat16}
    back = there_and_back(state | {"sparse": torch.eye(3).to_sparse()})
    assert torch.equal(back.pop("sparse").to_dense(), torch.eye(3))
    assert_same(back, state)
    check_loads(state)


def test_the_state_itself_is_left_as_it_was():
    state = wide_state()
    before = [id(value) for value in state.values()]
    pack(state)
    assert [id(value) for value in state.values()] == before


class Unknown:
    pass


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Unknown(), "Unknown"),
        (np.float64(1.5), "numpy.float64"),
        (np.ones(2), "numpy.ndarray"),
        (defaultdict(int), "defaultdict"),
    ],
)
def test_what_would_not_load_is_named_with_its_key_path_and_type(value, kind):
    state = {"model": torch.ones(2), "callbacks": {"MyCallback": {"fine": 1, "list": [1, (2, value)]}}}
    with pytest.raises(InputError, match=rf"^callbacks / MyCallback / list / 1 / 1: a value of type \S*{kind} would not load"):
        check_loads(state)


def test_what_cannot_be_saved_is_named_too():
    with pytest.raises(InputError, match=r"^callbacks / hook: a value of type builtins.function cannot be saved"):
        pack({"callbacks": {"hook": lambda: None}})


def test_a_key_that_would_not_load_is_named():
    with pytest.raises(InputError, match="Unknown"):
        check_loads({"a": {Unknown(): 1}})


def test_named_tuples_and_tensor_subclasses_are_refused_by_name():
    with pytest.raises(InputError, match=r"^a / 0: a value of type \S*Point is a named tuple"):
        pack({"a": [Point(1, 2)]})
    with pytest.raises(InputError, match=r"^w: a value of type \S*Buffer is a tensor subclass"):
        pack({"w": torch.nn.Buffer(torch.ones(1)).as_subclass(type("Buffer", (torch.Tensor,), {}))})


def test_what_loads_passes():
    check_loads(wide_state())


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_a_skeleton_is_never_executed():
    buffer = io.BytesIO()
    torch.save({"a": Evil()}, buffer)
    with pytest.raises(pickle.UnpicklingError, match="exec"):
        unpack(buffer.getvalue(), [])


def test_a_skeleton_of_other_tensors_is_refused():
    skeleton, tensors = pack({"a": torch.ones(1), "b": torch.zeros(1)})
    with pytest.raises(InputError, match=r"names tensor 1, but 1 were given"):
        unpack(skeleton, tensors[:1])
