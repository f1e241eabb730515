"""Codecs, normalizer, tri-planes, the model of all these, and metrics. Imports rendering, data and core."""
