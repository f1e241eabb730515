"""Engines that start many ranks: SLURM and this machine by submitit, Ray."""
