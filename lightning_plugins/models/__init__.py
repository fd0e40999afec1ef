"""LightningModules, a folder each."""
