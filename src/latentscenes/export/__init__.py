"""Pictures, films, meshes and web pages. May import storage and the folders below, but not training."""
