"""The version of the package, noted in everything that it writes."""

__version__ = "0.1.0"
