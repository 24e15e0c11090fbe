"""Files that are written whole or not at all."""

import os
from pathlib import Path

__all__ = ['atomic_write']


def atomic_write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file under another name in its folder, made where missing, and rename it when it is complete.

    Args:
        path: The file; one that exists is replaced.
        content: All of it.

    Raises:
        OSError: If it cannot be written; the file is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'.{path.name}.unfinished')
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk does not name the file
