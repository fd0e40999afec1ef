"""Oracle: factors, bases, ``S`` and the direction from per-example gradients and rows that the test writes down itself."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import GradientPreconditioner
from lightning_plugins.engines.preconditioning.examples import Rows
from lightning_plugins.engines.preconditioning.methods.ekfac import _squares_along
from tests.engines.preconditioning.dense import joined
from tests.engines.preconditioning.example_oracles import MODELS, Dense, close, names_of

DAMPING = 0.01
N = 6


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def observed(model, x, y, method="ekfac", loss=functional.cross_entropy, **options):
    """Take one step and return the preconditioner, the gradients before and those after."""
    model = copy.deepcopy(model)
    preconditioner = GradientPreconditioner(model, method, damping=DAMPING, **options)
    value = loss(model(x), y)
    preconditioner.observe(value)
    value.backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    preconditioner.precondition()
    return preconditioner, before, {name: parameter.grad for name, parameter in model.named_parameters()}


def whole(basis):
    """``(B, pieces, f, f)`` of one block as one matrix."""
    assert basis.shape[0] == 1
    return torch.block_diag(*basis[0])


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("case", ["perceptron", "called twice, on sequences", "dilated, circular"])
def test_the_moments_are_the_diagonal_of_the_fisher_matrix_in_the_bases(case, fisher):
    model, x, y = MODELS[case](N)
    dense = Dense(model, x, y, exact=fisher == "exact")
    preconditioner, before, after = observed(model, x, y, fisher=fisher)
    for slot in preconditioner._slots:
        names = [name for name in names_of(model)[slot.name]]
        rows = joined(*(dense.row[name] for name in names))
        block = slot.block
        u_g, u_a = (whole(basis) for basis in block._bases)
        basis = torch.kron(u_g, u_a)
        fisher_matrix = rows.mT @ rows / N
        close(block.moments.value.flatten(), (basis.mT @ fisher_matrix @ basis).diagonal())
        gradient = joined(*(before[name].unsqueeze(0) for name in names)).squeeze(0)
        corrected = basis @ torch.diag(block.moments.value.flatten()) @ basis.mT
        expected = torch.linalg.solve(corrected + DAMPING * torch.eye(len(corrected), dtype=torch.float64), gradient)
        close(joined(*(after[name].unsqueeze(0) for name in names)).squeeze(0), expected)
        k_fac = torch.kron(block.factors.outputs.value[0, 0], block.factors.inputs.value[0, 0])
        assert (corrected - fisher_matrix).norm() <= (k_fac - fisher_matrix).norm()
        close(u_g @ u_g.mT, torch.eye(len(u_g), dtype=torch.float64))


@pytest.mark.parametrize("case", ["perceptron", "called twice, on sequences", "dilated, circular"])
def test_the_bases_are_those_of_the_factors(case):
    model, x, y = MODELS[case](N)
    for slot in observed(model, x, y)[0]._slots:
        factors = (slot.block.factors.outputs.value[0, 0], slot.block.factors.inputs.value[0, 0])
        for basis, factor in zip(slot.block._bases, factors, strict=True):
            turned = whole(basis).mT @ factor @ whole(basis)
            assert (turned - torch.diag(turned.diagonal())).norm() <= 1e-12 * factor.norm()


def test_an_embedding_keeps_its_tokens_for_a_basis():
    model, x, y = MODELS["tokens"](N)
    preconditioner, before, after = observed(model, x, y)
    block = next(slot.block for slot in preconditioner._slots if slot.name == "embedding")
    (basis,) = block._bases
    rows = Dense(model, x, y).row["embedding.weight"] @ whole(basis)  # (N, vocabulary, O)
    moments = rows.square().sum(0) / N
    close(block.moments.value[0].mT, moments)
    close(after["embedding.weight"], (before["embedding.weight"] @ whole(basis) / (moments + DAMPING)) @ whole(basis).mT)


def test_groups_have_bases_of_their_own():
    model, x, y = MODELS["grouped, strided, group norm"](N)
    preconditioner, before, after = observed(model, x, y)
    block = preconditioner._slots[0].block
    rows = Dense(model, x, y)
    for group in range(2):
        outputs, inputs = (basis[group, 0] for basis in block._bases)
        part = slice(3 * group, 3 * group + 3)
        weight, bias = rows.row["0.weight"][:, part].flatten(2), rows.row["0.bias"][:, part, None]
        moments = (outputs.mT @ torch.cat([weight, bias], 2) @ inputs).square().sum(0) / N
        gradient = torch.cat([before["0.weight"][part].flatten(1), before["0.bias"][part, None]], 1)
        expected = outputs @ (outputs.mT @ gradient @ inputs / (moments + DAMPING)) @ inputs.mT
        close(torch.cat([after["0.weight"][part].flatten(1), after["0.bias"][part, None]], 1), expected)


def test_wide_factors_fall_into_blocks():
    model, x, y = MODELS["perceptron"](N)
    preconditioner, before, after = observed(model, x, y, max_dim=3)
    block = preconditioner._slots[0].block  # 5 inputs and the bias are two blocks of 3, 4 outputs two blocks of 2
    u_g, u_a = (whole(basis) for basis in block._bases)
    assert (u_g[:2, 2:] == 0).all()
    assert (u_a[:3, 3:] == 0).all()
    rows = joined(*(Dense(model, x, y).row[name] for name in ("0.weight", "0.bias"))).unflatten(1, (4, 6))
    moments = (u_g.mT @ rows @ u_a).square().sum(0) / N
    gradient = torch.cat([before["0.weight"], before["0.bias"][:, None]], 1)
    expected = u_g @ (u_g.mT @ gradient @ u_a / (moments + DAMPING)) @ u_a.mT
    close(torch.cat([after["0.weight"], after["0.bias"][:, None]], 1), expected)


def test_a_width_that_the_blocks_do_not_fill_is_padded_and_nothing_leaks():
    model = nn.Linear(6, 5).double()  # 6 inputs and the bias in two blocks of 4, 5 outputs in two of 3
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(5, (40,))
    preconditioner, _, after = observed(model, x, y, max_dim=4)
    block = preconditioner._slots[0].block
    u_g, u_a = (whole(basis) for basis in block._bases)
    rows = torch.zeros(40, 6, 8, dtype=torch.float64)
    rows[:, :5, :7] = joined(*(Dense(model, x, y).row[name] for name in ("weight", "bias"))).unflatten(1, (5, 7))
    moments = (u_g.mT @ rows @ u_a).square().sum(0) / 40
    expected = (u_g @ (u_g.mT @ rows.mean(0) @ u_a / (moments + DAMPING)) @ u_a.mT)[:5, :7]
    close(torch.cat([after["weight"], after["bias"][:, None]], 1), expected)


def test_the_average_of_the_moments_follows_the_bases_when_they_turn():
    model, x, y = MODELS["perceptron"](N)
    tapped = copy.deepcopy(model)
    preconditioner = GradientPreconditioner(tapped, "ekfac", damping=DAMPING, decay=0.5)
    batches, states = [x, torch.randn_like(x)], []
    for inputs in batches:
        tapped.zero_grad()
        loss = functional.cross_entropy(tapped(inputs), y)
        preconditioner.observe(loss)
        loss.backward()
        preconditioner.precondition()
        block = preconditioner._slots[0].block
        u_g, u_a = (whole(basis) for basis in block._bases)
        states.append((torch.kron(u_g, u_a).clone(), block.moments.value.flatten().clone()))
    (old, first), (new, second) = states
    assert (old - new).norm() > 0.1  # they did turn
    rows = joined(*(Dense(model, batches[1], y).row[name] for name in ("0.weight", "0.bias")))
    fresh = (rows @ new).square().sum(0) / N
    kept = (new.mT @ old @ torch.diag(first) @ old.mT @ new).diagonal()
    close(second, 0.5 * kept + 0.5 * fresh)


def test_between_refreshes_the_moments_go_on_in_the_bases_that_there_are():
    model, x, y = MODELS["perceptron"](N)
    tapped = copy.deepcopy(model)
    preconditioner = GradientPreconditioner(tapped, "ekfac", inverse_every=3, warmup_steps=0, decay=0.5)
    block, bases, moments = preconditioner._slots[0].block, [], []
    for _ in range(4):
        tapped.zero_grad()
        loss = functional.cross_entropy(tapped(torch.randn_like(x)), y)
        preconditioner.observe(loss)
        loss.backward()
        preconditioner.precondition()
        bases.append([basis.clone() for basis in block._bases])
        moments.append(block.moments.value.clone())
    assert all(torch.equal(*pair) for pair in zip(bases[0], bases[2], strict=True))
    assert not torch.equal(bases[2][0], bases[3][0])
    assert not torch.equal(moments[1], moments[2])


def test_factors_without_eigenvectors_keep_the_bases_and_are_counted():
    model, x, y = MODELS["perceptron"](N)
    block = observed(model, x, y)[0]._slots[0].block
    before = [basis.clone() for basis in block._bases]
    block.factors.inputs.value.fill_(float("nan"))
    block.refresh(DAMPING)
    assert all(torch.equal(*pair) for pair in zip(before, block._bases, strict=True))
    assert block.trouble.kept_inverses == 1


def test_ranks_that_share_inverses_out_are_refused():
    with pytest.raises(InputError, match=r"ekfac needs its bases on every rank, so worker_fraction must be 1, got 0.5"):
        GradientPreconditioner(nn.Linear(2, 2), "ekfac", worker_fraction=0.5)


@pytest.mark.parametrize("positions", [1, 4, 40])
def test_turning_rows_and_turning_gradients_give_the_same_squares(positions):
    inputs, gradients = torch.randn(2, N, positions, 5).double(), torch.randn(2, N, positions, 3).double()
    bases = [torch.linalg.qr(torch.randn(2, 1, size, size).double()).Q for size in (3, 5)]
    example = torch.einsum("bnro,bnri->bnoi", gradients, inputs)
    expected = (bases[0].mT @ example @ bases[1]).square().sum(1)
    close(_squares_along(bases, Rows(0, inputs, gradients), 0), expected)


def test_what_an_owner_sends_is_all_that_another_rank_needs():
    model, x, y = MODELS["perceptron"](N)
    owner, other = (observed(model, x, y)[0]._slots[0].block for _ in range(2))
    for block in (owner, other):
        block.factors.outputs.value.add_(torch.diag(torch.arange(4.0).double()))
    owner.refresh(0.7)
    assert all(tensor.is_contiguous() for tensor in owner.derived())
    for sent, received in zip(owner.derived(), other.derived(), strict=True):
        received.copy_(sent)
    gradient = torch.randn(1, 4, 6, dtype=torch.float64)
    assert torch.equal(owner.directions([gradient])[0], other.directions([gradient])[0])
