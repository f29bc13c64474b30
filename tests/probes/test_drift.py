"""The bound beyond a decomposition whose vectors were rounded, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hessdiag_probes import generator, lanczos, sphere
from hessdiag_probes.basis import Storage
from hessdiag_probes.drift import Drift


def test_the_bound_of_one_step_is_what_was_lost_over_the_share():
    drift = Drift(np.array([0.02]), start=0.001, overlap=0.0)
    found = drift.beyond(np.array([3.0]), np.array([]), 0.5, 3.0, 0.011)
    assert found == pytest.approx((0.5 + 0.02) / (0.011 - 0.001), rel=1e-5)
    assert found >= 52.0


def test_the_bound_of_two_steps_solves_its_quadratic():
    f1, f2, beta, b, share = 0.03, 0.05, 0.2, 2.0, 0.1
    drift = Drift(np.array([f1, f2]), start=0.0, overlap=0.0)
    found = drift.beyond(np.array([0.0, 0.0]), np.array([b]), beta, b, share)
    # share (x² - b²) = f1 x + (f2 + beta) b
    root = f1 + math.sqrt(f1**2 + 4 * share * (share * b**2 + (f2 + beta) * b))
    assert found == pytest.approx(root / (2 * share) - b, rel=1e-5)


def test_nothing_is_certified_where_the_start_itself_was_lost():
    drift = Drift(np.array([0.0]), start=0.2, overlap=0.0)
    assert drift.beyond(np.array([3.0]), np.array([]), 0.5, 3.0, 0.2) == math.inf


def test_vectors_that_may_be_dependent_certify_no_ritz_pair():
    drift = Drift(np.array([0.1, 0.1]), start=0.0, overlap=1.5)
    assert drift.reach == math.inf
    assert (drift.residuals(0.1, np.eye(2)) == math.inf).all()


@pytest.mark.parametrize("value", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_ends_of_a_multiple_of_the_identity_hold_it(value, seed):
    start = sphere(150, generator=generator(seed, "start"), dtype=torch.float64)
    run = lanczos(lambda v: value * v, start, 12, storage=Storage(dtype=torch.float32))
    low, high = run.ritz().ends(1e-3)
    assert low <= value <= high
    assert high - low < 1e-4 * value
