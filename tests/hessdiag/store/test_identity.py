"""Which differences of fingerprints make another analysis."""

from __future__ import annotations

import pytest

from hessdiag.store.identity import differing

WANTED = {"loss": 0.7274, "dtype": "float64", "seed": 0, "weight_decay": 1e-3, "memory": {}}


@pytest.mark.parametrize(
    ("dtype", "apart", "same"),
    [
        ("float64", 1e-13, True),
        ("float64", 1e-9, False),
        ("float32", 1e-7, True),
        ("float32", 1e-3, False),
    ],
)
def test_the_same_loss_may_differ_by_the_rounding_of_its_type(dtype, apart, same):
    wanted = WANTED | {"dtype": dtype}
    stored = wanted | {"loss": wanted["loss"] * (1 + apart)}
    assert differing(stored, wanted) == ([] if same else ["loss"])


def test_no_other_number_may_differ_by_that_of_float32():
    wanted = WANTED | {"dtype": "float32"}
    assert differing(wanted | {"weight_decay": 1e-3 * (1 + 1e-7)}, wanted) == ["weight_decay"]


def test_what_only_the_stored_analysis_says_makes_it_another():
    assert differing(WANTED | {"engine": "difference"}, WANTED) == ["engine"]


def test_a_field_of_later_releases_that_says_nothing_makes_no_difference():
    stored = {name: value for name, value in WANTED.items() if name != "memory"}
    assert differing(stored, WANTED) == []
