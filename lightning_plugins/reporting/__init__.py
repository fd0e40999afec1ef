"""Figures, tables and the one-file report; no Lightning."""
