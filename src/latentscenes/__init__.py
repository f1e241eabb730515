"""latentscenes: learn large collections of 3D objects from posed images.

All public names are here. They are imported at first use, so `import latentscenes` alone does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from latentscenes.core.version import __version__

if TYPE_CHECKING:
    from latentscenes.api import LearnedScene, Library, RenderedViews, create_library, open_library
    from latentscenes.core.cameras import Box, Cameras, look_at, orbit
    from latentscenes.core.errors import UserError

_MODULES = {
    "Box": "core.cameras",
    "Cameras": "core.cameras",
    "LearnedScene": "api",
    "Library": "api",
    "RenderedViews": "api",
    "UserError": "core.errors",
    "create_library": "api",
    "look_at": "core.cameras",
    "open_library": "api",
    "orbit": "core.cameras",
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
    if name not in _MODULES:
        raise AttributeError(f"module 'latentscenes' has no attribute {name!r}")
    return getattr(importlib.import_module(f"latentscenes.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
