"""zquant: low-VRAM quantized inference for Z-Image.

    import zquant
    engine = zquant.Engine.open("z-image-turbo-q4")
    result = engine.generate(zquant.RunRequest(prompt="a red fox in the snow"))
    result.images[0].save("fox.png")

Public names are loaded on first use, so importing zquant does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zquant.engine import Engine
    from zquant.errors import (
        CheckpointError,
        DeviceError,
        FormatError,
        PlanError,
        ZQuantError,
    )
    from zquant.request import RunRequest, RunResult

__version__ = "0.1.0"

_HOME = {
    "CheckpointError": "zquant.errors",
    "DeviceError": "zquant.errors",
    "Engine": "zquant.engine",
    "FormatError": "zquant.errors",
    "PlanError": "zquant.errors",
    "RunRequest": "zquant.request",
    "RunResult": "zquant.request",
    "ZQuantError": "zquant.errors",
}

__all__ = [
    "CheckpointError",
    "DeviceError",
    "Engine",
    "FormatError",
    "PlanError",
    "RunRequest",
    "RunResult",
    "ZQuantError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zquant' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
