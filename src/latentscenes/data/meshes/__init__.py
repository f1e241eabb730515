"""Folders of meshes: readers of glTF, OBJ and PLY, and the importer that renders them. Imports core and
data's files."""
