"""A certificate is a promise about draws: each kind of interval holds as often as it says."""

from __future__ import annotations

import pytest

import interval_draws

LIMIT = 4.0  # standard errors, over some twenty kinds of interval on seven spectra


def broken(records):
    return {record.kind: record for record in records if record.excess > LIMIT}


@pytest.mark.parametrize("name", interval_draws.SPECTRA)
def test_every_kind_of_interval_holds_as_often_as_it_says(name):
    records = interval_draws.measure(name, 25)
    assert {"lambda_max", "trace", "frobenius", "row norm"} <= {r.kind for r in records}
    assert broken(records) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", interval_draws.SPECTRA)
def test_every_kind_of_interval_holds_as_often_as_it_says_over_two_thousand_draws(name):
    # 300 draws on each of seven spectra.
    assert broken(interval_draws.measure(name, 300)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", interval_draws.SPECTRA)
def test_power_iteration_holds_as_often_as_it_says(name):
    assert broken(interval_draws.measure(name, 100, power=True)) == {}


def test_a_record_of_too_many_misses_stands_out():
    assert interval_draws.Record("x", 0.95, 300, 15, 0.2).excess < 1
    assert interval_draws.Record("x", 0.95, 300, 45, 0.36).excess > LIMIT
    assert interval_draws.Record("x", 0.999, 300, 3, 0.1).excess > LIMIT / 3
