"""Write files and folders that appear under their names complete or not at all."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import IO, Any, Iterator, Union

AnyPath = Union[str, Path]


@contextlib.contextmanager
def atomic_write(path: AnyPath, text: bool = False, sync: bool = False) -> Iterator[IO[Any]]:
    """Yield a temporary file that is renamed to `path` when the block ends, or removed after an error.

    Code that needs a path instead of a file may write to the `name` of what is yielded.

    Args:
        path: missing parent folders are created.
        text: yield a UTF-8 text file with "\\n" line ends; otherwise a binary one.
        sync: flush to disk before the rename, so that the file survives a power failure.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        form = {"mode": "w", "encoding": "utf-8", "newline": "\n"} if text else {"mode": "wb"}
        with open(temporary, **form) as file:  # type: ignore[call-overload]
            yield file
        if sync:
            with open(temporary, "rb+") as written:  # opened again: the block may have replaced the file by name
                os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


@contextlib.contextmanager
def replace_folder(folder: AnyPath) -> Iterator[Path]:
    """Yield a new, empty folder that takes the place of `folder` when the block ends, or is removed after an error."""
    target = Path(os.path.realpath(folder))
    draft, old = (target.with_name(f"{target.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        draft.mkdir(parents=True)
        yield draft
        if target.exists():
            os.replace(target, old)
        os.replace(draft, target)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_writable(folder: AnyPath, flag: str) -> None:
    """Create the folder and a file in it, then remove the file.

    Raises:
        ValueError: the folder cannot be written; names the flag, before hours of work are lost.
    """
    probe = Path(folder) / f".writable.{os.getpid()}.tmp"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{flag} {folder}: cannot be written ({error.strerror}); give another folder") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, at most 120 characters, or its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
