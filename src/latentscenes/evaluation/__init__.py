"""Scores, costs and reports. May import export, training, storage and the folders below, but not api."""
