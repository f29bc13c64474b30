from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from hessdiag.blocks import find_blocks
from hessdiag.errors import InputError, OptionError


class Model(nn.Module):
    """Nested layers, a root parameter, tied, frozen and half-frozen ones."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.enc = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.dec = nn.Linear(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.enc[0].weight
        self.norm = nn.LayerNorm(2).requires_grad_(False)
        self.dec.bias.requires_grad_(False)


def names(blocks):
    return [block.name for block in blocks]


def by_name(*specification, model=None):
    return {block.name: block for block in find_blocks(model or Model(), specification)}


def test_layers_come_in_the_order_of_the_network_with_the_whole_last():
    blocks = find_blocks(Model(), ("layer",))
    assert names(blocks) == ["scale", "enc.0", "enc.1", "dec", "head", "norm", "whole"]


def test_a_layer_holds_its_own_trainable_parameters():
    blocks = by_name("layer")
    assert blocks["enc.0"].parameters == ("enc.0.weight", "enc.0.bias")
    assert blocks["enc.0"].size == 16
    assert blocks["dec"].parameters == ("dec.weight",)
    assert blocks["dec"].size == 12
    assert blocks["scale"].parameters == ("scale",)


def test_a_layer_of_frozen_or_tied_parameters_is_a_row_with_the_reason():
    blocks = by_name("layer")
    assert "frozen" in blocks["norm"].skipped
    assert "tied" in blocks["head"].skipped
    assert "enc.0.weight" in blocks["head"].skipped
    for name in ("norm", "head"):
        assert blocks[name].parameters == ()
        assert blocks[name].size == 0


def test_the_whole_counts_every_trainable_parameter_once():
    whole = by_name("whole")["whole"]
    assert whole.parameters == (
        "scale", "enc.0.weight", "enc.0.bias", "enc.1.weight", "enc.1.bias", "dec.weight",
    )  # fmt: skip
    assert whole.size == 3 + 12 + 4 + 4 + 4 + 12


def test_parameter_blocks_are_named_by_their_parameters():
    blocks = find_blocks(Model(), ("parameter",))
    assert names(blocks)[:3] == ["scale", "enc.0.weight", "enc.0.bias"]
    assert "head.weight" not in names(blocks)
    assert "whole" not in names(blocks)
    assert {b.name for b in blocks if b.skipped} == {"dec.bias", "norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("specification", "found"),
    [
        (("enc*",), ["enc.0", "enc.1"]),
        (("dec", "enc.0"), ["dec", "enc.0"]),
        (("*.0", "whole"), ["enc.0", "whole"]),
        (("whole", "dec"), ["dec", "whole"]),
        (("enc.[01]",), ["enc.0", "enc.1"]),
        (("enc.0", "enc*"), ["enc.0", "enc.1"]),
        (("layer", "whole"), ["scale", "enc.0", "enc.1", "dec", "head", "norm", "whole"]),
        (("biases=*bias",), ["biases"]),
    ],
)
def test_globs_choose_layers(specification, found):
    assert names(find_blocks(Model(), specification)) == found


def test_a_named_glob_merges_all_parameters_that_match_in_network_order():
    block = by_name("mixed=*weight")["mixed"]
    assert block.parameters == ("enc.0.weight", "enc.1.weight", "dec.weight")
    assert block.size == 12 + 4 + 12


def test_an_alias_stands_for_the_first_name():
    assert by_name("tied=head*")["tied"].parameters == ("enc.0.weight",)


def test_a_named_glob_of_frozen_parameters_is_skipped():
    assert "frozen" in by_name("still=norm*")["still"].skipped


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        (("enk.0",), "no layer matches 'enk.0' \\(did you mean 'enc.0'\\?\\)"),
        (("zzz*",), "no layer matches 'zzz\\*'; layers: scale, enc.0"),
        (("a=zzz*",), "no parameter matches 'zzz\\*'"),
        (("a=dec.weigth",), "did you mean 'dec.weight'"),
        (("a=enc*", "a=dec*"), "two blocks are named 'a'"),
        (("dec", "dec=enc*"), "two blocks are named 'dec'"),
        (("whole=*",), "does not name a block"),
        (("=enc*",), "does not name a block"),
        (("a=",), "does not name a block"),
    ],
)
def test_what_cannot_be_found_is_refused_with_a_hint(specification, message):
    with pytest.raises(OptionError, match=message):
        find_blocks(Model(), specification)


def test_a_long_list_of_layers_is_cut_in_the_message():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(30)))
    with pytest.raises(OptionError, match="\\(30 in all\\)"):
        find_blocks(model, ("zzz",))


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(InputError, match="no trainable parameter"):
        find_blocks(nn.Linear(2, 2).requires_grad_(False), ("layer",))


def test_parametrizations_belong_to_their_layer():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    blocks = by_name("layer", model=model)
    assert list(blocks) == ["0", "1", "whole"]
    assert blocks["0"].size == 2 + 2 + 6
    alone = by_name("layer", model=parametrizations.weight_norm(nn.Linear(3, 2)))
    assert {name: block.size for name, block in alone.items()} == {
        "bias": 2,
        "weight": 8,
        "whole": 10,
    }


def test_compiled_layers_have_the_names_of_the_plain_network():
    body = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    compiled = nn.Sequential(torch.compile(body, backend="eager"), nn.Linear(2, 2))
    plain = nn.Sequential(body, compiled[1])
    assert find_blocks(compiled, ("layer",)) == find_blocks(plain, ("layer",))


def test_a_module_used_twice_is_one_layer_and_a_row_that_says_so():
    shared = nn.Linear(2, 2)
    blocks = by_name("layer", model=nn.ModuleList([shared, shared]))
    assert blocks["0"].size == blocks["whole"].size == 6
    assert "tied" in blocks["1"].skipped


def test_a_parameter_without_values_is_a_row_with_the_reason():
    model = nn.Module()
    model.empty, model.full = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2))
    blocks = by_name("layer", model=model)
    assert "no values" in blocks["empty"].skipped
    assert blocks["whole"].size == 2


def test_a_model_whose_parameters_hold_no_value_is_refused():
    model = nn.Module()
    model.empty = nn.Parameter(torch.empty(0))
    with pytest.raises(InputError, match="no trainable parameter of the model holds a value"):
        find_blocks(model, ("layer",))


@pytest.mark.parametrize("name", ["half\ud800", "null\0"])
def test_a_name_that_no_file_can_hold_is_refused_before_the_work(name):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(2, 1))
    with pytest.raises(InputError, match="rename the module"):
        find_blocks(model, ("layer",))
