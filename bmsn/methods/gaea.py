"""GAEA: as `darts`, with alpha on the simplex and an exponentiated-gradient update.

Source: Li et al. 2021, "Geometry-aware gradient algorithms for neural architecture search", whose learning rate of
alpha on DARTS' space is the default; Javan et al. 2023, table 2.
"""

from __future__ import annotations

from typing import ClassVar

from bmsn.methods.darts import Darts
from bmsn.methods.mixing import Mixing, Simplex


class Gaea(Darts):
    """`--method gaea`."""

    name: ClassVar[str] = "gaea"
    alpha_lr: ClassVar[float] = 0.1
    mixing_kind: ClassVar[type[Mixing]] = Simplex
