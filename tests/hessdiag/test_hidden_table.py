import math
from dataclasses import replace

import numpy as np
import pytest
from rich.cells import cell_len

from hessdiag.errors import OptionError
from hessdiag.quantity import Quantity
from hessdiag.run import BlockResult, HiddenResult, VariantResult
from hessdiag.tables.hidden import hidden_table
from hessdiag.tables.lines import TIED
from hessdiag.tables.reasons import hidden_sentences

NEURONS = {
    "kappa_hessian": np.array([4.5e8, 30.0, np.nan]),
    "kappa_hidden": np.array([2e4, 2e4, np.nan]),
    "kappa_s": np.array([3.0, 5.0, np.nan]),
    "bound": np.array([np.nan, 2e9, np.nan]),
    "slack": np.array([np.nan, 64.0, np.nan]),
    "s_positive": np.array([60.0, 80.0, 0.0]),
    "s_negative": np.array([20.0, 0.0, 0.0]),
    "s_zero": np.array([20.0, 20.0, 100.0]),
}


def layer(name="0", neurons=NEURONS, **known):
    """H_e of six features over a hundred positions: one dead, one constant, one along the ones."""
    hidden = {
        "row_norm": np.array([10.0, 2000.0, 10.5, 0.0, 70.0, 5.0, 40.0]),
        "column_norm": np.array([1.5, 30.0]),
        "singular_value": np.array([2000.0, 90.0, 30.0, 10.0, 0.5, 1e-13, 0.0]),
        "bias_cosine": np.array([1.0, 0.5, 0.9995, np.nan, 1.0, -0.1, 0.0]),
        "dead": np.array([0, 0, 0, 1, 0, 0, 0], dtype=bool),
        "constant": np.array([1, 0, 0, 1, 1, 0, 0], dtype=bool),
        "kappa": np.asarray(4000.0),
        "rank": np.asarray(5.0),
        "centring_holds": np.asarray(1.0),
    }
    return HiddenResult(name, 0, hidden | known, neurons)


def block(runs, name, **variants):
    found = {key: VariantResult(runs.values(**values)) for key, values in variants.items()}
    return BlockResult(name, (f"{name}.weight",), found)


def with_hidden(runs, blocks=(), **hidden):
    variants = tuple(dict.fromkeys(("raw", *hidden)))
    return replace(runs.run(tuple(blocks), variants), hidden=hidden)


def table(runs, *, width=80, **options):
    run = with_hidden(
        runs,
        [
            block(
                runs,
                "0",
                raw={"kappa": Quantity.exact(4.5887e8)},
                bnp={"kappa": Quantity.exact(45.5208)},
            )
        ],
        raw=(layer(),),
        bnp=(layer(kappa=np.asarray(6.75), centring_holds=np.asarray(0.0), neurons={}),),
    )
    return hidden_table(run, "0", width=width, **options)


def test_the_table_of_a_layer_under_two_variants(runs):
    assert table(runs) == (
        "demo:mlp · model.pt · hessian · cpu\n"
        "H_e = [eᵀ; H] of 0: the row of ones and 6 features, 100 positions\n"
        "\n"
        "                         rows  columns     along         con-\n"
        "variant  κ(H_e)    rank  span     span  the ones  dead  stant\n"
        "─────────────────────────────────────────────────────────────\n"
        "raw      = 4000  5 of 7   400     20.0         1     1      1\n"
        "bnp      = 6.75  5 of 7   400     20.0         1     1      1\n"
        "\n"
        "Rows of H_e under raw; feature k is weight.flatten(1)[:, k]\n"
        "               cosine to\n"
        "feature  norm   the ones\n"
        "──────────────────────────────────\n"
        "0        2000     0.5000   largest\n"
        "3        70.0     1.0000   largest\n"
        "5        40.0     0.0000   largest\n"
        "1        10.5     0.9995  smallest\n"
        "4        5.00    -0.1000  smallest\n"
        "ones     10.0     1.0000  the bias\n"
        "Along the ones, |cosine| > 0.99: 1.\n"
        "Constant: 3.\n"
        "Dead: 2.\n"
        "\n"
        "                κ         κ    κ(S)   slack  slack  with a\n"
        "neurons    median     worst  median  median  worst   bound\n"
        "──────────────────────────────────────────────────────────\n"
        "raw      2.25e+08  4.50e+08    4.00    64.0   64.0  1 of 3\n"
        "\n"
        "S over all neurons and samples: 46.7% positive, 6.7% negative, 46.7% zero;\n"
        "neurons with negative entries: 1 of 3; inactive neurons: 1.\n"
        "\n"
        "Row norms of H_e span 400; standardising the inputs (bnp) would lower κ\n"
        "from 4.59e+08 to 45.5.\n"
        "\n"
        "κ(H_e): largest / smallest positive singular value of H_e · span: largest /\n"
        "smallest norm that is not zero · dead: zero for every position · constant: the\n"
        "same at every position · κ: of H_e S H_eᵀ, each neuron's own Hessian · slack:\n"
        "κ(H_e)² κ(S) / κ, where S > 0 and H_e has full row rank · S: curvature of the\n"
        "loss in the pre-activation, sample by sample · = exact\n"
        "- raw, bnp: 2 of the 7 rows add nothing (dead, constant, or a combination of\n"
        "  others); κ is over the rest\n"
        "- bnp: centring the features raises κ(H_e) here; theorem 4 is for H_e of full\n"
        "  row rank\n"
    )


def test_one_variant_alone_shows_its_own_features(runs):
    lines = table(runs, variant="bnp").splitlines()
    assert "Rows of H_e under bnp; feature k is weight.flatten(1)[:, k]" in lines
    assert not any(line.startswith("raw") for line in lines)
    assert any(line.startswith("Neurons: none taken apart.") for line in lines)


@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_wider_than_asked(width, runs):
    run = with_hidden(runs, raw=(layer("encoder." * 20),))
    lines = hidden_table(run, "encoder." * 20, width=width).splitlines()
    assert max(map(cell_len, lines)) <= width


def test_few_features_are_listed_once(runs):
    few = layer(
        row_norm=np.array([10.0, 20.0, 5.0]),
        bias_cosine=np.array([1.0, 0.5, 0.25]),
        dead=np.zeros(3, dtype=bool),
        constant=np.array([True, False, False]),
    )
    lines = hidden_table(with_hidden(runs, raw=(few,)), "0").splitlines()
    assert [line.split()[0] for line in lines if line.endswith("est")] == ["0", "1"]


def test_kappa_is_a_lower_bound_where_a_singular_value_is_at_the_tolerance(runs):
    tolerance = 10 * 100 * 2.0**-52 * 2000  # 10 max(n, N) ε s₁, N = 100
    for factor, shown in ((0.2, "≥ 3990"), (5.0, "≥ 3990"), (0.05, "= 4000"), (20.0, "= 4000")):
        values = np.array([2000.0, 90.0, 30.0, 10.0, 0.5, factor * tolerance, 0.0])
        text = hidden_table(with_hidden(runs, raw=(layer(singular_value=values),)), "0")
        row = next(line for line in text.splitlines() if line.startswith("raw"))
        assert shown in row, factor


def test_kappa_has_the_digits_that_rounding_of_the_inputs_leaves(runs):
    for error, shown in ((1e-9, "= 6.74"), (0.003, "= 7 "), (0.2, "≥ 2.87")):
        changed = layer(kappa=np.asarray(6.74), input_error=np.asarray(error))
        text = hidden_table(with_hidden(runs, bnp=(changed,)), "0")
        row = next(line for line in text.splitlines() if line.startswith("bnp"))
        assert shown in row, error


def test_without_singular_values_and_columns_the_rest_is_shown(runs):
    nothing = np.asarray(math.nan)
    large = layer(kappa=nothing, rank=nothing, centring_holds=nothing)
    left = {k: v for k, v in large.hidden.items() if k not in ("singular_value", "column_norm")}
    text = hidden_table(with_hidden(runs, raw=(replace(large, hidden=left),)), "0")
    row = next(line for line in text.splitlines() if line.startswith("raw"))
    assert row.split() == ["raw", "?", "–", "400", "–", "1", "1", "1"]
    assert "- raw: 6 features are too many for singular values\n" in text


def test_an_unknown_layer_is_refused_with_the_nearest_and_those_there_are(runs):
    run = with_hidden(runs, raw=(layer("encoder.0"), layer("head")))
    with pytest.raises(OptionError, match=r"'encoder.1'; did you mean 'encoder.0'\? it has: enc"):
        hidden_table(run, "encoder.1")
    with pytest.raises(OptionError, match=r"layer 'zzz'; it has: encoder.0, head$"):
        hidden_table(run, "zzz")


def test_a_run_without_h_e_says_how_to_get_it(runs):
    with pytest.raises(OptionError, match=r"holds no H_e.*analyse the checkpoint again"):
        hidden_table(runs.small_run(), "0")


def test_a_variant_that_does_not_change_the_layer_is_refused(runs):
    run = with_hidden(runs, raw=(layer(), layer("2")), bnp=(layer("2"),))
    with pytest.raises(OptionError, match=r"'bnp' does not change what layer '0' sees.*under: raw"):
        hidden_table(run, "0", variant="bnp")


def sentence(runs, raw, **variants):
    run = with_hidden(runs, [block(runs, "0", raw=raw, **variants)], raw=(layer(),))
    (found,) = hidden_sentences(run)
    return found.replace(TIED, " ").removeprefix("0: row norms of H_e span 400; ")


def test_a_sentence_tells_the_span_and_what_standardising_would_do(runs):
    raw = {"kappa": Quantity.exact(4.5887e8)}
    lower = {"kappa": Quantity.exact(45.5208)}
    assert sentence(runs, raw, bnp=lower, standardize=raw) == (
        "standardising the inputs (bnp) would lower κ from 4.59e+08 to 45.5"
    )
    assert sentence(runs, raw, standardize=lower) == (
        "standardising the inputs (standardize) would lower κ from 4.59e+08 to 45.5"
    )
    assert sentence(runs, lower, bnp=raw) == (
        "standardising the inputs (bnp) would not help: it would raise κ from 45.5 to 4.59e+08"
    )


def test_a_sentence_without_another_variant_tells_the_span_alone(runs):
    told = "0: row norms of H_e span 400"
    assert sentence(runs, {}) == told
    assert sentence(runs, {}, bnp={"skipped": "no"}, adam={}) == told


def test_a_layer_whose_block_was_skipped_tells_the_span_alone(runs):
    variants = {
        "raw": VariantResult(runs.skipped_values("frozen")),
        "bnp": VariantResult(runs.values()),
    }
    run = with_hidden(runs, [BlockResult("0", (), variants)], raw=(layer(),), bnp=())
    assert "\nRow norms of H_e span 400.\n" in hidden_table(run, "0")
    assert hidden_sentences(run) == []


def test_a_sentence_takes_the_median_where_kappa_is_a_bound(runs):
    bound = Quantity.lower_bound(1e11)
    known = {"0.5": Quantity.exact(500.0), "0.9": Quantity.absent()}
    better = {"0.5": Quantity.exact(20.0), "0.9": Quantity.absent()}
    raw = {"kappa": bound, "kappa_quantile": known}
    assert sentence(runs, raw, bnp={"kappa": bound, "kappa_quantile": better}) == (
        "standardising the inputs (bnp) would lower κ at the median λ from 500 to 20.0"
    )


def test_bounds_are_told_as_bounds_and_claim_nothing(runs):
    def both(low):
        quantiles = {"0.5": Quantity.lower_bound(low), "0.9": Quantity.absent()}
        return {"kappa": Quantity.lower_bound(low), "kappa_quantile": quantiles}

    assert sentence(runs, both(1e11), bnp=both(1e3)) == (
        "standardising the inputs (bnp) would take κ at the median λ from ≥ 1.00e+11 to ≥ 1000, "
        "which is not certain to be lower"
    )


def test_an_unresolved_number_is_told_as_such(runs):
    quantiles = {"0.5": Quantity.unresolved(), "0.9": Quantity.unresolved()}
    raw = {"kappa": Quantity.lower_bound(7.0), "kappa_quantile": quantiles}
    assert sentence(runs, raw, bnp=raw) == (
        "what standardising the inputs (bnp) would do to κ is unresolved"
    )


def test_sentences_are_about_the_worst_layers_worst_first(runs):
    def with_median(value):
        return {"kappa_quantile": {"0.5": Quantity.exact(value), "0.9": Quantity.absent()}}

    medians = {"a": 5.0, "b": 7.0, "c": 6.0, "norm": 99.0, "whole": 1e9}
    blocks = [block(runs, name, raw=with_median(value)) for name, value in medians.items()]
    unresolved = {"0.5": Quantity.unresolved(), "0.9": Quantity.unresolved()}
    low = {"kappa": Quantity.lower_bound(6.5), "kappa_quantile": unresolved}
    blocks += [block(runs, "d", raw=low)]
    blocks += [block(runs, "e", raw={"kappa": Quantity.zero(), "kappa_quantile": unresolved})]
    layers = tuple(layer(name) for name in ("a", "b", "c", "d", "e", "whole"))
    run = with_hidden(runs, blocks, raw=layers)
    assert [text[0] for text in hidden_sentences(run)] == ["b", "d", "c"]
    assert len(hidden_sentences(run, limit=10)) == 4
    assert hidden_sentences(runs.small_run()) == []
