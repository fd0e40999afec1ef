"""Oracle: the Hessian of the sum of the terms' losses at the logits, by torch.func in float64, from formulas written out here.

A seed stands for all terms at once, so its outer products are compared within terms alone.
"""

import pytest
import torch
from torch.nn import functional

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import GradientPreconditioner
from lightning_plugins.engines.preconditioning.losses import exact_seeds, given_loss, read_loss, sampled_seeds

CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classes(*shape):
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(1))


def with_ignored(target, index=-100):
    target = target.clone()
    target.view(-1)[::3] = index
    return target


class CrossEntropy:
    """Logits of any shape with classes on ``axis``; a term per target, ``weight`` of its class, none where it is ``ignored``."""

    def __init__(self, shape, target, *, axis=1, loss=None, weight=None, ignored=-100):
        self.shape, self.target, self.axis, self.ignored = shape, target, axis, ignored
        self.weight = torch.ones(3, dtype=torch.float64) if weight is None else weight
        self.loss = loss or (lambda z: functional.cross_entropy(z, target, weight, ignore_index=ignored))

    def term_weights(self):
        kept = self.target != self.ignored
        return torch.where(kept, self.weight[torch.where(kept, self.target, 0)], 0.0)

    def sum_of_terms(self, z):
        z = z.movedim(self.axis, -1)
        target = torch.where(self.target == self.ignored, 0, self.target)
        picked = z.gather(-1, target.reshape(z.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        return ((z.logsumexp(-1) - picked) * self.term_weights().reshape(picked.shape)).sum()

    def owners(self):
        shape = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        return torch.arange(self.target.numel()).reshape(shape).unsqueeze(self.axis).expand(self.shape).flatten()

    def terms(self):
        return float(self.term_weights().sum())


class Entries:
    """A loss per entry; a term is an example, and its loss the mean or the sum over its entries."""

    def __init__(self, shape, loss, entry, *, mean=True):
        self.shape, self.loss, self.entry, self.mean = shape, loss, entry, mean

    def sum_of_terms(self, z):
        return self.entry(z).sum() / (z[0].numel() if self.mean else 1)

    def owners(self):
        return torch.arange(self.shape[0]).reshape(-1, *[1] * (len(self.shape) - 1)).expand(self.shape).flatten()

    def terms(self):
        return self.shape[0]


def squared_error(*shape, reduction="mean", swapped=False):
    target = draw(*shape, seed=2)

    def loss(z):
        return functional.mse_loss(*((target, z) if swapped else (z, target)), reduction=reduction)

    return Entries(shape, loss, lambda z: (z - target) ** 2, mean=reduction == "mean")


def binary(*shape, reduction="mean", weight=None):
    target = draw(*shape, seed=3).sigmoid()
    given = torch.ones(1, dtype=torch.float64) if weight is None else weight

    def loss(z):
        return functional.binary_cross_entropy_with_logits(z, target, weight, reduction=reduction)

    return Entries(shape, loss, lambda z: given * (functional.softplus(z) - z * target), mean=reduction == "mean")


def flattened_after_softmax(target):
    return lambda z: functional.nll_loss(functional.log_softmax(z, -1).view(-1, 3), target.flatten())


CASES = {
    "classes": CrossEntropy((4, 3), classes(4)),
    "one example without a batch": CrossEntropy((3,), torch.tensor(1), axis=0),
    "sequence": CrossEntropy((2, 3, 4), classes(2, 4)),
    "image": CrossEntropy((2, 3, 2, 2), classes(2, 2, 2)),
    "volume": CrossEntropy((2, 3, 2, 1, 2), classes(2, 2, 1, 2)),
    "tokens, some ignored": CrossEntropy((8, 3), with_ignored(classes(8))),
    "sequence, some ignored": CrossEntropy((2, 3, 4), with_ignored(classes(2, 4))),
    "a class is ignored": CrossEntropy((8, 3), with_ignored(classes(8), 2), ignored=2),
    "class weights": CrossEntropy((4, 3), classes(4), weight=CLASS_WEIGHTS),
    "class weights, some ignored": CrossEntropy((2, 3, 4), with_ignored(classes(2, 4)), weight=CLASS_WEIGHTS),
    "summed": CrossEntropy((4, 3), classes(4), loss=lambda z: functional.cross_entropy(z, classes(4), reduction="sum")),
    "classes last, flattened later": CrossEntropy((2, 3, 3), classes(2, 3), axis=2, loss=flattened_after_softmax(classes(2, 3))),
    "squared (N,)": squared_error(5),
    "squared (N, C)": squared_error(4, 3),
    "squared (N, C, H, W)": squared_error(2, 2, 2, 3),
    "squared, summed": squared_error(4, 3, reduction="sum"),
    "squared, target first": squared_error(4, 3, swapped=True),
    "binary (N,)": binary(5),
    "binary (N, C)": binary(4, 3),
    "binary, summed": binary(4, 3, reduction="sum"),
    "binary, weights of entries": binary(4, 3, weight=CLASS_WEIGHTS),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def logits_of(case):
    leaf = draw(*case.shape, seed=4).requires_grad_()
    return leaf, leaf * 1.0


def within_terms(seeds, owners):
    """Return the outer product of every seed, ``(seeds, entries, entries)``, with zeros between entries of different terms."""
    flat = torch.stack([seed.flatten() for seed in seeds])
    return flat.unsqueeze(2) * flat.unsqueeze(1) * (owners.unsqueeze(1) == owners)


def hessian_of_terms(case, leaf):
    return torch.func.hessian(case.sum_of_terms)(leaf.detach()).reshape(leaf.numel(), -1)


@cases
def test_exact_seeds_are_a_square_root_of_the_hessian_of_the_terms(case):
    leaf, logits = logits_of(case)
    loss = read_loss(case.loss(logits))
    products = within_terms(list(exact_seeds(loss)), case.owners())
    torch.testing.assert_close(products.sum(0), hessian_of_terms(case, leaf), rtol=1e-12, atol=1e-14)
    assert loss.terms == pytest.approx(case.terms(), rel=1e-14)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case, CrossEntropy) and len(case.shape) > 2])
def test_positions_apart_are_a_square_root_within_whole_examples(name):
    """Within an example the Hessian has no entry between two positions, and neither may the seeds together."""
    case = CASES[name]
    leaf, logits = logits_of(case)
    seeds = list(exact_seeds(read_loss(case.loss(logits)), positions_apart=True))
    examples = torch.arange(case.shape[0]).reshape(-1, *[1] * (len(case.shape) - 1)).expand(case.shape).flatten()
    products = within_terms(seeds, examples)
    torch.testing.assert_close(products.sum(0), hessian_of_terms(case, leaf), rtol=1e-12, atol=1e-14)
    assert len(seeds) == case.target[0].numel() * 3


@cases
def test_terms_and_scale_turn_the_gradient_into_that_of_the_sum_of_terms(case):
    leaf, logits = logits_of(case)
    whole = case.loss(logits) / 4
    loss = read_loss(whole)
    (gradient,) = torch.autograd.grad(whole, logits, retain_graph=True)
    expected = torch.func.grad(case.sum_of_terms)(leaf.detach())
    torch.testing.assert_close(gradient / loss.scale(loss.terms), expected, rtol=1e-12, atol=1e-14)


@cases
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_seeds_have_no_graph_of_their_own(case, fisher):
    loss = read_loss(case.loss(logits_of(case)[1]))
    seeds = list(exact_seeds(loss)) if fisher == "exact" else list(sampled_seeds(loss, 1, None))
    assert not any(seed.requires_grad for seed in seeds)


@cases
def test_the_edge_of_the_logits_leads_to_their_gradient(case):
    leaf, logits = logits_of(case)
    loss = read_loss(case.loss(logits))
    seed = draw(*case.shape, seed=5)
    (reached,) = torch.autograd.grad(loss.logits, leaf, seed, retain_graph=True)
    torch.testing.assert_close(reached, seed, rtol=0, atol=0)


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize(
    "name",
    ["classes", "sequence, some ignored", "class weights", "squared (N, C)", "squared, summed", "binary, weights of entries"],
)
def test_sampled_seeds_have_the_hessian_as_second_moment(name, samples):
    case = CASES[name]
    leaf, logits = logits_of(case)
    loss = read_loss(case.loss(logits))
    generator = torch.Generator().manual_seed(6)
    drawn = 3200
    seeds = [seed for _ in range(drawn // samples) for seed in sampled_seeds(loss, samples, generator)]
    products = within_terms(seeds, case.owners())
    error = (products.mean(0) - hessian_of_terms(case, leaf)).abs()
    assert (error <= 4 * products.std(0) / drawn**0.5 + 1e-12).all()
    assert products.mean(0).abs().max() > 0.05


@pytest.mark.parametrize("samples", [1, 8])
def test_the_fisher_of_several_samples_is_not_smaller(samples):
    """ASDL divides the loss by the samples before squaring, so that its Fisher of 8 samples is 8 times too small."""
    examples = 2000
    model = torch.nn.Linear(2, 3).double()
    preconditioner = GradientPreconditioner(model, "kfac", fisher="mc", samples=samples, seed=7)
    row = draw(1, 2)
    loss = functional.cross_entropy(model(row.expand(examples, 2)), torch.zeros(examples, dtype=torch.int64))
    preconditioner.observe(loss)
    loss.backward()
    preconditioner.precondition()
    measured = preconditioner.state_dict()["blocks"][0]["state"]["factors"]["outputs"]["value"][0, 0]
    probabilities = model(row)[0].detach().softmax(0)
    columns = probabilities - torch.eye(3, dtype=torch.float64)  # the seed of every class that can be drawn
    outcomes = columns.unsqueeze(2) * columns.unsqueeze(1)
    expected = (outcomes * probabilities[:, None, None]).sum(0)
    spread = (((outcomes - expected) ** 2 * probabilities[:, None, None]).sum(0) / (examples * samples)).sqrt()
    assert ((measured - expected).abs() <= 4 * spread).all()


WRAPPED = {
    "accumulation": (lambda loss: loss / 4, 0.25),
    "scaler": (lambda loss: loss * torch.tensor(2.0**16), 2.0**16),
    "accumulation and scaler": (lambda loss: (loss / 4) * torch.tensor(2.0**16), 2.0**14),
    "cast": (lambda loss: loss.float(), 1.0),
    "reduced again": (lambda loss: (loss / 2).mean().sum(), 0.5),
    "shaped": (lambda loss: (3.0 * loss.view(1)).squeeze(), 3.0),
    "maximised": (lambda loss: -loss, -1.0),
}


@pytest.mark.parametrize(("wrap", "factor"), WRAPPED.values(), ids=WRAPPED)
def test_what_multiplies_a_loss_is_its_exact_factor(wrap, factor):
    logits = draw(4, 3).requires_grad_()
    loss = read_loss(wrap(functional.cross_entropy(logits * 1.0, classes(4))))
    assert (loss.form, loss.factor, loss.terms) == ("cross_entropy", factor, 4.0)
    assert loss.scale(4.0) == abs(factor) / 4


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


UNKNOWN = {
    "mean": (lambda z: z.exp().mean(), True, 1.0, "MeanBackward"),
    "sum": (lambda z: z.exp().sum(), False, 1.0, "SumBackward"),
    "sum, divided": (lambda z: z.exp().sum() / 4, False, 0.25, "SumBackward"),
    "two losses": (
        lambda z: (functional.cross_entropy(z, classes(4)) + 0.5 * functional.mse_loss(z, z.detach() + 1)) / 2,
        True,
        0.5,
        "AddBackward",
    ),
    "product of losses": (
        lambda z: functional.cross_entropy(z, classes(4)) * functional.mse_loss(z, z.detach() + 1),
        True,
        1.0,
        "MulBackward",
    ),
    "custom function": (lambda z: Doubled.apply(functional.cross_entropy(z, classes(4))) / 2, True, 0.5, "DoubledBackward"),
    "smooth l1, summed": (
        lambda z: functional.smooth_l1_loss(z, z.detach() + 1, reduction="sum"),
        False,
        1.0,
        "SmoothL1LossBackward",
    ),
    "label smoothing": (lambda z: functional.cross_entropy(z, classes(4), label_smoothing=0.1), True, 1.0, "AddBackward"),
    "probability targets": (lambda z: functional.cross_entropy(z, draw(4, 3).softmax(1)), False, -0.25, "SumBackward"),
    "logarithm of a softmax": (lambda z: functional.nll_loss(z.softmax(1).log(), classes(4)), True, 1.0, "NllLossBackward"),
    "log-softmax moved": (
        lambda z: functional.nll_loss(z.view(1, 4, 3).log_softmax(2).transpose(1, 2), classes(4).view(1, 4)),
        True,
        1.0,
        "NllLoss2DBackward",
    ),
    "log-softmax read across": (
        lambda z: functional.nll_loss(z.view(1, 4, 3).log_softmax(2).view(1, 3, 4), classes(4).view(1, 4)),
        True,
        1.0,
        "NllLoss2DBackward",
    ),
    "both sides trained": (lambda z: functional.mse_loss(z, z.exp()), True, 1.0, "MseLossBackward whose target depends"),
    "positive weights": (
        lambda z: functional.binary_cross_entropy_with_logits(z, z.detach().sigmoid(), pos_weight=CLASS_WEIGHTS),
        True,
        1.0,
        "BinaryCrossEntropyWithLogitsBackward with pos_weight",
    ),
}


@pytest.mark.parametrize(("compute", "mean", "factor", "root"), UNKNOWN.values(), ids=UNKNOWN)
def test_other_losses_have_a_factor_and_no_form_and_are_refused_by_name(compute, mean, factor, root):
    logits = draw(4, 3).requires_grad_()
    loss = read_loss(compute(logits * 1.0))
    assert (loss.form, loss.mean, loss.factor) == (None, mean, factor)
    assert loss.scale(4.0) == (abs(factor) / 4 if mean else abs(factor))
    for seeds in (lambda: list(exact_seeds(loss)), lambda: list(sampled_seeds(loss, 1, None))):
        with pytest.raises(InputError) as caught:
            seeds()
        for part in (root, "cross_entropy, squared_error, binary_cross_entropy", "loss=", "logits=", "fisher='empirical'"):
            assert part in str(caught.value)


@pytest.mark.parametrize("name", ["label smoothing", "probability targets"])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_soft_cross_entropy_works_where_its_form_is_named(name, fisher):
    compute = UNKNOWN[name][0]
    model = torch.nn.Linear(2, 3).double()

    def step(preconditioner, **given):
        logits = model(draw(4, 2))
        loss = compute(logits)
        preconditioner.observe(loss, logits if given else None)
        loss.backward()
        preconditioner.precondition()

    refused = GradientPreconditioner(model, "kfac", fisher=fisher)
    with pytest.raises(InputError, match=UNKNOWN[name][3]):
        step(refused)
    refused.detach()
    named = GradientPreconditioner(model, "kfac", fisher=fisher, loss="cross_entropy")
    step(named, logits=True)
    measured = named.state_dict()["blocks"][0]["state"]["factors"]["outputs"]["value"][0, 0]
    if fisher == "exact":
        probabilities = model(draw(4, 2)).detach().softmax(1)
        expected = (torch.diag_embed(probabilities) - probabilities.unsqueeze(2) * probabilities.unsqueeze(1)).mean(0)
        torch.testing.assert_close(measured, expected, rtol=1e-12, atol=1e-14)
    assert measured.trace() > 0


@pytest.mark.parametrize(
    ("form", "shape", "name"),
    [
        ("cross_entropy", (2, 3, 4), "sequence"),
        ("squared_error", (2, 2, 2, 3), "squared (N, C, H, W)"),
        ("binary_cross_entropy", (5,), "binary (N,)"),
    ],
)
def test_a_named_form_equals_the_one_that_is_read(form, shape, name):
    case = CASES[name]
    _, logits = logits_of(case)
    read, named = read_loss(case.loss(logits)), given_loss(form, logits)
    assert (read.form, read.terms, named.factor, named.mean) == (named.form, named.terms, 1.0, True)
    for one, other in zip(exact_seeds(read), exact_seeds(named), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)


def test_a_batch_without_a_target_counts_no_terms_and_leaves_the_averages_alone():
    model = torch.nn.Linear(2, 3).double()
    preconditioner = GradientPreconditioner(model, "kfac", warmup_steps=0)
    targets = [classes(4), torch.full((4,), -100), classes(4)]

    def step(targets):
        model.zero_grad()
        for target in targets:
            loss = functional.cross_entropy(model(draw(4, 2)), target)
            preconditioner.observe(loss)
            loss.backward()
        preconditioner.precondition()
        return preconditioner.state_dict()["blocks"][0]["state"]["factors"]["outputs"]

    assert read_loss(functional.cross_entropy(model(draw(4, 2)), targets[1])).terms == 0.0
    before = {key: torch.as_tensor(value).clone() for key, value in step(targets[:1]).items()}
    after = step(targets[1:2])
    assert after["steps"] == before["steps"]
    assert torch.equal(after["value"], before["value"])
    assert step(targets[1:])["value"].isfinite().all()


def test_a_loss_that_is_multiplied_by_zero_counts_no_terms():
    logits = draw(4, 3).requires_grad_()
    for compute in (lambda z: functional.cross_entropy(z, classes(4)), lambda z: z.exp().mean()):
        loss = read_loss(compute(logits) * 0.0)
        assert (loss.factor, loss.terms, loss.scale(loss.terms)) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_logits_that_are_not_finite_make_seeds_that_are_not(fisher):
    """Drawing with ``torch.multinomial`` would raise, and on a GPU leave no device to go on with."""
    logits = draw(4, 3)
    logits[1, 2] = float("nan")
    loss = read_loss(functional.cross_entropy(logits.requires_grad_() * 1.0, classes(4)))
    seeds = list(sampled_seeds(loss, 2, None) if fisher == "mc" else exact_seeds(loss))
    assert all(not seed[1].isfinite().all() and seed[[0, 2, 3]].isfinite().all() for seed in seeds)


@pytest.mark.parametrize("name", ["classes", "squared (N, C)", "binary (N, C)"])
def test_under_autocast_the_seeds_are_float32_and_reach_the_parameters(name):
    case = CASES[name]
    model = torch.nn.Linear(5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(draw(4, 5).float())
        loss = read_loss(case.loss(logits) / 2)
    assert logits.dtype == torch.bfloat16
    assert (loss.factor, loss.terms) == (0.5, 4.0)
    seeds = list(exact_seeds(loss))
    expected = hessian_of_terms(case, logits.detach().double())
    torch.testing.assert_close(within_terms(seeds, case.owners()).sum(0), expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    (gradient,) = torch.autograd.grad(loss.logits, model.weight, seeds[0], retain_graph=True)
    assert gradient.isfinite().all()
    assert gradient.norm() > 0


def test_statistics_of_a_half_precision_loss_are_float32():
    logits = draw(4, 3).bfloat16().requires_grad_()
    loss = read_loss(functional.mse_loss(logits * 1.0, torch.zeros(4, 3, dtype=torch.bfloat16)))
    (seed,) = sampled_seeds(loss, 1, None)
    assert seed.dtype == torch.float32
    assert torch.autograd.grad(loss.logits, logits, seed)[0].dtype == torch.bfloat16


def test_a_compiled_model_with_its_loss_outside():
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    compiled = torch.compile(model, backend="aot_eager")
    x = draw(4, 4)
    for output in (compiled(x), model(x)):
        loss = read_loss(functional.cross_entropy(output, classes(4)) / 2)
        assert (loss.form, loss.factor, loss.terms) == ("cross_entropy", 0.5, 4.0)
        seeds = list(exact_seeds(loss))
        gradients = [torch.autograd.grad(loss.logits, model[0].weight, seed, retain_graph=True)[0] for seed in seeds]
        if output.grad_fn.name().startswith("Compiled"):
            through_compiled = gradients
    torch.testing.assert_close(torch.stack(through_compiled), torch.stack(gradients), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (torch.tensor(1.0), r"got shape \(\) without a graph"),
        (torch.ones(3, requires_grad=True) * 1.0, r"got shape \(3,\) with a graph; return loss.mean\(\)"),
    ],
)
def test_what_is_no_scalar_with_a_graph_is_refused(loss, says):
    with pytest.raises(InputError, match=says):
        read_loss(loss)


def test_named_forms_are_checked():
    with pytest.raises(InputError, match="loss must be one of cross_entropy, squared_error, binary_cross_entropy, got 'hinge'"):
        given_loss("hinge", draw(2, 3).requires_grad_() * 1.0)
    with pytest.raises(InputError, match="logits have no graph"):
        given_loss("squared_error", draw(2, 3))
    with pytest.raises(InputError, match=r"must be \(N, classes, ...\), got shape \(3,\)"):
        given_loss("cross_entropy", draw(3).requires_grad_() * 1.0)
