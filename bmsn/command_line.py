"""`command_line`: the command that repeats a run, from the settings that are stored with it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def command_line(command: str, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """`python -m COMMAND` with these settings as flags, quoted for a POSIX shell.

    Args:
        command: a module of bmsn and, where it needs them, its first flags.
        settings: by name; what is None or stands at its default is left out.
        defaults: by name; settings without one are always shown.
    """
    words = ["python", "-m", *command.split()]
    for name, value in settings.items():
        if value is None or (name in defaults and value == defaults[name]):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
