"""Index sets for the simulator: recorded in a small real training, extrapolated from what was recorded, or adversarial.

Extrapolation measures two things of recorded supports: the profile, in which part of the vector how many entries lie, and how
much the supports of different ranks overlap. Each index i then has a probability p(i) with which any rank selects it:

    p(i) ~ Beta(d s, (1 - d) s),   d the profile's density at i,   E|A and B| = sum of d (d s + 1) / (s + 1)

so that one number s, the concentration, is set by the mean overlap of two ranks: the smaller, the more alike are the ranks.
Assumptions: ranks are exchangeable and, given p, independent; p of neighbouring indices is independent; profile and s do
not depend on the number of ranks, the length or the model. The first two hold by construction for workers that
draw from one data set; the third is a guess, checked in ``tests`` within one training (fitted on few of its ranks, predicting
the union of all) and known to fail by up to a quarter across trainings of different size: with more ranks they overlap more.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from lightning_plugins.engines.sparse_allreduce.simulator import Indices, Supports

CLASSES, SIDE, BATCH, RATE, NOISE = 10, 16, 8, 0.1, 2.0
PROFILE_BINS = 64
# Of the union, an entry that m ranks selected is in the final set with a weight of m squared: of the powers 1 to 4 this one
# gives the multiplicities that recorded final sets have.
FINAL_POWER = 2.0


def record_supports(ranks: int, steps: int, density: float, seed: int = 0, every: int = 1) -> list[Supports]:
    """Train a small convolutional network with sparse sums and error feedback, and return what was selected.

    One process plays all ranks. Each draws its own batches of noisy patterns and keeps its own residual; the sum of the ranks'
    exact top-k is cut to its own top-k, the global set, as Ok-Topk does it.

    Args:
        ranks: workers.
        steps: of training.
        density: k over the number of parameters, in (0, 1].
        seed: of the data and the initial weights.
        every: steps from one recording to the next.

    Returns:
        Supports after ``every``, ``2 * every``, ... steps.

    Raises:
        ValueError: if the density is outside of (0, 1], or another number is below 1.
    """
    if not 0 < density <= 1 or min(ranks, steps, every) < 1:
        raise ValueError(
            f"density must be in (0, 1], and ranks, steps and every 1 or more, got {density}, {ranks}, {steps} and {every}"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _network()
    patterns = torch.randn(CLASSES, 1, SIDE, SIDE, generator=generator)
    parameters = list(model.parameters())
    length = sum(p.numel() for p in parameters)
    k = max(1, round(density * length))
    residuals = torch.zeros(ranks, length)
    recorded = []
    for step in range(1, steps + 1):
        for rank in range(ranks):
            labels = torch.randint(CLASSES, (BATCH,), generator=generator)
            images = patterns[labels] + NOISE * torch.randn(BATCH, 1, SIDE, SIDE, generator=generator)
            loss = functional.cross_entropy(model(images), labels)
            residuals[rank] += torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)])
        chosen = _largest(residuals, k)
        sums = torch.where(chosen, residuals, 0).sum(dim=0)
        final = _largest(sums[None], k)[0]
        residuals[chosen & final] = 0
        update = torch.where(final, sums, 0) / ranks
        with torch.no_grad():
            for parameter, part in zip(parameters, update.split([p.numel() for p in parameters]), strict=True):
                parameter.sub_(RATE * part.view_as(parameter))
        if step % every == 0:
            local = tuple(row.nonzero().flatten().numpy() for row in chosen)
            recorded.append(Supports(length, local, final.nonzero().flatten().numpy()))
    return recorded


@dataclass(frozen=True)
class Overlap:
    """What recorded supports look like, without their length and number.

    Attributes:
        profile: ``(bins,)``, density of the selection along the vector, over its mean.
        concentration: s of the Beta distributions.
        density: mean density, which the fit was made for.
    """

    profile: NDArray[np.float64]
    concentration: float
    density: float

    def densities(self) -> NDArray[np.float64]:
        """Return the density of each bin, between what a Beta distribution can have."""
        return np.clip(self.density * self.profile, 1e-9, 1 - 1e-9)


def measure_overlap(supports: Supports, bins: int = PROFILE_BINS) -> Overlap:
    """Fit the profile and the concentration to the supports of two or more ranks.

    Raises:
        ValueError: if there is one rank, or two ranks have no more in common than chance gives them.
    """
    if supports.ranks < 2:
        raise ValueError("overlap needs two ranks or more, got one")
    multiplicity = _multiplicity(supports)
    in_bin = np.arange(supports.length) * bins // supports.length
    size = np.bincount(in_bin, minlength=bins)
    density = np.bincount(in_bin, multiplicity, minlength=bins) / np.maximum(size, 1) / supports.ranks
    both = (multiplicity * (multiplicity - 1)).sum() / (supports.ranks * (supports.ranks - 1))
    by_chance, same = (size * density**2).sum(), (size * density).sum()
    if both <= by_chance:
        raise ValueError(f"two ranks share {both:.1f} entries, and {by_chance:.1f} by chance: there is no overlap to fit")
    mean = same / supports.length
    return Overlap(density / mean, float((same - both) / (both - by_chance)), float(mean))


def expected_union(overlap: Overlap, ranks: int) -> float:
    """Return the expected share of the vector that at least one of so many ranks selects."""
    alpha = overlap.concentration * overlap.densities()
    beta = overlap.concentration - alpha
    none = np.ones_like(alpha)
    for rank in range(ranks):  # the Beta function's ratio, a rank at a time
        none *= (beta + rank) / (alpha + beta + rank)
    return float(1 - none.mean())


def draw_supports(overlap: Overlap, length: int, ranks: int, seed: int = 0, scale: float = 1.0) -> Supports:
    """Draw supports with a measured profile, density and overlap, for any length and number of ranks.

    Every rank selects exactly k, and so does the final set, which is drawn from the union, see ``FINAL_POWER``.

    Args:
        overlap: measured; ``dataclasses.replace`` its density for another k.
        length: of the vector to draw.
        ranks: how many.
        seed: of the draw; with the same one, fewer ranks select what the first of more ranks do.
        scale: entries of the real vector for which one stands.
    """
    generator = np.random.default_rng(seed)
    density = overlap.densities()[np.arange(length) * len(overlap.profile) // length]
    likely = generator.beta(overlap.concentration * density, overlap.concentration * (1 - density))
    likely = (likely * density.sum() / likely.sum()).astype(np.float32)
    k = round(float(density.sum()))
    local = tuple(_drawn(likely, k, generator) for _ in range(ranks))
    return with_final(length, local, k, seed, scale)


def with_final(length: int, local: tuple[Indices, ...], k: int, seed: int = 0, scale: float = 1.0) -> Supports:
    """Return supports whose final set of ``k`` is drawn from the union of what the ranks selected."""
    bare = Supports(length, local, np.zeros(0, np.int64), scale)
    multiplicity = _multiplicity(bare)
    union = np.flatnonzero(multiplicity)
    # The largest of log weight + Gumbel noise are a draw without replacement.
    keys = FINAL_POWER * np.log(multiplicity[union]) + np.random.default_rng([seed, len(local)]).gumbel(size=union.size)
    return Supports(length, local, np.sort(union[np.argsort(-keys)[:k]]), scale)


def random_supports(length: int, k: int, ranks: int, seed: int = 0) -> Supports:
    """Return supports that lie anywhere, independently."""
    generator = np.random.default_rng(seed)
    return with_final(length, tuple(np.sort(generator.choice(length, k, replace=False)) for _ in range(ranks)), k, seed)


def one_region_supports(length: int, k: int, ranks: int, seed: int = 0) -> Supports:
    """Return supports that all lie in a quarter of what an even split gives to the first rank."""
    inside = random_supports(length // (4 * ranks), k, ranks, seed)
    return Supports(length, inside.local, inside.final)


def shifted_blocks(length: int, k: int, ranks: int, shift: int = 1, seed: int = 0) -> Supports:
    """Return disjoint supports: that of rank p lies in block ``p + shift`` of as many equal blocks as there are ranks.

    With equal cuts nothing of it stays at home. Each rank's own quantiles lie in its block, so their mean lies in the middle of
    the vector for all cuts alike, and the first and the last region get half of all entries each.
    """
    generator = np.random.default_rng(seed)
    block = length // ranks
    local = tuple((rank + shift) % ranks * block + np.sort(generator.choice(block, k, replace=False)) for rank in range(ranks))
    return with_final(length, local, k, seed)


def _drawn(likely: NDArray[np.float32], k: int, generator: np.random.Generator) -> Indices:
    """Return k sorted indices: those whose uniform number is smallest beside their probability, so about those below it."""
    drawn = generator.random(likely.size, dtype=np.float32)
    near = np.flatnonzero(drawn < 1.5 * likely)
    if near.size < k:
        near = np.arange(likely.size)
    order = np.argpartition(drawn[near] / np.maximum(likely[near], 1e-30), k - 1)[:k]
    return np.sort(near[order])


def _multiplicity(supports: Supports) -> NDArray[np.float64]:
    """Return ``(length,)``: how many ranks selected each index."""
    return np.bincount(np.concatenate(supports.local), minlength=supports.length).astype(np.float64)


def _network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * (SIDE // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, CLASSES)),
    )


def _largest(values: Tensor, k: int) -> Tensor:
    """Return ``(rows, length)``, true at the k largest magnitudes of each row that are not 0."""
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, values.abs().topk(k, dim=1).indices, True) & (values != 0)
