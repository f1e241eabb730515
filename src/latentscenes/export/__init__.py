"""Pictures, films, meshes and pages made from learned scenes. May import storage and everything below, not
training."""
