"""Laws of the networks: yaw equivariance, every part acts, holes are not read, sizes fit, bad options are refused."""

import pytest
import torch

from lightning_plugins.models.panoramic_depth.fusion import FUSIONS, BandGatedFusion, saturated_share
from lightning_plugins.models.panoramic_depth.heads import HEADS, build_head
from lightning_plugins.models.panoramic_depth.network import StudentNetwork, TeacherNetwork

# The smallest backbone that timm has, for its size alone.
TINY = "test_resnet"


@pytest.fixture(scope="module")
def image():
    return torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_rolling_the_image_by_the_stride_rolls_the_depth(fusion, image):
    torch.manual_seed(0)
    network = StudentNetwork(TINY, fusion=fusion).eval()
    with torch.no_grad():
        depth, rolled = network(image), network(image.roll(32, -1))
    assert depth.shape == (2, 1, 64, 128)
    assert (rolled - depth.roll(32, -1)).abs().max() < 1e-4 * depth.abs().max()
    assert depth.std() > 1e-3, "a constant would pass, too"


@pytest.mark.parametrize("backbone", ["resnet10t", "mobilenetv3_small_050"])
def test_other_backbones_are_equivariant_too(backbone, image):
    network = StudentNetwork(backbone).eval()
    with torch.no_grad():
        depth, rolled = network(image), network(image.roll(64, -1))
    assert (rolled - depth.roll(64, -1)).abs().max() < 1e-4 * depth.abs().max()


def test_every_parameter_gets_a_gradient(image):
    network = StudentNetwork(TINY)
    network(image).log().square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    # timm starts the last norm of each residual block at 0, which stops the first gradient inside the block.
    ours = [(name, p) for name, p in network.named_parameters() if not name.startswith("grid_branch.layer")]
    assert [name for name, p in ours if not p.grad.abs().sum() > 0] == []


def test_the_weights_fit_every_image_size(image):
    network = StudentNetwork(TINY).eval()
    with torch.no_grad():
        small = network(image)
        assert network(torch.rand(1, 3, 96, 192)).shape == (1, 1, 96, 192)
        torch.testing.assert_close(network(image), small)
    assert not [key for key in network.state_dict() if "index" in key or "taps" in key]


def test_computes_in_double_precision(image):
    network = StudentNetwork(TINY).eval()
    with torch.no_grad():
        single = network(image)
        torch.testing.assert_close(network.double()(image.double()).float(), single, rtol=1e-4, atol=1e-5)


def test_a_nadir_has_one_depth(image):
    network = StudentNetwork(TINY).eval()
    with torch.no_grad():
        last_row = network(image)[:, 0, -1]
    assert ((last_row.amax(1) - last_row.amin(1)) / last_row.mean(1)).max() < 0.1


def test_the_teacher_never_reads_a_hole():
    network = TeacherNetwork().eval()
    depth = 1 + 4 * torch.rand(2, 1, 64, 128)
    mask = torch.rand(2, 1, 64, 128) > 0.2
    with torch.no_grad():
        known = network(depth, mask)
        torch.testing.assert_close(network(torch.where(mask, depth, torch.nan), mask), known, rtol=0, atol=0)
        assert not torch.equal(network(depth * 1.1, mask), known)


def test_fresh_gates_are_open():
    torch.manual_seed(0)
    network = StudentNetwork(TINY)
    assert saturated_share(network) is None
    network(torch.rand(1, 3, 64, 128))
    assert saturated_share(network) == 0


def test_a_saturated_gate_is_counted():
    fusion = BandGatedFusion(4, 3)
    with torch.no_grad():
        fusion.pooled.weight.zero_()
        fusion.pooled.bias.copy_(torch.tensor([9.0, -9.0, 0.0, 0.0]))
    fusion(torch.rand(1, 4, 8, 16), torch.rand(1, 3, 8, 16))
    assert saturated_share(fusion) == 0.5


def test_heads_start_at_a_quarter_of_the_range_and_keep_to_it():
    for name in HEADS:
        head = build_head(name, 8.0)
        assert float(head(torch.zeros(()))) == pytest.approx(2.0)
        assert head(torch.tensor([-1e4, 1e4])).isfinite().all()
    assert float(build_head("sigmoid", 8.0)(torch.tensor(50.0))) == pytest.approx(8.0)
    least, most = build_head("exponential", 8.0)(torch.tensor([-50.0, 50.0])).tolist()
    assert (least, most) == (pytest.approx(0.01), pytest.approx(1000.0))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backbone": "resnet18x"}, "backbone must be a model of timm, got 'resnet18x'"),
        ({"backbone": "vit_tiny_patch16_224"}, "vit_tiny_patch16_224"),
        ({"backbone": "resnet10t", "backbone_options": {"chanels": 3}}, "chanels"),
        ({"backbone": TINY, "fusion": "gated"}, "got 'gated'; did you mean band_gated"),
        ({"backbone": TINY, "head": "softmax"}, "head must name a depth head, got 'softmax'"),
        ({"backbone": TINY, "max_depth_m": 0.0}, "max_depth_m must be greater than 0 metres, got 0.0"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        StudentNetwork(**options)


@pytest.mark.parametrize(
    ("shape", "sentence"), [((64, 64), "got 64 x 64; resize to 64 x 32"), ((50, 100), "got 100 x 50; resize to 128 x 64")]
)
def test_other_sizes_are_refused_with_the_nearest_that_fits(shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        StudentNetwork(TINY)(torch.rand(1, 3, *shape))
