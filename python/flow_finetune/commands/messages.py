"""What the user can mend becomes a message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.markup import escape

from flow_finetune.errors import InputError
from flow_finetune.progress import console
from flow_kernels import BackendUnavailable, backends


@contextmanager
def messages() -> Iterator[None]:
    """What the user can mend becomes a message and exit code 2."""
    try:
        yield
    except (InputError, BackendUnavailable, backends.CompiledFileError) as error:
        _stop(str(error))
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        if error.filename is None:
            raise
        _stop(f"{error.filename}: {error.strerror}; choose another place")


def _stop(message: str) -> NoReturn:
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(2) from None
