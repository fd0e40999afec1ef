"""What cannot be done is refused on every rank, in one sentence that names the ranks, with nothing changed and nobody waiting."""

import time

import numpy as np
import pytest
import torch

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sparse_allreduce import SparseAllreduceState, sparse_allreduce
from tests.engines.sparse_allreduce import threads
from tests.ranks.rank import progress

COUNT = 3


def good():
    return {"acc": torch.arange(1.0, 13.0), "k": 4, "state": SparseAllreduceState()}


def changed(name, rank):
    """Return the arguments of a bad call, and which ranks make the mistake."""
    call = good()
    strange = rank == 2
    if name == "k on all ranks" or (name == "k on one rank" and strange):
        call["k"] = 2
    elif name == "k is no integer" and strange:
        call["k"] = 4.0
    elif name == "another k" and strange:
        call["k"] = 5
    elif name == "another size" and strange:
        call["acc"] = torch.ones(11)
    elif name == "another step" and strange:
        call["state"].step = 3
    elif name == "another dtype" and strange:
        call["acc"] = call["acc"].double()
    elif name == "state of a shorter vector":
        call["state"].routings[0].cuts = [0, 2, 4, 6]
        call["state"].routings[0].owners = [0, 1, 2]
    elif name == "state of two ranks":
        call["state"].routings[0].cuts = [0, 6, 12]
        call["state"].routings[0].owners = [0, 1]
    elif name == "other cuts":
        call["state"].routings[0].cuts = [0, 4, 9 if strange else 8, 12]
        call["state"].routings[0].owners = [0, 1, 2]
    elif name == "other indices" and strange:
        call["state"] = SparseAllreduceState(indices="bitmap")
    elif name == "another interval" and strange:
        call["state"] = SparseAllreduceState(threshold_every=5)
    elif name == "sparse" and strange:
        call["acc"] = call["acc"].to_sparse()
    elif name == "half" and strange:
        call["acc"] = call["acc"].half()
    elif name == "bfloat16":
        call["acc"] = call["acc"].bfloat16()
    elif name == "integers" and strange:
        call["acc"] = call["acc"].long()
    elif name == "not contiguous" and strange:
        call["acc"] = torch.ones(4, 6).t()[:3]
    elif name == "empty" and strange:
        call["acc"] = torch.ones(0)
    elif name == "nan" and strange:
        call["acc"][5] = float("nan")
    elif name == "infinity" and strange:
        call["acc"][0] = -float("inf")
    return call


REFUSALS = {
    "k on one rank": "^rank 2: k must be a whole number from the number of ranks, 3, on, got 2; send more",
    "k on all ranks": "rank 0: k must be .*got 2.*; rank 1: .*; rank 2: ",
    "k is no integer": r"^rank 2: k must be a whole number .*got 4\.0",
    "another k": "^the ranks must agree in k: rank 0 has 4, rank 2 has 5; give all ranks the same",
    "another size": "agree in elements: rank 0 has 12, rank 2 has 11",
    "another step": "agree in step: rank 0 has 0, rank 2 has 3",
    "another dtype": r"agree in dtype: rank 0 has torch\.float32, rank 2 has torch\.float64",
    "state of a shorter vector": "rank 0: the state is of a vector of 6 elements on 3 ranks, acc has 12 on 3; make.*; rank 2: ",
    "state of two ranks": "rank 1: the state is of a vector of 12 elements on 2 ranks, acc has 12 on 3; make a Sparse",
    "other cuts": r"agree in cuts \(checksum\): rank 0 has \d+, rank 2 has \d+; give all ranks the same .*checkpoint",
    "other indices": "agree in indices: rank 0 has auto, rank 2 has bitmap",
    "another interval": "agree in threshold_every: rank 0 has 32, rank 2 has 5",
    "sparse": r"^rank 2: acc must be dense, got torch.sparse_coo; call .to_dense\(\)",
    "half": "^rank 2: acc must be float32 or float64, got torch.float16; keep residuals in float32",
    "bfloat16": "rank 2: acc must be float32 or float64, got torch.bfloat16",
    "integers": "^rank 2: acc must be float32 or float64, got torch.int64",
    "not contiguous": r"^rank 2: acc must be contiguous, got strides \(1, 6\); call .contiguous\(\)",
    "empty": r"^rank 2: acc must have 1 to 4294967296 elements, got 0; leave empty tensors out",
}


def refused(rank, count, names):
    """Make each bad call, and a good one afterwards."""
    said = []
    for name in names:
        call = changed(name, rank)
        before = call["acc"].clone()
        try:
            sparse_allreduce(call["acc"], call["k"], state=call["state"])
            said.append("nothing")
        except (InputError, FloatingPointError) as error:
            said.append(f"{type(error).__name__} {error}")
        same = torch.equal(call["acc"].to_dense().nan_to_num(7.0), before.to_dense().nan_to_num(7.0))
        said.append(same and call["state"].step in (0, 3) and call["state"].local.value is None)
        call = good()
        said.append(sparse_allreduce(call["acc"], call["k"], state=call["state"]).tolist() == [0.0] * 8 + [27, 30, 33, 36])
    return said


def check(results, names):
    assert all(said == results[0] for said in results)
    for name, (said, untouched, works_again) in zip(names, zip(*[iter(results[0])] * 3, strict=True), strict=True):
        if name in REFUSALS:
            kind, sentence = said.split(" ", 1)
            assert kind == "InputError", name
            with pytest.raises(InputError, match=REFUSALS[name]):
                raise InputError(sentence)
            assert "\n" not in sentence
        else:
            assert said.startswith("FloatingPointError"), name
            assert "nothing was sent or changed, leave this step out" in said
        assert untouched is True, name
        assert works_again is True, name


NAMES = [*REFUSALS, "nan", "infinity"]


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_refuse_with_the_same_sentence(name):
    check(threads.run(refused, COUNT, [name]), [name])


def test_nobody_waits_in_a_process_group(ranks):
    """All of them one after the other, over gloo: each ends on every rank, and the group can be used afterwards."""
    check(ranks.run(refused, COUNT, NAMES, timeout_s=30), NAMES)


def test_a_refusal_goes_before_what_is_not_finite():
    assert all("k must be" in said[0] for said in threads.run(one_refuses_one_is_nan, 2))


def one_refuses_one_is_nan(rank, count):
    call = good()
    call["acc"][0] = float("nan")
    with pytest.raises(InputError) as caught:
        sparse_allreduce(call["acc"], 1 if rank else 4, state=call["state"])
    return [str(caught.value)]


def test_alone_the_sentence_names_no_rank():
    with pytest.raises(InputError, match=r"^k must be a whole number from the number of ranks, 1, on, got 0"):
        sparse_allreduce(torch.ones(4), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": "exakt"}, "there is no threshold='exakt'; did you mean exact"),
        ({"cuts": "median"}, "there is no cuts='median'; valid are average, histogram"),
        ({"owners": "remote"}, "no owners="),
        ({"indices": "int16"}, "no indices='int16'; did you mean .*int32"),
        ({"values": "float16"}, "no values='float16'; did you mean bfloat16"),
        ({"threshold_every": 0}, "threshold_every must be 1 step or more, got 0"),
        ({"repartition_every": 2.5}, r"repartition_every must be 1 step or more, got 2\.5"),
    ],
)
def test_unknown_settings(settings, message):
    with pytest.raises(InputError, match=message):
        SparseAllreduceState(**settings)


@pytest.mark.parametrize(
    "strange",
    [{"step": "three"}, {"local_threshold": 0.1}, {"routings": [{"cut": []}]}, {"routings": []}, {"global_threshold": None}],
)
def test_a_foreign_state_is_refused_and_changes_nothing(strange):
    state = SparseAllreduceState()
    with pytest.raises(InputError, match="this is no state of a sparse allreduce"):
        state.load_state_dict({**SparseAllreduceState().state_dict(), "step": 7, **strange})
    assert state.state_dict() == SparseAllreduceState().state_dict()


def test_what_can_be_used_is_not_refused():
    """A parameter's data that requires a gradient, and whole numbers of numpy."""
    acc = torch.tensor([3.0, -1.0, 0.5, -4.0], requires_grad=True)
    assert sparse_allreduce(acc, np.int64(2)).tolist() == [3.0, 0.0, 0.0, -4.0]
    assert acc.tolist() == [0.0, -1.0, 0.5, 0.0]


def steps_until_it_fails(rank, count):
    state = SparseAllreduceState()
    acc = torch.zeros(1000)
    try:
        while True:
            acc += torch.randn(1000)
            sparse_allreduce(acc, 20, state=state)
            progress("a step")
            time.sleep(0.02)
    except RuntimeError as error:
        return type(error).__name__


def test_a_lost_rank_ends_the_others(ranks):
    """An error of the process group, within its timeout."""
    with ranks.start(steps_until_it_fails, 3, timeout_s=10) as handle:
        handle.wait_for("a step")
        killed_at = time.monotonic()
        handle.kill(1)
        assert handle.join(30) == [0, -9, 0]
        assert time.monotonic() - killed_at < 15
        assert handle.result(0)
        assert handle.result(2)
