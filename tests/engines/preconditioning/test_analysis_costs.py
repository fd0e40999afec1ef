"""Oracle: FlopCounterMode over the engine's own code, and the bytes of the state that it keeps."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import METHODS, GradientPreconditioner
from lightning_plugins.engines.preconditioning.analysis import count_costs, format_costs
from lightning_plugins.engines.preconditioning.layers import layer_of

aten = torch.ops.aten
BESIDE_PRODUCTS = {  # what the counter does not know by itself; of square matrices and solves batches, too
    aten.linalg_cholesky_ex: lambda shape, *_, **__: cube(shape) / 3,
    aten.cholesky_inverse: lambda shape, *_, **__: cube(shape) * 2 / 3,
    aten._linalg_eigh: lambda shape, *_, **__: cube(shape) * 9,
    aten.linalg_qr: lambda shape, *_, **__: cube(shape) * 8 / 3,
    aten.addmm_: lambda shape, a, b, *_, **__: 2 * a[0] * a[1] * b[1],
    aten.cholesky_solve: lambda columns, factor, *_, **__: 2 * columns[-1] * torch.Size(factor).numel(),
    aten.mv: lambda a, *_, **__: 2 * a.numel(),
    aten.linalg_solve_triangular: lambda a, b, *_, out_shape, **__: torch.Size(out_shape).numel() * a[-1],
}


def cube(shape):
    return torch.Size(shape).numel() * shape[-1]


def counted(action):
    with FlopCounterMode(display=False, custom_mapping=BESIDE_PRODUCTS) as counter:
        action()
    return counter.get_total_flops()


class Flat(nn.Module):
    """A linear layer over sequences, so that a layer has positions."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (6, 7)),
    "sequence": (lambda: nn.Linear(7, 6, bias=False), (4, 3, 7)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (3, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 2, 3, bias=False), (3, 4, 5)),
    "embedding": (lambda: nn.Embedding(9, 4), (3, 5)),
    "norm": (lambda: nn.LayerNorm(6), (4, 3, 6)),
}


def single(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    module = Flat(make()).double()
    x = torch.randint(0, 9, shape) if kind == "embedding" else torch.randn(shape, dtype=torch.float64)
    return module, x


TAPPED = [
    (method, kind)
    for method in ("kfac", "foof", "ekfac", "diag", "unit", "layer")
    for kind, (make, _) in LAYERS.items()
    if layer_of("", make()).kind in METHODS[method].kinds
]


def kept_bytes(state):
    if isinstance(state, torch.Tensor):
        # Single numbers and the state of a random generator are not what memory goes to.
        return state.nbytes if state.numel() > 1 and state.is_floating_point() else 0
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return sum(kept_bytes(part) for part in parts)


def tapped_counts(method, module, x, **options):
    """Operations of the engine's own block: an observation, a refresh with the two steps after it, a step; and its bytes."""
    layer = layer_of("layer", module.layer)
    entry = METHODS[method]
    block = entry.make(layer, entry.settings(**options), entry.fishers[0])
    gradient = torch.randn_like(module(x))
    rows = layer.inputs(x).shape[1:3].numel()

    def observe():
        block.accumulate_inputs(layer, x)
        block.accumulate_output_gradients(layer, x, gradient, 1.0)
        block.finish_pass()
        block.pending()

    def correct():
        if entry.corrected:
            block.corrections()
            block.fold_corrections(1.0)

    weight = [torch.randn(layer.shape, dtype=torch.float64)]

    def refresh_and_use_twice():
        block.refresh(0.1)
        block.directions(weight)
        block.directions(weight)

    observed = counted(observe)
    kept = list(block.examples._passes) if entry.corrected else None  # a fold ends the step, and a second one needs its rows
    block.fold(rows, 1.0)
    if kept is not None:
        block.examples._passes = kept
    block.refresh(0.1)
    observed += counted(correct)
    refresh_and_use_twice()
    # An inverse may be made at the refresh or at its second use; bases carry what they had from the second refresh on.
    made = counted(refresh_and_use_twice)
    return observed, made, counted(lambda: block.directions(weight)), kept_bytes(block.state_dict())


@pytest.mark.parametrize(("method", "kind"), TAPPED)
def test_counts_of_a_layer_are_those_of_the_engine(method, kind):
    module, x = single(kind)
    (cost,) = count_costs(module, x, method)
    observed, made, applied, kept = tapped_counts(method, module, x)
    assert cost.statistics_flop == pytest.approx(observed)
    assert cost.apply_flop == pytest.approx(applied)
    assert cost.refresh_flop + 2 * cost.apply_flop == pytest.approx(made)
    assert cost.memory_bytes == kept


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("options", [{"positions": "reduce"}, {"max_dim": 3}], ids=str)
def test_counts_follow_the_settings(method, options):
    torch.manual_seed(0)
    module, x = Flat(nn.Linear(6, 9, bias=False).double()), torch.randn(5, 4, 6, dtype=torch.float64)
    (cost,) = count_costs(module, x, method, **options)
    observed, made, applied, kept = tapped_counts(method, module, x, **options)
    found = (cost.statistics_flop, cost.refresh_flop + 2 * cost.apply_flop, cost.apply_flop, cost.memory_bytes)
    assert found == pytest.approx((observed, made, applied, kept))
    assert cost.statistics_flop != count_costs(module, x, method)[0].statistics_flop


PARAMETERS = [(method, shape) for method in ("shampoo", "soap", "psgd", "muon") for shape in ((6, 9), (4, 3, 2, 2), (7,))]
PARAMETERS.remove(("muon", (7,)))


class Scaled(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x):
        return self.weight.sum() * x


@pytest.mark.parametrize(("method", "shape"), PARAMETERS, ids=str)
@pytest.mark.parametrize("options", [{}, {"max_dim": 6}, {"flatten": False}], ids=str)
def test_counts_of_a_parameter_are_those_of_the_engine(method, shape, options):
    torch.manual_seed(0)
    options = {} if method == "muon" else options
    module = Scaled(*shape)
    (cost,) = count_costs(module, torch.ones(1), method, **options)
    block = METHODS[method].make(module.weight, METHODS[method].settings(**options))
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    block.fold(gradients[0])
    block.refresh()
    block.direction(gradients[0])
    observed = counted(lambda: block.fold(gradients[1]))
    made, applied = counted(block.refresh), counted(lambda: block.direction(gradients[2]))
    found = (cost.statistics_flop, cost.refresh_flop, cost.apply_flop, cost.memory_bytes)
    assert found == pytest.approx((observed, made, applied, kept_bytes(block.state_dict())))


@pytest.mark.parametrize(("graft", "moments"), [("none", 0), ("sgd", 0), ("adagrad", 1), ("rmsprop", 1), ("adam", 2)])
def test_memory_of_grafting(graft, moments):
    module = Scaled(6, 9)
    (cost,) = count_costs(module, torch.ones(1), "shampoo", graft=graft)
    assert cost.memory_bytes == 8 * (2 * (36 + 81) + moments * 54)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.Dropout(0.5), nn.Linear(8, 3)
    ).double()


def images(count=6):
    return torch.randn(count, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_kfac_of_a_network_is_what_a_step_of_it_adds():
    module, x = network().eval(), images()
    targets = torch.arange(6) % 3

    def step(preconditioner):
        module.zero_grad()
        loss = functional.cross_entropy(module(x), targets)
        if preconditioner:
            preconditioner.observe(loss)
        loss.backward()
        if preconditioner:
            preconditioner.precondition()

    plain = counted(lambda: step(None))
    costs = count_costs(module, x, "kfac", norms="plain")
    preconditioner = GradientPreconditioner(module, "kfac", norms="plain", inverse_every=5, warmup_steps=0)
    for _ in range(2):
        step(preconditioner)
    without_refresh = sum(cost.statistics_flop + cost.apply_flop for cost in costs)
    # The second use made the inverses; from now on a step observes and applies.
    assert counted(lambda: step(preconditioner)) - plain == pytest.approx(without_refresh)
    # Training is counted without the bias that an input stands for, and the first layer's inputs need no gradient.
    first, *others = (2 * 6 * 9 * 4 * 18, 2 * 6 * 36 * 8, 2 * 6 * 8 * 3)
    assert plain == 2 * first + 3 * sum(others)
    assert sum(cost.training_flop for cost in costs) == 3 * (2 * 6 * 9 * 4 * 19 + 2 * 6 * 37 * 8 + 2 * 6 * 9 * 3)


def test_full_is_solved_once_for_all_layers():
    costs = count_costs(network().eval(), images(), "full")
    assert [cost.name for cost in costs] == ["0", "1", "4", "6", "all layers"]
    assert costs[-1].refresh_flop == pytest.approx(6**3 / 3)
    assert sum(cost.refresh_flop for cost in costs[:-1]) == 0
    alone = count_costs(network().eval(), images(), "layer")
    assert [cost.statistics_flop for cost in alone] == [cost.statistics_flop for cost in costs[:-1]]
    assert sum(cost.refresh_flop for cost in alone) == pytest.approx(4 * 6**3 / 3)


def test_norms_go_to_the_method_that_they_have():
    methods = {cost.name: cost.method for cost in count_costs(network(), images(), "kfac")}
    assert methods == {"0": "kfac", "1": "unit", "4": "kfac", "6": "kfac"}


def test_intervals_and_drawn_targets():
    (plain,) = count_costs(nn.Linear(5, 4), torch.ones(10, 5), factor_every=10, inverse_every=100)
    expected = plain.statistics_flop / 10 + plain.refresh_flop / 100 + plain.apply_flop
    assert plain.step_flop == pytest.approx(expected)
    (drawn,) = count_costs(nn.Linear(5, 4), torch.ones(10, 5), fisher="mc", samples=3)
    # Two more second moments of the outputs' gradients, and three backward passes of two products each.
    assert drawn.statistics_flop - plain.statistics_flop == 2 * (2 * 10 * 4**2) + 3 * (4 * 10 * 4 * 6)


def test_calls_and_tied_weights_add_up():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight, self.two.bias = self.one.weight, self.one.bias

        def forward(self, x):
            return self.two(self.one(self.one(x)))

    (cost,) = count_costs(Twice(), torch.ones(5, 4))
    assert cost.rows == 15


def test_the_module_and_the_generator_stay_as_they_are():
    module = network().train()
    before, generator = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    count_costs(module, images())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(part._forward_hooks for part in module.modules())


def test_table_has_a_line_a_layer_and_their_sum():
    costs = count_costs(nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False)), torch.ones(50, 100))
    lines = format_costs(costs).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    # Training 6 M d^2, statistics 4 M d^2, refresh 2 d^3, apply 4 d^3; twice; 4 factors and inverses of 4 d^2 bytes each.
    assert lines[-1].split() == ["all", "6.00", "4.00", "4.00", "8.00", "16.00", "2.667", "312.5"]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("kfak", {}, "there is no method 'kfak'; did you mean kfac"),
        ("kfac", {"dampin": 1.0}, "kfac has no option 'dampin'; did you mean damping"),
        ("kfac", {"fisher": "exact"}, "depend on the loss; count fisher='mc' with samples= the number of classes"),
        ("shampoo", {"root": "newton"}, "depend on the matrices; count root='eigh'"),
    ],
)
def test_bad_input_is_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        count_costs(nn.Linear(3, 2), torch.ones(4, 3), method, **options)


def test_a_method_without_a_model_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS, "novel", METHODS["kfac"])
    with pytest.raises(InputError, match="there is no model of the costs of 'novel'; valid are diag, ekfac, foof"):
        count_costs(nn.Linear(3, 2), torch.ones(4, 3), "novel")
