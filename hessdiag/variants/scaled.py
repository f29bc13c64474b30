"""Weights whose scale does not matter, measured in units of their norms."""

from __future__ import annotations

import torch

from hessdiag.errors import SelfCheckFailed
from hessdiag.invariance import probed, scale_invariant
from hessdiag.variants.coordinates import Diagonal
from hessdiag.variants.parts import listed
from hessdiag.variants.scene import Built, NotApplicable, Scene


def norm_scaled(scene: Scene) -> Built:
    """``P = diag |w|`` on each scale-invariant group of weights, the identity elsewhere.

    Scaling such a group by c divides its block of H by c², so that raw κ depends on an arbitrary
    number; PᵀHP does not.

    Cost:
        A gradient; two products where every tensor whose gradient is orthogonal to it is
        scale-invariant, else up to four for each such tensor and grouping; one for their rounding.
    Source:
        maths.md 4.5.
    """
    try:
        with probed(scene, None, None) as probe:
            found = scale_invariant(probe)
            scene.product.count += probe.products
    except SelfCheckFailed as error:
        raise NotApplicable("its symmetries need a double backward, which fails here") from error
    if not found:
        raise NotApplicable(
            "none of its weights is scale-invariant (as those before BatchNorm in train mode "
            "or LayerNorm are): their norms mean something"
        )
    position = probe.position
    scale = torch.ones_like(position)
    for groups in found:
        scale[groups.places] = (
            position[groups.places].norm(dim=1, keepdim=True).expand_as(groups.places)
        )
    scale[scene.dead.to(scale.device)] = 1
    names = listed(name for groups in found for name in groups.names)
    notes = (f"scaled by their norms: {names}",)
    return Built(Diagonal(scale), source="hessian", notes=notes)
