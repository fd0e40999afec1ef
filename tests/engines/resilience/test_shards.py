"""What goes once a node and what goes by rank, and that nothing is lost on the way."""

import torch

from lightning_plugins.engines.resilience.shards import join, split


def state(rank):
    """Return a replica's state: the same parameters and moments on every rank, all else of its own."""
    return {
        "epoch": 1,
        "state_dict": {"weight": torch.ones(3), "statistics": torch.full((2,), float(rank))},
        "optimizer_states": [
            {"state": {0: {"moment": torch.ones(3)}}, "param_groups": [{"lr": 0.1 * (rank + 1), "params": [0]}]}
        ],
        "lr_schedulers": [{"best": rank}],
        "loops": {"fit_loop": {"state_dict": {"combined_loader": [rank]}}},
        "exact_resume": {"random": rank},
    }


def test_joined_it_is_what_was_split():
    whole = state(1)
    assert str(join(*split(whole, {"weight"}))) == str(whole)
    assert str(whole) == str(state(1)), "and is not changed"


def test_what_is_shared_is_alike_on_all_ranks_and_the_rest_is_not():
    (shared, own), (other_shared, other_own) = split(state(0), {"weight"}), split(state(1), {"weight"})
    assert str(shared) == str(other_shared)
    assert set(shared["state_dict"]) == {"weight"}
    assert str(join(shared, other_own)) == str(state(1))
    assert str(own) != str(other_own)
