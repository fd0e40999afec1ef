"""Oracle: the Fisher matrix of every output unit, dense, from per-example gradients of torch.func in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import GradientPreconditioner
from tests.engines.preconditioning.example_oracles import Dense, close, preconditioned

DAMPING = 0.03
N = 6


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Repeated(nn.Module):
    """One linear layer called twice, on sequences."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.layer(x))).mean(1))


def pooled(*layers, channels):
    return nn.Sequential(*layers, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)).double()


def unit_oracle(dense, damping, *names):
    """Solve every unit's system by itself: ``(units, I)``, the bias last."""
    rows = torch.cat(
        [dense.row[name].flatten(2) if dense.row[name].ndim > 2 else dense.row[name].unsqueeze(-1) for name in names], -1
    )
    means = [dense.gradients[name].mean(0) for name in names]
    means = torch.cat([mean.reshape(len(mean), -1) for mean in means], -1)
    eye = torch.eye(rows.shape[-1], dtype=rows.dtype)
    fishers = [rows[:, unit].mT @ rows[:, unit] / dense.count + damping * eye for unit in range(len(means))]
    return torch.stack([torch.linalg.solve(fisher, mean) for fisher, mean in zip(fishers, means, strict=True)])


def per_unit(found, *names):
    return torch.cat([found[name].reshape(len(found[names[-1]]), -1) for name in names], -1)


MODELS = {
    "sequence": (lambda: Repeated().double(), (N, 5, 4), ["layer", "head"]),
    "grouped": (lambda: pooled(nn.Conv2d(4, 6, 3, stride=2, groups=2, padding=1), channels=6), (N, 4, 7, 7), ["0", "4"]),
    "dilated": (
        lambda: pooled(nn.Conv2d(2, 3, 3, padding="same", dilation=2, padding_mode="circular"), channels=3),
        (N, 2, 6, 5),
        ["0"],
    ),
}


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("case", MODELS)
def test_every_unit_is_solved_by_its_own_fisher_matrix(case, fisher):
    make, shape, layers = MODELS[case]
    model, x, y = make(), torch.randn(shape).double(), torch.randint(3, (N,))
    dense = Dense(model, x, y, exact=fisher == "exact")
    found = preconditioned(model, [(x, y)], "unit", fisher=fisher, damping=DAMPING)
    for layer in layers:
        names = (f"{layer}.weight", f"{layer}.bias")
        close(per_unit(found, *names), unit_oracle(dense, DAMPING, *names))


NORMS = {
    "group": (lambda: nn.GroupNorm(2, 4), (N, 4, 3, 3)),
    "batch, frozen statistics": (lambda: nn.BatchNorm2d(4).eval(), (N, 4, 3, 3)),
    "layer": (lambda: nn.LayerNorm(4), (N, 3, 4)),
    "layer, two axes": (lambda: nn.LayerNorm((2, 4)), (N, 3, 2, 4)),
    "rms": (lambda: nn.RMSNorm(4), (N, 3, 4)),
}


@pytest.mark.parametrize("method", ["unit", "kfac"])
@pytest.mark.parametrize("gamma", [0.0, 1.3])
@pytest.mark.parametrize("case", NORMS)
def test_norm_layers_have_a_two_by_two_matrix_a_feature_also_where_the_scale_is_zero(case, gamma, method):
    make, shape = NORMS[case]
    norm = make()
    with torch.no_grad():
        norm.weight.fill_(gamma)
    x, y = torch.randn(shape).double(), torch.randint(3, (N,))
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(x[0].numel(), 3)).double()
    names = ("0.weight",) if case == "rms" else ("0.weight", "0.bias")
    dense = Dense(model, x, y)
    found = preconditioned(model, [(x, y)], method, damping=DAMPING)
    for name in names:  # a norm over several axes has a unit per entry
        dense.row[name], dense.gradients[name] = dense.row[name].flatten(1), dense.gradients[name].flatten(1)
        found[name] = found[name].flatten()
    close(per_unit(found, *names), unit_oracle(dense, DAMPING, *names))


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_batch_norm_in_training_takes_every_example_s_share_of_the_gradient(gamma):
    norm = nn.BatchNorm1d(4).double()
    with torch.no_grad():
        norm.weight.fill_(gamma)
    x, y = torch.randn(N, 4).double() * 3 + 1, torch.randint(3, (N,))
    model = nn.Sequential(norm, nn.Linear(4, 3)).double()
    normalized = (x - x.mean(0)) / (x.var(0, unbiased=False) + norm.eps).sqrt()

    def summed(scale, shift):  # every example has scale and shift of its own, of the same values
        return functional.cross_entropy(model[1](normalized * scale + shift), y, reduction="sum")

    own = (torch.full((N, 4), gamma, dtype=torch.float64), torch.zeros(N, 4, dtype=torch.float64))
    scale, shift = torch.autograd.functional.jacobian(summed, own)
    found = preconditioned(model, [(x, y)], "unit", damping=DAMPING)
    for unit in range(4):
        rows = torch.stack([scale[:, unit], shift[:, unit]], dim=1)
        expected = torch.linalg.solve(rows.mT @ rows / N + DAMPING * torch.eye(2).double(), rows.mean(0))
        close(torch.stack([found["0.weight"][unit], found["0.bias"][unit]]), expected)


def test_wide_units_fall_into_blocks_of_inputs():
    model, x, y = nn.Linear(5, 2).double(), torch.randn(N, 5, dtype=torch.float64), torch.randint(2, (N,))
    dense = Dense(model, x, y)
    found = per_unit(preconditioned(model, [(x, y)], "unit", damping=DAMPING, max_dim=4), "weight", "bias")
    for unit in range(2):  # 5 inputs and the bias: two blocks of 3
        row = torch.cat([dense.row["weight"][:, unit], dense.row["bias"][:, unit, None]], 1)
        for part in (slice(0, 3), slice(3, 6)):
            matrix = row[:, part].mT @ row[:, part] / N + DAMPING * torch.eye(3, dtype=torch.float64)
            close(found[unit, part], torch.linalg.solve(matrix, row[:, part].mean(0)))


def test_blocks_that_cannot_be_inverted_keep_their_last_inverses():
    model, x, y = MODELS["sequence"][0](), torch.randn(N, 5, 4).double(), torch.randint(3, (N,))
    preconditioner = GradientPreconditioner(model, "unit")
    loss = functional.cross_entropy(model(x), y)
    preconditioner.observe(loss)
    loss.backward()
    preconditioner.precondition()
    block = preconditioner._slots[0].block
    before = block.derived()[0].clone()
    block.fisher.value[0, 0] = -1e6
    block.refresh(0.01)
    assert torch.equal(block.derived()[0], before)
    assert block.trouble.kept_inverses == 1


def test_an_embedding_has_no_unit_wise_form_and_the_table_says_so():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    (line,) = (line for line in GradientPreconditioner(model, "unit").table if line.parameter == "0.weight")
    assert line.reason == "unit has no form for layers of kind embedding"
    with pytest.raises(InputError, match="it needs trainable layers of kind linear, convolution, transposed convolution, norm"):
        GradientPreconditioner(model[0], "unit")
