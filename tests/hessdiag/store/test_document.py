import json
import math
import sys
from dataclasses import replace

import pytest

from hessdiag.errors import MissingExtra
from hessdiag.quantity import Quantity
from hessdiag.run import VariantResult
from hessdiag.store.schema import SUMMARY, datasets

TOP = ["format", "version", "task", "curvature", "device", "seed", "blocks"]
VARIANT = [
    *("size", "inactive", "skipped", "same_function", "loss", "gradient_norm", "dtype", "method"),
    *("products", "seconds", "lambda_max", "lambda_min", "lambda_min_positive", "kappa"),
    *("kappa_abs", "kappa_quantile", "kappa_damped", "n_positive", "n_negative", "n_zero"),
    *("ambiguous", "margin_above", "margin_below", "trace", "frobenius", "stable_rank"),
    *("negative", "profile", "gd_rate", "gd_iterations_per_decade", "gd_rate_applies"),
    *("forecast", "diagonal_gap", "half_ratio", "source", "optimizer_class", "zero_state"),
    *("symmetries", "off_diagonality", "notes"),
]
PARTS = ["value", "low", "high", "status", "confidence"]


def one(runs, **known):
    block = replace(
        runs.small_run().blocks[0], variants={"raw": VariantResult(runs.values(**known))}
    )
    return runs.run((block,)).to_dict()["blocks"][0]["variants"]["raw"]


def test_keys_stand_in_the_order_of_the_contract(runs):
    document = runs.small_run().to_dict()
    assert list(document) == [*TOP, "checkpoint", "checks", "warnings"]
    assert list(document["blocks"][0]) == ["name", "parameters", "variants"]
    raw = document["blocks"][0]["variants"]["raw"]
    assert list(raw) == VARIANT
    assert list(raw["kappa_quantile"]) == ["0.5", "0.9"]
    assert list(raw["negative"]) == ["count", "mass", "depth"]
    assert list(raw["profile"]) == [f"1e-{k:02d}" for k in range(1, 13)]
    assert list(raw["profile"]["1e-07"]) == ["n_positive", "n_negative", "kappa"]
    assert list(raw["forecast"]) == ["1", "10", "100", "1000"]
    assert list(raw["forecast"]["10"]) == ["positive", "null", "negative", "total"]
    assert list(raw["kappa"]) == PARTS


def test_top_level_values_come_from_the_provenance(runs):
    document = runs.small_run().to_dict()
    assert [document[key] for key in TOP[:-1]] == [
        "hessdiag-run", "1.0.0", "demo:mlp", "hessian", "cpu", 0,
    ]  # fmt: skip
    assert document["checkpoint"] == "model.pt"
    assert document["checks"] == {"symmetry": 1e-16}
    assert document["warnings"] == ["demo text, not your data"]


def test_counts_are_integers_and_fractions_are_not(runs):
    raw = one(runs)
    for count in (raw["n_positive"], raw["profile"]["1e-03"]["n_negative"]):
        assert [type(count[part]) for part in PARTS[:3]] == [int, int, int]
        assert type(count["confidence"]) is float
    assert type(raw["negative"]["count"]["value"]) is float
    assert type(raw["kappa"]["value"]) is float


@pytest.mark.parametrize("name", ["kappa_damped", "diagonal_gap", "half_ratio"])
def test_a_nullable_quantity_is_null_only_where_it_does_not_exist(name, runs):
    assert one(runs)[name] is None
    assert one(runs, **{name: Quantity.unresolved()})[name]["status"] == "unresolved"


def test_other_absent_quantities_keep_their_five_keys(runs):
    assert one(runs, kappa=Quantity.absent())["kappa"] == dict.fromkeys(PARTS)


def test_null_stands_for_every_number_that_json_cannot_hold(runs):
    raw = one(
        runs,
        margin_above=math.inf,
        loss=math.nan,
        kappa=Quantity(1.0, -math.inf, 1.0, "exact", 1.0),
    )
    assert (raw["margin_above"], raw["loss"], raw["kappa"]["low"]) == (None, None, None)


def test_json_is_strict_and_parses_back_to_the_document(runs):
    def refuse(constant):
        raise AssertionError(constant)

    run = runs.rich_run()
    assert json.loads(run.to_json(), parse_constant=refuse) == run.to_dict()


def test_missing_pairs_are_left_out(runs):
    blocks = runs.rich_run().to_dict()["blocks"]
    assert list(blocks[0]["variants"]) == ["raw"]
    assert list(blocks[1]["variants"]) == ["raw", "bn+adam"]


def test_every_field_has_one_place_and_one_dataset_name():
    paths = [field.path for field in SUMMARY]
    names = [dataset.name for field in SUMMARY for dataset in datasets(field)]
    assert len(set(paths)) == len(paths)
    assert len(set(names)) == len(names)
    for field in SUMMARY:  # nested names joined by "_"
        assert field.name == "_".join(part for part in field.path if part != "*")


def test_dataframe_has_a_row_per_pair_and_the_names_of_the_summary(runs):
    run = runs.rich_run()
    frame = run.to_dataframe()
    assert frame.index.names == ["block", "variant"]
    assert len(frame) == sum(len(block.variants) for block in run.blocks)
    for block in run.blocks:
        for variant, result in block.variants.items():
            row = frame.loc[(block.name, variant)]
            median = result["kappa_quantile"]["0.5"]
            expected = {
                "kappa": result["kappa"].value,
                "kappa_low": result["kappa"].low,
                "kappa_high": result["kappa"].high,
                "kappa_confidence": result["kappa"].confidence,
                "kappa_quantile_0.5": median.value,
                "forecast_total_100": result["forecast_total"]["100"].value,
                "profile_kappa_1e-03_low": result["profile_kappa"]["1e-03"].low,
                "loss": result["loss"],
            }
            for name, value in expected.items():
                assert row[name] == value or (value is None and math.isnan(row[name])), name
            assert row["size"] == result["size"]
    assert frame.loc[(runs.NASTY_NAMES[0], "raw"), "kappa_status"] == "exact"
    assert frame["kappa"].dtype == "float64"
    assert frame["ambiguous"].isna().any()
    assert frame["ambiguous"].dtype == "boolean"


def test_dataframe_without_pandas_names_the_extra(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"pip install 'hessdiag\[xarray\]'"):
        runs.small_run().to_dataframe()
