from __future__ import annotations

import pytest
import torch
from torch import nn

from hessdiag.names import clean_name, layer_of, named_parameters


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("_orig_mod.0.weight", "0.weight"),
        ("enc._orig_mod.0._orig_mod.weight", "enc.0.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("", ""),
    ],
)
def test_marks_of_compiled_modules_are_taken_out(name, clean):
    assert clean_name(name) == clean


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("fc.weight", "fc"),
        ("a.b.0.bias", "a.b.0"),
        ("scale", "scale"),
        ("fc.parametrizations.weight.original0", "fc"),
        ("a.b.parametrizations.weight.0.base", "a.b"),
        ("parametrizations.weight.original", "weight"),
    ],
)
def test_a_parameter_belongs_to_the_layer_that_it_makes(name, layer):
    assert layer_of(name) == layer


def test_names_are_those_of_the_network_without_wrappers():
    body = nn.Sequential(nn.Linear(2, 2))
    plain = nn.Sequential(body, nn.Linear(2, 1))
    compiled = nn.Sequential(torch.compile(body, backend="eager"), plain[1])
    assert [n for n, _ in named_parameters(compiled)] == [n for n, _ in plain.named_parameters()]


def test_aliases_recur_only_when_asked_for():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert [n for n, _ in named_parameters(model)] == ["0.weight", "0.bias", "1.bias"]
    every = [n for n, _ in named_parameters(model, aliases=True)]
    assert every == ["0.weight", "0.bias", "1.weight", "1.bias"]
