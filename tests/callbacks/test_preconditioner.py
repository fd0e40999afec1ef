"""The callback inside a real Trainer, under whichever Lightning the environment variable names. Oracle: the engine in a plain
PyTorch loop, whose numbers the engine's own tests compare with dense matrices."""

import logging
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins import Preconditioner
from lightning_plugins._lightning import LightningModule, ModelCheckpoint, Trainer
from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import GradientPreconditioner

pytestmark = pytest.mark.adapter


MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class Classifier(LightningModule):
    """A small net; keeps its losses."""

    def __init__(self, optimizer=MOMENTUM, crash_at=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(inplace=True), nn.LayerNorm(12), nn.Linear(12, 3))
        self.optimizer = optimizer
        self.crash_at = crash_at
        self.stream = None
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if self.global_step == self.crash_at:
            raise RuntimeError("crash")
        # By the step, not by the loader, which begins anew when a run is resumed within an epoch.
        x, y = (part.to(self.device) for part in (self.stream or [batch])[self.global_step if self.stream else 0])
        logits = self(x)
        loss = functional.cross_entropy(logits, y)
        self.losses.append(float(loss.detach()))
        return {"loss": loss, "prediction": logits}

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def classifier(**options):
    torch.manual_seed(0)
    return Classifier(**options).double()


def streamed(**options):
    module = classifier(**options)
    module.stream = [tuple(batch) for batch in batches()]
    return module


def batches(count=40, size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * size, 6, dtype=torch.float64, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(dim=1)), batch_size=size)


QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}


def fit(module, *callbacks, data=None, ckpt_path=None, max_steps=40, **options):
    options = {**QUIET, **options}
    # A list of batches: Lightning would take pairs in a list for two loaders.
    data = DataLoader(data, batch_size=None) if isinstance(data, list) else data
    trainer = Trainer(accelerator="cpu", max_steps=max_steps, callbacks=list(callbacks), **options)
    trainer.fit(module, batches() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def plain_loop(module, steps=40, **options):
    """The same training without Lightning; returns its losses."""
    preconditioner = GradientPreconditioner(module, **options)
    optimizer = module.configure_optimizers()
    losses = []
    for x, y in list(batches())[:steps]:
        loss = functional.cross_entropy(module(x), y)
        optimizer.zero_grad()
        preconditioner.observe(loss)
        loss.backward()
        preconditioner.precondition(optimizer)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def hooks_of(module):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "kfac"},
        {"method": "kfac", "factor_every": 2, "inverse_every": 4, "warmup_steps": 3, "kl_clip": 1e-3},
        {"method": "kfac", "fisher": "mc", "samples": 2, "damping": 0.1},
        {"method": "kfac", "fisher": "exact", "match_norm": True},
        {"method": "foof"},
    ],
)
def test_trains_as_the_engine_does_in_a_plain_loop(options):
    module, other = classifier(), classifier()
    fit(module, Preconditioner(**options))
    assert module.losses == plain_loop(other, **options)
    plain = classifier()
    fit(plain)
    assert module.losses[1:] != plain.losses[1:]


def test_trains_further_than_the_plain_gradient():
    """0.3 is the best of SGD's learning rates 0.05, 0.3 and 1 here."""
    module, plain = (classifier(optimizer=partial(torch.optim.SGD, lr=0.3)) for _ in range(2))
    fit(module, Preconditioner("kfac"), data=batches(size=64))
    fit(plain, data=batches(size=64))
    assert sum(module.losses[-10:]) < 0.7 * sum(plain.losses[-10:])


@pytest.mark.parametrize("source", ["prediction", "net"])
def test_named_logits_equal_those_of_the_graph(source):
    """The logits of a submodule, and under a key of what training_step returns."""
    named, read = classifier(), classifier()
    fit(named, Preconditioner("kfac", fisher="mc", loss="cross_entropy", logits=source))
    fit(read, Preconditioner("kfac", fisher="mc"))
    torch.testing.assert_close(torch.tensor(named.losses), torch.tensor(read.losses), rtol=0, atol=1e-12)
    assert "training_step" not in vars(named)


def test_logits_that_are_nowhere_are_refused_by_name():
    with pytest.raises(InputError, match=r"logits='predictions' is no submodule .* did you mean prediction"):
        fit(classifier(), Preconditioner("kfac", fisher="mc", loss="cross_entropy", logits="predictions"))


def test_the_table_and_the_settings_are_shown_at_the_start(caplog):
    with caplog.at_level(logging.INFO):
        fit(classifier(), Preconditioner("kfac", ignore=["net.3"]), max_steps=1)
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "Preconditioner('kfac', factor_every=1, inverse_every=1, ignore=['net.3'], log_every=50" in text
    assert [line.split() for line in text.splitlines() if line.startswith("net.")] == [
        ["net.0.weight", "(12,", "6)", "kfac"],
        ["net.0.bias", "(12,)", "kfac"],
        ["net.2.weight", "(12,)", "unit"],
        ["net.2.bias", "(12,)", "unit"],
        ["net.3.weight", "(3,", "12)", "plain", "gradient", "ignored", "by", "name"],
        ["net.3.bias", "(3,)", "plain", "gradient", "ignored", "by", "name"],
    ]


def test_logs_what_it_does():
    seen = {}

    class Logged(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen[batch_idx] = {key for key in self.trainer.callback_metrics if key.startswith("second/")}

    torch.manual_seed(0)
    module = Logged().double()
    trainer = fit(module, Preconditioner("kfac", log_every=3, log_traces=True, name="second", kl_clip=1e-6), max_steps=6)
    assert not seen[1]
    assert seen[2]
    metrics = {key.removeprefix("second/"): float(value) for key, value in trainer.callback_metrics.items()}
    assert metrics["damping"] == pytest.approx(0.03)
    assert 0 < metrics["clip_factor"] < 1
    assert 0 < metrics["share_of_step_time"] < 1
    assert metrics["refresh_ms"] > 0
    assert metrics["nonfinite_batches_count"] == metrics["unseen_layers_count"] == metrics["kept_inverses_count"] == 0
    assert metrics["trace/net.0"] > 0


def test_after_the_fit_the_module_has_no_hook_of_it():
    module = classifier()
    fit(module, Preconditioner("kfac", fisher="mc", loss="cross_entropy", logits="net"), max_steps=2)
    assert hooks_of(module) == 0
    crashed = classifier(crash_at=2)
    with pytest.raises(RuntimeError, match="crash"):
        fit(crashed, Preconditioner("kfac", fisher="mc", loss="cross_entropy", logits="prediction"))
    assert hooks_of(crashed) == 0
    assert "training_step" not in vars(crashed)


def test_it_can_be_pickled_before_and_after_a_fit():
    callback = Preconditioner("kfac", damping=0.1, inverse_every=5)
    assert repr(pickle.loads(pickle.dumps(callback))) == repr(callback)
    fit(classifier(), callback, max_steps=2)
    state = pickle.loads(pickle.dumps(callback)).state_dict()
    assert state["blocks"][0]["steps"] == 2


# The checkpoint


@pytest.mark.parametrize("options", [{"inverse_every": 5, "warmup_steps": 0}, {"fisher": "mc"}, {"method": "foof"}])
def test_a_run_that_is_killed_between_refreshes_resumes_with_the_same_bits(tmp_path, options):
    whole = streamed()
    fit(whole, Preconditioner(**options))
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=13, save_top_k=-1)
    killed = streamed(crash_at=17)
    with pytest.raises(RuntimeError, match="crash"):
        fit(killed, saver, Preconditioner(**options), enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    resumed = streamed()
    fit(resumed, Preconditioner(**options), ckpt_path=path)
    assert resumed.losses[:20] == whole.losses[13:33]


def test_the_state_is_tensors_and_plain_values(tmp_path):
    callback = Preconditioner("kfac", name="mine")
    trainer = fit(classifier(), callback, max_steps=3)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"]["Preconditioner(mine)"]
    assert state["blocks"][0]["steps"] == 3


def test_a_fit_that_goes_on_keeps_its_curvature():
    whole, parts, callback = classifier(), classifier(), Preconditioner("kfac", inverse_every=4, warmup_steps=0)
    fit(whole, Preconditioner("kfac", inverse_every=4, warmup_steps=0), max_steps=10)
    trainer = fit(parts, callback, max_steps=6)
    trainer.fit_loop.epoch_loop.max_steps = 10
    # The same batches once more: only the state of the callback is looked at.
    steps = callback.state_dict()["blocks"][0]["steps"]
    trainer.fit(parts, batches())
    assert (steps, callback.state_dict()["blocks"][0]["steps"]) == (6, 10)


def test_a_new_trainer_starts_anew():
    callback = Preconditioner("kfac")
    fit(classifier(), callback, max_steps=3)
    fit(classifier(), callback, max_steps=2)
    assert callback.state_dict()["blocks"][0]["steps"] == 2


def test_a_checkpoint_of_another_model_is_refused_by_layer(tmp_path):
    fit(classifier(), Preconditioner("kfac"), max_steps=2).save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]["Preconditioner(preconditioner)"]
    other = Preconditioner("kfac")
    module = classifier()
    module.net[3] = nn.Linear(12, 4).double()

    class Loads(Preconditioner):
        def setup(self, trainer, pl_module, stage):
            super().setup(trainer, pl_module, stage)
            self.load_state_dict(state)

    other = Loads("kfac")
    with pytest.raises(InputError, match=r"of another model: it has layer net\.3 .*\[3, 12\].* \[\[4, 12\]"):
        fit(module, other, max_steps=1)


def test_two_instances_have_their_own_state(tmp_path):
    first = Preconditioner("kfac", ignore=["net.3"], name="first")
    second = Preconditioner("foof", ignore=["net.0"], norms="plain", name="second")
    trainer = fit(classifier(), first, second, max_steps=2)
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    states = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    assert states["Preconditioner(first)"]["method"] == "kfac"
    assert states["Preconditioner(second)"]["method"] == "foof"


def test_checkpoints_without_curvature_are_announced(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="save_weights_only=True hold no curvature"):
        fit(classifier(), Preconditioner("kfac"), saver, enable_checkpointing=True, max_steps=1)


def test_a_resumed_run_that_finds_no_state_says_so(tmp_path):
    fit(classifier(), max_steps=2).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match=r"goes on at step 2, .* no state of Preconditioner\(preconditioner\)"):
        fit(classifier(), Preconditioner("kfac"), ckpt_path=tmp_path / "plain.ckpt", max_steps=3)


# Options


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "kfak"}, "there is no method 'kfak'; did you mean kfac"),
        ({"damping": 0.0}, "damping must be above 0, got 0.0"),
        (
            {"factor_every": 3, "inverse_every": 10},
            "inverse_every must be a multiple of factor_every, got 10 and 3; 9 is the nearest",
        ),
        ({"fisher": "true"}, "kfac has no fisher='true'; valid are empirical"),
        ({"dampning": 1.0}, "kfac has no option 'dampning'; did you mean damping"),
        ({"clip_raw": 0.0}, "clip_raw must be above 0"),
        ({"log_every": 0}, "log_every must be a whole number of 1 or more"),
        ({"loss": "cross_entropy"}, "loss and logits go together"),
        ({"loss": "cross_entropy", "logits": "net"}, "for fisher='mc' and 'exact', got fisher='empirical'"),
    ],
)
def test_options_are_validated_at_once(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Preconditioner(**options)


def test_a_module_with_nothing_to_precondition_is_refused():
    module = classifier()
    module.requires_grad_(False)
    module.net[2].requires_grad_(True)
    with pytest.raises(InputError, match="Classifier has nothing for kfac to precondition"):
        fit(module, Preconditioner("kfac", norms="plain"), max_steps=1)


def test_an_infinite_batch_leaves_the_statistics_clean_and_is_counted():
    """The step after it must be that of a run that never saw it: its gradients are dropped by the module."""

    class DropsBadGradients(Classifier):
        def on_before_optimizer_step(self, optimizer):
            for parameter in self.parameters():
                if not parameter.grad.isfinite().all():
                    parameter.grad.zero_()

    def run(data, log_every):
        torch.manual_seed(0)
        module = DropsBadGradients(optimizer=partial(torch.optim.SGD, lr=0.05)).double()
        callback = Preconditioner("kfac", norms="plain", inverse_every=1, log_every=log_every)
        return module, callback, fit(module, callback, data=data, max_steps=len(data))

    good = [list(batch) for batch in batches()][:8]
    bad = [torch.full_like(good[0][0], math.inf), good[0][1]]
    clean, callback, _ = run(good, 8)
    hit, poisoned, trainer = run([*good[:4], bad, *good[4:]], 9)
    assert poisoned.state_dict()["nonfinite_batches"] == 1
    assert float(trainer.callback_metrics["preconditioner/nonfinite_batches_count"]) == 1
    for block, expected in zip(poisoned.state_dict()["blocks"], callback.state_dict()["blocks"], strict=True):
        torch.testing.assert_close(block["state"], expected["state"], rtol=0, atol=0)
    assert hit.losses[:4] + hit.losses[5:] == clean.losses


def test_clip_raw_bounds_the_gradient_before_it_is_rewritten():
    """Oracle: for foof at one step P is linear in the gradient, so a clip by a half halves the step."""
    weights = []
    for clip in (1e-3, 2e-3):
        module = classifier(optimizer=partial(torch.optim.SGD, lr=1.0))
        start = module.net[0].weight.detach().clone()
        fit(module, Preconditioner("foof", clip_raw=clip), max_steps=1)
        weights.append(module.net[0].weight.detach() - start)
    torch.testing.assert_close(2 * weights[0], weights[1], rtol=1e-6, atol=1e-12)
