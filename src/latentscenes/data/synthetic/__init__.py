"""Procedural cars, made from a seed. Imports only core and files of data."""
