"""Two runs matched: every quantity of the schema once, settings that differ, blocks in one only."""

import dataclasses
import json

import pytest

from hessdiag.comparison import difference, ratio
from hessdiag.diff import SIGNED, compare
from hessdiag.quantity import Quantity
from hessdiag.run import BlockResult, VariantResult
from hessdiag.store.schema import AXES, SUMMARY
from sample_runs import rich_run, run, skipped_values, small_run, values


def one_block(name="0", **known):
    return run(
        (BlockResult(name, (f"{name}.weight",), {"raw": VariantResult(values(4, **known))}),)
    )


def with_fingerprint(made, **fields):
    provenance = dataclasses.replace(
        made.provenance, fingerprint=made.provenance.fingerprint | fields
    )
    return dataclasses.replace(made, provenance=provenance)


def leaf(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def test_the_document_holds_every_field_of_the_schema_with_both_values():
    first, second = small_run(), one_block(lambda_max=Quantity.exact(10.0), loss=0.5)
    found = json.loads(compare(first, second).to_json(), parse_constant=pytest.fail)
    assert (found["format"], found["version"]) == ("hessdiag-diff", "1.0.0")
    assert [block["name"] for block in found["blocks"]] == ["0", "2", "whole"]
    tree = found["blocks"][0]["variants"]["raw"]
    ours, theirs = (made.to_dict()["blocks"][0]["variants"]["raw"] for made in (first, second))
    for field in SUMMARY:
        for key in (None,) if field.axis is None else AXES[field.axis]:
            path = [key if part == "*" else part for part in field.path]
            told = leaf(tree, path)
            assert (told["first"], told["second"]) == (leaf(ours, path), leaf(theirs, path))
            expected = {"first", "second"}
            assert set(told) == expected | (
                {"ratio", "difference"} if field.kind == "quantity" else set()
            )
    assert tree["lambda_max"]["ratio"]["value"] == 2.5
    assert tree["lambda_max"]["difference"]["value"] == 6.0
    assert tree["loss"] == {"first": 0.0017, "second": 0.5}
    assert tree["kappa_damped"] == dict.fromkeys(("first", "second", "ratio", "difference"))


def test_counts_have_a_difference_in_whole_numbers_and_no_ratio():
    made = compare(one_block(), one_block(n_negative=Quantity.exact(3.0))).to_dict()
    told = made["blocks"][0]["variants"]["raw"]["n_negative"]
    assert told["ratio"] is None
    assert told["difference"] == {
        "value": 2,
        "low": 2,
        "high": 2,
        "status": "exact",
        "confidence": 1.0,
    }
    assert all(isinstance(told["difference"][key], int) for key in ("value", "low", "high"))


@pytest.mark.parametrize("name", ["lambda_max", "lambda_min", "trace"])
def test_what_may_be_negative_has_a_ratio_only_where_both_are_certainly_positive(name):
    sides = [one_block(**{name: Quantity.exact(value)}) for value in (2.0, 4.0, -1.0)]
    both = compare(sides[0], sides[1]).pairs[0].quantity(name)
    assert both.ratio.value == 2.0
    mixed = compare(sides[0], sides[2]).pairs[0].quantity(name)
    assert mixed.ratio.status is None
    assert mixed.difference.value == -3.0


def test_quantities_carry_the_certificates_of_the_arithmetic():
    first, second = rich_run(), rich_run()
    for pair in compare(first, second).pairs:
        for found in pair.quantities():
            assert found.difference == difference(found.first, found.second)
            if found.field.integer:
                assert found.ratio is None
            else:
                sign = found.field.name not in SIGNED
                assert found.ratio == ratio(found.first, found.second, nonnegative=sign)


def test_blocks_and_variants_in_one_run_only_are_listed_with_an_empty_side():
    first, second = one_block("left"), rich_run()
    pairs = {(p.block, p.variant): p for p in compare(first, second).pairs}
    assert pairs["left", "raw"].second is None
    assert pairs["frozen", "raw"].first is None
    assert not pairs["left", "raw"].solved
    assert list(pairs["left", "raw"].quantities()) == []
    with pytest.raises(KeyError, match="left under raw is in one run only"):
        pairs["left", "raw"].quantity("kappa")
    blocks = compare(first, second).to_dict()["blocks"]
    kappa = {b["name"]: b["variants"]["raw"]["kappa"] for b in blocks}
    assert kappa["left"]["second"] is kappa["left"]["ratio"] is kappa["left"]["difference"] is None
    assert kappa["left"]["first"]["value"] == 4.0
    assert kappa["frozen"]["first"] is None


def test_a_skipped_side_is_not_solved():
    first = one_block()
    block = BlockResult("0", ("0.weight",), {"raw": VariantResult(skipped_values("frozen"))})
    assert not compare(first, run((block,))).pairs[0].solved
    assert compare(first, first).pairs[0].solved


def test_settings_that_differ_are_named_but_not_what_is_compared():
    first = with_fingerprint(one_block(), data="aa", weights="x", loss=1.0, optimizer=None)
    second = with_fingerprint(
        one_block(), data="bb", weights="y", loss=2.0, optimizer="z", exact_limit=9, new=1
    )
    assert compare(first, first).settings == {}
    assert compare(first, second).settings == {
        "data": ("aa", "bb"),
        "exact_limit": (4096, 9),
        "new": (None, 1),
    }
    assert compare(first, second).to_dict()["settings"]["data"] == {"first": "aa", "second": "bb"}


def test_the_signed_names_are_fields_of_the_schema():
    assert {field.name for field in SUMMARY if field.kind == "quantity"} >= SIGNED
