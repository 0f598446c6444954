"""The directory of a whole run, of language or of images: which names it may hold, and whose it is."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flow_finetune.config import MethodConfig, non_defaults, without_defaults
from flow_finetune.errors import InputError
from flow_finetune.methods import check_methods
from flow_finetune.progress import say
from flow_finetune.storage import is_used, require_same_run, used_error, write_json

RUN_FILE = "run.json"
_RESERVED = ("pretrained", "report")


def run_directories(config, output: Path) -> list[Path]:
    """The directories that a report on a run of `config` is made from, the pre-trained model's first."""
    return [output / "pretrained", *(output / method.name for method in config.methods)]


def check_rows(config, task_names: Sequence[str | None]) -> None:
    """Raise `InputError` unless the methods and tasks of `config` can stand beside each other in one directory."""
    if not config.tasks:
        raise InputError("a run needs at least one evaluation task, or its report would show nothing")
    for method in config.methods:
        if not re.fullmatch(r"[A-Za-z0-9._+-]+", method.name) or method.name in _RESERVED:
            raise InputError(f"method name {method.name!r} must be a plain directory name other than {_RESERVED}")
    for kind, names in (("method", [m.name for m in config.methods]), ("task", task_names)):
        repeated = [name for name, count in Counter(names).items() if count > 1 and name is not None]
        if repeated:
            raise InputError(f"two {kind}s are named {repeated[0]!r}; give them different names")
    check_methods(config.methods)


def claim(config, output: Path) -> None:
    """Make `output` the directory of a run of `config`, or find that it is.

    A run that made nothing, because its model or its data could not be read, does not hold the directory against the
    corrected call. Methods may be added and taken away: what is made of each stays.

    Raises:
        InputError: it holds another run, the same name for another method, or something else.
    """
    identity = non_defaults(config)
    path = output / RUN_FILE
    if path.is_file() and any(is_used(e) for e in output.iterdir() if e != path and e.suffix != ".partial"):
        # Without defaults on both sides: an option that came later, left at its default, does not disown a run.
        found = without_defaults(type(config), json.loads(path.read_text()))
        before, now = _methods(config, found), _methods(config, identity)
        for name in sorted(before.keys() & now.keys()):
            if before[name] != now[name] and is_used(output / name):
                raise InputError(
                    f"{output} has the method {name} already, with other options ({before[name]}); give this one another "
                    "name, or choose another directory"
                )
        require_same_run(output, {**found, "methods": None}, {**identity, "methods": None})
        others = [name for name in before if name not in now and is_used(output / name)]
        if others:
            say(
                f"{', '.join(others)} of {output} {'is' if len(others) == 1 else 'are'} not among this call's methods, so not in its report"
            )
        write_json(path, {**identity, "methods": [*{**before, **now}.values()]})
    elif is_used(output) and not path.is_file():
        raise used_error(output)
    else:
        write_json(path, identity)


def _methods(config, identity: dict) -> dict[str, dict]:
    """The methods of a stored identity by name, each without its defaults."""
    defaults = next(field.default for field in dataclasses.fields(config) if field.name == "methods")
    stored = identity.get("methods", [non_defaults(method) for method in defaults])
    return {method.get("name", MethodConfig.name): method for method in stored}
