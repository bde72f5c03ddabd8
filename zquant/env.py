"""Every ZQUANT_* environment variable: name, default, meaning. Nothing else reads the environment.

The README table lists the same rows; a test compares them.
"""

import os
from dataclasses import dataclass

__all__ = ["CACHE", "DEBUG", "VARIABLES", "Variable"]


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable; `default` is its value when unset or empty."""

    name: str
    default: str
    meaning: str

    @property
    def value(self) -> str:
        """The value now."""
        return os.environ.get(self.name) or self.default

    @property
    def is_on(self) -> bool:
        """True for anything but empty, `0`, `false`, `no` and `off`."""
        return self.value.lower() not in ("", "0", "false", "no", "off")


DEBUG = Variable("ZQUANT_DEBUG", "0", "`1` shows the traceback of an error, like `--debug`")
CACHE = Variable(
    "ZQUANT_CACHE",
    "~/.cache/zquant",
    "folder of prompt embeddings, 256 MiB at most; `off` for none",
)

VARIABLES = (CACHE, DEBUG)
