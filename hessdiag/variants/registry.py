"""Who makes the coordinates of each name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hessdiag.variants.curvature import block_inverse, jacobi, optimal, rownorm, ruiz
from hessdiag.variants.grammar import OPTIMIZERS
from hessdiag.variants.kfac import kfac
from hessdiag.variants.normalisation import bnp, bnp_floor, bnp_s, minmax, standardize
from hessdiag.variants.optimizers import named_optimizer, optimizer_coordinates
from hessdiag.variants.rotations import adadiag, adadiag2
from hessdiag.variants.scaled import norm_scaled
from hessdiag.variants.scene import Maker
from hessdiag.variants.shampoo import shampoo

AFFINE = frozenset({"standardize", "minmax", "bnp", "bnp-floor"})
"""Coordinates that act on the inputs of a layer alike for all its neurons: they change H_e."""

MAKERS: Mapping[str, Maker] = MappingProxyType(
    {
        "optimizer": optimizer_coordinates,
        **{name: named_optimizer(name) for name in OPTIMIZERS},
        "jacobi": jacobi,
        "rownorm": rownorm,
        "ruiz": ruiz,
        "optimal": optimal,
        "block-inverse": block_inverse,
        "standardize": standardize,
        "minmax": minmax,
        "bnp": bnp,
        "bnp-floor": bnp_floor,
        "bnp-s": bnp_s,
        "shampoo": shampoo,
        "kfac": kfac,
        "adadiag": adadiag,
        "adadiag2": adadiag2,
        "norm-scaled": norm_scaled,
    }
)
"""By the names of :data:`hessdiag.variants.grammar.COORDINATES`, but for ``raw``."""
