"""Progress on stderr: one bar per phase, quiet where nobody is watching a terminal.

Ctrl-C is heard between events, so that what is being computed is finished and kept; a second one
stops at once.
"""

import signal
import sys
import threading
from typing import Any

__all__ = ["PhaseBar"]


class PhaseBar:
    """Shows `(phase, done, total)` events as bars, each with its rate and remaining time.

    Raises:
        KeyboardInterrupt: at the first event after Ctrl-C.
    """

    def __init__(self, unit: str = "step") -> None:
        self._unit = unit
        self._phase = ""
        self._bar: Any = None
        self._stop = False
        self._handler: Any = None
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def __call__(self, phase: str, done: int, total: int) -> None:
        """A phase began (`done` is 0) or came nearer to its end."""
        from tqdm import tqdm

        if self._stop:
            raise KeyboardInterrupt
        if phase != self._phase:
            self._end_bar()
            self._phase = phase
            # disable=None: only a terminal gets bars
            self._bar = tqdm(
                total=total, desc=phase, unit=self._unit, file=sys.stderr, disable=None
            )
        self._bar.update(done - self._bar.n)

    def note(self, text: str) -> None:
        """A line of text, without breaking a bar."""
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the current bar; Ctrl-C is again what it was."""
        self._end_bar()
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._phase = None, ""

    def _interrupt(self, *_: Any) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        self.note("stopping after this step; Ctrl-C again stops at once")
