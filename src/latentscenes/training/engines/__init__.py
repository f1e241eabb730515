"""Engines that start many ranks: on this machine, by SLURM, by Ray."""
