"""The callback beside the other parts of a training: accumulation, precision, several optimizers, checkpointing, compilation.
Oracle: the engine in a plain PyTorch loop that does the same by hand."""

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins import Preconditioner
from lightning_plugins._lightning import LightningModule, Trainer, submodule
from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import GradientPreconditioner
from tests.callbacks.test_preconditioner import QUIET, Classifier, batches, classifier, fit, hooks_of, plain_loop

pytestmark = pytest.mark.adapter

PLAIN_SGD = partial(torch.optim.SGD, lr=0.05)


def weights_of(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def assert_equal(module, other, tolerance=1e-12):
    torch.testing.assert_close(weights_of(module), weights_of(other), rtol=0, atol=tolerance)


def statistics_of(callback):
    """The running averages of every layer, from the callback's state."""
    return [block["state"]["factors"] for block in callback.state_dict()["blocks"] if "factors" in block["state"]]


# Accumulation


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_four_micro_batches_equal_one_batch(fisher):
    one, four = classifier(), classifier()
    fit(one, Preconditioner("kfac", fisher=fisher), data=batches(10, 32), max_steps=10)
    fit(four, Preconditioner("kfac", fisher=fisher), data=batches(40, 8), max_steps=10, accumulate_grad_batches=4)
    assert_equal(one, four)


def test_the_last_partial_window_is_a_step_of_its_own_terms():
    """Ten batches in windows of four, four and two; Lightning divides by four also in the last."""
    module, other = classifier(), classifier()
    fit(module, Preconditioner("kfac"), data=batches(10, 8), accumulate_grad_batches=4, max_epochs=1, max_steps=-1)
    engine, optimizer, data = GradientPreconditioner(other, "kfac"), other.configure_optimizers(), list(batches(10, 8))
    for window in (data[:4], data[4:8], data[8:]):
        optimizer.zero_grad()
        for x, y in window:
            loss = functional.cross_entropy(other(x), y) / 4
            engine.observe(loss)
            loss.backward()
        engine.precondition(optimizer)
        optimizer.step()
    assert_equal(module, other)


def test_lightnings_clipping_sees_the_new_gradients():
    module = classifier(optimizer=partial(torch.optim.SGD, lr=1.0))
    before = weights_of(module)
    fit(module, Preconditioner("kfac"), max_steps=1, gradient_clip_val=1e-3)
    assert float((weights_of(module) - before).norm()) == pytest.approx(1e-3, rel=1e-3)


# Precision


def mixed(**scaler):
    plugin = submodule("plugins.precision").MixedPrecision
    return plugin("16-mixed", "cpu", torch.amp.GradScaler("cpu", **scaler))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{"kl_clip": 1e-4}, {"clip_raw": 0.1}])
def test_the_gradient_scaler_changes_nothing(fused, options):
    """A scale of 2^12 against 2^8: powers of two, and no gradient in half precision is subnormal under either, so that rounding
    is the same. Fused AdamW undoes the scale within its step."""
    modules = []
    for scale in (2.0**8, 2.0**12):
        module = classifier(optimizer=partial(torch.optim.AdamW, lr=0.01, fused=fused)).float()
        callback = Preconditioner("kfac", **options)
        data = [[x.float(), y] for x, y in batches()][:8]
        fit(module, callback, data=data, max_steps=8, plugins=[mixed(init_scale=scale, growth_interval=1000)])
        modules.append((module, callback))
    (one, first), (many, second) = modules
    assert_equal(one, many, 1e-6)
    for ours, theirs in zip(statistics_of(second), statistics_of(first), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


def test_an_overflow_of_half_precision_is_skipped_and_leaves_statistics_clean():
    module = classifier(optimizer=PLAIN_SGD).float()
    callback = Preconditioner("kfac", norms="plain")
    data = [[x.float(), y] for x, y in batches()][:8]
    plugin = mixed(init_scale=2.0**22, growth_interval=1000)
    fit(module, callback, data=data, max_steps=8, plugins=[plugin])
    assert 1 <= callback.state_dict()["nonfinite_batches"] < 8
    assert plugin.scaler.get_scale() < 2.0**22
    assert bool(weights_of(module).isfinite().all())


def test_bfloat16_trains_with_statistics_of_float32():
    module = classifier(optimizer=PLAIN_SGD).float()
    callback = Preconditioner("kfac")
    fit(module, callback, data=[[x.float(), y] for x, y in batches(size=64)], precision="bf16-mixed")
    values = [value for factors in statistics_of(callback) for value in (factors["inputs"]["value"], factors["outputs"]["value"])]
    assert {value.dtype for value in values} == {torch.float32}
    assert sum(module.losses[-10:]) < sum(module.losses[:10])


# Optimizers


class Manual(Classifier):
    """Steps by itself, within the autocast of mixed precision; the first batch has no loss."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.manual_backward(loss)
        self.optimizers().step()
        self.optimizers().zero_grad()


def test_manual_optimization_in_bfloat16_keeps_statistics_of_float32():
    torch.manual_seed(0)
    module, callback = Manual(), Preconditioner("kfac")
    data = DataLoader(TensorDataset(torch.randn(64, 6), torch.randint(0, 3, (64,))), batch_size=8)
    fit(module, callback, data=data, max_steps=6, precision="bf16-mixed")
    kept = [factor["value"].dtype for factors in statistics_of(callback) for factor in factors.values()]
    assert kept == [torch.float32] * 4


class Skipping(Classifier):
    def training_step(self, batch, batch_idx):
        return None if batch_idx < 2 else super().training_step(batch, batch_idx)


def test_a_first_batch_without_a_loss_is_skipped():
    torch.manual_seed(0)
    module = Skipping().double()
    fit(module, Preconditioner("kfac"), max_steps=5)
    assert len(module.losses) == 3, "Lightning counts two skipped batches as steps"
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_fused_adamw_equals_the_plain_one():
    plain, fused = (classifier(optimizer=partial(torch.optim.AdamW, lr=0.01, fused=fused)) for fused in (False, True))
    fit(plain, Preconditioner("kfac"))
    fit(fused, Preconditioner("kfac"))
    assert_equal(plain, fused, 1e-9)


class Adversaries(LightningModule):
    """A generator and a discriminator with an optimizer each, trained by hand in one of three usual orders."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.order = order
        self.double()

    def losses(self, x):
        def judged(score, real):
            return functional.binary_cross_entropy_with_logits(score, torch.full_like(score, real))

        fake = self.generator(x)
        of_generator = judged(self.discriminator(fake), 1.0)
        scores = torch.cat([self.discriminator(x), self.discriminator(fake.detach())])
        of_discriminator = functional.binary_cross_entropy_with_logits(
            scores, torch.cat([torch.ones_like(scores[: len(x)]), torch.zeros_like(scores[: len(x)])])
        )
        return of_generator, of_discriminator

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        if self.order == "both, then steps":
            of_discriminator = self.losses(batch[0])[1]
            for optimizer in optimizers:
                optimizer.zero_grad()
            # Frozen for the generator's loss, so that its gradients are those of its own loss alone.
            self.manual_backward(of_discriminator)
            self.discriminator.requires_grad_(False)
            self.manual_backward(self.losses(batch[0])[0])
            self.discriminator.requires_grad_(True)
            for optimizer in optimizers:
                optimizer.step()
            return
        for index, optimizer in enumerate(optimizers):
            if self.order == "toggled":
                self.toggle_optimizer(optimizer)
            loss = self.losses(batch[0])[index]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if self.order == "toggled":
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.generator, self.discriminator)]


@pytest.mark.parametrize("order", ["toggled", "untoggled", "both, then steps"])
def test_each_of_two_manual_optimizers_has_the_curvature_of_its_own_loss(order):
    """Oracle: an engine per network, each shown its own loss alone."""
    module, other = Adversaries(order), Adversaries(order)
    fit(module, Preconditioner("kfac"), data=batches(10), max_steps=20)
    parts = (other.generator, other.discriminator)
    for part in parts:
        part.requires_grad_(True)
    engines = [GradientPreconditioner(part, "kfac") for part in parts]
    optimizers = other.configure_optimizers()
    for x, _ in batches(10):
        for index in (1, 0) if order == "both, then steps" else (0, 1):
            loss = other.losses(x)[index]
            others = list(parts[1 - index].parameters())
            held = [parameter.grad for parameter in others]
            for part in parts:
                part.zero_grad()
            engines[1 - index].taps.receiving = False
            engines[index].observe(loss)
            loss.backward()
            for parameter, gradient in zip(others, held, strict=True):
                parameter.grad = gradient
            engines[index].precondition(optimizers[index])
            if order != "both, then steps":
                optimizers[index].step()
        if order == "both, then steps":
            for optimizer in optimizers:
                optimizer.step()
    assert_equal(module, other)


def test_a_backward_pass_past_lightning_is_refused_with_the_way_out():
    class Bare(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            functional.cross_entropy(self(batch[0]), batch[1]).backward()
            self.optimizers().step()

    with pytest.raises(InputError, match=r"self\.manual_backward\(loss\)"):
        fit(Bare().double(), Preconditioner("kfac"), max_steps=1)


def test_a_method_that_compares_sees_every_batch_twice():
    """K-BFGS replays the batch after the step: as in a plain loop, without a second log and with accumulated gradients."""

    class Logging(Classifier):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            self.log("loss", output["loss"])
            return output

    torch.manual_seed(0)
    module = Logging(optimizer=PLAIN_SGD).double()
    other = classifier(optimizer=PLAIN_SGD)
    trainer = fit(module, Preconditioner("kbfgs"), data=batches(12), accumulate_grad_batches=2, max_steps=6)
    engine, optimizer, data = GradientPreconditioner(other, "kbfgs"), other.configure_optimizers(), list(batches(12))
    last = None

    def loss_of(batch):
        return functional.cross_entropy(other(batch[0]), batch[1])

    for start in range(0, 12, 2):
        window = data[start : start + 2]
        optimizer.zero_grad()
        for batch in window:
            last = loss_of(batch)
            engine.observe(last / 2)
            (last / 2).backward()
        engine.precondition(optimizer)
        optimizer.step()
        engine.replay(*(partial(loss_of, batch) for batch in window))
    assert_equal(module, other)
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(float(last), abs=1e-12)


# Forward passes that are not plain


class Checkpointed(Classifier):
    reentrant = None

    def forward(self, x):
        if self.reentrant is None:
            return self.net(x)
        x = self.net[0](x).requires_grad_(True)
        return checkpoint(self.net[1:], x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_activation_checkpointing_changes_nothing(reentrant, method):
    modules = []
    for kind in (None, reentrant):
        torch.manual_seed(0)
        module = Checkpointed().double()
        module.reentrant = kind
        module.net[1] = nn.Tanh()
        fit(module, Preconditioner(method, damping=0.1), max_steps=10)
        modules.append(module)
    assert_equal(*modules)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("before", [None, "validate", "fit"])
def test_a_compiled_module_trains_as_the_plain_one(fresh_compiler, before):
    """Also one that ran before, whose compiled code has no taps."""

    class Validated(Classifier):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            return {"prediction": logits.softmax(1), "loss": functional.cross_entropy(logits, batch[1])}

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    modules, callbacks, graphs = [], [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = Validated().double()
        counter = CompileCounterWithBackend("aot_eager")
        trained = torch.compile(module, backend=counter) if compiled else module
        callback = Preconditioner("kfac", damping=0.1, factor_every=2, inverse_every=4, warmup_steps=2)
        if before:
            run = getattr(Trainer(accelerator="cpu", max_steps=2, **QUIET), before)
            run(trained, batches(2))
        count = submodule("callbacks").LambdaCallback(
            on_train_batch_end=lambda *_, counter=counter: graphs.append(counter.frame_count)
        )
        fit(trained, callback, count, max_steps=20)
        modules.append(module)
        callbacks.append(callback)
    assert_equal(*modules, 1e-9)
    assert graphs[24:] == [graphs[-1]] * 16, f"recompiled: {graphs[20:]}"
    for ours, theirs in zip(statistics_of(callbacks[1]), statistics_of(callbacks[0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_a_layer_that_is_used_past_its_module_is_named_once():
    class Attends(Classifier):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, x):
            x = self.net[:3](x).unsqueeze(1)
            return self.net[3](self.attention(x, x, x)[0].squeeze(1))

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"nothing was seen to go through them.*: attention\.out_proj\. ") as caught:
        fit(Attends().double(), Preconditioner("kfac"), max_steps=5)
    assert sum("out_proj" in str(warning.message) for warning in caught) == 1
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*out_proj")
        fit(Attends().double(), Preconditioner("kfac", ignore=["out_proj"]), max_steps=2)


# Strategies


def named(name, **members):
    return type(name, (), members)()


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (
            named("DeepSpeedStrategy"),
            "cannot work with DeepSpeedStrategy: DeepSpeed keeps .* ModelParallelStrategy with fully_shard",
        ),
        (named("FSDPStrategy"), "cannot work with FSDPStrategy: FSDP1 flattens .* also with use_orig_params=True"),
        (named("HorovodStrategy"), "does not know what HorovodStrategy does to gradients; it works with one device"),
        (
            named(
                "ModelParallelStrategy",
                device_mesh={
                    "tensor_parallel": SimpleNamespace(size=lambda: 2),
                    "data_parallel": SimpleNamespace(size=lambda: 1),
                },
            ),
            r"cannot work with tensor_parallel_size=2: .* tensor_parallel_size=1\)",
        ),
    ],
)
def test_strategies_whose_gradients_cannot_be_read_are_refused_before_anything_runs(strategy, sentence):
    trainer = SimpleNamespace(strategy=strategy, world_size=2, global_step=0, checkpoint_callbacks=[], is_global_zero=True)
    with pytest.raises(InputError, match=sentence):
        Preconditioner("kfac").setup(trainer, classifier(), "fit")


# YAML


def test_it_can_be_written_in_a_yaml_file(tmp_path):
    cli = pytest.importorskip("jsonargparse")
    parser = cli.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(submodule("callbacks").Callback, "callback")
    (tmp_path / "callback.yaml").write_text(
        "callback:\n  class_path: lightning_plugins.Preconditioner\n"
        "  init_args: {method: kfac, damping: 0.1, inverse_every: 10}\n  dict_kwargs: {decay: 0.9, kl_clip: 0.001}\n"
    )
    parser.add_argument("--config", action="config")
    callback = parser.instantiate(parser.parse_args([f"--config={tmp_path / 'callback.yaml'}"])).callback
    assert repr(callback) == repr(Preconditioner("kfac", damping=0.1, inverse_every=10, decay=0.9, kl_clip=0.001))


def test_an_evaluation_alone_leaves_the_module_as_it_is():
    class Validated(Classifier):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    module = Validated().double()
    Trainer(accelerator="cpu", callbacks=[Preconditioner("kfac")], **QUIET).validate(module, batches(2), verbose=False)
    assert hooks_of(module) == 0


@pytest.mark.parametrize("method", ["soap", "shampoo", "muon", "psgd", "ekfac", "diag"])
def test_other_methods_train_as_the_engine_does(method):
    module, other = classifier(optimizer=PLAIN_SGD), classifier(optimizer=PLAIN_SGD)
    fit(module, Preconditioner(method), max_steps=6)
    assert module.losses == plain_loop(other, steps=6, method=method)


def test_a_layer_that_was_compiled_by_itself_is_refused_with_the_way_out():
    module = classifier()
    module.net[0].compile(backend="aot_eager")
    with pytest.raises(InputError, match=r"net\.0 was compiled before the preconditioner was attached"):
        fit(module, Preconditioner("kfac"), max_steps=1)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_half_precision_on_a_gpu(fused):
    module = classifier(optimizer=partial(torch.optim.AdamW, lr=0.01, fused=fused)).float()
    callback = Preconditioner("kfac", log_every=1, kl_clip=0.01)
    trainer = Trainer(accelerator="gpu", devices=1, precision="16-mixed", max_steps=40, callbacks=[callback], **QUIET)
    data = torch.utils.data.DataLoader([[x.float(), y] for x, y in batches(size=64)], batch_size=None)
    trainer.fit(module, data)
    assert sum(module.losses[-10:]) < sum(module.losses[:10])
    assert 0 < float(trainer.callback_metrics["preconditioner/share_of_step_time"]) < 1
