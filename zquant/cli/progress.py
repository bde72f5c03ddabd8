"""Progress on stderr: one bar per phase, quiet where nobody is watching a terminal."""

import sys
from typing import Any

__all__ = ["PhaseBar"]


class PhaseBar:
    """Shows `(phase, done, total)` events as bars, each with its rate and remaining time."""

    def __init__(self, unit: str = "step") -> None:
        self._unit = unit
        self._phase = ""
        self._bar: Any = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        """A phase began (`done` is 0) or came nearer to its end."""
        from tqdm import tqdm

        if phase != self._phase:
            self.close()
            self._phase = phase
            # disable=None: only a terminal gets bars
            self._bar = tqdm(
                total=total, desc=phase, unit=self._unit, file=sys.stderr, disable=None
            )
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the current bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._phase = None, ""
