"""The options of the DDP hook, checked together before any group is made."""

from dataclasses import dataclass

from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.engines.sparse_allreduce.settings import Settings, check_density
from lightning_plugins.engines.sparse_allreduce.wire import MOST_ELEMENTS

MODES = ("streamed", "global", "per_bucket")


@dataclass(frozen=True)
class HookOptions:
    """What the hook does with DDP's buckets.

    Args:
        density: share of the gradient that is sent.
        mode: ``streamed`` sends each bucket as soon as backward has filled it, by thresholds for the whole model; ``global``
            sends everything after the last bucket, as the paper does; ``per_bucket`` has a threshold for each bucket.
        dense_steps: steps at the start that reduce the whole gradient.
        ranks_per_node: ranks that reduce densely among themselves, before nodes reduce sparsely.
        clip_norm: largest norm of the mean gradient if ranks were independent: each rank clips its own to
            ``clip_norm / sqrt(ranks)`` before it is added to the residual.
        unused_parameters: whether backward passes may leave parameters out (DDP's ``find_unused_parameters``): what waits
            for such a parameter is not sent then, since DDP would throw it away.
        auto: time some dense and some sparse steps at the start, and stay dense if these are not faster by ``WORTHWHILE``.
        measure_every: steps between two measurements of norms; 0 for none.
        assumption_every: steps between two measurements of the paper's assumption, two dense reductions each; 0 for none.
    """

    density: float = 0.01
    mode: str = "streamed"
    dense_steps: int = 0
    ranks_per_node: int = 1
    clip_norm: float | None = None
    unused_parameters: bool = False
    auto: bool = False
    measure_every: int = 50
    assumption_every: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.mode not in MODES:
            raise InputError(f"there is no mode={self.mode!r}; {nearest(str(self.mode), MODES)}")
        for name, least in (("dense_steps", 0), ("ranks_per_node", 1), ("measure_every", 0), ("assumption_every", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number from {least} on, got {value}")
        if self.clip_norm is not None and not 0.0 < self.clip_norm < float("inf"):
            raise InputError(f"clip_norm must be above 0 and finite, got {self.clip_norm}; leave it out not to clip")
        if self.clip_norm is not None and self.mode != "global":
            raise InputError(
                f"clip_norm needs the norm of the whole gradient, which mode={self.mode!r} does not wait for; use mode='global'"
            )

    def check_settings(self, settings: Settings) -> None:
        """Refuse what does not go with how thresholds are found."""
        if self.mode == "streamed" and settings.threshold == "sampled":
            raise InputError(
                "threshold='sampled' samples the whole gradient, which mode='streamed' does not wait for; use threshold='servo'"
            )

    def elements_sent(self, elements: int, ranks: int) -> int:
        """Return k for the whole vector.

        Raises:
            InputError: if that is fewer entries than there are ranks, or the vector is too long.
        """
        if elements > MOST_ELEMENTS:
            raise InputError(
                f"a rank reduces {elements} parameters, the most is {MOST_ELEMENTS}; give ranks_per_node, and each of a node's "
                "ranks reduces its part"
            )
        k = round(self.density * elements)
        if k < ranks:
            raise InputError(
                f"density {self.density} of {elements} parameters is {k} entries, fewer than the {ranks} ranks; "
                f"give at least {ranks / elements:.2g}, or train densely"
            )
        return k

    def elements_sent_of(self, part: int, ranks: int) -> int:
        """Return k for a bucket; a small one sends an entry for each rank."""
        return min(part, max(round(self.density * part), ranks))
