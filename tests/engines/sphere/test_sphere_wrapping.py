"""Laws: a wrapped network commutes with rolls by its stride, and away from seam and poles is the network it was."""

import copy

import pytest
import torch
from torch import nn

from lightning_plugins.engines.sphere import wrap_convolutions


def yaw_error(network, image, shift):
    """Return the largest difference between rolling before and after, relative to the largest output."""
    with torch.no_grad():
        before = network(image)
        after = network(image.roll(shift, -1))
    stride = image.shape[-1] // before.shape[-1]
    return ((after - before.roll(shift // stride, -1)).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "resnet10t", "tf_efficientnet_lite0"])
def test_timm_networks_become_yaw_equivariant(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, features_only=True, out_indices=(-1,)).eval()
    features = nn.Sequential(network, FirstOf())
    image = torch.randn(1, 3, 64, 128)
    names = list(network.state_dict())
    assert yaw_error(features, image, 32) > 1e-2
    padded = sum(pads(layer) for layer in network.modules())
    assert wrap_convolutions(network) == padded > 5
    assert wrap_convolutions(network) == 0
    assert list(network.state_dict()) == names
    assert yaw_error(features, image, 32) < 1e-5
    assert yaw_error(copy.deepcopy(features), image, -64) < 1e-5


def pads(layer):
    if type(layer).__name__.endswith("2dSame"):
        return True
    return isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and layer.padding not in (0, (0, 0))


class FirstOf(nn.Module):
    def forward(self, features):
        return features[0]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Conv2d(2, 3, (3, 5), padding="same", dilation=(2, 1)),
        nn.Conv2d(2, 3, 4, padding="same"),
        nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2, padding_mode="reflect"),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=True),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_the_interior_stays_and_the_seam_becomes_interior(layer):
    image = torch.randn(1, 2, 16, 32, dtype=torch.float64)
    layer = layer.double()
    plain = layer(image).detach()
    assert wrap_convolutions(layer) == 1
    wrapped = layer(image).detach()
    assert wrapped.shape == plain.shape
    torch.testing.assert_close(wrapped[..., 3:-3, 3:-3], plain[..., 3:-3, 3:-3])
    assert (wrapped - plain).abs().max() > 0.1
    assert yaw_error(layer, image, 6) < 1e-12


def test_same_layers_of_timm_keep_their_output_size_at_even_and_odd_heights():
    layers = pytest.importorskip("timm.layers")
    pool = layers.create_pool2d("max", 3, stride=2, padding="same")
    for layer in (layers.Conv2dSame(1, 1, 3, stride=2), pool, layers.StdConv2dSame(1, 1, 3, stride=2)):
        image = torch.randn(1, 1, 15, 32)
        plain = layer(image).detach()
        assert wrap_convolutions(layer) == 1
        wrapped = layer(image).detach()
        assert wrapped.shape == plain.shape
        torch.testing.assert_close(wrapped[..., 1:-1, 1:-1], plain[..., 1:-1, 1:-1])
        assert yaw_error(layer, image, 2) < 1e-5


def test_layers_that_do_not_pad_are_left_alone():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3, padding="valid"), nn.MaxPool2d(2), nn.ReLU())
    assert wrap_convolutions(network) == 0
    assert not any(layer._forward_pre_hooks for layer in network)


def test_trains_with_the_same_parameters(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 1, 3, padding=1))
    parameters = list(network.parameters())
    wrap_convolutions(network)
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    network(torch.randn(2, 1, 4, 8)).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in parameters)
    torch.save(network, tmp_path / "network.pt")
    again = torch.load(tmp_path / "network.pt", weights_only=False)
    image = torch.randn(1, 1, 4, 8)
    torch.testing.assert_close(again(image), network(image))
