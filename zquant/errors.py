"""Every error that zquant raises on purpose.

    ZQuantError             anything a user can act on; printed as one message, exit code 1
    ├── FormatError         a file is damaged, hostile or of a type that cannot be read
    ├── CheckpointError     files are readable but are not the model that was asked for
    ├── PlanError           the request does not fit: disk, memory or picture size
    └── DeviceError         the device is absent or cannot do what was asked

A message says what is wrong with its value, what was expected, and what to do.
Wrong arguments from Python are `ValueError`; a broken invariant of ours is `AssertionError`.
"""

__all__ = ["CheckpointError", "DeviceError", "FormatError", "PlanError", "ZQuantError"]


class ZQuantError(Exception):
    """Base of all zquant errors; its text is complete without a traceback."""


class FormatError(ZQuantError):
    """A file is damaged, hostile or of a type that cannot be read."""


class CheckpointError(ZQuantError):
    """Readable files that are not the model that was asked for."""


class PlanError(ZQuantError):
    """The request does not fit: disk, memory or picture size."""


class DeviceError(ZQuantError):
    """The device is absent or cannot do what was asked."""
