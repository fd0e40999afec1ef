"""What is left of a photograph: every pixel in the depth map, at most a million rows' worth of points in the cloud."""

import numpy as np
from PIL import Image

from lightning_plugins.reporting.photographs import CLOUD_ROWS, write_photograph


def test_large_photographs_keep_their_depth_map_and_thin_their_cloud(tmp_path):
    height = CLOUD_ROWS + 2
    image = np.zeros((height, 2 * height, 3), np.uint8)
    depth_m = np.full((height, 2 * height), 2.0, np.float32)
    directions = np.broadcast_to(np.array([1, 0, 0], np.float32), image.shape)
    preview = write_photograph(tmp_path / "out", "hall", image, depth_m, directions)
    assert Image.open(tmp_path / "out" / "hall_depth.png").size == (2 * height, height)
    assert f"element vertex {height // 2 * height}".encode() in (tmp_path / "out" / "hall_points.ply").read_bytes()[:300]
    assert (tmp_path / "out" / "hall_preview.png").read_bytes() == preview
