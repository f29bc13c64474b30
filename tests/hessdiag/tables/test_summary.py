import re

import pytest
from rich.cells import cell_len

from hessdiag.plain import printable
from hessdiag.quantity import Quantity
from hessdiag.run import BlockResult, VariantResult
from hessdiag.tables import summary_table, worst_block
from hessdiag.tables.labels import shortened


@pytest.fixture(scope="module")
def many(runs):
    """Thirty layers, every status, a skipped one, and ``whole``."""
    blocks = [
        block(runs, f"model.layers.{i}.self_attn.q_proj", size=10_000 + i, kappa=quantity)
        for i, quantity in enumerate([*runs.EVERY_STATUS.values()] * 3)
    ]
    blocks.append(BlockResult("lm_head", (), {"raw": VariantResult(runs.skipped_values("tied"))}))
    return runs.run((*blocks, block(runs, "whole", size=270_000)))


def block(runs, name, **known):
    return BlockResult(name, (), {"raw": VariantResult(runs.values(**known))})


def table(runs, *blocks, **options):
    return summary_table(runs.run(blocks), **options)


def line_of(text, name):
    return next(line for line in text.splitlines() if line.startswith(name))


def test_the_table_of_a_small_run(runs):
    run = runs.run(
        (
            block(runs, "0", size=2080, inactive=96, kappa=Quantity.exact(8.31e7)),
            block(runs, "2", size=330, kappa=Quantity.lower_bound(1.7e12), ambiguous=True),
            BlockResult("drop", (), {"raw": VariantResult(runs.skipped_values("it is frozen"))}),
            block(runs, "whole", size=2410, n_negative=Quantity.exact(12)),
        )
    )
    assert summary_table(run, width=80) == (
        "demo:mlp · model.pt · hessian · float64 · cpu · loss 0.0017\n"
        "\n"
        "                in-                 κ at the              λ < 0  λ < 0\n"
        "block  size  active            κ    median λ       λ_max  count   mass\n"
        "──────────────────────────────────────────────────────────────────────\n"
        "0      2080      96  = 8.31e+07   = 2.00e+00  = 4.00e+00      1  12.5%\n"
        "2       330       0  ≥ 1.70e+12!  = 2.00e+00  = 4.00e+00      1  12.5%\n"
        "drop   skipped: it is frozen\n"
        "──────────────────────────────────────────────────────────────────────\n"
        "whole  2410       0  = 4.00e+00   = 2.00e+00  = 4.00e+00     12  12.5%\n"
        "\n"
        "The worst block is 0: κ at its median positive eigenvalue = 2.00e+00,\n"
        "κ = 8.31e+07.\n"
        "κ = λ_max / smallest λ > 0 · at the median λ: λ_max / median λ > 0 · inactive:\n"
        "zero rows of H · mass: share of Σ|λ| ·\n"
        "left out for width: λ_min, ‖g‖, forecast T = 100 · = exact · ≥ lower bound ·\n"
        "! eigenvalues at the zero tolerance: κ depends on it\n"
        "\n"
        "- Warning: demo text, not your data\n"
    )


@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_no_line_is_wider_than_asked(width, many):
    lines = summary_table(many, width=width).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert len([line for line in lines if line.startswith("m")]) == 27


@pytest.mark.parametrize("width", range(88, 160, 8))
def test_layers_stay_apart_when_their_names_are_cut(width, many):
    lines = summary_table(many, width=width).splitlines()
    labels = [line.split("  ")[0] for line in lines if line.startswith("m")]
    assert len(set(labels)) == 27


def test_a_wider_terminal_shows_more(runs):
    narrow, middle, wide = (table(runs, block(runs, "0"), width=w) for w in (70, 100, 160))
    assert "left out for width: λ_min," in narrow
    assert "left out for width: λ_min," not in middle
    assert "left out" not in wide
    assert "= 4.000e+00" in wide


def test_kinds_and_exponents_of_a_column_stand_below_each_other(many):
    lines = summary_table(many, width=140).splitlines()
    found = [re.search(r"[=≥≤~] +\d\.\d+(?=e\+)", line) for line in lines if line[:5] == "model"]
    exact, _, *others = found[:5]  # exact, interval, lower-bound, upper-bound, estimate
    assert len({match.end() for match in (exact, *others)}) == 1
    assert len({match.start() for match in (exact, *others)}) == 1


def test_a_zero_stands_at_the_right_edge_with_its_kind_at_the_left(runs):
    zero = block(runs, "flat", lambda_max=Quantity.exact(0.0))
    text = table(runs, zero, block(runs, "steep", lambda_max=Quantity.exact(38.12)), width=80)
    start = line_of(text, "steep").index("= 3.81e+01")
    assert line_of(text, "flat")[start : start + 10] == "=        0"


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ("exact", "= 2.50e+05"),
        ("interval", "[2.0e0, 4.0e0]"),
        ("lower-bound", "≥ 1.00e+11"),
        ("upper-bound", "≤ 7.50e+00"),
        ("estimate", "~ 1.25e+01"),
        ("unresolved", "?"),
        ("zero", "0"),
        ("absent", "–"),
    ],
)
def test_every_kappa_stands_with_its_kind_and_the_legend_explains_it(status, shown, runs):
    text = table(runs, block(runs, "first", kappa=runs.EVERY_STATUS[status]), width=100)
    assert re.split(r" {2,}", line_of(text, "first"))[2] == shown
    legend = text[text.index("κ = λ_max") :]
    assert f"{shown[0].replace('[', '[]')} " in legend


def test_the_worst_block_has_the_largest_kappa_at_the_median(runs):
    def result(median, kappa):
        quantiles = {"0.5": median, "0.9": Quantity.absent()}
        return VariantResult(runs.values(kappa=kappa, kappa_quantile=quantiles))

    results = {
        "a": result(Quantity.exact(10.0), Quantity.exact(1e9)),
        "b": result(Quantity.exact(20.0), Quantity.exact(30.0)),
        "whole": result(Quantity.exact(1e5), Quantity.exact(1e6)),
    }
    assert worst_block(results) == "b"
    bound = result(Quantity.unresolved(), Quantity.interval(50.0, 25.0, 90.0, 0.999))
    assert worst_block(results | {"c": bound}) == "c"
    weak = result(Quantity.unresolved(), Quantity.interval(50.0, 15.0, 90.0, 0.999))
    assert worst_block(results | {"c": weak}) == "b"
    assert worst_block({"whole": results["whole"]}) == "whole"
    zero = result(Quantity.zero(), Quantity.zero())
    assert worst_block({"zero": zero}) is None


def test_blocks_with_bounds_only_may_be_worse_and_the_sentence_says_so(runs):
    bound = {"kappa": Quantity.lower_bound(1.5), "kappa_quantile": Quantity.unresolved()}
    unclear = {**bound, "kappa_quantile": dict.fromkeys(("0.5", "0.9"), Quantity.unresolved())}
    text = table(runs, block(runs, "a"), block(runs, "b", **unclear))
    assert "The worst block is a:" in text
    assert "b: known by bounds only, and may be worse." in " ".join(text.split())


def test_the_sentence_names_the_worst_block_in_full(runs):
    name = "model.encoder.layers.26.self_attn.out_proj.weight"
    high = {"0.5": Quantity.exact(5e6), "0.9": Quantity.exact(2e7)}
    text = table(runs, block(runs, "a"), block(runs, name, kappa_quantile=high), width=80)
    assert f"The worst block is {name}:" in text
    assert "5.00e+06" in text


def test_no_condition_number_at_all_is_said(runs):
    zero = {
        "kappa": Quantity.zero(),
        "kappa_quantile": dict.fromkeys(("0.5", "0.9"), Quantity.zero()),
    }
    assert "No block has a condition number" in table(runs, block(runs, "a", **zero))
    assert "There is no block" in table(runs)


def test_only_skipped_blocks_still_make_a_table(runs):
    skipped = BlockResult("a", (), {"raw": VariantResult(runs.skipped_values("it is frozen"))})
    assert "a      skipped: it is frozen" in table(runs, skipped)


def test_a_missing_variant_says_so(runs):
    text = summary_table(runs.rich_run(), variant="bn+adam", width=100)
    assert "skipped: no result under bn+adam" in text
    assert "variant bn+adam" in text


def test_a_long_reason_wraps_below_itself(runs):
    skipped = BlockResult("a", (), {"raw": VariantResult(runs.skipped_values("word " * 40))})
    lines = table(runs, block(runs, "b"), skipped, width=80).splitlines()
    first = next(i for i, line in enumerate(lines) if "skipped:" in line)
    assert lines[first + 1].startswith(" " * lines[first].index("skipped") + "word")


def test_whole_stands_last_behind_a_rule(runs):
    lines = table(runs, block(runs, "whole"), block(runs, "z")).splitlines()
    position = next(i for i, line in enumerate(lines) if line.startswith("whole"))
    assert lines[position - 1].startswith("───")
    assert lines[position - 2].startswith("z")
    assert lines[position + 1] == ""


def test_names_are_never_obeyed(runs):
    names = ("[bold red]x[/bold red]", "tab\tline\nend", "\x1b[31mred", ":smiley:", "[/]")
    text = table(runs, *(block(runs, name, notes=[name]) for name in names), width=140)
    assert all(line.isprintable() for line in text.splitlines())
    for name in ("[bold red]x[/bold red]", r"tab\tline\nend", r"\x1b[31mred", ":smiley:", "[/]"):
        assert line_of(text, name)
        assert f": {name}" in text


def test_color_adds_nothing_but_color(many):
    plain = summary_table(many, width=120)
    colored = summary_table(many, width=120, color=True)
    assert "\x1b" not in plain
    assert "\x1b[" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == plain


def test_notes_are_told_once_with_their_blocks(runs):
    noted = [block(runs, f"b{i}", notes=["kinked", f"own {i}"]) for i in range(9)]
    text = table(runs, *noted, width=100)
    assert "- b0, b1, b2, b3 and 5 more: kinked" in text
    assert text.count("kinked") == 1
    assert "4 more notes: hessdiag show RUN --json" in text


def test_labels_fit_and_keep_both_ends():
    name = "encoder.layers.11.self_attn.out_proj"
    (label,) = shortened([name], 20)
    assert cell_len(label) == 20
    assert label[:5] == name[:5]
    assert label[-5:] == name[-5:]
    (wide,) = shortened(["模型" * 20], 11)
    assert cell_len(wide) <= 11
    assert printable("a\u202eb\x00") == r"a\u202eb\x00"


def test_the_unknown_title_is_left_out(runs):
    text = table(runs, block(runs, "a"))
    assert "None" not in text


def test_a_weight_decay_that_is_no_number_is_left_out_of_the_title(runs):
    blocks = (block(runs, "0"),)
    assert "weight decay 0.5" in summary_table(runs.run(blocks, weight_decay=0.5))
    assert "weight decay" not in summary_table(runs.run(blocks, weight_decay="much"))
