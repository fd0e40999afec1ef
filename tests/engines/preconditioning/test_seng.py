"""Oracle: the layer's dense empirical Fisher matrix of per-example gradients by torch.func, in float64, and its linear solve."""

import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import GradientPreconditioner

EXACT = {"sketch": None, "rank": None}
DAMPING = 0.05


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def targets(count):
    return torch.randint(3, (count,), generator=torch.Generator().manual_seed(1))


def example_gradients(module, x, target):
    """Return the gradient of every example's loss by parameter, ``(N, *shape)``."""
    state = {name: p.detach() for name, p in module.named_parameters()}

    def loss(state, example, wanted):
        return functional.cross_entropy(functional_call(module, state, (example.unsqueeze(0),)), wanted.unsqueeze(0))

    return vmap(grad(loss), in_dims=(None, 0, 0))(state, x, target)


def layer_rows(gradients, layer):
    """Return the per-example gradients of a layer's weight and bias as ``(N, D)``."""
    return torch.cat([value.flatten(1) for name, value in gradients.items() if name.rpartition(".")[0] == layer], dim=1)


def solved(rows, gradient, damping=DAMPING):
    fisher = rows.mT @ rows / len(rows)
    return torch.linalg.solve(fisher + damping * torch.eye(len(fisher), dtype=rows.dtype), gradient)


class Perceptron(nn.Module):
    shape = (4,)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))

    def forward(self, x):
        return self.body(x)


class Sequences(nn.Module):
    """Six positions a layer, and one layer called twice."""

    shape = (6, 4)

    def __init__(self):
        super().__init__()
        self.start, self.again, self.end = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(self.start(x))
        return self.end(self.again(torch.tanh(self.again(x))).mean(1))


class Images(nn.Module):
    """Convolutions, also grouped and transposed."""

    shape = (2, 6, 6)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, stride=2),
            nn.Tanh(),
            nn.Conv2d(4, 4, 2, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 3, 2, bias=False),
        )

    def forward(self, x):
        return self.body(x).mean((2, 3))


MODULES = pytest.mark.parametrize("made", [Perceptron, Sequences, Images])


def module_and_batch(made, count=7):
    torch.manual_seed(0)
    return made().double(), draw(count, *made.shape), targets(count)


def observe(module, preconditioner, x, target, pieces=(None,), scale=1.0):
    """Run one step's forward and backward passes; ``pieces`` are sizes of micro-batches."""
    module.zero_grad()
    sizes = [len(x)] if pieces == (None,) else list(pieces)
    for part, wanted in zip(x.split(sizes), target.split(sizes), strict=True):
        loss = functional.cross_entropy(module(part), wanted) * (scale * len(part) / len(x))
        preconditioner.observe(loss)
        loss.backward()


def layers_of(module):
    return [name for name, part in module.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]


def layer_gradient(module, layer):
    return torch.cat([p.grad.flatten() for p in module.get_submodule(layer).parameters()])


@MODULES
@pytest.mark.parametrize("pieces", [(None,), (3, 4)], ids=["whole", "accumulated"])
@pytest.mark.parametrize("options", [EXACT, {"sketch": 1000, "rank": 36}], ids=["no sketch", "a sketch of everything"])
def test_without_sketching_it_is_the_dense_solve_of_every_layer(made, pieces, options):
    module, x, target = module_and_batch(made)
    rows = {layer: layer_rows(example_gradients(module, x, target), layer) for layer in layers_of(module)}
    preconditioner = GradientPreconditioner(module, "seng", damping=DAMPING, **options)
    observe(module, preconditioner, x, target, pieces)
    preconditioner.precondition()
    for layer, of_layer in rows.items():
        expected = solved(of_layer, of_layer.mean(0))
        assert (layer_gradient(module, layer) - expected).norm() <= 1e-10 * expected.norm(), layer


@MODULES
def test_a_gradient_that_is_not_the_examples_own_is_solved_for_too(made):
    """A penalty on the weights adds what no example's gradient spans."""
    module, x, target = module_and_batch(made)
    rows = {layer: layer_rows(example_gradients(module, x, target), layer) for layer in layers_of(module)}
    preconditioner = GradientPreconditioner(module, "seng", damping=DAMPING, **EXACT)
    observe(module, preconditioner, x, target)
    for p in module.parameters():
        p.grad += 0.1 * p.detach()
    given = {layer: layer_gradient(module, layer) for layer in rows}
    preconditioner.precondition()
    for layer, of_layer in rows.items():
        expected = solved(of_layer, given[layer])
        assert (layer_gradient(module, layer) - expected).norm() <= 1e-10 * expected.norm(), layer


def test_the_direction_scales_with_the_loss():
    module, x, target = module_and_batch(Perceptron)
    directions = []
    for scale in (1.0, 2.0**16):
        preconditioner = GradientPreconditioner(module, "seng", damping=DAMPING, **EXACT)
        observe(module, preconditioner, x, target, scale=scale)
        preconditioner.precondition(gradient_scale=scale)
        directions.append(torch.cat([p.grad.flatten() for p in module.parameters()]) / scale)
        preconditioner.detach()
    torch.testing.assert_close(directions[0], directions[1], rtol=1e-12, atol=1e-14)


def grams(made, draws, **options):
    """Return ``draws`` Gram matrices of every layer, and the dense ones."""
    module, x, target = module_and_batch(made, count=4)
    dense = example_gradients(module, x, target)
    preconditioner = GradientPreconditioner(module, "seng", **options)
    observe(module, preconditioner, x, target)
    preconditioner._observer.finish_pass()
    for slot in preconditioner._slots:
        rows = layer_rows(dense, slot.name)
        drawn = []
        for _ in range(draws):
            slot.block._gram = None
            drawn.append(slot.block.pending()[0])
        yield slot.name, torch.stack(drawn), rows @ rows.mT


@MODULES
def test_sketched_inner_products_have_the_right_mean(made):
    draws = 400
    for layer, drawn, expected in grams(made, draws, sketch=2, rank=None):
        error = (drawn.mean(0) - expected).abs()
        assert (error <= 4 * drawn.std(0) / draws**0.5 + 1e-12).all(), layer
        assert drawn.std(0).max() > 1e-3 * expected.abs().max(), layer


def test_a_small_rank_is_the_best_approximation_of_the_output_gradients():
    """A layer whose loss is the sum of ``y . g``: its output gradients are ``g``, and numpy's SVD cuts them."""
    layer = nn.Linear(4, 5, bias=False).double()
    x, g = draw(3, 6, 4), draw(3, 6, 5, seed=1)
    preconditioner = GradientPreconditioner(layer, "seng", sketch=None, rank=2, reduction="sum")
    loss = (layer(x) * g).sum()
    preconditioner.observe(loss)
    loss.backward()
    preconditioner._observer.finish_pass()
    (gram,) = preconditioner._slots[0].block.pending()
    left, values, right = torch.linalg.svd(g)
    values[:, 2:] = 0
    cut = left[:, :, :5] @ torch.diag_embed(values) @ right
    rows = (cut.mT @ x).flatten(1)
    torch.testing.assert_close(gram, rows @ rows.mT, rtol=1e-10, atol=1e-12)


def test_a_rank_of_all_outputs_changes_nothing():
    module, _, _ = module_and_batch(Images)
    assert len(layers_of(module)) == 3
    for layer, drawn, expected in grams(Images, 1, sketch=None, rank=4):
        torch.testing.assert_close(drawn[0], expected, rtol=1e-10, atol=1e-14, msg=layer)


@pytest.mark.parametrize("added", [False, True], ids=["own gradient", "another combination of the examples"])
def test_a_sketch_turns_the_direction_round_far_less_often_than_one_of_the_gram_matrix_alone(added):
    """Exact products with ``V`` beside sketched ones among the examples divide the sketch's error by the damping."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, target, damping = draw(12, 4), targets(12), 1e-3
    examples = example_gradients(module, x, target)
    dense = {layer: layer_rows(examples, layer) for layer in layers_of(module)}
    turned, exact_turned = 0, 0
    for seed in range(20):
        preconditioner = GradientPreconditioner(module, "seng", damping=damping, sketch=6, rank=None, seed=seed)
        observe(module, preconditioner, x, target)
        if added:
            for name, gradients in examples.items():
                module.get_parameter(name).grad += torch.tensordot(draw(12, seed=3) / 12, gradients, 1)
        given = {layer: layer_gradient(module, layer) for layer in dense}
        preconditioner._observer.finish_pass()
        gram = {slot.name: slot.block.pending()[0] for slot in preconditioner._slots}
        preconditioner.precondition()
        for layer, gradient in given.items():
            rows = dense[layer]
            solution = torch.linalg.solve(gram[layer] + 12 * damping * torch.eye(12, dtype=torch.float64), rows @ gradient)
            exact_turned += float((gradient - rows.mT @ solution) @ gradient) < 0
            turned += float(layer_gradient(module, layer) @ gradient) < 0
        preconditioner.detach()
    assert exact_turned >= 30
    assert 5 * turned <= exact_turned


def test_a_state_continues_with_the_same_draws():
    def steps(module, preconditioner, seeds):
        for seed in seeds:
            observe(module, preconditioner, draw(6, 4, seed=seed).float(), targets(6))
            preconditioner.precondition()
            with torch.no_grad():
                for p in module.parameters():
                    p -= 0.01 * p.grad

    options = {"damping": DAMPING, "sketch": 2, "seed": 5}
    module = module_and_batch(Perceptron)[0].float()
    preconditioner = GradientPreconditioner(module, "seng", **options)
    steps(module, preconditioner, range(3))
    file = io.BytesIO()
    torch.save({"module": module.state_dict(), "preconditioner": preconditioner.state_dict()}, file)
    steps(module, preconditioner, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = module_and_batch(Perceptron)[0].float()
    other.load_state_dict(saved["module"])
    resumed = GradientPreconditioner(other, "seng", **options)
    resumed.load_state_dict(saved["preconditioner"])
    steps(other, resumed, range(3, 6))
    assert all(torch.equal(one, two) for one, two in zip(module.parameters(), other.parameters(), strict=True))


def test_draws_follow_the_seed_and_not_the_global_generator():
    module, x, target = module_and_batch(Perceptron)

    def direction(seed):
        preconditioner = GradientPreconditioner(module, "seng", sketch=2, seed=seed)
        observe(module, preconditioner, x, target)
        preconditioner.precondition()
        preconditioner.detach()
        return torch.cat([p.grad.flatten() for p in module.parameters()])

    first = direction(1)
    before = torch.get_rng_state()
    assert torch.equal(direction(1), first)
    assert not torch.equal(direction(2), first)
    assert torch.equal(torch.get_rng_state(), before)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation returned."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.entries = max(self.entries, out.numel())
        return out


def test_no_gradient_of_an_example_is_formed():
    layer = nn.Linear(60, 50)
    x, target = draw(40, 60).float(), torch.zeros(40, dtype=torch.int64)
    preconditioner = GradientPreconditioner(layer, "seng", sketch=20)
    observe(layer, preconditioner, x, target)
    with Largest() as largest:
        preconditioner.precondition()
    assert 50 * 61 <= largest.entries < 2 * 50 * 61


def test_a_batch_that_is_not_finite_is_left_alone_and_counted():
    module, x, target = module_and_batch(Perceptron)
    preconditioner = GradientPreconditioner(module, "seng", damping=DAMPING)
    x[2] = float("inf")
    observe(module, preconditioner, x, target)
    preconditioner.precondition()
    assert preconditioner.metrics()["nonfinite_batches_count"] == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sketch": 0}, "sketch must be a whole number of 1 or more, got 0"),
        ({"rank": -1}, "rank must be a whole number of 1 or more, got -1"),
        ({"factor_every": 2, "inverse_every": 2}, "must be 1, got 2 and 2"),
        ({"fisher": "mc"}, "seng has no fisher='mc'; valid are empirical"),
    ],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        GradientPreconditioner(Perceptron(), "seng", **options)
