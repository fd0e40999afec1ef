"""Oracle: the paper's update in numpy, with inverses in product form and rows collected in loops; backpropagation by hand."""

import io
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import GradientPreconditioner
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble
from lightning_plugins.engines.preconditioning.methods.kbfgs import bfgs_update, powell_damped

DECAY = 0.9
OPTIONS = {"damping": 0.3, "decay": DECAY}


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Average:
    """An exponential moving average that counts its first values like a mean."""

    def __init__(self):
        self.count, self.value = 0, 0.0

    def add(self, new):
        self.count += 1
        keep = min(1 - 1 / self.count, DECAY)
        self.value = keep * self.value + (1 - keep) * new


def product_form(inverse, s, y):
    r = s @ y
    left = np.eye(len(s)) - np.outer(s, y) / r
    return left @ inverse @ left.T + np.outer(s, s) / r


def slices(size, widest):
    pieces = math.ceil(size / widest)
    width = math.ceil(size / pieces)
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


class Reference:
    """K-BFGS of one weight matrix ``(O, I)``, from rows of inputs and of gradients of one term's loss."""

    def __init__(self, weight, terms, damping=0.3, max_dim=1024):
        self.terms, self.damping = terms, damping
        self.inputs, self.outputs = slices(weight.shape[1], max_dim), slices(weight.shape[0], max_dim)
        self.factor, self.step, self.change = Average(), Average(), Average()
        self.input_inverses = None
        self.output_inverses = [np.eye(piece.stop - piece.start) for piece in self.outputs]

    def before(self, rows, gradients, weight):
        self.positions = len(rows) / self.terms
        mean = sum(rows) / len(rows)
        self.factor.add(sum(np.outer(row, row) for row in rows) / len(rows))
        ridge = math.sqrt(self.damping / self.positions)
        damped = [self.factor.value[piece, piece] + ridge * np.eye(piece.stop - piece.start) for piece in self.inputs]
        if self.input_inverses is None:
            self.input_inverses = [np.linalg.inv(matrix) for matrix in damped]
        else:
            pairs = [(inverse, inverse @ mean[piece]) for inverse, piece in zip(self.input_inverses, self.inputs, strict=True)]
            self.input_inverses = [product_form(h, s, m @ s) for (h, s), m in zip(pairs, damped, strict=True)]
        self.outputs_before, self.gradient_before = weight @ mean, sum(gradients) / self.terms

    def direction(self, gradient):
        out = np.zeros_like(gradient)
        for rows, left in zip(self.outputs, self.output_inverses, strict=True):
            for columns, right in zip(self.inputs, self.input_inverses, strict=True):
                out[rows, columns] = left @ gradient[rows, columns] @ right
        return out

    def after(self, rows, gradients, weight):
        self.step.add(weight @ (sum(rows) / len(rows)) - self.outputs_before)
        self.change.add(sum(gradients) / self.terms - self.gradient_before)
        ridge = math.sqrt(self.damping * self.positions)
        updated = []
        for inverse, piece in zip(self.output_inverses, self.outputs, strict=True):
            s, y = self.step.value[piece], self.change.value[piece]
            q, r = y @ inverse @ y, s @ y
            if r < 0.2 * q:
                theta = 0.8 * q / (q - r)
                s = theta * s + (1 - theta) * inverse @ y
            updated.append(product_form(inverse, s, y + ridge * s))
        self.output_inverses = updated


def joined(module):
    weight = module.weight.detach().flatten(1)
    return torch.cat([weight, module.bias.detach().unsqueeze(1)], dim=1).numpy()


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def passes_of_perceptron(weights, x, target):
    """Return rows of inputs and of gradients per layer, and the gradients of the mean squared error."""
    rows, deltas = ([], []), ([], [])
    for example, wanted in zip(x, target, strict=True):
        first = np.append(example, 1.0)
        hidden = np.tanh(weights[0] @ first)
        second = np.append(hidden, 1.0)
        last = 2 * (weights[1] @ second - wanted) / len(wanted)
        middle = (weights[1][:, :-1].T @ last) * (1 - hidden**2)
        for layer, (row, delta) in enumerate(((first, middle), (second, last))):
            rows[layer].append(row)
            deltas[layer].append(delta)
    gradients = [sum(np.outer(d, a) for a, d in zip(*pair, strict=True)) / len(x) for pair in zip(rows, deltas, strict=True)]
    return rows, deltas, gradients


@pytest.mark.parametrize("max_dim", [1024, 3], ids=["whole", "blocks of 3"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_perceptron_takes_the_steps_of_the_loop(micro_batches, max_dim):
    model = perceptron()
    preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS, max_dim=max_dim)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    weights = [joined(model[0]), joined(model[2])]
    references = [Reference(weight, 6, max_dim=max_dim) for weight in weights]
    for step in range(8):
        x, target = draw(6, 4, seed=step), 3 * draw(6, 3, seed=100 + step)
        closures = [
            lambda part=part, wanted=wanted: functional.mse_loss(model(part), wanted) / micro_batches
            for part, wanted in zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True)
        ]
        optimizer.zero_grad()
        for closure in closures:
            loss = closure()
            preconditioner.observe(loss)
            loss.backward()
        preconditioner.precondition(optimizer)
        optimizer.step()
        preconditioner.replay(*closures)

        rows, deltas, gradients = passes_of_perceptron(weights, x.numpy(), target.numpy())
        for layer, reference in enumerate(references):
            reference.before(rows[layer], deltas[layer], weights[layer])
        weights = [w - 0.2 * r.direction(g) for w, r, g in zip(weights, references, gradients, strict=True)]
        rows, deltas, _ = passes_of_perceptron(weights, x.numpy(), target.numpy())
        for layer, reference in enumerate(references):
            reference.after(rows[layer], deltas[layer], weights[layer])
        for module, weight in zip((model[0], model[2]), weights, strict=True):
            np.testing.assert_allclose(joined(module), weight, rtol=1e-10, atol=1e-12)


def trained(model, preconditioner, forward, batches, lr=0.2):
    """Train on the squared error of ``forward``; return the gradient of the last batch before and after preconditioning."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x, target in batches:

        def closure(x=x, target=target):
            return functional.mse_loss(forward(x), target)

        optimizer.zero_grad()
        loss = closure()
        preconditioner.observe(loss)
        loss.backward()
        plain = [p.grad.clone() for p in model.parameters()]
        preconditioner.precondition(optimizer)
        rewritten = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        preconditioner.replay(closure)
    return plain, rewritten


class Patches(nn.Module):
    """A convolution whose rows a loop can find: 2 x 2 patches of an image of 3 x 3."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 2)

    def forward(self, x):
        return self.layer(x)

    @staticmethod
    def rows(x):
        return [np.append(image[:, i : i + 2, j : j + 2].reshape(-1), 1.0) for image in x for i in range(2) for j in range(2)]

    @staticmethod
    def vectors(y):
        return [image[:, i, j] for image in y for i in range(2) for j in range(2)]


class Twice(nn.Module):
    """A linear layer that is called twice in a pass: its rows are those of both calls."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return torch.stack([self.layer(x[:, 0]), self.layer(x[:, 1])], dim=1)

    @staticmethod
    def rows(x):
        return [np.append(row, 1.0) for example in x for row in example]

    @staticmethod
    def vectors(y):
        return [row for example in y for row in example]


@pytest.mark.parametrize(("made", "shape"), [(Patches, (4, 2, 3, 3)), (Twice, (4, 2, 3))])
def test_positions_and_calls_take_the_steps_of_the_loop(made, shape):
    torch.manual_seed(1)
    model = made().double()
    preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS)
    weight = joined(model.layer)
    reference = Reference(weight, shape[0])
    for step in range(5):
        x = draw(*shape, seed=step)
        target = draw(*model(x).shape, seed=50 + step)
        trained(model, preconditioner, model, [(x, target)], lr=0.1)
        rows, wanted = made.rows(x.numpy()), made.vectors(target.numpy())
        entries = target[0].numel()

        def deltas(weight, rows=rows, wanted=wanted, entries=entries):
            return [2 * (weight @ row - vector) / entries for row, vector in zip(rows, wanted, strict=True)]

        reference.before(rows, deltas(weight), weight)
        gradient = sum(np.outer(d, a) for a, d in zip(rows, deltas(weight), strict=True)) / shape[0]
        weight = weight - 0.1 * reference.direction(gradient)
        reference.after(rows, deltas(weight), weight)
        np.testing.assert_allclose(joined(model.layer), weight, rtol=1e-10, atol=1e-12)


def test_an_update_obeys_the_secant_equation_and_stays_symmetric_and_positive():
    root = draw(2, 5, 5)
    inverse = root @ root.mT + torch.eye(5, dtype=torch.float64)
    s, y = draw(2, 5, seed=1), draw(2, 5, seed=2)
    y = y * (s * y).sum(-1, keepdim=True).sign()
    trouble = Trouble()
    new = bfgs_update(inverse, s, y, trouble)
    torch.testing.assert_close((new @ y.unsqueeze(-1)).squeeze(-1), s, rtol=1e-10, atol=1e-12)
    assert torch.equal(new, new.mT)
    assert (torch.linalg.eigvalsh(new) > 0).all()
    assert trouble.kept_inverses == 0


def test_a_pair_of_negative_curvature_is_kept_out_and_counted():
    inverse = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    s = draw(2, 3)
    y = torch.stack([s[0], -s[1]])
    trouble = Trouble()
    new = bfgs_update(inverse, s, y, trouble)
    torch.testing.assert_close(new[0] @ y[0], s[0])
    assert torch.equal(new[1], inverse[1])
    assert trouble.kept_inverses == 1


def test_powells_damping_bounds_the_curvature_from_below_and_leaves_good_pairs_alone():
    inverse = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    y = draw(3, 4)
    s = torch.stack([y[0], -y[1], 0.1 * y[2]])
    damped = powell_damped(inverse, s, y)
    least = 0.2 * (y * y).sum(-1)
    torch.testing.assert_close((damped * y).sum(-1)[1:], least[1:], rtol=1e-12, atol=0)
    assert torch.equal(damped[0], s[0])


def test_the_input_inverse_is_that_of_the_damped_factor_on_a_stationary_batch():
    model = perceptron()
    preconditioner = GradientPreconditioner(model[:1], "kbfgs", **OPTIONS)
    x, target = draw(6, 4), draw(6, 5, seed=1)
    trained(model[:1], preconditioner, model[:1], [(x, target)] * 20, lr=0.1)
    state = preconditioner.state_dict()["blocks"][0]["state"]
    rows = torch.cat([x, torch.ones(6, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.inv(rows.mT @ rows / 6 + 0.3**0.5 * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(state["tensors"]["input_inverse"][0, 0], expected, rtol=1e-10, atol=1e-12)


def test_the_input_inverse_converges_where_it_started_wrong():
    """Signs of the rows change the mean input and leave the second moment as it is."""
    layer = nn.Linear(4, 2, bias=False).double()
    preconditioner = GradientPreconditioner(layer, "kbfgs", **OPTIONS)
    x, target = draw(8, 4), draw(8, 2, seed=1)
    batches = [(x * draw(8, 1, seed=seed).sign(), target) for seed in range(60)]
    trained(layer, preconditioner, layer, batches[:1])
    state = preconditioner.state_dict()
    inverse = state["blocks"][0]["state"]["tensors"]["input_inverse"]
    expected = torch.linalg.inv(x.mT @ x / 8 + 0.3**0.5 * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(inverse[0, 0], expected, rtol=1e-10, atol=1e-12)
    inverse.copy_(torch.eye(4))
    preconditioner.load_state_dict(state)
    errors = []
    for batch in batches[1:]:
        trained(layer, preconditioner, layer, [batch])
        state = preconditioner.state_dict()["blocks"][0]["state"]
        errors.append(float((state["tensors"]["input_inverse"][0, 0] - expected).norm() / expected.norm()))
    assert errors[0] > 0.1
    assert errors[-1] < 1e-6


def inverses(preconditioner):
    return [block["state"]["tensors"]["output_inverse"].clone() for block in preconditioner.state_dict()["blocks"]]


def test_the_stored_output_inverse_moves_at_every_step():
    """ASDL updates a copy that it just made, so that its stored inverse stays the identity for ever."""
    model = perceptron()
    preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS)
    seen = []
    for step in range(3):
        trained(model, preconditioner, model, [(draw(6, 4, seed=step), draw(6, 3, seed=9 + step))])
        seen.append(inverses(preconditioner))
    for first, second, third in zip(*seen, strict=True):
        assert (first - torch.eye(first.shape[-1])).norm() > 1e-3
        assert not torch.equal(first, second)
        assert not torch.equal(second, third)


def test_a_step_of_length_zero_changes_nothing_between_the_passes():
    """ASDL's second pass pairs the last inputs with the present targets, so that gradients differ though no weight moved."""
    model = perceptron()
    preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS)
    batches = [(draw(6, 4, seed=step), draw(6, 3, seed=9 + step)) for step in range(3)]
    trained(model, preconditioner, model, batches, lr=0.0)
    for block in preconditioner.state_dict()["blocks"]:
        assert not block["state"]["steps"]["value"].any()
        assert not block["state"]["changes"]["value"].any()
    for inverse in inverses(preconditioner):
        assert torch.equal(inverse[0, 0], torch.eye(inverse.shape[-1], dtype=torch.float64))


class Noisy(nn.Module):
    """Layers between which noise is drawn and statistics are kept, checkpointed or not."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.start = nn.Linear(4, 6)
        self.middle = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6), nn.ReLU(inplace=True))
        self.end = nn.Linear(6, 3)

    def forward(self, x):
        x = self.start(x)
        x = self.middle(x) if self.reentrant is None else checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.end(functional.dropout(x, 0.5))


@pytest.mark.parametrize("reentrant", [None, False], ids=["stored", "checkpointed"])
def test_a_replay_repeats_the_noise_of_every_micro_batch_and_leaves_no_trace(reentrant):
    torch.manual_seed(0)
    model = Noisy(reentrant).double()
    preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS)
    closures = []
    for part in range(3):
        x, target = torch.randn(8, 4).double(), torch.randn(8, 3).double()  # these draw from the same generator

        def closure(x=x, target=target):
            return functional.mse_loss(model(x), target) / 3

        loss = closure()
        preconditioner.observe(loss)
        loss.backward()
        assert len(closures) == part
        closures.append(closure)
    preconditioner.precondition()
    gradients = [p.grad.clone() for p in model.parameters()]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    torch.rand(3)  # the program went on drawing since
    random = torch.get_rng_state()
    preconditioner.replay(*closures)
    for block in preconditioner.state_dict()["blocks"]:
        if "changes" in block["state"]:
            assert block["state"]["changes"]["value"].abs().max() < 1e-14
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert all(buffer is buffers[name][0] and torch.equal(buffer, buffers[name][1]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_compiled_module_trains_as_a_plain_one():
    weights = []
    for compiled in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
        preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS)
        torch._dynamo.reset()
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        trained(model, preconditioner, forward, [(draw(6, 4, seed=step), draw(6, 3, seed=9 + step)) for step in range(4)])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-14)


def test_reentrant_checkpoints_cannot_be_replayed_and_torch_says_what_to_do():
    model = Noisy(reentrant=True).double()
    preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS)
    observed(preconditioner, model)
    preconditioner.precondition()
    with pytest.raises(RuntimeError, match="set use_reentrant=False"):
        preconditioner.replay(lambda: functional.mse_loss(model(draw(6, 4)), draw(6, 3, seed=1)))


def test_a_state_continues_with_the_same_bits():
    batches = [(draw(6, 4, seed=step).float(), draw(6, 3, seed=9 + step).float()) for step in range(6)]
    model = perceptron().float()
    preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS)
    trained(model, preconditioner, model, batches[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "preconditioner": preconditioner.state_dict()}, file)
    trained(model, preconditioner, model, batches[3:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = perceptron().float()
    other.load_state_dict(saved["model"])
    resumed = GradientPreconditioner(other, "kbfgs", **OPTIONS)
    resumed.load_state_dict(saved["preconditioner"])
    trained(other, resumed, other, batches[3:])
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    for one, two in zip(inverses(preconditioner), inverses(resumed), strict=True):
        assert torch.equal(one, two)


def trained_on_ranks(rank, world_size, fractions):
    """Train on this rank's share of every batch, with averaged gradients; return the weights for each worker fraction."""
    results = []
    for fraction in fractions:
        model = perceptron()
        group = dist.group.WORLD if world_size > 1 else None
        preconditioner = GradientPreconditioner(model, "kbfgs", group=group, worker_fraction=fraction, **OPTIONS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for step in range(5):
            x, target = draw(6, 4, seed=step)[rank::world_size], 3 * draw(6, 3, seed=9 + step)[rank::world_size]

            def closure(x=x, target=target, model=model):
                return functional.mse_loss(model(x), target)

            optimizer.zero_grad()
            loss = closure()
            preconditioner.observe(loss)
            loss.backward()
            for p in model.parameters() if world_size > 1 else ():
                dist.all_reduce(p.grad)
                p.grad /= world_size
            preconditioner.precondition(optimizer)
            optimizer.step()
            preconditioner.replay(closure)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy())
    return results


def test_two_ranks_equal_one_process_on_the_union_of_their_batches(ranks):
    (alone,) = trained_on_ranks(0, 1, [1.0])
    for results in ranks.run(trained_on_ranks, 2, [1.0, 0.5]):
        for weights in results:
            np.testing.assert_allclose(weights, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", ["scaled", "summed", "repeated"])
def test_the_pairs_do_not_depend_on_the_scale_of_the_loss_or_on_repeated_examples(change):
    def run(change):
        model = perceptron()
        preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS)
        repeats = 2 if change == "repeated" else 1
        for step in range(4):
            x, target = draw(6, 4, seed=step).repeat(repeats, 1), draw(6, 3, seed=9 + step).repeat(repeats, 1)

            def closure(x=x, target=target):
                loss = (model(x) - target).square().mean(1)
                loss = loss.sum() / len(x) if change == "summed" else loss.mean()
                return loss * 2.0**16 if change == "scaled" else loss

            model.zero_grad()
            loss = closure()
            preconditioner.observe(loss)
            loss.backward()
            preconditioner.precondition()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad / (2.0**16 if change == "scaled" else 1.0)
            preconditioner.replay(closure)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(run(change), run("plain"), rtol=1e-10, atol=1e-12)


def test_every_direction_descends():
    model = perceptron()
    preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS)
    for step in range(10):
        plain, rewritten = trained(model, preconditioner, model, [(draw(6, 4, seed=step), draw(6, 3, seed=90 + step))], lr=0.3)
        assert sum((one * two).sum() for one, two in zip(plain, rewritten, strict=True)) > 0


def observed(preconditioner, model):
    loss = functional.mse_loss(model(draw(6, 4)), draw(6, 3, seed=1))
    preconditioner.observe(loss)
    loss.backward()


def test_a_step_that_was_not_replayed_is_refused():
    model = perceptron()
    preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS)
    observed(preconditioner, model)
    preconditioner.precondition()
    with pytest.raises(InputError, match=r"was not replayed; call replay\(closure\) after optimizer.step\(\)"):
        observed(preconditioner, model)


def test_a_replay_takes_one_closure_per_micro_batch():
    model = perceptron()
    preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS)
    observed(preconditioner, model)
    observed(preconditioner, model)
    preconditioner.precondition()
    with pytest.raises(InputError, match="had 2 micro-batches and replay was given 1 closures"):
        preconditioner.replay(lambda: model(draw(6, 4)).mean())


def test_a_closure_that_fails_leaves_nothing_running():
    model = Noisy().double()
    preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS)
    observed(preconditioner, model)
    preconditioner.precondition()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random = torch.get_rng_state()

    def fails():
        model(draw(6, 4))
        raise KeyError("the batch is gone")

    with pytest.raises(KeyError):
        preconditioner.replay(fails)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    observed(preconditioner, model)


def test_a_replay_that_is_not_finite_is_counted_and_forgotten():
    model = perceptron()
    preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS)
    trained(model, preconditioner, model, [(draw(6, 4), draw(6, 3, seed=1))])
    before = inverses(preconditioner)
    observed(preconditioner, model)
    preconditioner.precondition()
    preconditioner.replay(lambda: functional.mse_loss(model(draw(6, 4)) / 0.0, draw(6, 3)))
    assert preconditioner.metrics()["nonfinite_batches_count"] == 1
    assert all(torch.equal(one, two) for one, two in zip(before, inverses(preconditioner), strict=True))
    trained(model, preconditioner, model, [(draw(6, 4), draw(6, 3, seed=1))])
    assert not torch.equal(before[0], inverses(preconditioner)[0])


def test_other_methods_ignore_a_replay_and_steps_without_curvature_need_none():
    model = perceptron()
    other = GradientPreconditioner(model, "kfac")
    other.replay(lambda: pytest.fail("was called"))
    other.detach()
    preconditioner = GradientPreconditioner(model, "kbfgs", **OPTIONS, factor_every=2, inverse_every=2, warmup_steps=0)
    for step in range(4):
        observed(preconditioner, model)
        preconditioner.precondition()
        if step % 2:
            preconditioner.replay(lambda: pytest.fail("was called"))
        else:
            preconditioner.replay(lambda: functional.mse_loss(model(draw(6, 4)), draw(6, 3, seed=1)))
    preconditioner.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
