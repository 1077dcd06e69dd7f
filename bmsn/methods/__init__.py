"""The search methods under one interface, by name: `methods.get("mcts")`, `methods.names()`.

A method is one file with one subclass of `bmsn.methods.base.Method`; a line in `_METHODS` makes it known to `--method`.
Importing this module imports none of them.

`bmsn.run_search` runs a method by its name; `bmsn.methods.base.Sampler` shows how to drive its sampler by hand.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from bmsn.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from bmsn.methods.base import Method

# name: module and class
_METHODS = {
    "mixture": "bmsn.methods.mixture:Mixture",
    "spos": "bmsn.methods.spos:Spos",
    "spos-unshared": "bmsn.methods.unshared:UnsharedSpos",
    "spos-unshared-all": "bmsn.methods.unshared:UnsharedSposAll",
    "darts": "bmsn.methods.darts:Darts",
    "darts-unshared-same": "bmsn.methods.darts:DartsUnsharedSame",
    "darts-unshared-random": "bmsn.methods.darts:DartsUnsharedRandom",
    "gaea": "bmsn.methods.gaea:Gaea",
    "few-shot": "bmsn.methods.few_shot:FewShot",
    "mcts": "bmsn.methods.mcts:Mcts",
    "boltzmann": "bmsn.methods.boltzmann:Boltzmann",
    "random": "bmsn.methods.random:Random",
    "macs": "bmsn.methods.macs:Macs",
}


def names() -> tuple[str, ...]:
    """Names of all methods, as `--method` takes them."""
    return tuple(_METHODS)


def check_name(name: str) -> None:
    """Raises InputError unless there is a method of that name; the message has the nearest one."""
    if name not in _METHODS:
        raise InputError(f"method {name!r} is unknown{did_you_mean(name, _METHODS)}; known: {', '.join(_METHODS)}")


def get(name: str) -> type[Method]:
    """The class of a method. Raises InputError for an unknown name.

    >>> bmsn.methods.get("mcts").ranked_by
    'visits in the tree, from its root down'
    """
    check_name(name)
    module, _, attribute = _METHODS[name].partition(":")
    method: type[Method] = getattr(importlib.import_module(module), attribute)
    return method
