"""The table of an estimate."""

import pytest
from rich.cells import cell_len

from hessdiag.estimated import BlockEstimate, Estimate
from hessdiag.tables.estimate import duration, estimate_table, size

MADE = Estimate(
    blocks=(
        BlockEstimate("0", 2080, None, "cut from whole", "", 0, 9, 2.5, 5 * 2**20),
        BlockEstimate("frozen", 7, "all frozen"),
        BlockEstimate("whole", 2410, None, "lanczos", "kept", 1280, 11, 90.0, 3 * 2**30),
        BlockEstimate("[red]\x1b[0m", 10, None, "exact", "kept", 10, 11, 0.04, 900),
    ),
    device="cpu",
    dtype="float64",
    setup_seconds=0.5,
    selfcheck_products=14,
    selfcheck_seconds=1.5,
    selfcheck_memory=2**20,
)


def test_rows_hold_method_products_time_and_memory_and_the_last_their_totals():
    lines = estimate_table(MADE).splitlines()
    cells = [[c.strip() for c in line.split("  ") if c.strip()] for line in lines]
    assert cells[0] == ["block", "size", "method", "products", "time", "memory"]
    assert ["0", "2,080", "cut from whole", "–", "2.5 s", "5.0 MiB"] in cells
    assert ["frozen", "7", "skipped: all frozen"] in cells
    assert cells[5] == ["whole", "2,410", "lanczos", "1,280", "90 s", "3.0 GiB"]
    assert cells[7] == ["in all", "1,290", "95 s", "3.0 GiB"]
    text = " ".join(" ".join(lines).split())
    assert "about 14 for the self-checks and 31 that measure rounding" in text
    assert "at the most that they may take" in text
    assert "\x1b" not in text
    assert max(map(cell_len, lines)) <= 100


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (12.0, "12 s"),
        (99.0, "99 s"),
        (100.0, "2 min"),
        (7200.0, "2.0 h"),
    ],
)
def test_a_duration_is_short(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (900, "900 B"), (2048, "2.0 KiB"), (300 * 2**20, "300 MiB"), (2**50, "1024 TiB")],
)
def test_a_size_is_short(count, shown):
    assert size(count) == shown
