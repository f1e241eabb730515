"""Scores, costs and reports of learned scenes. May import export, training, storage and everything below, but
not api."""
