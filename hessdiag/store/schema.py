"""The run format as data: the JSON document and the HDF5 file are both generated from it.

A new quantity is one line of :data:`SUMMARY`; a new group of arrays is one more entry of
:data:`ARRAYS`. ``docs/file-format.md`` says the same in prose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hessdiag.run import HORIZONS, QUANTILES, THRESHOLDS

FORMAT = "hessdiag-run"
VERSION = "1.0.0"

Dtype = Literal["float", "int", "bool", "text"]
Kind = Literal["quantity", "float", "int", "bool", "text", "list", "before-after"]

LOSS = "loss"
NONE = "1"
"""Units of what has none, as UDUNITS writes it."""


@dataclass(frozen=True, slots=True)
class Field:
    """One value per (block, variant), or one per key of ``axis`` as well.

    Attributes:
        name: In ``VariantResult.values`` and under ``/summary``.
        path: In the JSON document; ``*`` stands for the key of the axis.
        kind: A quantity with its certificate, or the type of a plain value.
        nullable: A quantity that does not exist is null in JSON rather than five nulls;
            an empty text is null.
        integer: A count: JSON prints its value and bounds as integers.
    """

    name: str
    path: tuple[str, ...]
    kind: Kind
    units: str
    long_name: str
    axis: str | None = None
    nullable: bool = False
    integer: bool = False

    @property
    def dims(self) -> tuple[str, ...]:
        """The dimensions of its datasets."""
        return ("block", "variant") if self.axis is None else ("block", "variant", self.axis)


@dataclass(frozen=True, slots=True)
class Dataset:
    """One array of the file, by its name inside its group."""

    name: str
    dims: tuple[str, ...]
    units: str
    long_name: str
    dtype: Dtype = "float"


def _quantity(
    name: str, units: str, long_name: str, *, path: str | None = None, axis: str | None = None
) -> Field:
    return Field(name, tuple((path or name).split(".")), "quantity", units, long_name, axis)


def _count(name: str, long_name: str, *, path: str | None = None, axis: str | None = None) -> Field:
    parts = tuple((path or name).split("."))
    return Field(name, parts, "quantity", NONE, long_name, axis, integer=True)


def _nullable(name: str, kind: Kind, long_name: str) -> Field:
    return Field(name, (name,), kind, NONE, long_name, nullable=True)


def _plain(name: str, kind: Kind, long_name: str, units: str = NONE) -> Field:
    return Field(name, (name,), kind, units, long_name)


SUMMARY: tuple[Field, ...] = (
    _plain("size", "int", "trainable parameters of the block"),
    _plain("inactive", "int", "parameters whose Hessian row is zero, or rounding noise"),
    _nullable("skipped", "text", "why the block was not analysed under this variant"),
    _plain("same_function", "bool", "the variant computes the function of the original"),
    _plain("loss", "float", "loss at the analysed parameters", LOSS),
    _plain("gradient_norm", "float", "2-norm of the gradient of the block", LOSS),
    _plain("dtype", "text", "floating-point type of the products"),
    _plain("method", "text", "exact or lanczos"),
    _plain("products", "int", "Hessian-vector products used"),
    _plain("seconds", "float", "wall time", "s"),
    _quantity("lambda_max", LOSS, "largest eigenvalue"),
    _quantity("lambda_min", LOSS, "smallest eigenvalue"),
    _quantity("lambda_min_positive", LOSS, "smallest eigenvalue above the zero tolerance"),
    _quantity("kappa", NONE, "largest over smallest positive eigenvalue"),
    _quantity("kappa_abs", NONE, "largest over smallest nonzero absolute eigenvalue"),
    _quantity(
        "kappa_quantile",
        NONE,
        "largest eigenvalue over that at a quantile of the positive ones",
        path="kappa_quantile.*",
        axis="quantile",
    ),
    _nullable("kappa_damped", "quantity", "condition number at the given absolute damping"),
    _count("n_positive", "eigenvalues above the zero tolerance"),
    _count("n_negative", "eigenvalues below minus the zero tolerance"),
    _count("n_zero", "eigenvalues within the zero tolerance"),
    _plain("ambiguous", "bool", "eigenvalues lie near the zero tolerance"),
    _plain(
        "margin_above",
        "float",
        "smallest absolute eigenvalue of the row-scaled matrix above its tolerance, over it",
    ),
    _plain(
        "margin_below",
        "float",
        "largest absolute eigenvalue of the row-scaled matrix below its tolerance, over it",
    ),
    _quantity("trace", LOSS, "sum of the eigenvalues"),
    _quantity("frobenius", LOSS, "Frobenius norm"),
    _quantity("stable_rank", NONE, "squared Frobenius norm over squared 2-norm"),
    _quantity(
        "negative_count", NONE, "fraction of eigenvalues that are negative", path="negative.count"
    ),
    _quantity(
        "negative_mass",
        NONE,
        "absolute sum of the negative eigenvalues over that of all",
        path="negative.mass",
    ),
    _quantity(
        "negative_depth",
        NONE,
        "absolute most negative eigenvalue over the 2-norm",
        path="negative.depth",
    ),
    _count(
        "profile_n_positive",
        "eigenvalues above threshold times the 2-norm",
        path="profile.*.n_positive",
        axis="threshold",
    ),
    _count(
        "profile_n_negative",
        "eigenvalues below minus threshold times the 2-norm",
        path="profile.*.n_negative",
        axis="threshold",
    ),
    _quantity(
        "profile_kappa",
        NONE,
        "largest eigenvalue over the smallest above threshold times the 2-norm",
        path="profile.*.kappa",
        axis="threshold",
    ),
    _quantity("gd_rate", NONE, "contraction per step of gradient descent at its best step size"),
    _quantity("gd_iterations_per_decade", NONE, "gradient steps for one decimal digit"),
    _plain("gd_rate_applies", "bool", "the hypotheses of the rate hold"),
    *(
        _quantity(
            f"forecast_{part}",
            LOSS,
            f"loss decrease after T gradient steps in the quadratic model, {of}",
            path=f"forecast.*.{part}",
            axis="horizon",
        )
        for part, of in (
            ("positive", "positive eigenvalues"),
            ("null", "zero eigenvalues"),
            ("negative", "negative eigenvalues"),
            ("total", "all eigenvalues"),
        )
    ),
    _nullable("diagonal_gap", "quantity", "factor by which another diagonal could still be better"),
    _nullable("half_ratio", "quantity", "largest eigenvalues of the two halves of the data, ratio"),
    _nullable("source", "text", "what the preconditioner was made from"),
    _nullable("optimizer_class", "text", "class of the optimizer"),
    _plain("zero_state", "int", "parameters whose optimizer state is zero"),
    _plain("symmetries", "list", "symmetries of the loss, a JSON list"),
    Field(
        "off_diagonality",
        ("off_diagonality",),
        "before-after",
        NONE,
        "off-diagonal share of the Frobenius norm, without and with the rotation",
    ),
    _plain("notes", "list", "what a reader of the numbers must know, a JSON list"),
)

AXES: dict[str, tuple[str, ...]] = {
    "quantile": QUANTILES,
    "threshold": THRESHOLDS,
    "horizon": HORIZONS,
}
"""The keys of each axis, as the JSON document spells them; the file holds them as numbers."""

COORDINATES: tuple[Dataset, ...] = (
    Dataset("block", ("block",), NONE, "block of parameters", "text"),
    Dataset("variant", ("variant",), NONE, "view of the problem", "text"),
    Dataset("quantile", ("quantile",), NONE, "quantile of the positive eigenvalues"),
    Dataset("threshold", ("threshold",), NONE, "eigenvalue relative to the 2-norm"),
    Dataset("horizon", ("horizon",), NONE, "gradient steps T", "int"),
)
PARAMETERS = Dataset(
    "parameters", ("block",), NONE, "names of the parameters of the block, a JSON list", "text"
)

SPECTRUM: tuple[Dataset, ...] = (
    Dataset("eigenvalue", ("eigenvalue_index",), LOSS, "eigenvalues, ascending"),
    Dataset("ritz_value", ("ritz_index",), LOSS, "Ritz values, ascending"),
    Dataset("ritz_weight", ("ritz_index",), NONE, "squared first component of each Ritz vector"),
    Dataset("ritz_bound", ("ritz_index",), LOSS, "distance of each to the spectrum, at most"),
    Dataset("density_grid", ("density_index",), LOSS, "eigenvalues at which the density is given"),
    Dataset("density", ("density_index",), "loss-1", "smoothed density of the eigenvalues, area 1"),
    Dataset("density_stderr", ("density_index",), "loss-1", "its error by the random probes"),
    Dataset("density_width", (), LOSS, "standard deviation of the smoothing"),
    Dataset("density_resolution", (), LOSS, "eigenvalue below which Lanczos tells nothing apart"),
    Dataset("vector_value", ("vector_index",), LOSS, "eigenvalues of the stored eigenvectors"),
    Dataset("vector", ("vector_index", "parameter"), NONE, "a few extreme eigenvectors, by row"),
)
ROWS: tuple[Dataset, ...] = (
    Dataset("norm", ("parameter",), LOSS, "2-norm of each row of the Hessian block"),
    Dataset("norm_low", ("parameter",), LOSS, "lower end of the row norm"),
    Dataset("norm_high", ("parameter",), LOSS, "upper end of the row norm"),
    Dataset("diagonal", ("parameter",), LOSS, "diagonal of the Hessian block"),
    Dataset("diagonal_low", ("parameter",), LOSS, "lower end of the diagonal entry"),
    Dataset("diagonal_high", ("parameter",), LOSS, "upper end of the diagonal entry"),
)
ARRAYS: dict[str, tuple[Dataset, ...]] = {"spectra": SPECTRUM, "rows": ROWS}
"""By group: ``/<group>/<variant>/<block index>/<dataset>``."""

HIDDEN: tuple[Dataset, ...] = (
    Dataset("row_norm", ("feature",), NONE, "2-norm of each row of H_e; row 0 is that of ones"),
    Dataset("column_norm", ("position",), NONE, "2-norm of each column of H_e"),
    Dataset("singular_value", ("singular_index",), NONE, "singular values of H_e, descending"),
    Dataset("bias_cosine", ("feature",), NONE, "cosine of each row to the row of ones"),
    Dataset("dead", ("feature",), NONE, "the feature is zero everywhere", "bool"),
    Dataset("constant", ("feature",), NONE, "the feature is the same everywhere", "bool"),
    Dataset("kappa", (), NONE, "largest over smallest positive singular value of H_e"),
    Dataset("rank", (), NONE, "singular values of H_e above the tolerance"),
    Dataset("input_error", (), NONE, "rounding of the inputs, beside the largest singular value"),
    Dataset("centring_holds", (), NONE, "centring the features lowers kappa", "bool"),
)
NEURONS: tuple[Dataset, ...] = (
    Dataset("kappa_hessian", ("neuron",), NONE, "condition number of H_e S H_e^T"),
    Dataset("kappa_hidden", ("neuron",), NONE, "condition number of H_e"),
    Dataset("kappa_s", ("neuron",), NONE, "condition number of S"),
    Dataset("bound", ("neuron",), NONE, "squared kappa_hidden times kappa_s"),
    Dataset("slack", ("neuron",), NONE, "bound over kappa_hessian"),
    Dataset("s_positive", ("neuron",), NONE, "positive entries of the diagonal S"),
    Dataset("s_negative", ("neuron",), NONE, "negative entries of S"),
    Dataset("s_zero", ("neuron",), NONE, "entries of S that are zero or rounding noise"),
)
LAYERS: dict[str, tuple[Dataset, ...]] = {"hidden": HIDDEN, "neurons": NEURONS}
"""By group: ``/<group>/<variant>/<layer index>/<dataset>``."""

_COSINE = "cosine of each Hessian row at p* to p_t - p*"
COSINES: tuple[Dataset, ...] = (
    Dataset("step", ("iterate",), NONE, "training step of the iterate"),
    Dataset("distance", ("iterate",), NONE, "2-norm of p_t - p*"),
    Dataset("cosine", ("iterate", "parameter"), NONE, _COSINE),
    Dataset("cosine_low", ("iterate", "parameter"), NONE, f"lower end: {_COSINE}"),
    Dataset("cosine_high", ("iterate", "parameter"), NONE, f"upper end: {_COSINE}"),
    Dataset("valid", ("iterate", "parameter"), NONE, "the cosine exists", "bool"),
    Dataset("row_norm", ("parameter",), LOSS, "2-norm of each row of the full Hessian at p*"),
    Dataset("row_norm_low", ("parameter",), LOSS, "lower end of the row norm"),
    Dataset("row_norm_high", ("parameter",), LOSS, "upper end of the row norm"),
    Dataset(
        "gradient_rms", ("parameter",), LOSS, "root mean square of the gradient over the iterates"
    ),
    Dataset(
        "quadratic_residual",
        ("iterate",),
        NONE,
        "2-norm of g_t - g(p*) - H (p_t - p*) over that of H (p_t - p*)",
    ),
    Dataset("fraction_above", ("iterate",), NONE, "share of the cosines beyond 0.1"),
)
"""Under ``/cosines``, all of them or none."""
CONTEXT = ("step", "distance")
"""What the group's attribute ``coordinates`` names (CF): xarray shows them as coordinates."""

PROVENANCE: dict[str, tuple[type, str]] = {
    "config": (dict, "options of the analysis, a JSON object"),
    "environment": (dict, "versions, engine, self-checks and timings, a JSON object"),
    "fingerprint": (dict, "what decides the numbers, a JSON object"),
    "warnings": (list, "warnings of the analysis, a JSON list"),
}

PARTS: dict[Kind, tuple[tuple[str, Dtype, str], ...]] = {
    "quantity": (
        ("", "float", ""),
        ("_low", "float", "lower end: "),
        ("_high", "float", "upper end: "),
        ("_status", "text", "kind of certificate: "),
        ("_confidence", "float", "level of the interval: "),
    ),
    "before-after": (("_before", "float", "before: "), ("_after", "float", "after: ")),
    "float": (("", "float", ""),),
    "int": (("", "int", ""),),
    "bool": (("", "bool", ""),),
    "text": (("", "text", ""),),
    "list": (("", "text", ""),),
}
"""By kind of field: suffix, type and prefix of the long name of each of its datasets."""


def datasets(field: Field) -> tuple[Dataset, ...]:
    """The datasets under ``/summary`` that hold ``field``, in the order of its parts."""
    return tuple(
        Dataset(
            field.name + suffix,
            field.dims,
            NONE if suffix in {"_status", "_confidence"} else field.units,
            prefix + field.long_name,
            dtype,
        )
        for suffix, dtype, prefix in PARTS[field.kind]
    )
