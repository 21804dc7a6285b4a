"""PopTorch's errors. They derive from Exception: `except RuntimeError` does not catch them."""


class Error(Exception):
    """An error of PopTorch or of a library below it.

    Attributes:
        message, type, location: what went wrong, in which component, and where in its source.
    """

    def __init__(self, message):
        super().__init__(f"'poptorch_py_error': {message}")
        self.message, self.type, self.location = message, "poptorch_py_error", ""


class RecoverableError(Error):
    """A failure of the device after which resetting it helps."""

    recovery_action = "IPU_RESET"


class UnrecoverableError(Error):
    """A failure of the device after which the machine has to be repaired."""
