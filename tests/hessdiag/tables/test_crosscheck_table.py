"""The table of a cross-check shows what is certain, and what failed."""

import pytest

from hessdiag.agreement import Crosscheck, Deviation, Entry
from hessdiag.options import Options
from hessdiag.quantity import Quantity
from hessdiag.tables.crosscheck import crosscheck_table

TOP = Quantity.exact(2.0)
ENTRIES = (
    Entry(
        "lambda_max",
        "PyHessian, eigenvalues()",
        Quantity.estimate(1.9),
        100,
        1.25,
        Deviation(0.05, 0.0499),
    ),
    Entry(
        "lambda_max",
        "hessdiag, Lanczos",
        Quantity.interval(1.99, 1.99, 2.01, 0.999),
        1234,
        0.0123,
        Deviation(0.005, 0.0),
    ),
    Entry("lambda_max", "hessdiag, all eigenvalues", TOP, 30, 90.0, Deviation(0.0, 0.0)),
    Entry("trace", "PyHessian, trace()", Quantity.absent(), 0, 0.0, failure="Oops: no\nmore"),
    Entry("trace", "hessdiag, Lanczos", Quantity.estimate(7.0), 5, 0.2, Deviation(0.3, None)),
)


def table(width=100, color=False, notes=("look \x1b[2J out",)):
    found = Crosscheck("toy", "m.pt", 30, "cpu", "kept", Options(), 1.5, ENTRIES, notes)
    return crosscheck_table(found, width=width, color=color)


def test_each_line_says_how_far_off_for_certain_at_what_cost():
    lines = [line.split("  ") for line in table().splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[2] == [
        *("λ_max", "PyHessian, eigenvalues()", "1.9000e+00", "none", "≥ 4.9 %", "100", "1.2 s")
    ]
    assert cells[3][2:] == ["[1.990e0, 2.010e0]", "inside, 0.50 %", "1,234", "12 ms"]
    assert cells[4][2:] == ["exact", "inside", "30", "90 s"]
    assert cells[7][-2:] == ["5", "200 ms"]
    assert cells[7][-3] == "~ 30 %"


def test_a_failure_is_a_line_in_words_and_its_first_line_stands_below():
    text = table()
    assert "failed: see below" in text
    assert "PyHessian, trace(): Oops: no\n" in text
    assert "more" not in text


@pytest.mark.parametrize("width", [60, 80, 100])
def test_it_fits_the_terminal_and_obeys_nothing_that_others_wrote(width):
    lines = table(width).splitlines()
    assert max(map(len, lines)) <= max(width, 70)
    assert "\x1b" not in table(width)
    assert "\x1b" in table(width, color=True)
    assert ("certificate" in lines[0]) == (width == 100)
