"""Learns models and scenes: batches, losses, optimizers, the loop, new scenes. Imports storage and below."""
