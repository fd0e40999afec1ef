"""When the tasks of a step run, what is kept, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import METHODS, GradientPreconditioner, format_table
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble, damped_cholesky


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 4, generator=generator), torch.randint(0, 3, (16,), generator=generator)


def step(model, preconditioner, optimizer, number, poison=None):
    inputs, targets = batch(number)
    if poison is not None:
        inputs[0, 0] = poison
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(inputs), targets)
    preconditioner.observe(loss)
    loss.backward()
    preconditioner.precondition(optimizer)
    if poison is None:
        optimizer.step()
    return float(loss)


def training(steps, **options):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    preconditioner = GradientPreconditioner(model, **options)
    losses = [step(model, preconditioner, optimizer, number) for number in range(steps)]
    return model, optimizer, preconditioner, losses


class Recording:
    """Stands before a block and notes which of its tasks ran."""

    def __init__(self, block, log):
        self._block, self._log = block, log

    def __getattr__(self, name):
        if name in ("fold", "refresh", "accumulate_inputs"):
            self._log[-1].append(name)
        return getattr(self._block, name)


@pytest.mark.parametrize(("warmup", "expected"), [(0, [0, 4, 8]), (3, [0, 1, 2, 4, 8])])
def test_tasks_run_when_they_are_due(warmup, expected):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    preconditioner = GradientPreconditioner(model, "kfac", factor_every=2, inverse_every=4, warmup_steps=warmup)
    log = []
    slot = preconditioner._slots[0]
    slot.block = Recording(slot.block, log)
    for number in range(10):
        log.append([])
        step(model, preconditioner, optimizer, number)
    folds = [number for number, tasks in enumerate(log) if "fold" in tasks]
    assert folds == sorted({*range(0, 10, 2), *range(warmup)})
    assert [number for number, tasks in enumerate(log) if "refresh" in tasks] == expected
    assert [number for number, tasks in enumerate(log) if "accumulate_inputs" in tasks] == folds, "no work without a use"


@pytest.mark.parametrize("method", ["kfac", "foof", "unit"])
def test_a_state_goes_on_with_the_same_bits(method, tmp_path):
    options = {"method": method, "factor_every": 2, "inverse_every": 4, "warmup_steps": 0}
    *_, straight = training(12, **options)
    model, optimizer, preconditioner, _ = training(7, **options)
    torch.save((model.state_dict(), optimizer.state_dict(), preconditioner.state_dict()), tmp_path / "state.pt")
    weights, momenta, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = network()
    again.load_state_dict(weights)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(momenta)
    resumed = GradientPreconditioner(again, **options)
    resumed.load_state_dict(state)
    assert [step(again, resumed, optimizer, number) for number in range(7, 12)] == straight[7:]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["kfac", "unit"])
def test_a_bad_batch_leaves_no_trace_but_a_count(poison, method):
    model, optimizer, preconditioner, _ = training(3, method=method)
    before = [value.clone() for value in tensors(preconditioner.state_dict()["blocks"])]
    step(model, preconditioner, optimizer, 3, poison)
    assert preconditioner.nonfinite_batches == 1
    after = tensors(preconditioner.state_dict()["blocks"])
    assert all(torch.equal(ours, kept) for ours, kept in zip(after, before, strict=True))
    assert all(step(model, preconditioner, optimizer, number) < 10 for number in range(4, 8))
    assert preconditioner.nonfinite_batches == 1


def tensors(state):
    """Every tensor in a state, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return [tensor for child in children for tensor in tensors(child)]


def test_an_optimizer_of_some_parameters_leaves_the_others_alone():
    model = network()
    preconditioner = GradientPreconditioner(model, "kfac")
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    inputs, targets = batch(0)
    loss = functional.cross_entropy(model(inputs), targets)
    preconditioner.observe(loss)
    loss.backward()
    kept, changed = model[3].weight.grad.clone(), model[0].weight.grad.clone()
    preconditioner.precondition(first)
    assert torch.equal(model[3].weight.grad, kept)
    assert not torch.equal(model[0].weight.grad, changed)


def test_a_method_that_couples_layers_names_one_without_a_gradient():
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    preconditioner = GradientPreconditioner(model, "full")
    inputs, targets = batch(0)
    loss = functional.cross_entropy(model["used"](inputs), targets)
    preconditioner.observe(loss)
    loss.backward()
    with pytest.raises(InputError, match=r"full couples all layers, and unused has no gradient.*ignore=\['unused'\]"):
        preconditioner.precondition()


def test_kl_clip_bounds_the_step():
    inputs, targets = batch(0)
    products = []
    for clip in (None, 1e-4):
        model = network()
        preconditioner = GradientPreconditioner(model, "kfac", kl_clip=clip)
        loss = functional.cross_entropy(model(inputs), targets)
        preconditioner.observe(loss)
        loss.backward()
        plain = [parameter.grad.clone() for parameter in model.parameters()]
        preconditioner.precondition(torch.optim.SGD(model.parameters(), lr=0.3))
        products.append(sum(float((p.grad * v).sum()) for p, v in zip(model.parameters(), plain, strict=True)))
    factor = (1e-4 / (0.3**2 * products[0])) ** 0.5
    assert factor < 1
    assert products[1] == pytest.approx(factor * products[0], rel=1e-5)
    assert preconditioner.metrics()["clip_factor"] == pytest.approx(factor, rel=1e-5)


def test_match_norm_keeps_each_layers_length():
    inputs, targets = batch(0)
    model = network()
    preconditioner = GradientPreconditioner(model, "kfac", match_norm=True)
    loss = functional.cross_entropy(model(inputs), targets)
    preconditioner.observe(loss)
    loss.backward()
    before = [torch.cat([p.grad.flatten() for p in model[index].parameters()]) for index in (0, 3)]
    preconditioner.precondition()
    for index, plain in zip((0, 3), before, strict=True):
        after = torch.cat([p.grad.flatten() for p in model[index].parameters()])
        assert float(after.norm()) == pytest.approx(float(plain.norm()), rel=1e-5)
        assert not torch.allclose(after, plain, rtol=1e-2)


def test_the_table_names_what_preconditions_what():
    model = nn.ModuleDict(
        {"body": network(), "frozen": nn.Linear(3, 3).requires_grad_(False), "attention": nn.MultiheadAttention(4, 2)}
    )
    text = format_table(GradientPreconditioner(model, "kfac", ignore=["body.3"]).table)
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["body.0.weight"].split()[-1] == "kfac"
    assert lines["body.2.bias"].split()[-1] == "unit"
    assert lines["body.3.weight"].endswith("plain gradient  ignored by name")
    assert lines["frozen.weight"].endswith("frozen")
    assert lines["attention.in_proj_weight"].endswith("no layer of a kind that the method knows")


def test_what_layers_of_two_kinds_share_keeps_its_gradient():
    model = nn.ModuleDict({"words": nn.Embedding(7, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["words"].weight
    lines = {line.parameter: line for line in GradientPreconditioner(model, "kfac").table}
    assert lines["words.weight"].reason == "layers of kinds embedding and linear share its weight"
    assert lines["body.weight"].method == "kfac"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "kfak"}, "there is no method 'kfak'; did you mean .*kfac"),
        ({"damping": 0.0}, "damping must be above 0, got 0.0"),
        ({"damping": -1.0}, "damping must be above 0, got -1.0"),
        (
            {"factor_every": 10, "inverse_every": 25},
            "inverse_every must be a multiple of factor_every, got 25 and 10; 20 is the nearest",
        ),
        ({"factor_every": 0}, "factor_every must be a whole number of 1 or more, got 0"),
        ({"fisher": "sampled"}, "kfac has no fisher='sampled'; valid are empirical, mc, exact, forward"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"positions": "mean"}, "positions must be one of expand, reduce, got 'mean'"),
        ({"dampning": 0.1}, "kfac has no option 'dampning'; did you mean damping"),
        ({"worker_fraction": 0.0}, r"worker_fraction must be in \(0, 1\], got 0.0"),
        ({"loss": "nll"}, "loss must be one of cross_entropy, squared_error, binary_cross_entropy, got 'nll'"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        ({"damping": float("inf")}, "damping must be finite, got inf"),
        ({"damping": "0.1"}, "damping must be above 0, got '0.1'"),
        ({"factor_every": float("nan")}, "factor_every must be a whole number of 1 or more, got nan"),
        ({"ignore": "head"}, r"ignore must be a list of parts of names, got 'head'; write ignore=\['head'\]"),
        ({"ignore": ["haed"]}, "ignore='haed' is part of no name in Sequential"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        GradientPreconditioner(network(), **options)


@pytest.mark.parametrize("module", [nn.Sequential(nn.ReLU()), nn.LSTM(3, 3), nn.Linear(3, 3).requires_grad_(False)])
def test_a_module_with_nothing_to_precondition_is_refused(module):
    with pytest.raises(InputError, match="has nothing for kfac to precondition"):
        GradientPreconditioner(module, "kfac")


def test_a_step_without_an_observed_loss_is_refused():
    model = network()
    preconditioner = GradientPreconditioner(model, "kfac")
    inputs, targets = batch(0)
    functional.cross_entropy(model(inputs), targets).backward()
    with pytest.raises(InputError, match=r"no loss was seen; call observe\(loss\) before loss.backward\(\)"):
        preconditioner.precondition()


def test_a_checkpoint_of_another_model_names_the_first_difference():
    _, _, preconditioner, _ = training(2, method="kfac")
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 5))
    with pytest.raises(
        InputError, match=r"another model: it has layer 3 \[\[3, 6\], \[3\]\] where this one has 3 \[\[5, 6\], \[5\]\]"
    ):
        GradientPreconditioner(other, "kfac").load_state_dict(preconditioner.state_dict())
    with pytest.raises(InputError, match="the checkpoint holds kfac with fisher='empirical' and this preconditioner is foof"):
        GradientPreconditioner(network(), "foof").load_state_dict(preconditioner.state_dict())


def test_the_ladder_of_a_matrix_that_cholesky_refuses():
    indefinite = torch.diag(torch.tensor([1.0, -0.5]))
    trouble = Trouble()
    factor = damped_cholesky(indefinite, torch.tensor([0.1]), trouble)  # 0.1, 0.2, 0.4, 0.8 > 0.5
    assert trouble == Trouble(doubled_ridges=3)
    torch.testing.assert_close(factor @ factor.mT, indefinite + 0.8 * torch.eye(2))
    trouble = Trouble()
    assert damped_cholesky(-100 * torch.eye(2), torch.tensor([0.1]), trouble) is None
    assert trouble == Trouble(doubled_ridges=5, float64_retries=1, kept_inverses=1)
    nearly = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    trouble = Trouble()
    assert damped_cholesky(nearly, torch.tensor([1e-12]), trouble) is not None, "float64 sees what float32 rounds away"
    assert trouble.float64_retries == 1


def test_a_failed_factorisation_keeps_the_last_good_one():
    model, optimizer, preconditioner, _ = training(2, method="kfac")
    block = preconditioner._slots[0].block
    good = [solver.clone() for solver in block.derived()]
    block.factors.outputs.value.fill_(0.0).diagonal(dim1=-2, dim2=-1).fill_(-1e6)
    block.refresh(0.03)
    assert all(torch.equal(ours, before) for ours, before in zip(block.derived(), good, strict=True))
    assert preconditioner.metrics()["kept_inverses_count"] == 1.0
    step(model, preconditioner, optimizer, 2)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains(method):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    preconditioner = GradientPreconditioner(model, method)
    inputs, targets = batch(0)

    def loss():
        return functional.cross_entropy(model(inputs), targets)

    first = float(loss())
    for _ in range(30):
        optimizer.zero_grad()
        value = loss()
        preconditioner.observe(value)
        value.backward()
        preconditioner.precondition(optimizer)
        optimizer.step()
        if METHODS[method].replays:
            preconditioner.replay(loss)
    assert float(loss()) < first
    assert preconditioner.nonfinite_batches == 0
