"""zquant: low-VRAM quantized inference for Z-Image.

    import zquant
    with zquant.Engine.open("z-image-turbo-q4") as engine:
        result = engine.generate(zquant.RunRequest(prompt="a red fox in the snow"))
    zquant.save_png(result.images[0], "fox.png", result.recipes[0])

`zquant.__all__` is the public interface; anything else may change with any version. Its names are
loaded on first use, so importing zquant does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zquant.engine import Engine, Journal, Progress
    from zquant.errors import (
        CheckpointError,
        DeviceError,
        FormatError,
        PlanError,
        ZQuantError,
    )
    from zquant.formats.embed_cache import EmbedCache
    from zquant.image import read_recipe, save_png
    from zquant.memory.needs import Limits
    from zquant.memory.plan import MemoryPlan
    from zquant.request import RunRequest, RunResult

__version__ = "0.1.0"

_HOME = {
    "CheckpointError": "zquant.errors",
    "DeviceError": "zquant.errors",
    "EmbedCache": "zquant.formats.embed_cache",
    "Engine": "zquant.engine",
    "FormatError": "zquant.errors",
    "Journal": "zquant.engine",
    "Limits": "zquant.memory.needs",
    "MemoryPlan": "zquant.memory.plan",
    "PlanError": "zquant.errors",
    "Progress": "zquant.engine",
    "RunRequest": "zquant.request",
    "RunResult": "zquant.request",
    "ZQuantError": "zquant.errors",
    "read_recipe": "zquant.image",
    "save_png": "zquant.image",
}

__all__ = [
    "CheckpointError",
    "DeviceError",
    "EmbedCache",
    "Engine",
    "FormatError",
    "Journal",
    "Limits",
    "MemoryPlan",
    "PlanError",
    "Progress",
    "RunRequest",
    "RunResult",
    "ZQuantError",
    "__version__",
    "read_recipe",
    "save_png",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zquant' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
