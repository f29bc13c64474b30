"""The summary of cosines against closed forms and numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hessdiag.cosine_summary import summarise
from hessdiag.tables.cosines import cosine_sentences


def arrays(cosine, *, norm=None, rms=None, residual=0.05, factor=1.0):
    cosine = np.asarray(cosine, dtype=float)
    iterates, size = cosine.shape
    norm = np.ones(size) if norm is None else np.asarray(norm, dtype=float)
    valid = ~np.isnan(cosine)
    return {
        "step": np.arange(iterates) + 1.0,
        "distance": valid.any(axis=1).astype(float),
        "cosine": cosine,
        "cosine_low": cosine,
        "cosine_high": cosine,
        "valid": valid,
        "row_norm": norm,
        "row_norm_low": norm / factor,
        "row_norm_high": norm * factor,
        "gradient_rms": norm if rms is None else np.asarray(rms, dtype=float),
        "quadratic_residual": np.where(valid.any(axis=1), residual, np.nan),
        "fraction_above": np.full(iterates, 0.5),
    }


def test_the_share_beyond_a_tenth_and_the_median_pool_all_that_exist():
    found = summarise(arrays([[0.05, -0.2, np.nan], [0.1, 0.4, np.nan]]))
    assert found.fraction == 0.5
    assert found.median == pytest.approx(0.15)
    assert (found.iterates, found.rows) == (2, 2)


def test_the_null_is_that_of_random_directions():
    found = [summarise(arrays(np.full((1, n), 0.2))) for n in (1, 2, 3, 5000)]
    assert found[0].null_fraction == 1.0
    assert found[1].null_fraction == pytest.approx(1 - 2 / np.pi * np.arcsin(0.1), rel=1e-12)
    assert found[2].null_fraction == pytest.approx(0.9, rel=1e-12)
    drawn = np.random.default_rng(0).standard_normal((4000, 300))
    share = (np.abs(drawn[:, 0]) > 0.1 * np.linalg.norm(drawn, axis=1)).mean()
    null = summarise(arrays(np.full((1, 300), 0.2))).null_fraction
    assert null == pytest.approx(share, abs=4 * np.sqrt(null / 4000))
    assert found[3].null_median == pytest.approx(0.6745 / np.sqrt(5000))


def test_gradients_of_a_dominated_quadratic_recover_row_norms_though_no_cosine_is_large():
    rng = np.random.default_rng(1)
    size = 2000
    top = rng.standard_normal(size) * 10.0 ** rng.uniform(-2, 2, size)
    top /= np.linalg.norm(top)
    way = rng.standard_normal((5, size))
    way -= np.outer(way @ top, top)
    way += 0.05 * np.linalg.norm(way, axis=1)[:, None] * top
    gradient = np.outer(way @ top, top)
    rms = np.sqrt((gradient**2).mean(axis=0))
    cosine = np.sign(top) * (way @ top / np.linalg.norm(way, axis=1))[:, None]
    found = summarise(arrays(cosine, norm=np.abs(top), rms=rms))
    assert found.fraction == 0
    assert found.spread == pytest.approx(1)
    assert found.extreme_spread == pytest.approx(1)
    assert found.slope == pytest.approx(1)
    assert found.correlation == pytest.approx(1)


def test_spread_slope_and_correlation_are_numpys():
    rng = np.random.default_rng(2)
    norm, rms = np.exp(rng.standard_normal((2, 200)))
    rms *= np.sqrt(norm)
    norm[7], rms[9] = 0.0, 0.0
    cosine = np.full((2, 200), 0.2)
    cosine[:, 7] = np.nan
    found = summarise(arrays(cosine, norm=norm, rms=rms))
    kept = np.setdiff1d(np.arange(200), [7, 9])
    gamma = rms[kept] / norm[kept]
    assert found.spread == pytest.approx(np.quantile(gamma, 0.95) / np.quantile(gamma, 0.05))
    assert found.extreme_spread == pytest.approx(gamma.max() / gamma.min())
    x, y = np.log(norm[kept]), np.log(rms[kept])
    assert found.slope == pytest.approx(np.polyfit(x, y, 1)[0])
    assert found.correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.silent == 1


def test_equal_rows_have_no_slope():
    found = summarise(arrays(np.full((1, 4), 0.2), norm=[2, 2, 2, 2], rms=[1, 2, 3, 4]))
    assert (found.slope, found.correlation) == (None, None)


def test_each_reason_for_doubt_is_told():
    cosine = np.full((3, 4), 0.2)
    assert summarise(arrays(cosine)).warnings == ()
    assert summarise(arrays(np.vstack([cosine, np.full(4, np.nan)]))).warnings == ()
    (far,) = summarise(arrays(cosine, residual=[0.1, 0.31, 2.5])).warnings
    assert far.startswith("at 2 of 3 iterates the quadratic model misses")
    assert "(up to 2.5): their cosines are not about the loss" in far
    (lost,) = summarise(arrays(cosine, residual=[0.1, np.nan, 0.1])).warnings
    assert lost.startswith("at 1 of 3 iterates the gradient is not finite")
    (rough,) = summarise(arrays(cosine, factor=1.5)).warnings
    assert "known to a factor of 2.2 only" in rough
    (open_,) = summarise(arrays(cosine, factor=np.inf)).warnings
    assert "known from above only" in open_


def test_nothing_to_say_is_said():
    none = np.full((2, 3), np.nan)
    found = summarise(arrays(none))
    assert found.warnings == ("no iterate has a cosine: all are p* itself",)
    assert (found.fraction, found.median) == (None, None)
    zero = summarise(arrays(none, norm=np.zeros(3)))
    assert zero.warnings == ("no iterate has a cosine: every row of the Hessian is zero",)
    assert (zero.spread, zero.slope) == (None, None)


def test_the_sentences_are_those_of_the_numbers(runs):
    cosine = np.tile([0.2] + [0.01] * 99, (10, 1))
    norm = np.logspace(0, 3, 100)
    run = replace(runs.small_run(), cosines=arrays(cosine, norm=norm, rms=norm**2))
    assert cosine_sentences(run) == [
        "1 % of the cosines of 100 Hessian rows to p_t - p* at 10 iterates exceed 0.1 (random "
        "directions: 32 %); median 0.01 (random: 0.067)",
        "mean |g| recovers the row norms to a factor of 501 (q95/q05; largest over smallest "
        "1e+03): log-log slope 2.00, correlation 1.00",
    ]


def test_warnings_follow_and_a_run_without_iterates_says_nothing(runs):
    assert cosine_sentences(runs.small_run()) == []
    run = replace(runs.small_run(), cosines=arrays(np.full((2, 3), np.nan)))
    sentences = cosine_sentences(run)
    assert sentences[-1] == "no iterate has a cosine: all are p* itself"
    run = replace(runs.full_run(), cosines=arrays(np.full((1, 3), 0.2), residual=0.9))
    assert len(cosine_sentences(run)) == 3
