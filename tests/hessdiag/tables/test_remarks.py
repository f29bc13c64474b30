"""What stands below the tables: origins, reasons, symmetries, each once."""

from compared_runs import compared, result, skipped
from hessdiag.quantity import Quantity
from hessdiag.tables import summary_table


def remarks(run, **options):
    """Each remark as one line."""
    text = summary_table(run, width=100, **options)
    below = text[text.rindex("\n\n- ") + 2 :].replace("\n  ", " ")
    return [line.removeprefix("- ") for line in below.splitlines()]


def of(variant="adam", **blocks):
    return compared({name: {"raw": result(), variant: found} for name, found in blocks.items()})


def test_where_coordinates_come_from_is_said_once_for_all_variants_that_share_it():
    state = {"source": "state", "optimizer_class": "torch.optim.AdamW"}
    run = compared(
        {
            "0": {
                "raw": result(),
                "optimizer": result(**state, zero_state=1500),
                "bnp": result(source="activations"),
                "bnp-s": result(source="activations"),
            },
            "2": {"raw": result(), "optimizer": result(**state, zero_state=1)},
        }
    )
    assert remarks(run)[:2] == [
        "optimizer: from the stored state (torch.optim.AdamW); v = 0 for 1,501 parameters",
        "bnp, bnp-s: from the activations",
    ]


def test_whole_counts_its_zero_states_for_all():
    found = {"source": "minibatches", "optimizer_class": "Adam"}
    run = of(a=result(**found, zero_state=3), whole=result(**found, zero_state=4))
    line = "coordinates from gradients of mini-batches (Adam); v = 0 for 4 parameters"
    assert line in remarks(run, variant="adam")


def test_a_variant_says_what_its_coordinates_do():
    run = of(
        "kfac",
        a=result(
            off_diagonality={"before": 0.9312, "after": 0.25},
            diagonal_gap=Quantity.exact(1.5),
            same_function=False,
            loss=0.125,
        ),
        b=result(off_diagonality={"before": 0.5, "after": 0.125}),
    )
    found = remarks(run, variant="kfac")
    assert found[:3] == [
        "off-diagonal share of ‖H‖_F, before and after the rotation: a 0.931 → 0.25, b 0.5 → 0.125",
        "another diagonal could lower κ further, at most by: a = ×1.50",
        "another function than the original's, with a loss of its own: 0.125",
    ]
    assert not any("off-diagonal" in line for line in remarks(run))


def test_the_symmetries_of_raw_are_named_once_with_their_layers():
    run = compared(
        {
            "1": {"raw": result(symmetries=["ReLU rescaling: 1 – 2"]), "adam": result()},
            "2": {
                "raw": result(symmetries=["ReLU rescaling: 1 – 2", "softmax shift"]),
                "adam": result(symmetries=["softmax shift"]),
            },
            "whole": {"raw": result(symmetries=["softmax shift", "dead: 3 rows"])},
        }
    )
    assert (
        remarks(run)[0]
        == "symmetries: ReLU rescaling: 1 – 2 (1, 2); softmax shift (2); dead: 3 rows (whole)"
    )


def test_reasons_are_said_once_with_the_variants_and_blocks_they_are_about():
    frozen = skipped("the layer is shared")
    run = compared(
        {
            "0": {"raw": result(), "bnp": frozen, "bnp-s": frozen, "adam": result()},
            "2": {"raw": result(), "bnp": result(), "bnp-s": result()},
            "raw": {
                "raw": skipped("not begun"),
                "bnp": result(),
                "bnp-s": result(),
                "adam": result(),
            },
            "3": {key: skipped("it is frozen") for key in ("raw", "bnp", "bnp-s", "adam")},
        }
    )
    assert remarks(run)[:2] == [
        "bnp, bnp-s skipped on 0: the layer is shared",
        "adam: no result on 2",
    ]
    assert "not begun" not in " ".join(remarks(run))  # raw's own table says so
    assert "it is frozen" not in " ".join(remarks(run))


def test_many_reasons_and_symmetries_are_cut_with_a_pointer():
    blocks = {
        str(i): {"raw": result(symmetries=[f"s{i}"]), "bnp": skipped(f"reason {i}")}
        for i in range(12)
    }
    blocks["0"]["bnp"] = result()
    found = remarks(compared(blocks))
    assert found[0].endswith("s5 (5); 6 more symmetries: hessdiag show RUN --json")
    assert found[1:10] == [
        *(f"bnp skipped on {i}: reason {i}" for i in range(1, 9)),
        "3 more reasons: hessdiag show RUN --json",
    ]


LONG = "the network raises " + "x" * 3000
CUT = "thenetworkraises" + "x" * 220 + "…"


def squeezed(run, variant=None):
    """The text without its line breaks and spaces."""
    return "".join(summary_table(run, variant=variant).split())


def test_a_long_reason_is_cut_in_print_and_kept_in_the_document():
    run = of("bn", a=result(), b=skipped(LONG))
    assert f"-bnskippedonb:{CUT}" in squeezed(run)
    assert f"skipped:{CUT}" in squeezed(run, "bn")
    assert "x" * 221 not in squeezed(run) + squeezed(run, "bn")
    assert LONG in run.to_json()


def test_reasons_that_are_cut_to_the_same_words_are_said_once():
    run = of("bn", a=result(), b=skipped(LONG + "1"), c=skipped(LONG + "2"))
    assert squeezed(run).count(CUT) == 1
    assert f"-bnskippedonb,c:{CUT}" in squeezed(run)


def test_a_long_note_is_cut_and_one_of_240_characters_is_not():
    text = squeezed(of(a=result(notes=[LONG, "y" * 240, "z" * 241])), "adam")
    assert f"-a:{CUT}" in text
    assert f"-a:{'y' * 240}-" in text
    assert f"-a:{'z' * 239}…" in text
