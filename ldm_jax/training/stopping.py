"""SIGTERM and Ctrl-C while a run trains: it saves after the step under way and ends, so that the same command goes on."""

import contextlib
import signal

import jax

from ldm_jax.kernels import processes


class Terminated(BaseException):
    """SIGTERM while nothing is trained yet: whatever is being prepared (latents, a compilation) is left where it stands."""


class Stop(contextlib.AbstractContextManager):
    """SIGTERM and Ctrl-C: at once before training; between steps, after the one under way, and a second Ctrl-C at once."""

    def __init__(self):
        self.name, self.training = None, False

    def _handle(self, number, frame):
        if number == signal.SIGINT and (self.name == "SIGINT" or not self.training):
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if not self.training:
            raise Terminated

    def __enter__(self):
        try:
            self.old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # Not the main thread: whoever owns it handles signals.
            self.old = {}
        return self

    def __exit__(self, *exc):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def between_steps(self):
        """From here on a signal waits for the end of a step."""
        self.training = True
        try:
            yield
        finally:
            self.training = False

    def agreed(self, boundary: bool) -> bool:
        """Whether to stop now: at once on one process, at the next log line, all together, on several."""
        if jax.process_count() == 1:
            return self.name is not None
        if not boundary:
            return False
        return processes.any_process(self.name is not None)
