"""Panoramic upright adjustment: where up is in a tilted panorama, and the level image of it."""
