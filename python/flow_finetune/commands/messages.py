"""What the user can mend becomes a message."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.markup import escape

from flow_finetune.errors import InputError
from flow_finetune.progress import console
from flow_kernels import BackendUnavailable, backends

_OF_A_PLACE = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
# Without a class of their own: a read-only file system, and a name that is too long.
_ERRNOS_OF_A_PLACE = (errno.EROFS, errno.ENAMETOOLONG)


@contextmanager
def messages() -> Iterator[None]:
    """What the user can mend becomes a message and exit code 2."""
    try:
        yield
    except (InputError, BackendUnavailable, backends.CompiledFileError) as error:
        _stop(str(error))
    except KeyboardInterrupt:
        console.print("interrupted; what was finished is kept, and the same command continues where it can")
        raise typer.Exit(130) from None
    except OSError as error:
        if error.filename is None or not (isinstance(error, _OF_A_PLACE) or error.errno in _ERRNOS_OF_A_PLACE):
            raise
        _stop(f"{error.filename}: {error.strerror}; choose another place")


def _stop(message: str) -> NoReturn:
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(2) from None
