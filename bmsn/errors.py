"""The two kinds of failure that a command turns into an exit code (listed in the README)."""


class InputError(ValueError):
    """Bad input: a flag, field, file, data set or run folder. The message says what is accepted. Exit code 2."""


class RunStopped(RuntimeError):
    """A run stopped itself (NaN losses, a balance that cannot be solved); its last good state is kept. Exit code 3."""
