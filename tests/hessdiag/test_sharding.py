"""Which blocks are whose: every block once, the dear ones first, and all processes agree."""

from __future__ import annotations

import pytest
from torch import nn

from hessdiag.activations import find_layers
from hessdiag.blocks import Block, find_blocks
from hessdiag.errors import OptionError
from hessdiag.options import Options, make_options
from hessdiag.shard import Shard, parse_shard
from hessdiag.sharding import block_cost, share_of

RAW = ("raw",)


def blocks(*sizes, skipped=()):
    return [
        Block(str(k), (f"{k}.weight",), size, "frozen" if k in skipped else None)
        for k, size in enumerate(sizes)
    ]


def dealt(found, count, *, rows=10, total=1000, **options):
    """The names in each shard."""
    shares = [
        share_of(
            found,
            Options(shard=f"{k}/{count}", **{"variants": RAW} | options),
            "cpu",
            rows=rows,
            total=total,
        )
        for k in range(1, count + 1)
    ]
    return [[block.name for block in share.blocks] for share in shares]


@pytest.mark.parametrize("text", ["1/1", "2/8", "8/8", "100000/999999"])
def test_a_shard_is_written_as_it_is_read(text):
    assert str(parse_shard(text)) == text
    assert make_options(shard=f" {text} ").shard == text


@pytest.mark.parametrize(
    "text", ["0/8", "9/8", "2", "2/0", "2/", "/2", "-1/2", "1.0/2", "a/b", "1/2/3", "", "٢/٨", 2]
)
def test_what_is_no_shard_is_refused_with_an_example(text):
    with pytest.raises(OptionError, match=r"it must be I/N.* such as 2/8"):
        make_options(shard=text)


def test_leading_zeros_of_an_array_job_name_the_same_shard():
    assert make_options(shard="02/08").shard == "2/8"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("limit", [0, 50, 4096])
def test_every_block_is_in_one_shard_and_keeps_its_order(count, limit):
    sizes = (3, 70, 900, 40, 41, 8, 300, 2, 5000)
    parts = dealt(blocks(*sizes), count, exact_limit=limit)
    assert sorted(name for part in parts for name in part) == [str(k) for k in range(len(sizes))]
    assert all(part == sorted(part) for part in parts)


def test_equal_blocks_are_dealt_evenly():
    assert [len(part) for part in dealt(blocks(*[7] * 12), 4)] == [3, 3, 3, 3]


def test_one_dear_block_is_alone_and_the_others_share_the_rest():
    assert dealt(blocks(5, 5, 500, 5, 5), 3) == [["2"], ["0", "3"], ["1", "4"]]


def test_the_longest_shard_is_at_most_four_thirds_of_the_best():
    """Graham's worst case over three: 11 where 9 is possible. Products cost all, solves nothing."""
    sizes = (5, 5, 4, 4, 3, 3, 3)
    parts = dealt(blocks(*sizes), 3, rows=10**9)
    loads = [sum(sizes[int(name)] for name in part) for part in parts]
    assert sorted(loads) == [8, 8, 11]


def test_blocks_that_cost_nothing_leave_an_empty_shard_empty():
    assert dealt(blocks(4, 0, 0, skipped=(1, 2)), 3) == [["0", "1", "2"], [], []]


def test_without_a_shard_all_is_ones_own():
    found = blocks(4, 5)
    share = share_of(found, Options(variants=RAW), "cpu", rows=1, total=9)
    assert share.blocks == tuple(found)
    assert share.leads


def test_an_exact_block_costs_its_products_and_a_dense_solve_per_variant():
    options = Options(variants=("raw", "adam", "bn", "bn+adam"))
    (block,) = blocks(30)
    # Two networks are assembled by 30 products of 12·10·1000 operations; four views are solved.
    cost = block_cost(block, options, limit=30, rows=10, total=1000)
    assert cost == 2 * 30 * 120_000 + 4 * 25 * 30**3


def test_a_larger_block_costs_its_products_and_its_basis_per_variant():
    options = Options(variants=("raw", "adam"), steps=15, probes=6)
    (block,) = blocks(300)
    cost = block_cost(block, options, limit=299, rows=10, total=1000)
    assert cost == 2 * ((15 + 20 + 6) * 120_000 + 4 * 300 * 15**2)
    power = Options(variants=("raw", "adam"), steps=15, probes=6, eigensolver="power")
    assert block_cost(block, power, limit=299, rows=10, total=1000) == 2 * 41 * 120_000


def shares(model, specification, count, **options):
    found = find_blocks(model, specification)
    asked = [Options(shard=f"{k}/{count}", variants=RAW, **options) for k in range(1, count + 1)]
    return [share_of(found, given, "cpu", rows=4, total=9) for given in asked]


@pytest.mark.parametrize(
    "specification", [("layer",), ("parameter",), ("whole",), ("0", "a=0.*", "b=2.*")]
)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_layer_is_explained_by_one_shard_whatever_the_blocks_are(specification, count):
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 2))
    layers = find_layers(model)
    assert len(layers) == 3
    for layer in layers.values():
        found = [share.explains(layer) for share in shares(model, specification, count)]
        assert found.count(True) == 1


def test_a_layer_is_explained_where_its_block_is():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 2))
    layers = find_layers(model)
    for share in shares(model, ("layer",), 4):
        own = {name for name, layer in layers.items() if share.explains(layer)}
        assert own == {block.name for block in share.blocks} - {"whole"}


@pytest.mark.parametrize(("limit", "position"), [(0, 0), (541, 1), (572, 0)])
def test_the_shard_of_whole_leads_and_else_the_first(limit, position):
    """Of 540 and 572 parameters: a layer that is assembled costs more than 80 products of whole."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 60))
    parts = shares(model, ("1", "whole"), 3, exact_limit=limit)
    names = [[block.name for block in share.blocks] for share in parts]
    assert names[position] == ["whole"]
    assert [share.leads for share in parts] == ["whole" in own for own in names]
    assert [share.leads for share in shares(model, ("parameter",), 3)] == [True, False, False]


def test_a_sentence_says_how_much_of_the_analysis_a_shard_is():
    assert "shard 2/8 holds 3 of 20 blocks" in Shard(2, 8).sentence(3, 20)
    assert "shard 8/8 holds none of the 3 blocks" in Shard(8, 8).sentence(0, 3)
