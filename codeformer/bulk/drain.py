"""Ctrl-C and SIGTERM: what has been begun is finished and recorded, and then the run ends."""

import signal
import threading
from types import FrameType
from typing import Any, Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Drain:
    """A context in which the first signal sets an event, and a second one ends the program at once.

    Attributes:
        stop: set when the run is to end.
        signal: the signal that came; None if none has.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Drain":
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Takes the signals; again after something else has taken them, as `ray.init` does."""
        for number in _SIGNALS:
            signal.signal(number, self._take)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        self.stop.set()
