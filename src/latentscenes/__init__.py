"""latentscenes: learn large collections of 3D objects from posed images, cheaply.

What programs need is here, and is imported when first asked for: `import latentscenes` alone loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentscenes.cameras import Box, Cameras, look_at, orbit
    from latentscenes.errors import UserError
    from latentscenes.library import LearnedScene, Library, RenderedViews, create_library, open_library

__version__ = "0.1.0"

_HOMES = {
    "Box": "cameras", "Cameras": "cameras", "look_at": "cameras", "orbit": "cameras",
    "LearnedScene": "library", "Library": "library", "RenderedViews": "library", "create_library": "library", "open_library": "library",
    "UserError": "errors",
}  # fmt: skip

__all__ = ["Box", "Cameras", "LearnedScene", "Library", "RenderedViews", "UserError", "create_library", "look_at", "open_library", "orbit"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentscenes' has no attribute {name!r}")
    return getattr(importlib.import_module(f"latentscenes.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
