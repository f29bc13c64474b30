"""What the self-checks make of products by differences and of the errors that they tell."""

from __future__ import annotations

import math

import pytest
import torch

from hessdiag.checks import Check
from hessdiag.curvature.engines.difference import Differed
from hessdiag.difference_checks import AGREEMENT_LIMIT, check_agreement, check_symmetry, notice
from hessdiag.errors import SelfCheckFailed

U, V = (torch.tensor(entries, dtype=torch.float64) for entries in ([1, 1], [1, -1]))


class Telling:
    """Products with a matrix, each with an error of the same size, of truncation or rounding."""

    length = 1.0

    def __init__(self, matrix, *, truncation=0.0, rounding=0.0):
        self.matrix = torch.tensor(matrix, dtype=torch.float64)
        self.truncation, self.rounding = truncation, rounding

    def differ(self, vector):
        error = torch.zeros_like(vector)
        error[0] = self.truncation + self.rounding
        return Differed(self.matrix @ vector, error, self.truncation, self.rounding, 1e-3)


def test_asymmetry_counts_beyond_the_errors_of_the_products():
    matrix = [[1.0, 0.5], [0.0, 1.0]]  # u·Av = -1/2 and v·Au = 1/2
    scale = math.sqrt(2) * (math.sqrt(1.25) + math.sqrt(3.25))
    exact, _ = check_symmetry(Telling(matrix), [(U, V)])
    assert exact == pytest.approx(1 / scale)
    rough, _ = check_symmetry(Telling(matrix, truncation=0.1), [(U, V)])
    assert rough == pytest.approx((1 - 0.2 * math.sqrt(2)) / scale)
    assert check_symmetry(Telling(matrix, truncation=0.5), [(U, V)])[0] == 0.0


def test_products_within_their_errors_say_nothing_of_symmetry():
    found, note = check_symmetry(Telling([[0.0, 1.0], [-1.0, 0.0]], rounding=1.0), [(U, V)])
    assert found == 0.0
    assert "drowned" in note


def test_a_matrix_that_is_zero_to_rounding_agrees():
    found = check_agreement(Telling([[0.0, 0.0], [0.0, 0.0]], rounding=1e-15), U)
    assert (found.value, found.passed) == (0.0, True)
    assert "zero" in found.note


def test_differences_that_disagree_are_refused_and_what_they_agree_to_is_the_value():
    ones = [[1.0, 0.0], [0.0, 1.0]]
    size = math.sqrt(2)
    found = check_agreement(Telling(ones, truncation=1e-3), U)
    assert (found.value, found.limit) == (pytest.approx(1e-3 / size), AGREEMENT_LIMIT)
    with pytest.raises(SelfCheckFailed, match=r"(?s)steps of 1\.0e-03.*smooth activations"):
        check_agreement(Telling(ones, truncation=1.01 * AGREEMENT_LIMIT * size), U)
    with pytest.raises(SelfCheckFailed, match="kinks"):
        check_agreement(Telling([[0.0, 0.0], [0.0, 0.0]], truncation=1e-3), U)


@pytest.mark.parametrize(("value", "rough"), [(1e-9, False), (1e-5, True)])
def test_a_reader_is_told_the_accuracy_and_the_reason_where_it_is_rough(value, rough):
    told = notice(Check(value, AGREEMENT_LIMIT, True))
    assert f"accurate to about {value:.0e} of" in told
    assert ("rough" in told) == rough
