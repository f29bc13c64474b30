"""The table over training steps: whatever there is, every number is printed once and fits."""

import dataclasses
import re

import pytest
from rich.cells import cell_len

from compared_runs import compared
from compared_runs import result as pair
from hessdiag.quantity import Quantity
from hessdiag.run import QUANTILES, BlockResult, VariantResult
from hessdiag.tables.steps import headline, steps_table
from sample_runs import run, skipped_values, values


def result(median=None, **known):
    if median is not None:
        known["kappa_quantile"] = dict.fromkeys(QUANTILES, median)
    return VariantResult(values(4, **known))


def made(step, blocks, checkpoint=None):
    rows = tuple(
        BlockResult(name, (f"{name}.weight",), {"raw": found}) for name, found in blocks.items()
    )
    return run(rows, step=step, checkpoint=checkpoint or f"step-{step}.pt")


def grid(steps, blocks, long=False):
    """Runs whose κ at the median of block b at step s is s + b / 1000, told by its digits."""
    names = [f"encoder.layers.{b}.attention.out_proj" if long else f"b{b}" for b in range(blocks)]
    runs = []
    for s in range(1, steps + 1):
        found = {
            name: result(Quantity.lower_bound(float(f"{s}.{b:02d}e5")))
            for b, name in enumerate(names)
        }
        runs.append(made(s * 100, found))
    return runs


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize(("steps", "blocks"), [(2, 2), (2, 60), (9, 2), (9, 60), (5, 13)])
def test_every_number_is_printed_once_and_no_line_runs_over(steps, blocks, width, long):
    text = steps_table(grid(steps, blocks, long), width=width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text or long
    found = re.findall(r"≥ (\d\.\d\de\+05)", text)
    wanted = [f"{s}.{b:02d}e+05" for s in range(1, steps + 1) for b in range(blocks)]
    assert sorted(found) == sorted(wanted)


def test_fifty_checkpoints_of_sixty_blocks_fit_too():
    runs = grid(9, 60)[:1] * 50
    text = steps_table(runs, width=100)
    assert max(map(cell_len, text.splitlines())) <= 100
    assert len(re.findall(r"≥ \d\.\d\de\+05", text)) == 50 * 60


def test_rows_are_steps_where_that_reads_best_and_blocks_where_it_does_not():
    down = steps_table(grid(9, 2)).splitlines()
    assert down[2].split() == ["step", "loss", "b0", "b1"]
    assert [line.split()[0] for line in down[4:13]] == [str(100 * s) for s in range(1, 10)]
    across = steps_table(grid(2, 30)).splitlines()
    assert across[2].split() == ["block", "100", "200"]
    assert [line.split()[0] for line in across[4:7]] == ["loss", "b0", "b1"]


def test_columns_are_loss_and_the_top_of_whole_then_blocks_with_whole_last():
    found = {
        "whole": result(lambda_max=Quantity.exact(8.0), loss=0.25),
        "0": result(loss=0.25),
        "2": result(loss=0.25),
    }
    lines = steps_table([made(1000, found)] + [made(s, found) for s in range(20, 30)]).splitlines()
    assert lines[0].startswith("demo:mlp · 11 checkpoints · hessian · κ at the median λ")
    assert re.split(r"\s{2,}", lines[2].strip()) == [
        "step",
        "loss",
        "λ_max of whole",
        "0",
        "2",
        "whole",
    ]
    assert re.split(r"\s{2,}", lines[4].strip())[:3] == ["1,000", "0.25", "= 8.00e+00"]


def test_runs_keep_the_order_given_and_names_stand_in_where_steps_are_not_known_or_equal():
    found = {"0": result()}
    text = steps_table([made(300, found), made(100, found), made(200, found)])
    assert re.findall(r"\d00", text.splitlines()[2]) == ["300", "100", "200"]
    for runs in ([made(5, found), made(5, found)], [made(5, found), made(None, found, "last.pt")]):
        text = steps_table(runs)
        assert all(run.provenance.config["checkpoint"] in text for run in runs)


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        (result(Quantity.exact(20.0)), "= 2.00e+01"),
        (result(Quantity.unresolved(), kappa=Quantity.lower_bound(50.0)), "≥ 5.00e+01*"),
        (result(Quantity.unresolved(), kappa=Quantity.unresolved()), "?"),
        (result(Quantity.zero()), "0"),
        (VariantResult(skipped_values("failed: out of memory")), "–"),
        (None, "–"),
    ],
)
def test_the_headline_is_kappa_at_the_median_else_kappa_with_a_mark(row, shown):
    assert str(headline(row)) == shown


def test_the_legend_says_what_the_marks_mean():
    unresolved = result(Quantity.unresolved(), kappa=Quantity.lower_bound(50.0))
    failed = VariantResult(skipped_values("failed: device lost"))
    text = steps_table([made(1, {"0": unresolved, "1": failed})])
    assert "* κ = λ_max / smallest λ > 0" in text
    assert "≥ lower bound" in text
    assert "some blocks failed" in " ".join(text.split())
    plain = steps_table([made(1, {"0": result(Quantity.exact(2.0))})])
    assert not {"*", "≥", "failed"} & set(plain.split())


def test_a_block_that_one_run_lacks_is_a_dash():
    lines = steps_table(
        [made(s, {"0": result()}) for s in range(1, 9)] + [made(9, {"1": result()})]
    )
    last = next(line for line in lines.splitlines() if line.strip().startswith("9 "))
    assert re.split(r"\s{2,}", last.strip())[-2] == "–"


def test_names_that_differ_in_the_middle_are_told_apart_over_their_columns():
    names = [f"encoder.{a}.attention.{b}.linear" for a in (3, 4) for b in (5, 6)]
    runs = [made(step, {name: result() for name in names}) for step in range(1, 31)]
    headers = [line for line in steps_table(runs).splitlines() if line.strip().startswith("step")]
    shown = [cell for line in headers for cell in line.split()[1:] if cell != "loss"]
    assert len(shown) == len(set(shown)) == 4


def both(step, raw, adam):
    blocks = {"0": {"raw": raw, "adam": adam}}
    return dataclasses.replace(compared(blocks), provenance=made(step, {}).provenance)


def test_with_several_variants_each_step_says_which_helps_most():
    gain = {"gain": 1.0}
    more = {"gain": 2.0}
    runs = [
        both(1, pair(4.0, **gain), pair(2.0, **more)),
        both(2, pair(4.0, **more), pair(8.0, **gain)),
        both(3, pair(4.0, **gain), pair(2.0, gain=Quantity.estimate(3.0))),
        both(4, pair(4.0, **gain), pair(Quantity.exact(3.0, 2.0, 5.0), **more)),
        both(5, pair(4.0, **gain), pair(Quantity.unresolved(), **more)),
        *(made(step, {"0": result(loss=0.0017)}) for step in range(6, 20)),
    ]
    lines = steps_table(runs, width=100).splitlines()
    assert re.split(r"\s{2,}", lines[2].strip()) == [
        "step",
        "loss",
        "best by forecast",
        "best by κ",
        "0",
    ]
    told = [re.split(r"\s{2,}", line.strip())[2:4] for line in lines[4:10]]
    assert told == [
        ["adam", "adam"],
        ["none", "none"],
        ["~ adam", "adam"],
        ["adam", "≈ adam"],
        ["adam", "?"],
        ["–", "–"],
    ]
    legend = " ".join(lines[24:])
    assert "≈ not separated from another" in legend
    assert "~ estimate" in legend
    assert "best by" not in steps_table(runs, variant="adam")
    assert "best by" not in steps_table([made(1, {"0": result()})])
