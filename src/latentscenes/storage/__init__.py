"""Learned scenes on disk: runs, libraries, pretrained models. May import model, rendering, data, core."""
