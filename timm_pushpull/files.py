"""Writes a file completely or not at all."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ['atomic_write', 'write_table']


def atomic_write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a temporary file in the same folder, then rename it. The folder is made if it does not exist.

    Args:
        path: The file; an existing file is replaced.
        content: Content of the whole file.

    Raises:
        OSError: If writing fails. The file then is as before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'.{path.name}.{os.getpid()}.unfinished')  # two processes may write the same file
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None  # the error of a full disk names no file


def write_table(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file.

    Args:
        path: The file; an existing file is replaced.
        columns: Names of the columns.
        rows: Cells of each row.

    Raises:
        OSError: If writing fails. The file then is as before.
    """
    text = io.StringIO(newline='')
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(columns)
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode(errors='surrogateescape'))  # names of files may be any bytes
