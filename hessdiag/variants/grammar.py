"""The names of variants: ``network``, ``coordinates`` or ``network+coordinates``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from hessdiag.errors import OptionError

RAW = "raw"
ORIGINAL = ""

NETWORKS: Mapping[str, str] = MappingProxyType(
    {
        "bn": "batch normalisation put in after the activations, the next weights compensated",
        "bn-detached": "the same with its statistics held constant",
        "ln": "layer normalisation put in: another function",
        "gn": "group normalisation put in: another function",
        "rms": "RMS normalisation put in: another function",
        "without-bn": "the network's BatchNorm layers folded into their neighbours",
    }
)
"""Changes of the network, each with what it is."""

OTHER_FUNCTIONS = frozenset({"ln", "gn", "rms"})
"""Changes that compute another function of the same parameters: never ranked against raw."""

COORDINATES: Mapping[str, str] = MappingProxyType(
    {
        RAW: "the parameters as they are",
        "optimizer": "M of the optimizer whose state the checkpoint holds",
        "adam": "M of Adam",
        "adamw": "M of AdamW",
        "amsgrad": "M of Adam with the largest second moments",
        "nadam": "M of NAdam",
        "radam": "M of RAdam",
        "adamax": "M of Adamax",
        "adagrad": "M of AdaGrad",
        "rmsprop": "M of RMSprop",
        "jacobi": "M = 1/|h_ii|",
        "rownorm": "M = 1/‖h_i‖",
        "ruiz": "M that gives PᵀHP rows of norm 1",
        "optimal": "the best diagonal M of a small positive definite block",
        "block-inverse": "M = |H|⁻¹ of the block: the limit of any layerwise method",
        "standardize": "inputs of the network standardised, folded into the first layer",
        "minmax": "inputs of the network scaled to 0…1, folded into the first layer",
        "bnp": "batch normalisation preconditioning, P = UD of every layer",
        "bnp-floor": "the same with the paper's floor under the variances",
        "bnp-s": "the same with means and variances weighted by the curvature",
        "shampoo": "M of Shampoo, from both sides of the gradient",
        "kfac": "M of K-FAC",
        "adadiag": "Adam's M in coordinates rotated from one side",
        "adadiag2": "Adam's M in coordinates rotated from both sides",
        "norm-scaled": "P = diag |w| of each group of weights",
    }
)
"""Changes of the parameters p = Pz, each with what it is."""

OPTIMIZERS = ("adam", "adamw", "amsgrad", "nadam", "radam", "adamax", "adagrad", "rmsprop")
REPLAYED = frozenset({*OPTIMIZERS, "shampoo", "adadiag", "adadiag2"})
"""Coordinates that may be made from mini-batches, one after the other."""


@dataclass(frozen=True)
class Variant:
    """A view of the problem: which network, and in which coordinates.

    Attributes:
        network: A key of :data:`NETWORKS`, or empty for the network as it is.
        coordinates: A key of :data:`COORDINATES`.
    """

    network: str = ORIGINAL
    coordinates: str = RAW

    @property
    def key(self) -> str:
        """The shortest spelling, which JSON and HDF5 use."""
        if not self.network:
            return self.coordinates
        return self.network if self.coordinates == RAW else f"{self.network}+{self.coordinates}"


def parse_variant(text: str) -> Variant:
    """The variant that ``text`` names.

    Raises:
        OptionError: A name is unknown, or there are two of a kind; with the nearest name.
    """
    parts = [part.strip() for part in text.split("+")]
    if not all(parts):
        raise OptionError(
            f"variant {text!r} has nothing on one side of '+'; write network, coordinates, or "
            "network+coordinates, such as bn+adam"
        )
    for part in parts:
        if part not in NETWORKS and part not in COORDINATES:
            known = [*COORDINATES, *NETWORKS]
            near = get_close_matches(part.lower(), known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise OptionError(f"unknown variant {part!r}{hint}; there are {', '.join(known)}")
    networks = [part for part in parts if part in NETWORKS]
    coordinates = [part for part in parts if part in COORDINATES]
    if len(networks) > 1 or len(coordinates) > 1:
        raise OptionError(
            f"variant {text!r} names two {'networks' if len(networks) > 1 else 'coordinates'}; "
            "write network, coordinates, or network+coordinates, at most one of each"
        )
    return Variant(*(networks or [ORIGINAL]), *(coordinates or [RAW]))
