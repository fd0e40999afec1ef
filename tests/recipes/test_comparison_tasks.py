"""The tasks that optimizers are compared on, and the trials they get: the same bits for the same seed, as many for everyone."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import METHODS
from lightning_plugins.recipes.comparison_tasks import LETTERS, TASKS
from lightning_plugins.recipes.comparison_trials import CONTESTANTS, Trial, at_edge, trials


def weights(task):
    return torch.cat([parameter.detach().flatten() for parameter in task.make_module().parameters()])


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_everything_follows_from_seed_and_step_alone(name):
    one = TASKS[name](3)
    first = weights(one)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again, other = TASKS[name](3), TASKS[name](4)
    assert equal(one.batch(7), again.batch(7))
    assert torch.equal(first, weights(again))
    assert torch.equal(state, torch.get_rng_state()), "the program's own random numbers were used"
    batches = [one.batch(0)[0], one.batch(1)[0], other.batch(0)[0], one.evaluation[0][: len(one.batch(0)[0])]]
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == len(batches)
    assert not torch.equal(first, weights(other))
    assert equal(one.evaluation, other.evaluation)
    stream = one.batches()
    assert equal(next(stream), one.batch(0))
    assert equal(next(stream), one.batch(1))


def test_the_autoencoder_is_the_one_that_the_literature_has_in_small():
    task = TASKS["deep_autoencoder"](0)
    widths = [64, 100, 50, 25, 6, 25, 50, 100, 64]
    linear = [part for part in task.make_module() if isinstance(part, nn.Linear)]
    assert [(part.in_features, part.out_features) for part in linear] == list(pairwise(widths))
    assert sum(isinstance(part, nn.Tanh) for part in task.make_module()) == 7
    images, targets = task.batch(0)
    assert images.shape == (512, 64)
    assert torch.equal(images, targets)
    prediction = task.make_module()(images).detach()
    by_hand = np.mean([((p - t) ** 2).sum() for p, t in zip(prediction.numpy(), targets.numpy(), strict=True)])
    assert float(task.loss(prediction, targets)) == pytest.approx(by_hand, rel=1e-5)


def test_an_image_is_one_round_bump():
    images = TASKS["deep_autoencoder"](0).batch(0)[0].double().numpy().reshape(-1, 8, 8)
    rows, columns = np.mgrid[:8, :8]
    for image in images[:20]:
        # The logarithm of a round bump is a paraboloid with the same curvature along both axes.
        basis = np.stack([np.ones(64), rows.ravel(), columns.ravel(), (rows**2 + columns**2).ravel()], axis=1)
        bright = image.ravel() > 1e-4
        solution, *_ = np.linalg.lstsq(basis[bright], np.log(image.ravel()[bright]), rcond=None)
        assert np.abs(np.exp(basis[bright] @ solution) - image.ravel()[bright]).max() < 1e-3
        assert solution[3] < 0


def test_the_text_is_of_the_grammar_and_targets_are_the_next_letters():
    inputs, targets = TASKS["character_transformer"](0).batch(0)
    assert inputs.shape == targets.shape == (64, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text = "".join(LETTERS[i] for i in TASKS["character_transformer"](0).evaluation[0].flatten())
    assert "some cat " not in text
    assert "every cats " not in text
    assert "the cats " in text
    assert " that " in text


def test_the_transformer_sees_no_letter_before_its_turn():
    task = TASKS["character_transformer"](0)
    module = task.make_module()
    letters = task.batch(0)[0][:2].clone()
    before = module(letters).detach()
    letters[:, 20] = (letters[:, 20] + 1) % len(LETTERS)
    after = module(letters)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amin(dim=(0, 1)).max() > 0
    assert {type(part) for part in module.modules() if next(part.parameters(recurse=False), None) is not None} == {
        nn.Linear,
        nn.Embedding,
        nn.LayerNorm,
    }
    assert float(task.loss(before, task.batch(0)[1][:2])) == pytest.approx(math.log(len(LETTERS)), rel=0.2)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("count", [1, 3, 9, 12])
def test_everyone_has_as_many_trials_and_the_smaller_grid_is_within_the_larger(task, count):
    for method in CONTESTANTS:
        tried = trials(task, method, count)
        assert len(set(tried)) == count
        assert tried == trials(task, method, 12)[:count] or (count != 12 and tried[0].damping is not None)
        has_damping = method in METHODS and not METHODS[method].gradient_only
        assert all((trial.damping is not None) == has_damping for trial in tried)
        rates = sorted({trial.learning_rate for trial in tried})
        assert min(rates) <= tried[0].learning_rate <= max(rates)


def test_the_rivals_are_what_their_users_take():
    module = nn.Linear(2, 2)
    adamw = Trial("adamw", 0.01).make_optimizer(module)
    assert type(adamw) is torch.optim.AdamW
    assert adamw.defaults["betas"] == (0.9, 0.999)
    assert adamw.defaults["weight_decay"] == 0
    sgd = Trial("sgd", 0.01).make_optimizer(module)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.9, True)
    for method in METHODS:
        base = Trial(method, 0.01, 0.1).make_optimizer(module)
        assert type(base) is torch.optim.SGD
        assert base.defaults["momentum"] == (0.0 if method in ("soap", "muon") else 0.9)
        assert not base.defaults["nesterov"]


def test_a_best_trial_at_an_edge_is_told():
    grid = [Trial("adamw", rate) for rate in (0.1, 0.2, 0.3)]
    assert [at_edge(trial, grid) for trial in grid] == [True, False, True]
    grid = [Trial("kfac", rate, damping) for rate in (0.1, 0.2, 0.3) for damping in (1.0, 2.0, 3.0)]
    assert not at_edge(Trial("kfac", 0.2, 2.0), grid)
    assert at_edge(Trial("kfac", 0.2, 1.0), grid)
    assert at_edge(Trial("kfac", 0.3, 2.0), grid)


def test_what_cannot_be_tried_is_refused():
    with pytest.raises(InputError, match="there is no contestant 'adam'; did you mean adamw"):
        trials("deep_autoencoder", "adam", 3)
    with pytest.raises(InputError, match="trials must be 1 or more, got 0"):
        trials("deep_autoencoder", "adamw", 0)
