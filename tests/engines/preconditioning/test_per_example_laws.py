"""Laws of all methods that square or pair gradients of whole examples: units of the loss, micro-batches, chunks, resuming."""

import copy
import io

import pytest
import torch
from torch import nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import METHODS, GradientPreconditioner
from lightning_plugins.engines.preconditioning import examples as examples_module
from lightning_plugins.engines.preconditioning import gram as gram_module
from tests.engines.preconditioning.dense import relative_error
from tests.engines.preconditioning.example_oracles import (
    MODELS,
    Dense,
    Tagger,
    close,
    cross_entropy,
    flat,
    names_of,
    preconditioned,
    train,
)

METHOD_NAMES = ["diag", "unit", "ekfac", "layer", "full"]
N = 6


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def everything(gradients):
    return flat(gradients, *gradients)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_unequal_micro_batches_are_one_batch(method, fisher):
    model, x, y = MODELS["grouped, strided, group norm"](N)
    whole = preconditioned(model, [(x, y)], method, fisher=fisher)
    parts = preconditioned(model, [(x[:2], y[:2]), (x[2:], y[2:])], method, fisher=fisher)
    close(everything(parts), everything(whole))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_scale_of_mixed_precision_changes_nothing(method):
    model, x, y = MODELS["called twice, on sequences"](N)
    close(
        everything(preconditioned(model, [(x, y)], method, scale=2.0**16)),
        everything(preconditioned(model, [(x, y)], method)),
    )


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_sum_over_examples_has_the_direction_of_the_mean_in_its_own_units(method):
    model, x, y = MODELS["tokens"](N)

    def summed(outputs, targets):
        return cross_entropy(outputs, targets, reduction="sum")

    close(
        everything(preconditioned(model, [(x, y)], method, loss=summed)),
        N * everything(preconditioned(model, [(x, y)], method)),
    )


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("case", MODELS)
def test_it_is_a_positive_direction_other_than_the_gradient(case, method):
    model, x, y = MODELS[case](N)
    found = preconditioned(model, [(x, y)], method, damping=1e-3)
    before = {name: parameter.grad for name, parameter in with_gradients(model, x, y).named_parameters()}
    for layer, names in names_of(model).items():
        if all(before[name].any() for name in names) and (method, layer) != ("unit", "embedding"):
            direction, gradient = flat(found, *names), flat(before, *names)
            assert direction @ gradient > 0
            assert relative_error(direction / direction.norm(), gradient / gradient.norm()) > 1e-3


def with_gradients(model, x, y):
    model = copy.deepcopy(model)
    cross_entropy(model(x), y).backward()
    return model


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("case", ["grouped, strided, group norm", "called twice, on sequences", "tokens"])
def test_chunks_of_single_examples_give_what_one_chunk_gives(case, method, monkeypatch):
    model, x, y = MODELS[case](N)
    whole = preconditioned(model, [(x, y)], method)
    monkeypatch.setattr(examples_module, "CHUNK_BYTES", 1)
    monkeypatch.setattr(gram_module, "CHUNK_BYTES", 1)
    close(everything(preconditioned(model, [(x, y)], method)), everything(whole))


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_run_continues_with_the_same_bits(method, fisher):
    once = method in ("layer", "full")
    options = {"fisher": fisher, "warmup_steps": 1}
    options |= {} if once else {"factor_every": 2, "inverse_every": 4}
    model = MODELS["grouped, strided, group norm"](N)[0]
    batches = [MODELS["grouped, strided, group norm"](N)[1:] for _ in range(9)]
    whole = GradientPreconditioner(model, method, **options)
    train(whole, model, batches[:3])
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed_model = copy_without_taps(model)
    resumed = GradientPreconditioner(resumed_model, method, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(train(resumed, resumed_model, batches[3:]), train(whole, model, batches[3:]))


def copy_without_taps(model):
    fresh = MODELS["grouped, strided, group norm"](N)[0]
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    return fresh


@pytest.mark.parametrize("samples", [1, 8])
def test_sampled_targets_average_to_the_exact_diagonal_for_one_and_for_many_samples(samples):
    model, x, y = MODELS["perceptron"](N)
    names = names_of(model)["0"]
    dense = Dense(model, x, y, exact=True)
    expected = torch.cat([(dense.row[name] ** 2).sum(0).reshape(4, -1) / N for name in names], 1)
    tapped = copy.deepcopy(model)
    preconditioner = GradientPreconditioner(tapped, "diag", fisher="mc", samples=samples)
    block, rounds = preconditioner._slots[0].block, 800 // samples
    means = []
    for _ in range(rounds):
        preconditioner.observe(cross_entropy(tapped(x), y))
        means.append(block.pending()[0][0] / (N * samples))
        block.clear()
    means = torch.stack(means)
    error = (means.mean(0) - expected).abs()
    assert (error <= 4.5 * means.std(0) / rounds**0.5 + 1e-12).all()
    assert error.max() < 0.2 * expected.max()


@pytest.mark.parametrize("method", ["diag", "layer", "full"])
def test_terms_of_one_example_get_columns_of_their_own(method):
    model, x, y = Tagger().double(), torch.randn(4, 3, 4, dtype=torch.float64), torch.randint(3, (4, 3))
    dense = Dense(model, x, y, exact=True)
    found = preconditioned(model, [(x, y)], method, fisher="exact", damping=0.01)
    if method == "diag":
        names = tuple(found)
        close(flat(found, *names), dense.mean_gradient(*names) / (dense.rows(*names).square().sum(0) / 4 + 0.01))
    elif method == "full":
        names = ("layer.weight", "layer.bias", "head.weight", "head.bias")
        close(flat(found, *names), dense.solve(0.01, *names))
    else:
        close(flat(found, "layer.weight", "layer.bias"), dense.solve(0.01, "layer.weight", "layer.bias"))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_exact_refuses_terms_that_do_not_say_whose_they_are(method):
    model, x, y = Tagger().double(), torch.randn(4, 3, 4, dtype=torch.float64), torch.randint(3, (12,))
    preconditioner = GradientPreconditioner(model, method, fisher="exact")
    loss = cross_entropy(model(x).transpose(1, 2).flatten(0, 1), y)
    with pytest.raises(InputError, match=r"12 rows of logits where \w+ saw 4 examples; give it logits"):
        preconditioner.observe(loss)


@pytest.mark.parametrize("method", ["ekfac", "layer", "full"])
def test_an_input_that_was_overwritten_before_the_step_is_refused(method):
    model, x, y = MODELS["perceptron"](N)
    preconditioner = GradientPreconditioner(model, method)
    loss = cross_entropy(model(x), y)
    preconditioner.observe(loss)
    loss.backward()
    x.zero_()
    with pytest.raises(InputError, match="the input of 0 was overwritten"):
        preconditioner.precondition()


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_batch_with_nan_leaves_the_averages_clean(method):
    model, x, y = MODELS["perceptron"](N)
    batches = [MODELS["perceptron"](N)[1:] for _ in range(3)]
    preconditioner = GradientPreconditioner(model, method)
    train(preconditioner, model, batches[:1])
    loss = cross_entropy(model(x.clone().fill_(float("nan"))), y)
    preconditioner.observe(loss)
    loss.backward()
    preconditioner.precondition()
    model.zero_grad()
    assert preconditioner.nonfinite_batches == 1
    assert train(preconditioner, model, batches[1:]).isfinite().all()


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_half_precision_keeps_its_statistics_in_single(method):
    model, x, y = MODELS["grouped, strided, group norm"](N)
    found = preconditioned(model.bfloat16(), [(x.bfloat16(), y)], method, damping=0.1)
    exact = preconditioned(model.double(), [(x.bfloat16().double(), y)], method, damping=0.1)
    assert all(gradient.dtype == torch.bfloat16 for gradient in found.values())
    assert relative_error(everything(found).double(), everything(exact)) < 0.05


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_there_is_no_forward_only_form(method):
    assert METHODS[method].fishers == ("empirical", "mc", "exact")
    with pytest.raises(InputError, match="valid are empirical, mc, exact"):
        GradientPreconditioner(nn.Linear(2, 2), method, fisher="forward")


@pytest.mark.parametrize("method", ["diag", "unit", "ekfac"])
def test_settings_out_of_range_are_refused(method):
    with pytest.raises(InputError, match=r"decay must be in \[0, 1\), got 1"):
        GradientPreconditioner(nn.Linear(2, 2), method, decay=1.0)
    if method != "diag":
        with pytest.raises(InputError, match="max_dim must be a whole number of 1 or more, got 0"):
            GradientPreconditioner(nn.Linear(2, 2), method, max_dim=0)


@pytest.mark.parametrize("method", ["diag", "unit", "ekfac"])
def test_what_two_ranks_add_up_is_what_one_process_sums(method):
    model, x, y = MODELS["grouped, strided, group norm"](N)
    expected = directions(method, model, [(x, y)])
    for found, alone in zip(directions(method, model, [(x[:2], y[:2]), (x[2:], y[2:])]), expected, strict=True):
        close(found, alone)


def directions(method, model, shares):
    """Run the tasks of every block by hand, one share of the batch a rank, and return the first rank's directions."""
    ranks = []
    for inputs, targets in shares:
        module = copy.deepcopy(model)
        preconditioner = GradientPreconditioner(module, method)
        loss = cross_entropy(module(inputs), targets)
        preconditioner.observe(loss)
        loss.backward()
        preconditioner._observer.finish_pass()
        ranks.append(preconditioner._slots)
    found = []
    for slots in zip(*ranks, strict=True):
        blocks = [slot.block for slot in slots]
        rows = sum(block.rows for block in blocks)
        add_up([block.pending() for block in blocks])
        for block in blocks:
            block.fold(rows, float(N))
            block.refresh(0.01)
        if slots[0].entry.corrected:
            add_up([block.corrections() for block in blocks])
            for block in blocks:
                block.fold_corrections(float(N))
        shape = slots[0].layers[0].shape
        found += blocks[0].directions([torch.linspace(-1, 2, blocks[0].layers[0].weight.new_empty(shape).numel()).view(shape)])
    return found


def add_up(ranks):
    for tensors in zip(*ranks, strict=True):
        total = sum(tensors)
        for tensor in tensors:
            tensor.copy_(total)
