"""The trajectory of an analysis: its iterates, the point p*, and the cosines at it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hessdiag.blocks import WHOLE, Block
from hessdiag.checkpoint import match_weights, read_checkpoint
from hessdiag.curvature.objective import placed
from hessdiag.errors import OptionError
from hessdiag.failures import why
from hessdiag.fingerprint import hash_tensors
from hessdiag.iterates import Iterate, digest, find_iterates
from hessdiag.names import clean_name
from hessdiag.network import Network, Row
from hessdiag.opened import Opened
from hessdiag.options import Options
from hessdiag.rows import Rows
from hessdiag.trajectory import cosines
from hessdiag.variants.grammar import RAW
from hessdiag.variants.scene import Iterates

GAUSS_NEWTON = (
    "the cosines are those of the Gauss–Newton matrix's rows (--curvature ggn), and the residual "
    "is that of its quadratic model"
)


@dataclass(frozen=True)
class Trajectory:
    """Iterates of a training, and the point that they are seen from.

    Attributes:
        iterates: By ascending step.
        reference: Parameters at p* by their first names; None where it is the analysed point.
        digest: Hash of the parameters at p*, or None.
    """

    iterates: tuple[Iterate, ...] = ()
    reference: Mapping[str, Tensor] | None = None
    digest: str | None = None

    @property
    def fingerprint(self) -> dict[str, str | None]:
        """Hashes of both, None where there is none."""
        return {
            "iterates": digest(self.iterates) if self.iterates else None,
            "reference": self.digest,
        }

    def readers(self, model: nn.Module) -> Iterates:
        """The iterates for those who replay an optimizer, read when they are asked for."""

        def reader(iterate: Iterate) -> Callable[[], Mapping[str, Tensor]]:
            return lambda: iterate.load(model)

        return tuple(reader(iterate) for iterate in self.iterates)


def find_trajectory(options: Options, model: nn.Module, *, trust: bool) -> Trajectory:
    """What ``--iterates`` and ``--reference`` name, checked against the model on loan.

    Raises:
        OptionError: Nothing matches, or a reference is given without iterates.
        CheckpointError: A file cannot be read, or is of another architecture.
    """
    if options.iterates is None:
        if options.reference is not None:
            raise OptionError(
                "--reference is the point that the cosines of a trajectory are taken at; give its "
                "checkpoints too: --iterates 'iterates/*.pt'"
            )
        return Trajectory()
    iterates = tuple(find_iterates(options.iterates, model, trust=trust))
    if options.reference is None:
        here = {clean_name(name): p.data for name, p in model.named_parameters()}
        return Trajectory(iterates, digest=hash_tensors(here))
    weights = match_weights(read_checkpoint(options.reference, trust=trust), model).weights
    reference = {
        clean_name(name): weights[name].detach().to(parameter.device, parameter.dtype)
        for name, parameter in model.named_parameters()
    }
    return Trajectory(iterates, reference, hash_tensors(reference))


def cosines_at(
    network: Network, trajectory: Trajectory, whole: Block, done: Rows
) -> tuple[dict[str, NDArray[np.float64]], list[str]]:
    """The cosines at p*, and warnings.

    Args:
        network: The checkpoint's own.
        trajectory: With iterates.
        whole: The block of all trainable parameters.
        done: The rows; told where there are no cosines because something failed.
    Cost:
        A product and a gradient per iterate, and those of one block of that size unless its row
        at p* is done.
    """
    parameters = network.select(whole.parameters)
    values = [p.data for p in parameters]
    row = done.done.get((whole.name, RAW))
    if trajectory.reference is not None:
        values = [trajectory.reference[name] for name in whole.parameters]
        row = None
    try:
        with placed(parameters, values):
            opened = Opened(network, whole, Row(f"{WHOLE} at p*", (1, 1)))
            rows = row.rows if row is not None and row["skipped"] is None else {}
            if "norm" not in rows:
                rows = opened.solve()[0].rows
            if "norm" not in rows:
                raise OptionError(
                    "the row norms of the whole network are not known, so there are no cosines; "
                    "allow random probes (--probes 20)"
                )
            found = cosines(
                network.objective,
                dict(zip(whole.parameters, parameters, strict=True)),
                trajectory.iterates,
                product=opened.product,
                rows=rows,
                noise=torch.as_tensor(opened.problem.noise.rows),
                weight_decay=network.options.weight_decay,
                report=network.report,
                stop=network.late,
            )
    except Exception as error:  # they stand beside the rows, and may cost none of them
        done.failed.append("cosines")
        return {}, [f"there are no cosines: {why(network.told(error, 'cosines'))}"]
    told = [GAUSS_NEWTON] if network.options.curvature == "ggn" else []
    return found, told
