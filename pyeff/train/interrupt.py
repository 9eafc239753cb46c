"""Ctrl-C during training: the step is finished and saved first."""

import signal
import threading
from types import FrameType, TracebackType


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by SIGINT after a step, and its state is on disk."""


class StopRequest:
    """While it is entered, SIGINT raises a flag instead of KeyboardInterrupt; a second one raises.

    Outside the main thread, where Python lets nobody handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.raised = False
        self._previous: object = None
        self._entered = False

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
            self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._entered:
            # None stands for a handler that C code had set; Python cannot put that one back.
            signal.signal(signal.SIGINT, self._previous or signal.SIG_DFL)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True
