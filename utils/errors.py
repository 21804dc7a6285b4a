"""Errors in one line, and those that mean that memory ran out."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, at most 120 characters, or its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def describe_error(error: BaseException) -> str:
    """Return an exception's message in one line, without the error number of OSError."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(message.split())


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether this is an error of torch or Python for memory that ran out."""
    # torch 2.0 has no type for the CPU's.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in " ".join(str(error).split())
