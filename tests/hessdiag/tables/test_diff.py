"""The table of two runs: both values, the change, and whether it is certain."""

import dataclasses
import re

import pytest
from rich.cells import cell_len

from compared_runs import compared, result, skipped
from hessdiag.diff import compare
from hessdiag.quantity import Quantity
from hessdiag.run import QUANTILES, BlockResult, VariantResult
from hessdiag.store.schema import AXES, SUMMARY
from hessdiag.tables.diff import diff_table
from sample_runs import rich_run, run, skipped_values, values

NAMES = ("a.h5", "b.h5")


def medians(*numbers):
    return {"kappa_quantile": dict.fromkeys(QUANTILES, numbers[0])}


def made(**blocks):
    rows = tuple(
        BlockResult(name, (f"{name}.weight",), {"raw": VariantResult(found)})
        for name, found in blocks.items()
    )
    return run(rows)


def table(first, second, **options):
    return diff_table(compare(first, second), NAMES, **options)


def rows(text):
    """The cells of each line of the table, by label."""
    found = {}
    for line in text.splitlines():
        if line.startswith("  ") and len(line.split("  ")) > 3:
            label, *cells = [cell.strip() for cell in line.strip().split("  ") if cell.strip()]
            found[label] = cells
    assert found.pop("first") == ["second", "change"]
    return found


def test_each_block_shows_both_values_and_the_change_with_its_arrow():
    first = made(b=values(4, kappa=Quantity.lower_bound(10.0)))
    second = made(
        b=values(
            4,
            **medians(Quantity.exact(5.0)),
            kappa=Quantity.lower_bound(20.0),
            lambda_max=Quantity.interval(2.0, 1.0, 6.0, 0.99),
            lambda_min=Quantity.exact(-3.0),
            negative_mass=Quantity.exact(0.0625),
        )
    )
    found = rows(table(first, second))
    assert found["κ at the median λ"] == ["= 2.00e+00", "= 5.00e+00", "↑ = ×2.50"]
    assert found["κ"] == ["≥ 1.00e+01", "≥ 2.00e+01", "?"]
    assert found["λ_max"] == ["= 4.00e+00", "[1.0e0, 6.0e0]", "[×0.24, ×1.6]"]
    assert found["λ_min"] == ["= -1.00e+00", "= -3.00e+00", "↓ = -2.00e+00"]
    assert found["λ < 0 mass"] == ["12.5%", "6.2%", "↓ = ×0.500"]


def test_a_share_that_was_nothing_shows_its_difference():
    none, some = (values(4, negative_mass=Quantity.exact(x)) for x in (0.0, 0.25))
    assert rows(table(made(b=none), made(b=some)))["λ < 0 mass"] == ["0%", "25.0%", "↑ +25.0%"]
    assert rows(table(made(b=none), made(b=none)))["λ < 0 mass"] == ["0%", "0%", "0%"]


def test_the_sentence_names_the_largest_certain_change():
    first = made(
        a=values(4), b=values(4), c=values(4, **medians(Quantity.unresolved())), whole=values(4)
    )
    second = made(
        a=values(4, **medians(Quantity.exact(1.0))),
        b=values(4, **medians(Quantity.exact(0.25))),
        c=values(4, **medians(Quantity.exact(1e9))),
        whole=values(4, **medians(Quantity.exact(1e9))),
    )
    text = " ".join(table(first, second).split())
    assert "κ at the median λ changed most in b, by ×0.125: from = 2.00e+00 to = 2.50e-01." in text
    same = table(first, first)
    assert "No block's κ at the median λ has certainly changed." in same
    assert not {"↑", "↓"} & set("".join(line for line in same.splitlines() if line[:2] == "  "))


def test_settings_that_differ_are_a_warning_at_the_top():
    first = made(b=values(4))
    other = dataclasses.replace(
        first.provenance,
        fingerprint=first.provenance.fingerprint | {"data": "c" * 64, "dtype": "float32"},
    )
    text = table(first, dataclasses.replace(first, provenance=other))
    lines = text.splitlines()
    assert lines[0].startswith("first   a.h5")
    assert lines[1].startswith("second  b.h5")
    warning = " ".join(" ".join(lines[2:4]).split())
    assert warning.startswith("Warning: the two analyses differ in ")
    assert "dtype (float64 | float32)" in warning
    assert "data (none | cccccccc)" in warning
    assert "Warning" not in table(first, first)


def test_what_only_one_run_has_is_said_and_not_compared():
    first = made(a=values(4), s=values(4))
    second = made(b=values(5), s=skipped_values("failed: device lost"))
    text = table(first, second)
    assert "not in the second run" in text
    assert "not in the first run" in text
    assert "skipped in the second run: failed: device lost" in text
    assert rows(text) == {}


def test_one_block_shows_every_quantity_that_exists():
    text = table(made(b=values(4), c=values(4)), made(b=values(4), c=values(4)), block="b")
    expected = []
    for field in SUMMARY:
        if field.kind == "quantity" and not field.nullable:
            keys = (None,) if field.axis is None else AXES[field.axis]
            expected += [".".join(k if p == "*" else p for p in field.path) for k in keys]
    assert list(rows(text)) == expected
    assert rows(text)["n_positive"] == ["3", "3", "0"]


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("variant", ["raw", "bn+adam"])
def test_any_run_against_any_prints_within_the_width_and_obeys_no_name(variant, width):
    text = table(rich_run(), rich_run(), variant=variant, width=width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "[bold red]markup[/bold red]" in text
    assert "line\\nbreak\\tand tab" in text


def test_colour_is_only_where_it_is_asked_for():
    assert "\x1b[" in table(made(b=values(4)), made(b=values(4)), color=True)


def several():
    first = compared(
        {
            "0": {
                "raw": result(4.0, 1.0),
                "bnp": result(3.0, 2.0),
                "adam": result(2.0, 9.0),
                "kfac": result(1.0, 1.0),
            },
            "2": {"raw": result(4.0, 1.0), "bnp": result(3.0, 2.0), "adam": result(2.0, 2.0)},
        }
    )
    second = compared(
        {
            "0": {"raw": result(4.0, 1.0), "bnp": result(1.0, 4.0), "adam": result(2.0, 2.0)},
            "2": {"raw": result(4.0, 1.0), "bnp": result(3.0, 2.0), "adam": skipped("no state")},
        }
    )
    return first, second


def test_every_variant_that_both_runs_have_stands_below_raw():
    lines = [line.strip() for line in table(*several()).splitlines()]
    block = lines[lines.index("0  4 parameters") : lines.index("2  4 parameters")]
    assert [line for line in block if line.startswith("under")] == ["under bnp", "under adam"]
    start = block.index("under bnp") + 1
    assert [cell.split("  ") for cell in map(_single, block[start : start + 2])] == [
        ["κ at the median λ", "= 3.00e+00", "= 1.00e+00", "↓ = ×0.333"],
        ["forecast T = 100", "= 2.00e+00", "= 4.00e+00", "↑ = ×2.00"],
    ]
    rest = lines[lines.index("2  4 parameters") :]
    after = rest[rest.index("under adam") + 1]
    assert after == "skipped in the second run: no state"


def _single(line):
    return re.sub(r" {2,}", "  ", line)


def test_the_variants_of_one_run_alone_and_what_helps_most_in_either_are_said():
    text = " ".join(table(*several()).split())
    assert "Only in the first run: kfac." in text
    assert (
        "The variant that helps most (first | second): by forecast adam | bnp; "
        "by κ at the median λ adam | bnp." in text
    )
    alone = table(made(b=values(4)), made(b=values(4)))
    assert "helps most" not in alone
    assert "Only in" not in alone


def test_one_variant_or_one_block_stands_alone_where_it_is_asked_for():
    for options in ({"variant": "bnp"}, {"variant": "raw"}, {"block": "0"}):
        text = table(*several(), **options)
        assert "under" not in text
        assert "helps most" not in text
    assert "variant bnp" in table(*several(), variant="bnp")


def test_a_long_reason_is_cut():
    first = compared({"0": {"raw": result(), "bnp": skipped("x" * 3000)}})
    second = compared({"0": {"raw": result(), "bnp": result()}})
    text = "".join(table(first, second).split())
    assert f"skippedinthefirstrun:{'x' * 239}…" in text
    assert "x" * 240 not in text
