"""Single path one-shot: one supernet, architectures drawn as `draw` says. The mixture with M = 1.

Source: Guo et al. 2020, "Single path one-shot neural architecture search with uniform sampling", which draws choices
uniformly layer by layer, not architectures.
"""

from __future__ import annotations

from typing import ClassVar

from bmsn.methods.mixture import Mixture
from bmsn.space import SearchSpace


class Spos(Mixture):
    """`--method spos`."""

    name: ClassVar[str] = "spos"
    settings: ClassVar[frozenset[str]] = Mixture.settings - {"split_after"}

    @classmethod
    def num_supernets(cls, space: SearchSpace) -> int:
        return 1
