"""Variants side by side: every number once, the best of a row only where that is certain."""

import re

import pytest
from rich.cells import cell_len

from compared_runs import compared, large_run, result, skipped
from hessdiag.quantity import Quantity
from hessdiag.tables import summary_table
from hessdiag.tables.variants import beside, variant_lines

TEN = (
    "raw",
    "optimizer",
    "bnp",
    "adam",
    "ln",
    "optimal",
    "bn+adam",
    "block-inverse",
    "shampoo",
    "bn-detached+block-inverse",
)


def table(run, width=100):
    """The lines of the comparison alone."""
    lines, _ = variant_lines(beside(run), width)
    return [line.plain.rstrip() for line in lines]


def cells(run, title, row):
    """What stands in a row under a title."""
    lines = table(run, 100)
    head = next(i for i, line in enumerate(lines) if re.search(rf"(^|  ){title}(  |$)", line))
    start = lines[head].index(title)
    rule = next(line for line in lines[head:] if line.startswith("─"))
    end = (rule + " ").index(" ", start)
    found = next(line for line in lines[head:] if line.startswith(row))
    return re.split(r"\s{2,}", found[start:end].strip())


def small():
    return compared(
        {
            "whole": {
                "raw": result(90.0, Quantity.estimate(1.0), kappa=Quantity.lower_bound(9e5)),
                "adam": result(9.0, Quantity.estimate(4.0), kappa=Quantity.lower_bound(9e4)),
                "ln": result(8.0, Quantity.estimate(9.0), same_function=False, loss=0.5),
            },
            "0": {
                "raw": result(100.0, 0.25, kappa=Quantity.exact(1e7)),
                "adam": result(50.0, 0.5, kappa=Quantity.exact(2e7), ambiguous=True),
                "ln": result(1.0, 9.0, kappa=Quantity.exact(3.0), same_function=False, loss=0.5),
            },
            "norm": {
                "raw": result(Quantity.lower_bound(400.0), 0.125),
                "adam": result(100.0, 0.125),
                "ln": skipped("nothing to normalise"),
            },
        }
    )


def test_the_tables_of_a_small_run():
    assert table(small(), 80) == [
        "         κ                             κ at the median λ            ratio to raw",
        "block         raw      adam      ln‡       raw      adam      ln‡       adam",
        "──────   ───────────────────────────   ──────────────────────────   ────────────",
        "0        = 1.0e7*  = 2.0e7!  = 3.0e0   = 1.0e2  = 5.0e1*  = 1.0e0   = ×0.50",
        "norm     = 4.0e0   = 4.0e0         –   ≥ 4.0e2  = 1.0e2*        –   ≤ ×0.26",
        "──────   ───────────────────────────   ──────────────────────────   ────────────",
        "whole    ≥ 9.0e5   ≥ 9.0e4   = 4.0e0   = 9.0e1  = 9.0e0*  = 8.0e0   = ×0.10",
        "──────   ───────────────────────────   ──────────────────────────   ────────────",
        "median                                                              ≤ ×0.36*",
        "",
        "         forecast, T = 100",
        "block         raw       adam      ln‡",
        "──────   ────────────────────────────",
        "0        = 2.5e-1  = 5.0e-1*  = 9.0e0",
        "norm     = 1.2e-1  = 1.2e-1         –",
        "──────   ────────────────────────────",
        "whole    ~  1.0e0  ~  4.0e0   ~ 9.0e0",
        "",
    ]


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize(("blocks", "variants"), [(5, 3), (50, 10), (1, 2), (60, 3)])
def test_every_pair_is_shown_once_a_quantity_and_no_line_runs_over(blocks, variants, width):
    keys = TEN[:variants]
    run = large_run(blocks, keys)
    lines = table(run, width)
    assert max(map(cell_len, lines)) <= width
    others = len([key for key in keys if key == "ln"])
    rows = [line for line in lines if line.startswith(("model", "m…", "…", "whole", "median"))]
    shown = sum(character in "=≥≤~?–" for line in rows for character in line)
    medians = (variants - 1 - others) * (blocks > 1)
    later = [t for t in split_titles(lines) if not t.startswith("ratio") and "(1/" not in t]
    assert shown == (blocks + 1) * (4 * variants - 1 - others + len(later)) + medians


@pytest.mark.parametrize("width", [80, 100, 160])
def test_what_stands_below_the_tables_fits_too(width):
    text = summary_table(large_run(9, TEN), width=width)
    assert max(map(cell_len, text.splitlines())) <= width


def test_a_wide_terminal_has_all_in_one_table_and_a_narrow_one_has_more():
    def panels(width):
        return sum(line.startswith("block") for line in table(large_run(5, TEN[:3]), width))

    assert [panels(width) for width in (200, 100, 60)] == [1, 2, 4]


def split_titles(lines):
    """The titles of the parts of groups."""
    found = [re.findall(r"\S[^()]*?\(\d+/\d+\)", line) for line in lines]
    return [title.strip() for titles in found for title in titles]


def test_a_group_that_is_too_wide_is_split_and_says_so():
    titles = split_titles(table(large_run(3, TEN), 80))
    assert [t for t in titles if t.startswith("κ (")] == ["κ (1/3)", "κ (2/3)", "κ (3/3)"]


def heads(lines):
    """The variants over each table, by its title."""
    at = [i for i, line in enumerate(lines) if line.startswith("block")]
    return [(lines[i - 1].strip() or lines[i - 2].strip(), lines[i].split()[1:]) for i in at]


def test_every_part_of_a_split_group_has_raw_to_compare_with_but_ratios_do_not():
    keys = ("raw", *(f"variant-{k}" for k in range(12)))
    found = heads(table(large_run(3, keys), 80))
    for title, names in found:
        assert names.count("raw") == (not title.startswith("ratio"))
    for quantity, whose in (("κ (", keys), ("forecast", keys), ("ratio", keys[1:])):
        parts = [names for title, names in found if title.startswith(quantity)]
        assert len(parts) > 1
        named = [n for k, part in enumerate(parts) for n in part if not (k and n == "raw")]
        assert named == [*whose]


def test_raw_is_not_repeated_where_there_is_no_room_for_two_columns():
    run = compared({"0": {key: result(9.0, 1.0) for key in ("raw", "a", "b")}})
    for width, expected in ((24, [["raw", "a"], ["raw", "b"]]), (23, [["raw"], ["a"], ["b"]])):
        lines = table(run, width)
        assert max(map(cell_len, lines[: lines.index("")])) <= width
        assert [names for title, names in heads(lines) if title.startswith("κ (")] == expected


def test_without_numbers_of_raw_its_column_is_not_repeated():
    keys = ("raw", *(f"variant-{k}" for k in range(12)))
    blocks = {name: {key: result(9.0, 1.0) for key in keys} for name in "ab"}
    for row in blocks.values():
        row["raw"] = skipped("not begun")
    lines = table(compared(blocks), 80)
    every = [name for title, names in heads(lines) if title.startswith("κ (") for name in names]
    assert every == [*keys[1:]]


def test_the_best_of_a_row_is_starred_where_its_interval_separates_it():
    assert cells(small(), "κ", "0") == ["= 1.00e+07*", "= 2.00e+07!", "= 3.00e+00"]
    assert cells(small(), "κ at the median λ", "norm") == ["≥ 4.00e+02", "= 1.00e+02*", "–"]
    assert cells(small(), "forecast, T = 100", "0") == ["= 2.50e-01", "= 5.00e-01*", "= 9.00e+00"]


def test_ties_bounds_estimates_and_other_functions_are_never_starred():
    assert cells(small(), "κ", "norm") == ["= 4.00e+00", "= 4.00e+00", "–"]
    assert cells(small(), "κ", "whole")[:2] == ["≥ 9.00e+05", "≥ 9.00e+04"]
    assert cells(small(), "forecast, T = 100", "whole")[:2] == ["~ 1.00e+00", "~ 4.00e+00"]
    assert "ln‡" in "".join(table(small()))
    assert not any(line.endswith("*") for line in (cells(small(), "κ", "0")[2],))


def test_what_does_not_exist_takes_no_part_and_what_is_unresolved_keeps_the_star_away():
    def row(third):
        found = {"raw": result(4.0), "adam": result(2.0), "bnp": result(third)}
        return cells(compared({"0": found}), "κ at the median λ", "0")

    assert row(Quantity.absent()) == ["= 4.00e+00", "= 2.00e+00*", "–"]
    assert row(Quantity.unresolved()) == ["= 4.00e+00", "= 2.00e+00", "?"]


def test_the_ratio_is_to_raw_and_ends_with_its_median_over_blocks():
    assert cells(small(), "ratio to raw", "0") == ["= ×0.500"]
    assert cells(small(), "ratio to raw", "norm") == ["≤ ×0.251"]
    assert cells(small(), "ratio to raw", "whole") == ["= ×0.100"]
    assert cells(small(), "ratio to raw", "median") == ["≤ ×0.354*"]


def test_the_median_of_half_of_the_blocks_neither_wins_nor_keeps_the_star_away():
    blocks = {name: {"raw": result(8.0), "all": result(4.0)} for name in "ab"}
    blocks["a"]["half"], blocks["b"]["half"] = result(1.0), skipped("not the first layer")
    assert cells(compared(blocks), "ratio to raw", "median") == ["= ×0.500*", "= ×0.125"]


def test_without_whole_the_forecast_ends_with_its_sum():
    blocks = {
        "0": {"raw": result(9.0, 1.0), "a": result(3.0, 3.0)},
        "2": {"raw": result(9.0, 2.0), "a": skipped("no")},
    }
    assert cells(compared(blocks), "forecast, T = 100", "sum") == ["= 3.00e+00", "= 5.00e+00*"]


def test_a_variant_without_numbers_has_no_column_and_its_reason_stands_below():
    reason = "the checkpoint's SGD keeps no second moments"
    blocks = {name: {"raw": result(), "optimizer": skipped(reason)} for name in ("0", "2")}
    blocks["0"]["bnp"], blocks["2"]["bnp"] = result(), skipped("it has no inputs")
    text = summary_table(compared(blocks), width=100)
    assert "optimizer" not in "".join(table(compared(blocks)))
    assert f"- optimizer skipped on all blocks: {reason}\n" in text
    assert "- bnp skipped on 2: it has no inputs\n" in text


def test_a_block_that_raw_skips_for_the_same_reason_has_no_row():
    frozen = {key: skipped("it is frozen") for key in ("raw", "bnp")}
    run = compared({"0": {"raw": result(), "bnp": result()}, "1": frozen})
    assert not any(line.startswith("1") for line in table(run))
    assert summary_table(run).count("it is frozen") == 1


def test_another_function_shows_its_own_loss():
    text = " ".join(summary_table(small(), width=100).split())
    assert "‡ another function, never ranked, with a loss of its own: ln 0.5 (raw 0.0017)" in text


def test_the_comparison_explains_its_marks_and_repeats_none_of_the_first_legend():
    text = summary_table(small(), width=160)
    for part in ("* certainly the best of its row", "~ estimate", "= exact", "≥ lower bound"):
        assert text.count(part) == 1
    assert "median: over blocks" in text
    assert "sum: over blocks" not in text


def test_everything_that_is_bold_is_starred_too():
    run = large_run(6, TEN)
    lines, marks = variant_lines(beside(run), 100)
    bold = [
        line.plain[span.start : span.end].strip()
        for line in lines
        for span in line.spans
        if span.style == "bold"
    ]
    assert bold
    assert all(text.endswith("*") for text in bold)
    assert len(bold) == sum(mark.tail.endswith("*") for mark in marks)


def test_names_of_others_are_not_obeyed():
    evil = "[bold]x[/bold]\x1b[31m\n"
    run = compared({evil: {"raw": result(), "bnp": skipped(evil)}, "z": {"raw": result(),
        "bnp": result(symmetries=[evil])}})  # fmt: skip
    for variant in (None, "bnp"):
        text = summary_table(run, variant=variant)
        assert "\x1b" not in text
        assert text.count("[bold]x[/bold]") >= 1


def test_one_variant_has_no_comparison():
    run = compared({"0": {"raw": result()}, "2": {"raw": result()}})
    assert "Verdict" not in summary_table(run)
    assert "ratio to raw" not in summary_table(run)


def test_an_asked_variant_has_the_table_alone():
    for variant in ("raw", "adam"):
        text = summary_table(small(), variant=variant)
        assert "Verdict" not in text
        assert "ratio to raw" not in text
