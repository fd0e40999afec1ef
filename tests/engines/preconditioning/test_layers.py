"""A layer's rows against autograd: the sum of outer products is the gradient, for every kind, padding and grouping."""

import pytest
import torch
from torch import nn

from lightning_plugins.engines.preconditioning.layers import layer_of

CASES = {
    "linear": (nn.Linear(5, 3), (4, 5)),
    "linear without bias": (nn.Linear(5, 3, bias=False), (4, 5)),
    "linear on a sequence": (nn.Linear(5, 3), (4, 6, 5)),
    "linear on two more axes": (nn.Linear(5, 3), (4, 2, 3, 5)),
    "linear on one vector": (nn.Linear(5, 3), (5,)),
    "conv": (nn.Conv2d(3, 4, 3), (2, 3, 6, 7)),
    "conv of one image": (nn.Conv2d(3, 4, 3), (3, 6, 7)),
    "conv strided and padded": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2)), (2, 3, 6, 7)),
    "conv dilated": (nn.Conv2d(3, 4, 3, dilation=2, padding=1, bias=False), (2, 3, 8, 7)),
    "conv in groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 7)),
    "conv depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding="same"), (2, 4, 6, 7)),
    "conv same, even kernel": (nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (2, 3, 8, 9)),
    "conv valid": (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 6, 7)),
    "conv circular": (nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), (2, 3, 6, 7)),
    "conv reflect, same": (nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (2, 3, 6, 7)),
    "conv1d replicate": (nn.Conv1d(3, 4, 3, padding=2, stride=2, padding_mode="replicate"), (2, 3, 9)),
    "conv3d": (nn.Conv3d(2, 4, (2, 3, 2), groups=2, stride=(1, 2, 1)), (2, 2, 4, 5, 3)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, bias=False), (2, 3, 5, 4)),
    "transposed, all options": (
        nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(2, 1), groups=2),
        (2, 4, 5, 4),
    ),
    "transposed, padded beyond its stride": (nn.ConvTranspose1d(2, 3, 3, dilation=3, output_padding=2, bias=False), (2, 2, 4)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 4, stride=2, padding=1), (2, 3, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 2, 3)),
    "batch norm": (nn.BatchNorm1d(5), (6, 5)),
    "batch norm on images": (nn.BatchNorm2d(3), (4, 3, 5, 2)),
    "batch norm, evaluating": (nn.BatchNorm2d(3).eval(), (4, 3, 5, 2)),
    "group norm": (nn.GroupNorm(2, 4), (3, 4, 5)),
    "layer norm": (nn.LayerNorm(5), (3, 2, 5)),
    "layer norm on two axes": (nn.LayerNorm((2, 5)), (3, 2, 5)),
    "layer norm without bias": (nn.LayerNorm(5, bias=False), (3, 5)),
    "rms norm": (nn.RMSNorm(5), (3, 2, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_outer_products_sum_to_the_gradient(case):
    torch.manual_seed(0)
    module, shape = CASES[case]
    module = module.double()
    if case == "batch norm, evaluating":
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2.0)
    layer = layer_of("it", module)
    x = torch.randn(shape, dtype=torch.float64)
    output = module(x)
    weights = torch.randn_like(output)
    module.zero_grad()
    output.backward(weights)
    rows_in, rows_out = layer.inputs(x), layer.output_gradients(weights)
    assert rows_in.shape[:3] == rows_out.shape[:3]
    assert (rows_in.shape[0], rows_out.shape[-1], rows_in.shape[-1]) == layer.shape
    found = torch.einsum("bnro,bnri->boi", rows_out, rows_in)
    torch.testing.assert_close(found, layer.gradient(), rtol=0, atol=1e-12)


def test_an_embeddings_rows_are_its_tokens():
    module = nn.Embedding(7, 3, padding_idx=2).double()
    layer = layer_of("it", module)
    tokens = torch.tensor([[0, 2, 6], [6, 6, 1]])
    output = module(tokens)
    weights = torch.randn_like(output)
    output.backward(weights)
    one_hot = nn.functional.one_hot(layer.inputs(tokens)[0, :, :, 0], 7).double()
    found = torch.einsum("nro,nri->oi", layer.output_gradients(weights)[0], one_hot).unsqueeze(0)
    found[..., 2] = 0.0  # a padding token has no gradient
    torch.testing.assert_close(found, layer.gradient())


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read(case):
    module, _ = CASES[case]
    layer = layer_of("it", module.double())
    for parameter in layer.parameters:
        parameter.grad = torch.randn_like(parameter)
    kept = [parameter.grad for parameter in layer.parameters]
    matrix = torch.randn(layer.shape, dtype=torch.float64)
    layer.write(matrix)
    torch.testing.assert_close(layer.gradient(), matrix, rtol=0, atol=0)
    assert all(parameter.grad is before for parameter, before in zip(layer.parameters, kept, strict=True)), "rebound"


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.BatchNorm1d(3, affine=False), nn.LayerNorm(3, elementwise_affine=False), nn.LSTM(3, 3)]
)
def test_other_modules_are_no_layers(module):
    assert layer_of("it", module) is None
