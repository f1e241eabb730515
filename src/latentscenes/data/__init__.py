"""Datasets of posed images: importing, rendering from meshes, packing, opening. Imports only core."""
