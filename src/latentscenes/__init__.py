"""latentscenes: learn large collections of 3D objects from posed images, cheaply.

What programs need is here, and is imported when first asked for: `import latentscenes` alone loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from latentscenes.core.version import __version__

if TYPE_CHECKING:
    from latentscenes.api import LearnedScene, Library, RenderedViews, create_library, open_library
    from latentscenes.core.cameras import Box, Cameras, look_at, orbit
    from latentscenes.core.errors import UserError

_HOMES = {
    "Box": "core.cameras",
    "Cameras": "core.cameras",
    "look_at": "core.cameras",
    "orbit": "core.cameras",
    "LearnedScene": "api",
    "Library": "api",
    "RenderedViews": "api",
    "create_library": "api",
    "open_library": "api",
    "UserError": "core.errors",
}

__all__ = [
    "Box",
    "Cameras",
    "LearnedScene",
    "Library",
    "RenderedViews",
    "UserError",
    "__version__",
    "create_library",
    "look_at",
    "open_library",
    "orbit",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentscenes' has no attribute {name!r}")
    return getattr(importlib.import_module(f"latentscenes.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
