"""Oracle: the gated blend with gates that are set by hand, in numpy."""

import numpy as np
import torch

from lightning_plugins.models.panoramic_depth.fusion import BandGatedFusion


def test_each_row_and_channel_is_blended_by_its_gate():
    torch.manual_seed(0)
    fusion = BandGatedFusion(3, 2, bands=4).double()
    logits = np.random.default_rng(0).normal(size=(3, 4))
    with torch.no_grad():
        fusion.pooled.weight.zero_()
        fusion.pooled.bias.zero_()
        fusion.band_bias.copy_(torch.tensor(logits)[None, :, :, None])  # as many bands as rows: each row has its own
    grid, sphere = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(2, 2, 4, 8, dtype=torch.float64)
    gate = 1 / (1 + np.exp(-logits))[None, :, :, None]
    weight, bias = fusion.project.weight.detach().numpy()[..., 0, 0], fusion.project.bias.detach().numpy()
    projected = np.einsum("cs,bsvu->bcvu", weight, sphere.numpy()) + bias[:, None, None]
    expected = gate * projected + (1 - gate) * grid.numpy()
    np.testing.assert_allclose(fusion(grid, sphere).detach(), expected, atol=1e-12)
    np.testing.assert_allclose(fusion.last_gate, np.broadcast_to(gate, (2, 3, 4, 1)), atol=1e-12)
