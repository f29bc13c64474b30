from __future__ import annotations

import inspect
import math

import pytest

from hessdiag.errors import InputError, OptionError
from hessdiag.options import Options, make_options, parse_size


def test_the_defaults_are_the_contracts():
    options = make_options()
    assert options == Options()
    assert (options.variants, options.blocks) == (None, ("layer",))
    assert (options.curvature, options.dtype, options.engine) == ("hessian", "float64", "auto")
    assert (options.steps, options.seed, options.exact_limit) == (40, 0, None)


def test_the_names_are_the_command_lines_with_underscores():
    assert list(inspect.signature(Options).parameters) == [
        "variants", "blocks", "curvature", "exact_limit", "steps", "probes", "density",
        "tolerance", "eigensolver", "max_seconds", "device", "dtype", "seed", "batch_size",
        "max_examples", "weight_decay", "damping", "engine", "memory_budget", "iterates",
        "reference", "shard",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("layer", ("layer",)),
        (" a* , whole,", ("a*", "whole")),
        (["a*", "n=b*"], ("a*", "n=b*")),
        (("x",), ("x",)),
    ],
)
def test_blocks_are_text_or_a_list(given, found):
    assert make_options(blocks=given).blocks == found


@pytest.mark.parametrize("given", ["raw", "raw,raw", ["raw"], ("raw",)])
def test_raw_is_always_there_once(given):
    assert make_options(variants=given).variants == ("raw",)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("512", 512), ("1K", 1024), ("512M", 2**29), ("8G", 2**33), ("8GiB", 2**33),
        ("1.5gb", 3 * 2**29), (" 2 T ", 2**41), ("7B", 7), (4096, 4096), (1e9, 10**9),
    ],
)  # fmt: skip
def test_sizes_are_powers_of_1024(text, size):
    assert parse_size(text) == size
    assert make_options(memory_budget=text).memory_budget == size


@pytest.mark.parametrize("value", ["", "lots", "8X", "-1", -1, "1.2.3G", math.nan, math.inf, True])
def test_what_is_no_size_is_refused(value):
    with pytest.raises(OptionError, match="is no size; write it like 512M or 8G"):
        make_options(memory_budget=value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 3}, "no option 'step' \\(did you mean 'steps'\\?\\)"),
        ({"variants": "jacobbi"}, "unknown variant 'jacobbi' \\(did you mean 'jacobi'"),
        ({"variants": "rawr"}, "did you mean 'raw'"),
        ({"variants": ""}, "variants is empty"),
        ({"blocks": [" "]}, "blocks is empty"),
        ({"blocks": None}, "it must be text or a list of text"),
        ({"variants": [1, 2]}, "it must be text or a list of text"),
        ({"curvature": "fisher"}, "must be one of hessian, ggn"),
        ({"dtype": "float16"}, "must be one of float64, float32"),
        ({"engine": "fast"}, "must be one of auto, kept, linearized"),
        ({"device": "mps"}, "must be auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:x"}, "must be auto, cpu, cuda or cuda:N"),
        ({"exact_limit": -1}, "exact_limit is -1"),
        ({"exact_limit": True}, "exact_limit is True"),
        ({"steps": 0}, "steps is 0; it must be a whole number >= 1"),
        ({"steps": None}, "steps is None"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_examples": "9"}, "max_examples is '9'"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"weight_decay": "x"}, "weight_decay is 'x'; it must be a number"),
        ({"weight_decay": math.nan}, "finite number >= 0"),
        ({"damping": math.inf}, "finite number >= 0"),
        ({"damping": False}, "damping is False"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(given, message):
    with pytest.raises(OptionError, match=message):
        make_options(**given)


def test_an_option_error_is_an_input_error_and_a_value_error():
    assert issubclass(OptionError, InputError)
    assert issubclass(OptionError, ValueError)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices_are_accepted_before_they_are_looked_for(device):
    assert make_options(device=device).device == device


def test_zero_means_never_exact_and_none_the_default():
    assert make_options(exact_limit=0).exact_limit == 0
    assert make_options(damping=None, batch_size=None).damping is None
