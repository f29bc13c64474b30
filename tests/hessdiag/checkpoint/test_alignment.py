"""Prefixes come off where one alone makes the names fit, and nothing is guessed."""

import pytest

from hessdiag.checkpoint.alignment import align

MODEL = ["0.weight", "0.bias", "2.weight", "2.bias"]


def under(prefix: str) -> list[str]:
    return [prefix + name for name in MODEL]


@pytest.mark.parametrize(
    "prefix", ["model.", "net.", "lit.model.", "model._orig_mod.", "module.x."]
)
@pytest.mark.parametrize("embedded", [False, True])
def test_a_common_prefix_comes_off(prefix, embedded):
    found = align(under(prefix), MODEL, embedded=embedded)
    assert found.renamed == dict(zip(under(prefix), MODEL, strict=True))
    assert found.outside == found.rivals == ()
    assert found.removed


def test_the_notice_names_prefix_and_wrapper():
    assert align(under("_orig_mod.net."), MODEL).removed == ("'net.'", "'_orig_mod.'")


def test_names_outside_of_the_prefix_are_left_out_only_where_the_network_is_a_part():
    own = [*under("model."), "loss.weight", "metric.count"]
    found = align(own, MODEL, embedded=True)
    assert list(found.renamed) == under("model.")
    assert found.outside == ("loss.weight", "metric.count")
    assert align(own, MODEL).renamed == {name: name for name in own}


def test_two_parts_that_fit_equally_well_are_rivals_and_nothing_is_taken_off():
    own = [*under("student."), *under("teacher.")]
    found = align(own, MODEL, embedded=True)
    assert found.rivals == ("student.", "teacher.")
    assert found.renamed == {name: name for name in own}
    better = align(own[:-1], MODEL, embedded=True)
    assert better.removed == ("'student.'",)


def test_a_model_that_has_the_prefix_itself_keeps_it():
    own = [*under("model."), "loss.weight"]
    found = align(own, under("model."), embedded=True)
    assert found.renamed == {name: name for name in own}
    assert found.removed == ()


def test_a_prefix_that_fits_less_than_half_of_the_model_stays():
    own = ["encoder.0.weight", "encoder.9.weight"]
    assert align(own, MODEL, embedded=True).renamed == {name: name for name in own}


def test_a_common_prefix_is_not_swapped_for_another_one():
    own = under("backbone.")
    assert align(own, under("net.")).renamed == {name: name for name in own}


def test_a_base_prefix_that_the_file_lacks_is_added():
    model = ["transformer.wte.weight", "transformer.h.0.w", "lm_head.weight"]
    found = align(["wte.weight", "h.0.w"], model, base="transformer.")
    assert found.renamed == {"wte.weight": model[0], "h.0.w": model[1]}
    assert found.added == "transformer."
    whole = align(model, model, base="transformer.")
    assert (whole.added, whole.renamed) == ("", {name: name for name in model})


def test_a_prefix_comes_off_for_a_compiled_model_too():
    model = [f"_orig_mod.{name}" for name in MODEL]
    found = align(under("net."), model)
    assert found.renamed == dict(zip(under("net."), model, strict=True))
