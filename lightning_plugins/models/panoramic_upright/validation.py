"""What a validation reports of an upright network: angles, and the level images with the true and with the predicted one."""

from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_plugins.models.panoramic_upright.network import Candidates, UprightNetwork, unit_up
from lightning_plugins.models.panoramic_upright.orientation_metrics import UpErrors
from lightning_plugins.models.panoramic_upright.reconstruction_metrics import PanoramaPSNR, psnr_db

ANGLES = ("true", "predicted")


class UprightFigures(nn.Module):
    """The metrics of one validation; nothing of it is saved in checkpoints.

    Figures of ``compute``: those of ``UpErrors``, and, of the images whose level truth was given, for either angle
    ``psnr_<image>_<angle>_db`` and ``ws_psnr_<image>_<angle>_db`` with ``plain``, ``refined`` and ``gated`` as image;
    ``gate_precision``, the share of images of which the gate took the candidate that is nearer to the truth, over the sphere; and
    ``gate_refined_share``, the share of which it took the refined one. These two are of the true angle: where image and truth lie
    some pixels apart, the softer of two images is always the nearer one.

    Args:
        refined: whether there is a refiner; without one ``plain`` is all there is to report.
    """

    def __init__(self, refined: bool) -> None:
        super().__init__()
        self.up_errors = UpErrors()
        self.images = ("plain", "refined", "gated") if refined else ("plain",)
        self.psnr: Any = nn.ModuleDict({f"{image}_{angle}": PanoramaPSNR() for image in self.images for angle in ANGLES})
        gates = ("gate_precision", "gate_refined_share") if refined else ()
        self.gates: Any = nn.ModuleDict({name: MeanMetric() for name in gates})
        self.has_level = False

    def update(self, network: UprightNetwork, image: Tensor, up: Tensor, level: Tensor | None) -> None:
        """Add a batch.

        Args:
            network: what is judged.
            image: ``(B, 3, H, W)``, tilted.
            up: ``(B, 3)``, true.
            level: ``(B, 3, H, W)``, true; None judges the angle alone.
        """
        predicted = unit_up(network.estimate(image))
        self.up_errors.update(predicted, up)
        if level is None:
            return
        self.has_level = True
        for angle, direction in zip(ANGLES, (up, predicted), strict=True):
            candidates = network.level(image, direction)
            for name in self.images:
                self.psnr[f"{name}_{angle}"].update(getattr(candidates, name), level)
            if self.gates and angle == "true":
                self.gates["gate_precision"].update(gate_is_right(candidates, level).float())
                self.gates["gate_refined_share"].update(candidates.took_refined.float())

    def compute(self) -> dict[str, Tensor]:
        """Return the figures of all batches since the last call, and begin anew."""
        figures: dict[str, Tensor] = self.up_errors.compute()
        self.up_errors.reset()
        if not self.has_level:
            return figures
        for name, psnr in self.psnr.items():
            figures |= {f"{kind.removesuffix('_db')}_{name}_db": figure for kind, figure in psnr.compute().items()}
            psnr.reset()
        for name, gate in self.gates.items():
            figures[name] = gate.compute()
            gate.reset()
        self.has_level = False
        return figures


def gate_is_right(candidates: Candidates, level: Tensor) -> Tensor:
    """Tell for each image, ``(B,)``, whether the gate took the candidate nearer to the truth; of two equal ones either is right.

    Args:
        candidates: of a batch.
        level: ``(B, 3, h, w)``, the truth.
    """
    plain, refined = (psnr_db(image, level, by_solid_angle=True) for image in (candidates.plain, candidates.refined))
    return (plain == refined) | (candidates.took_refined == (refined > plain))
