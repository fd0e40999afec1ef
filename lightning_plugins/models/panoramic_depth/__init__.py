"""Panoramic depth: teacher and student."""
