"""Cameras, configurations, console, files and errors, for all folders. Imports nothing of the package."""
