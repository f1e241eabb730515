"""latentscenes: learn large collections of 3D objects from posed images, cheaply."""

__version__ = "0.1.0"
