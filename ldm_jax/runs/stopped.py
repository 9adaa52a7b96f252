"""Why a run that was sound when it began could not go on. A module of its own, so that the command line need not import jax for it."""


class Stopped(RuntimeError):
    """A loss that is not finite, a disk that is full; the message is for the user, the exit code 1."""
