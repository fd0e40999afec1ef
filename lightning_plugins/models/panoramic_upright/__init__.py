"""Panoramic upright adjustment: where up is in a tilted panorama."""
