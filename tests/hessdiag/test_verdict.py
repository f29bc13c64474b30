"""Which variant helps most, on runs where that is known by construction."""

from dataclasses import replace

import pytest

from compared_runs import compared, result, skipped
from hessdiag.quantity import Quantity
from hessdiag.tables import summary_table
from hessdiag.tables.verdict import verdict_sentence
from hessdiag.verdict import kappa_ratio, verdict


def said(run):
    return verdict_sentence(verdict(run)).replace("\N{NO-BREAK SPACE}", " ")


def order(ranking):
    return [standing.variant for standing in ranking.ranked]


def test_the_two_measures_rank_and_disagree():
    run = compared(
        {
            "0": {"raw": result(100.0, 1.0), "adam": result(50.0, 9.0), "bnp": result(1.0, 2.0)},
            "2": {"raw": result(10.0, 1.0), "adam": result(20.0, 9.0), "bnp": result(1.0, 2.0)},
            "whole": {"raw": result(9.0, 1.5), "adam": result(9.0, 4.0), "bnp": result(9.0, 3.0)},
        }
    )
    found = verdict(run)
    assert order(found.forecast) == ["adam", "bnp", "raw"]
    assert order(found.kappa) == ["bnp", "raw", "adam"]
    amounts = {s.variant: s.amount.value for s in found.kappa.ranked}
    assert amounts == pytest.approx({"raw": 1.0, "adam": 1.0, "bnp": (0.01 * 0.1) ** 0.5})
    assert found.agree is False
    assert said(run) == (
        "Verdict: by forecast (T = 100, whole) adam helps most: = 4.00e+00, raw = 1.50e+00; "
        "by κ at the median λ (ratio to raw, median over 2 blocks) bnp helps most: ×0.0316; "
        "the two disagree."
    )


def test_the_two_measures_may_agree():
    run = compared({"whole": {"raw": result(9.0, 1.0), "bnp": result(3.0, 3.0)}})
    assert verdict(run).agree is True
    assert said(run).endswith("bnp helps most: ×0.333; the two agree.")


def test_without_whole_the_forecast_is_summed_over_blocks():
    run = compared(
        {
            "0": {"raw": result(2.0, 1.0), "a": result(2.0, 5.0), "b": result(2.0, 4.0)},
            "2": {"raw": result(2.0, 1.0), "a": result(2.0, 1.0), "b": result(2.0, 4.0)},
        }
    )
    found = verdict(run).forecast
    assert [(s.variant, s.amount.value) for s in found.ranked] == [("b", 8), ("a", 6), ("raw", 2)]
    assert "by forecast (T = 100, sum over 2 blocks) b helps most" in said(run)


def test_a_whole_that_raw_has_no_numbers_for_is_no_measure():
    blocks = {
        "0": {"raw": result(2.0, 1.0), "a": result(2.0, 5.0)},
        "whole": {"raw": skipped("not begun within --max-seconds 1"), "a": result(2.0, 0.5)},
    }
    assert not verdict(compared(blocks)).forecast.whole


def test_a_block_to_which_a_variant_does_not_apply_gains_what_it_gains_raw():
    blocks = {
        "0": {"raw": result(2.0, 1.0), "bnp": result(1.0, 5.0)},
        "norm": {"raw": result(2.0, 3.0), "bnp": skipped("a LayerNorm has no inputs")},
        "2": {"raw": result(2.0, 1.0), "bnp": result(1.0, 5.0)},
    }
    found = verdict(compared(blocks))
    assert {s.variant: s.amount.value for s in found.forecast.ranked} == {"raw": 5, "bnp": 13}
    assert "bnp helps most: ×0.500 on 2 of 3" in said(compared(blocks))


@pytest.mark.parametrize("reason", ["failed: out of memory", "not begun within --max-seconds 9"])
def test_a_block_that_failed_leaves_its_variant_out_of_the_sum(reason):
    blocks = {
        "0": {"raw": result(2.0, 1.0), "a": result(1.0, 5.0), "b": result(1.0, 2.0)},
        "2": {"raw": result(2.0, 3.0), "a": skipped(reason), "b": result(1.0, 3.0)},
    }
    assert order(verdict(compared(blocks)).forecast) == ["b", "raw"]


def test_a_variant_on_no_more_than_half_of_the_blocks_is_not_ranked_by_their_median():
    blocks = {name: {"raw": result(8.0), "all": result(4.0), "most": result(2.0)} for name in "ab"}
    blocks |= {name: {"raw": result(8.0), "all": result(4.0)} for name in "cd"}
    blocks["c"]["most"] = result(2.0)
    blocks["d"]["most"] = skipped("not here")
    for name in "abcd":
        blocks[name]["half"] = result(1.0) if name in "ab" else skipped("not the first layer")
    found = verdict(compared(blocks)).kappa
    assert order(found) == ["most", "all", "raw"]
    assert [s.variant for s in found.partial] == ["half"]
    assert "most helps most: ×0.250 on 3 of 4 (half: on no more than half" in said(compared(blocks))


def test_another_function_is_never_ranked():
    other = {"same_function": False, "loss": 9.0}
    run = compared(
        {
            "0": {
                "raw": result(9.0, 1.0),
                "ln": result(1.0, 99.0, **other),
                "bnp": result(8.0, 2.0),
            },
            "whole": {"raw": result(9.0, 1.0), "ln": result(1.0, 99.0), "bnp": result(8.0, 2.0)},
        }
    )
    found = verdict(run)
    assert order(found.forecast) == order(found.kappa) == ["bnp", "raw"]
    assert "ln" not in said(run)


def test_a_changed_network_of_the_same_function_is_ranked():
    run = compared({"0": {"raw": result(9.0, 1.0), "bn+adam": result(1.0, 2.0)}})
    assert "bn+adam helps most" in said(run)


def test_where_no_variant_helps_the_sentence_says_so():
    run = compared({"0": {"raw": result(9.0, 3.0), "a": result(12.0, 1.0), "b": result(18.0, 2.0)}})
    assert said(run) == (
        "Verdict: by forecast (T = 100, 1 block) no variant helps, raw gains most: = 3.00e+00; "
        "by κ at the median λ (ratio to raw, 1 block) no variant helps, a comes nearest: ×1.33; "
        "the two agree."
    )


def test_a_leader_whose_interval_touches_others_is_not_separated_from_them():
    near = Quantity.exact(2.9, 2.5, 3.1)
    best = Quantity.exact(3.0, 2.8, 3.2)
    run = compared({"0": {"raw": result(9.0, 1.0), "a": result(9.0, near), "b": result(9.0, best)}})
    assert verdict(run).forecast.level == ("a",)
    assert "b helps most: = 3e+00, raw = 1.00e+00 (not separated from a)" in said(run)


def test_two_leaders_that_the_intervals_do_not_part_may_still_agree():
    wide = Quantity.exact(3.0, 2.0, 4.0)
    run = compared({"0": {"raw": result(9.0, 1.0), "a": result(9.0, 2.9), "b": result(1.0, 2.0)}})
    assert verdict(run).agree is False
    run = compared({"0": {"raw": result(9.0, 1.0), "a": result(9.0, wide), "b": result(1.0, 2.9)}})
    assert verdict(run).agree is None
    assert "whether the two agree is open" in said(run)


def test_estimates_rank_and_are_called_estimates():
    raw, adam = Quantity.estimate(1.0), Quantity.estimate(3.0)
    bounds = {"a": Quantity.unresolved(), "b": Quantity.unresolved()}
    run = compared({"whole": {"raw": result(bounds["a"], raw), "adam": result(bounds["b"], adam)}})
    assert said(run) == (
        "Verdict: by forecast (T = 100, whole, an estimate) adam helps most: ~ 3.00e+00, "
        "raw ~ 1.00e+00; by κ at the median λ (ratio to raw, 1 block) nothing can be said "
        "(adam: not resolved)."
    )


def test_estimates_that_name_two_variants_disagree():
    def guess(number):
        return Quantity.estimate(number)

    run = compared({"0": {
        "raw": result(9.0, guess(1.0)), "a": result(1.0, guess(2.0)), "b": result(2.0, guess(3.0))
    }})  # fmt: skip
    assert verdict(run).agree is False


@pytest.mark.parametrize(
    ("raw", "variant", "status", "low", "high"),
    [
        (Quantity.lower_bound(50.0), Quantity.exact(5.0), "upper-bound", None, 0.1),
        (Quantity.exact(50.0), Quantity.lower_bound(5.0), "lower-bound", 0.1, None),
        (Quantity.upper_bound(50.0), Quantity.exact(5.0), "lower-bound", 0.1, None),
        (Quantity.lower_bound(50.0), Quantity.lower_bound(5.0), "unresolved", None, None),
        (Quantity.exact(50.0), Quantity.exact(5.0), "exact", 0.1, 0.1),
        (Quantity.exact(50.0), Quantity.zero(), "zero", None, None),
    ],
)
def test_the_ratio_of_bounds_is_a_bound_to_the_right_side(raw, variant, status, low, high):
    found = kappa_ratio(result(raw), result(variant))
    assert found.status == status
    assert found.low == pytest.approx(low)
    assert found.high == pytest.approx(high)


def test_a_ratio_that_is_bounded_from_above_is_ranked_by_its_bound_and_one_from_below_is_not():
    run = compared(
        {
            "0": {
                "raw": result(Quantity.lower_bound(100.0)),
                "bounded": result(Quantity.exact(12.49)),
                "unknown": result(Quantity.lower_bound(1.0)),
            }
        }
    )
    found = verdict(run).kappa
    assert order(found) == ["bounded", "raw"]
    assert [s.variant for s in found.unranked] == ["unknown"]
    assert "bounded helps most: ≤ ×0.125 (unknown: not resolved)" in said(run)


def test_one_variant_makes_no_verdict():
    alone = {"0": {"raw": result(), "optimizer": skipped("SGD keeps no second moments")}}
    for run in (compared({"0": {"raw": result()}}), compared(alone), compared({})):
        assert verdict(run).forecast is None
        assert verdict(run).kappa is None
        assert said(run) == ""


def test_a_zero_hessian_has_no_ratio_and_gains_nothing():
    zero = result(Quantity.zero(), Quantity.zero())
    run = compared({
        "0": {"raw": zero, "a": zero},
        "2": {"raw": result(9.0, 1.0), "a": result(3.0, 2.0)},
    })  # fmt: skip
    found = verdict(run)
    assert found.forecast.blocks == found.kappa.blocks == 1
    assert "a helps most: ×0.333" in said(run)


def test_a_variant_that_is_certainly_worse_by_a_bound_does_not_help():
    run = compared({"0": {"raw": result(2.0, 1.0), "a": result(Quantity.lower_bound(9.0), 1.0)}})
    assert verdict(run).kappa.leader.variant == "raw"
    assert "1 block) no variant helps; " in said(run)


def decayed(variants, trained="AdamW", decay=0.1):
    """A run in which each variant gains more than the one before it, and has a smaller κ."""
    found = {v: result(8.0 / 2**k, 1.0 + k) for k, v in enumerate(variants)}
    run = compared({"0": found, "whole": found})
    known = run.provenance
    return replace(
        run,
        provenance=replace(
            known,
            config=known.config | {"weight_decay": decay},
            environment=known.environment | {"optimizer": trained and {"class": trained}},
        ),
    )


def test_under_decoupled_decay_no_forecast_is_ranked_and_kappa_says_whose_units():
    run = decayed(["raw", "optimizer", "ruiz"])
    assert said(run) == (
        "Verdict: by forecast nothing is compared: each variant has its own penalty λ|z|²/2 "
        "(decoupled weight decay); by κ at the median λ (ratio to raw, 1 block, weight decay in "
        "each variant's own units) ruiz helps most: ×0.250."
    )
    assert verdict(run).forecast is None
    assert verdict(run).agree is None
    assert verdict(run).penalised == ("optimizer", "ruiz")


@pytest.mark.parametrize("trained", ["Adam", "SGD", None])
def test_under_coupled_decay_every_forecast_is_of_one_function(trained):
    run = decayed(["raw", "optimizer", "ruiz", "rmsprop"], trained)
    assert order(verdict(run).forecast) == ["rmsprop", "ruiz", "optimizer", "raw"]
    assert verdict(run).penalised == ()
    assert "own" not in said(run)


def test_without_decay_the_class_of_the_optimizer_does_not_matter():
    run = decayed(["raw", "adamw", "bn"], "AdamW", 0.0)
    assert order(verdict(run).forecast) == ["bn", "adamw", "raw"]


def test_a_named_optimizer_decays_as_its_name_says_whatever_the_checkpoint_was_trained_by():
    run = decayed(["raw", "adamw", "jacobi"], "Adam")
    assert verdict(run).penalised == ("adamw",)
    assert "(adamw: not compared, with its own weight penalty); by κ" in said(run)
    run = decayed(["raw", "adam", "jacobi", "adamw"], "AdamW")
    assert order(verdict(run).forecast) == ["adam", "raw"]
    assert said(run).startswith(
        "Verdict: by forecast (T = 100, whole) adam helps most: = 2.00e+00, raw = 1.00e+00 "
        "(jacobi and adamw: not compared, each with its own weight penalty); by κ"
    )
    assert order(verdict(run).kappa) == ["adamw", "jacobi", "adam", "raw"]


def test_a_changed_network_decays_its_own_parameters():
    run = decayed(["raw", "jacobi", "bn", "bn+adam"], "Adam")
    assert verdict(run).penalised == ("bn", "bn+adam")
    assert order(verdict(run).forecast) == ["jacobi", "raw"]
    alone = decayed(["raw", "bn"], "Adam")
    assert "by forecast nothing is compared: each network has its own penalty" in said(alone)


def test_a_forecast_of_its_own_penalty_is_neither_starred_nor_summed():
    def table(**options):
        run = decayed(["raw", "ruiz"], **options)
        run = replace(run, blocks=tuple(replace(run["0"], name=name) for name in "ab"))
        text = summary_table(run, width=160)
        return [line for line in text.splitlines() if line.startswith(("a ", "b ", "sum "))][2:]

    def forecasts(rows):
        return [row[row.rindex("= ") :].strip() for row in rows]

    assert forecasts(table(decay=0.0)) == ["= 2.00e+00*", "= 2.00e+00*", "= 4.00e+00*"]
    assert forecasts(table()) == ["= 2.00e+00", "= 2.00e+00"]
    assert all("= 4.00e+00*" in row for row in table())  # κ at the median
