"""A library in the browser. May import api, export, storage and the folders below; it needs viser."""
