"""Shards and variants back to one run; what does not belong together is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import sample_runs
from hessdiag.errors import StoreError
from hessdiag.finished import is_complete
from hessdiag.merging import check_place, merge_runs, merged
from hessdiag.merging.sources import Source
from hessdiag.options import Options
from hessdiag.quantity import Quantity
from hessdiag.run import VariantResult
from hessdiag.store import read_run, validate_run, write_run
from hessdiag.store.identity import differing
from hessdiag.tables import summary_table
from sharded_runs import complete_run, departures, parts_of, write_parts

TOLD = frozenset({"warnings"})
TWO = [["whole"], ["0", "2"]]


@pytest.fixture(scope="module")
def whole():
    """Three blocks, two variants, H_e and cosines; seconds by row, a warning."""
    return complete_run(sample_runs.full_run())


def edited(source, kind, **values):
    """``source`` with other entries in a part of its provenance."""
    told = source.run.provenance
    told = replace(told, **{kind: getattr(told, kind) | values})
    return Source(source.path, replace(source.run, provenance=told))


def with_row(source, block, variant, /, **values):
    """``source`` with other values in one row."""
    blocks = tuple(
        replace(
            b,
            variants={
                v: VariantResult({**r.values, **values}, r.spectrum, r.rows)
                if (b.name, v) == (block, variant)
                else r
                for v, r in b.variants.items()
            },
        )
        for b in source.run.blocks
    )
    return Source(source.path, replace(source.run, blocks=blocks))


def apart(*variants):
    """A run of all blocks per list of variants, with the same raw rows."""
    return [
        Source(Path(f"variants-{position}.h5"), complete_run(sample_runs.full_run(names)))
        for position, names in enumerate(variants)
    ]


@pytest.mark.parametrize(
    "parts",
    [
        [["0", "2", "whole"]],
        [["whole"], ["0", "2"]],
        [["2", "whole"], ["0"]],
        [["2"], ["whole"], ["0"]],
        [["whole"], ["0"], [], ["2"], []],
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_the_shards_of_a_run_are_that_run(whole, parts, backwards):
    sources = parts_of(whole, parts)
    run = merged(sources[::-1] if backwards else sources)
    assert departures(whole, run, 0.0, TOLD) == []
    assert run.provenance.fingerprint == whole.provenance.fingerprint
    assert run.provenance.environment["engine"] == whole.provenance.environment["engine"]
    assert run.provenance.environment["seconds"] == whole.provenance.environment["seconds"]
    assert run.provenance.config["shard"] is None


def test_files_of_shards_are_valid_and_so_is_what_they_make_up(whole, tmp_path):
    paths = write_parts(whole, tmp_path, [["0"], ["2", "whole"], []])
    for path in paths:
        assert validate_run(path) == []
    merge_runs(paths).save(tmp_path / "run.h5")
    assert validate_run(tmp_path / "run.h5") == []
    assert departures(whole, read_run(tmp_path / "run.h5"), 0.0, TOLD) == []


def test_every_shard_stays_known_with_its_machine_and_a_warning_stands_once(whole):
    run = merged(parts_of(whole, TWO)[::-1])
    assert run.provenance.warnings == ["demo text, not your data", "of shard 1", "of shard 2"]
    origins = run.provenance.environment["shards"]
    assert [(o["file"], o["shard"], o["threads"], o["blocks"]) for o in origins] == [
        ("run.shard-1-of-2.h5", "1/2", 1, ["whole"]),
        ("run.shard-2-of-2.h5", "2/2", 2, ["0", "2"]),
    ]


def test_layers_stand_in_their_order_whichever_shard_explained_them(whole):
    first, second = parts_of(whole, TWO)
    near, far = whole.hidden["raw"]
    assert near.index < far.index
    sources = [
        Source(source.path, replace(source.run, hidden={"raw": (found,)}))
        for source, found in ((first, far), (second, near))
    ]
    assert merged(sources).hidden["raw"] == (near, far)


def test_a_shard_without_any_row_says_so_and_one_with_some_says_how_many(whole):
    sources = parts_of(whole, [*TWO, []])
    table = summary_table(sources[2].run)
    assert "shard 3/3 holds none of the 3 blocks" in table
    assert "no parameter" not in table
    assert sources[2].run.to_dict()["shard"] == "3/3"
    table = summary_table(sources[1].run)
    assert "· shard 2/3" in table.splitlines()[0]
    assert "shard 2/3 holds 2 of 3 blocks; `hessdiag merge` joins the shards" in table
    run = merged(sources)
    assert "shard" not in summary_table(run).replace("of shard", "")
    assert "shard" not in run.to_dict()


def test_failed_rows_stay_failed_and_what_is_complete_is_complete(whole):
    first, second = parts_of(whole, TWO)
    assert is_complete(merged([first, second]), Options())
    failed = ["2 [bnp]", "H_e of the network"]
    run = merged([first, edited(second, "environment", failed=failed)])
    assert run.provenance.environment["failed"] == failed
    assert not is_complete(run, Options())


def test_what_memory_did_not_allow_in_a_shard_is_told_of_the_run(whole):
    first, second = parts_of(whole, TWO)
    memory = {"2": ["power iteration"]}
    run = merged([first, edited(second, "fingerprint", memory=memory)])
    assert run.provenance.fingerprint["memory"] == memory


def test_a_network_that_memory_did_not_allow_is_tried_again_with_another_budget():
    first, second = parts_of(complete_run(sample_runs.full_run(("raw", "bn"))), TWO)
    limited = edited(second, "environment", limited=["bn"])
    run = merged([first, edited(limited, "config", memory_budget=7)])
    assert run.provenance.environment["limited"] == ["bn"]
    assert is_complete(run, Options(memory_budget=7))
    assert not is_complete(run, Options(memory_budget=8))


def test_a_network_that_memory_allowed_in_another_run_is_not_limited():
    short, long = apart(("raw", "bn"), ("raw", "bn", "bnp"))
    run = merged([edited(short, "environment", limited=["bn"]), long])
    assert run.provenance.environment["limited"] == []


def test_a_row_cut_short_is_done_again_by_whoever_allows_more_than_the_least_limit(whole):
    sources = parts_of(whole, [["whole"], ["0"], ["2"]])
    limits = (30.0, 20.0, None)
    run = merged([edited(s, "config", max_seconds=t) for s, t in zip(sources, limits, strict=True)])
    assert run.provenance.config["max_seconds"] == 20.0


@pytest.mark.parametrize("field", ["weights", "data", "dtype", "curvature", "exact_limit"])
def test_a_shard_of_another_analysis_is_refused_by_the_field(whole, field):
    first, second = parts_of(whole, TWO)
    with pytest.raises(StoreError, match=rf"2-of-2.h5 is not of the analysis of .*: {field} diff"):
        merged([first, edited(second, "fingerprint", **{field: "another"})])


@pytest.mark.parametrize("position", [0, 1])
def test_a_field_that_one_shard_lacks_differs(whole, position):
    sources = parts_of(whole, TWO)
    sources[position] = edited(sources[position], "fingerprint", newcomer=1)
    with pytest.raises(StoreError, match="newcomer differs"):
        merged(sources)


def test_a_loss_that_another_machine_summed_in_another_order_is_the_same(whole):
    first, second = parts_of(complete_run(whole, loss=0.25), TWO)
    near = edited(second, "fingerprint", loss=0.25 * (1 + 1e-13))
    assert merged([first, near]).provenance.fingerprint["loss"] == 0.25
    with pytest.raises(StoreError, match="loss differs"):
        merged([first, edited(second, "fingerprint", loss=0.25 * (1 + 1e-9))])


def test_seeds_are_refused_with_the_command_that_compares_them(whole):
    first, second = parts_of(whole, TWO)
    with pytest.raises(StoreError, match=r"seed differs; .*estimate of their own.*hessdiag diff"):
        merged([first, edited(second, "fingerprint", seed=1)])


def test_releases_are_not_mixed(whole):
    first, second = parts_of(whole, TWO)
    other = Source(second.path, replace(second.run, hessdiag_version="0.0.9"))
    with pytest.raises(StoreError, match="hessdiag_version differs"):
        merged([first, other])


def test_missing_shards_are_named_with_the_command_that_makes_one(whole):
    config = {"steps": 9, "density": True, "iterates": "it/*.pt", "memory_budget": 5, "max": 1}
    sources = parts_of(whole, [["whole"], ["0"], ["2"], []])
    first, second, third, fourth = [edited(source, "config", **config) for source in sources]
    with pytest.raises(StoreError) as refused:
        merged([first, third])
    assert str(refused.value) == (
        "the shards 2/4, 4/4 are missing; make each like the first: `hessdiag analyze model.pt "
        "--variants raw,bnp --steps 9 --density --iterates 'it/*.pt' --shard 2/4`, "
        "with the checkpoint and the task of the others"
    )
    with pytest.raises(StoreError, match=r"the shard 3/4 is missing; make it by .* --shard 3/4`"):
        merged([first, second, fourth])


def test_of_many_missing_shards_the_first_are_named(whole):
    sources = parts_of(whole, [["whole"], ["0", "2"], *([[]] * 18)])
    with pytest.raises(StoreError, match=r"shards 2/20, .* 9/20, … \(19 in all\) are missing"):
        merged(sources[:1])


def test_a_shard_that_is_there_twice_is_refused(whole, tmp_path):
    first, second = parts_of(whole, TWO)
    copy = Source(Path("copy.h5"), first.run)
    with pytest.raises(StoreError, match=r"shard 1/2 is there twice, .*1-of-2.h5 and .*copy.h5"):
        merged([first, second, copy])
    with pytest.raises(StoreError, match=r"model.h5 is named twice"):
        merge_runs([tmp_path / "model.h5", tmp_path / "a" / ".." / "model.h5"])


def test_two_ways_to_split_an_analysis_are_not_mixed(whole):
    first, _ = parts_of(whole, TWO)
    with pytest.raises(StoreError, match=r"is shard 1/2, .* is shard 1/3: two ways to split"):
        merged([first, *parts_of(whole, [["whole"], ["0"], ["2"]])])


def test_a_run_of_all_blocks_is_not_merged_with_its_shards(whole):
    every = Source(Path("all.h5"), whole)
    for order in ([every, *parts_of(whole, TWO)], [*parts_of(whole, TWO), every]):
        with pytest.raises(StoreError, match=r"all.h5 holds all blocks, and .*1-of-2.h5"):
            merged(order)
    with pytest.raises(StoreError, match="holds all blocks already; there is nothing to merge"):
        merged([every])


@pytest.mark.parametrize(
    ("parts", "told"),
    [([["whole"], ["0"]], "no shard has '2'"), ([["whole", "0"], ["0", "2"]], "in two of them")],
)
def test_shards_that_do_not_make_up_the_analysis_are_refused(whole, parts, told):
    with pytest.raises(StoreError, match=told):
        merged(parts_of(whole, parts))


def test_no_run_a_missing_one_and_a_damaged_one_are_refused_by_name(whole, tmp_path):
    paths = write_parts(whole, tmp_path, TWO)
    (tmp_path / "model.pt").write_bytes(b"weights")
    with pytest.raises(StoreError, match=r"model.pt is not a run file"):
        merge_runs([tmp_path / "model.pt", paths[0]])
    with pytest.raises(StoreError, match=r"absent.h5 does not exist"):
        merge_runs([tmp_path / "absent.h5", paths[0]])
    content = bytearray(paths[1].read_bytes())
    content[len(content) // 2] ^= 1
    paths[1].write_bytes(content)
    with pytest.raises(StoreError, match=r"2-of-2.h5 is not a hessdiag run, or it is damaged"):
        merge_runs(paths[::-1])


def test_runs_of_other_variants_become_one_table():
    run = merged(apart(("raw", "bnp"), ("raw", "adam"), ("raw", "jacobi", "adam")))
    wanted = complete_run(sample_runs.full_run(("raw", "bnp", "adam", "jacobi")))
    assert run.variants == wanted.variants
    assert departures(wanted, run, 0.0, frozenset()) == []
    assert differing(run.provenance.fingerprint, wanted.provenance.fingerprint) == []


def test_shards_of_other_variants_become_one_table():
    first = parts_of(complete_run(sample_runs.full_run(("raw", "bnp"))), TWO)
    second = complete_run(sample_runs.full_run(("raw", "adam")))
    others = parts_of(second, [["2"], ["0"], ["whole"]], "second")
    run = merged([first[1], *others, first[0]])
    wanted = complete_run(sample_runs.full_run(("raw", "bnp", "adam")))
    assert departures(wanted, run, 0.0, TOLD) == []
    assert len(run.provenance.environment["shards"]) == 5


def test_a_merged_run_can_be_merged_and_keeps_its_origins():
    first = parts_of(complete_run(sample_runs.full_run(("raw", "bnp"))), TWO)
    again = merged([Source(Path("merged.h5"), merged(first)), *apart(("raw", "adam"))])
    assert [origin["file"] for origin in again.provenance.environment["shards"]] == [
        "run.shard-1-of-2.h5",
        "run.shard-2-of-2.h5",
        "variants-0.h5",
    ]


def test_the_order_of_the_batches_is_known_where_a_variant_replays_gradients():
    plain, adam, adamax = apart(("raw", "bnp"), ("raw", "adam"), ("raw", "adamax"))
    adam = edited(adam, "fingerprint", batches="ab")
    same = edited(adamax, "fingerprint", batches="ab")
    assert merged([plain, adam, same]).provenance.fingerprint["batches"] == "ab"
    other = edited(adamax, "fingerprint", batches="cd")
    with pytest.raises(StoreError, match="batches differs"):
        merged([adam, other])
    with pytest.raises(StoreError, match="batches differs"):
        merged([plain, adam, other])


@pytest.mark.parametrize("name", ["lambda_max", "lambda_min", "frobenius", "trace"])
def test_rows_that_two_runs_hold_must_agree(name):
    first, second = apart(("raw", "bnp"), ("raw", "adam"))
    value = second.run["2"].variants["raw"][name].value
    near = with_row(second, "2", "raw", **{name: Quantity.exact(value * (1 + 1e-11))})
    assert merged([first, near])["2"].variants["raw"][name].value == value
    far = with_row(second, "2", "raw", **{name: Quantity.exact(value * (1 + 1e-6))})
    with pytest.raises(StoreError, match=r"2 is not the same in .*0.h5 and .*1.h5.*side by side"):
        merged([first, far])


def test_a_small_eigenvalue_agrees_by_the_norm_of_its_matrix():
    first, second = apart(("raw", "bnp"), ("raw", "adam"))
    ours = with_row(first, "2", "raw", lambda_min=Quantity.exact(1e-14))
    merged([ours, with_row(second, "2", "raw", lambda_min=Quantity.exact(3e-14))])
    with pytest.raises(StoreError, match="is not the same"):
        merged([ours, with_row(second, "2", "raw", lambda_min=Quantity.exact(1e-4))])


def test_a_row_that_is_unresolved_in_one_run_only_does_not_agree():
    first, second = apart(("raw", "bnp"), ("raw", "adam"))
    with pytest.raises(StoreError, match="2 is not the same"):
        merged([first, with_row(second, "2", "raw", trace=Quantity.unresolved())])


def test_a_row_that_is_skipped_in_one_run_only_does_not_agree():
    first, second = apart(("raw", "bnp"), ("raw", "adam"))
    skipped = sample_runs.skipped_values("it does not apply", 6)
    with pytest.raises(StoreError, match="2 is not the same"):
        merged([first, with_row(second, "2", "raw", **skipped)])
    both = [with_row(source, "2", "raw", **skipped) for source in (first, second)]
    assert merged(both)["2"].variants["raw"]["skipped"] == "it does not apply"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_row_that_failed_in_one_run_is_taken_from_the_other(failing):
    sources = apart(("raw", "bnp"), ("raw", "adam"))
    raised = sample_runs.skipped_values("it raised", 6)
    bad = with_row(sources[failing], "2", "raw", **raised)
    sources[failing] = edited(bad, "environment", failed=["2", "cosines"])
    run = merged(sources)
    assert run["2"].variants["raw"]["skipped"] is None
    assert run.provenance.environment["failed"] == ["cosines"]


def test_a_row_that_failed_in_both_runs_stays_failed():
    raised = sample_runs.skipped_values("it raised", 6)
    sources = [
        edited(with_row(source, "2", "raw", **raised), "environment", failed=["2"])
        for source in apart(("raw", "bnp"), ("raw", "adam"))
    ]
    run = merged(sources)
    assert run["2"].variants["raw"]["skipped"] == "it raised"
    assert run.provenance.environment["failed"] == ["2"]


def test_the_output_is_looked_at_before_any_work(whole, tmp_path):
    paths = [tmp_path / "a.h5", tmp_path / "b.h5"]
    with pytest.raises(StoreError, match="is one of the runs to merge"):
        check_place(paths[0], paths, force=True)
    write_run(whole, tmp_path / "run.h5")
    with pytest.raises(StoreError, match=r"run.h5 exists; replace it with --force"):
        check_place(tmp_path / "run.h5", paths, force=False)
    check_place(tmp_path / "run.h5", paths, force=True)
    folder = tmp_path / "other.h5.parts"
    folder.mkdir()
    (folder / "header").write_bytes(b"anything")
    with pytest.raises(StoreError, match=r"other.h5.parts holds an unfinished analysis"):
        check_place(tmp_path / "other.h5", paths, force=True)
    check_place(tmp_path / "new.h5", paths, force=False)
