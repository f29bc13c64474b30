import json
import os
import random

import numpy as np
import pytest

import sample_runs
from hessdiag.errors import StoreError, UnknownSchema
from hessdiag.run import BlockResult
from hessdiag.store.parts import Finished, read_block, read_part, write_block, write_part
from hessdiag.store.seal import seal

FINGERPRINT = {"seed": 0, "loss": 0.1 + 0.2, "blocks": ["layer"], "optimizer": None}


def pairs():
    for block in sample_runs.rich_run().blocks:
        for variant, result in block.variants.items():
            alone = BlockResult(block.name, block.parameters, {variant: result})
            yield Finished(alone, variant, "kept", 1 / 3, None)


def written(path):
    write_block(path, next(pairs()), FINGERPRINT)
    return path.read_bytes()


def test_every_value_comes_back_bit_for_bit(tmp_path):
    for done in pairs():
        write_block(tmp_path / "part", done, FINGERPRINT)
        back, fingerprint = read_block(tmp_path / "part")
        one, other = (sample_runs.run((d.block,), (d.variant,)) for d in (done, back))
        assert sample_runs.differences(one, other) == []
        assert (back.engine, back.seconds, back.max_seconds) == ("kept", 1 / 3, None)
        assert fingerprint == FINGERPRINT


def test_numpy_scalars_among_the_values_are_stored(tmp_path):
    fields = sample_runs.values(ambiguous=np.bool_(True), inactive=np.int64(3))
    block = BlockResult("0", (), {"raw": sample_runs.VariantResult(fields)})
    write_block(tmp_path / "part", Finished(block, "raw", None, 0.0, 2.5), {})
    back, _ = read_block(tmp_path / "part")
    assert (back.result["ambiguous"], back.result["inactive"]) == (True, 3)
    assert (back.engine, back.max_seconds) == (None, 2.5)


@pytest.mark.parametrize("dtype", [">f8", "<f8", "<f4"])
@pytest.mark.parametrize("shape", [(7, 7), (0, 0), (1, 3)])
def test_arrays_come_back_bit_for_bit_in_their_precision(dtype, shape, tmp_path):
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    write_part(tmp_path / "part", {"a": 1}, {"matrix": array.T, "second": array})
    document, arrays = read_part(tmp_path / "part")
    assert document["a"] == 1
    assert np.array_equal(arrays["matrix"], array.T)
    assert np.array_equal(arrays["second"], array)
    assert arrays["second"].dtype.itemsize == array.dtype.itemsize


def test_the_first_line_is_json_to_read_by_eye(tmp_path):
    head = json.loads(written(tmp_path / "part").split(b"\n", 1)[0])
    assert (head["format"], head["variant"]) == ("hessdiag-part", "raw")


def test_a_flipped_bit_anywhere_is_refused(tmp_path):
    path, source = tmp_path / "part", random.Random(0)
    content = written(path)
    ends = [*range(12), *range(len(content) - 60, len(content))]
    for position in [*ends, *source.sample(range(len(content)), 200)]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << source.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(StoreError, match=r"part is damaged .*remove it, and the same command"):
            read_block(path)


def test_a_cut_file_is_refused_at_every_length(tmp_path):
    path = tmp_path / "part"
    content = written(path)
    for length in [0, 1, 47, 48, 49, *range(100, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(StoreError, match="damaged"):
            read_block(path)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"junk",
        b"\n",
        b"[]\n",
        b"{}\n",
        b'{"format": "hessdiag-part"}\n',
        b'{"format": "other", "version": "1.0.0", "arrays": {}}\n',
        b'{"format": "hessdiag-part", "version": "1.0.0", "arrays": []}\n',
        b'{"format": "hessdiag-part", "version": "1.0.0", "arrays": {"x": ["|O", [1]]}}\n12345678',
        b'{"format": "hessdiag-part", "version": "1.0.0", "arrays": {"x": ["<f8", [9]]}}\n1',
        b'{"format": "hessdiag-part", "version": "1.0.0", "arrays": {"x": ["<f8", ["9"]]}}\n1',
        b'{"format": "hessdiag-part", "version": "1.0.0", "arrays": {}}\nmore',
        b'{"format": "hessdiag-part", "version": "1.0.0", "arrays": {}, "values": 3}\n',
    ],
)
def test_sealed_nonsense_is_refused(body, tmp_path):
    (tmp_path / "part").write_bytes(body + seal(body))
    with pytest.raises(StoreError, match="damaged"):
        read_block(tmp_path / "part")


def test_another_major_version_is_refused_by_name(tmp_path):
    body = b'{"format": "hessdiag-part", "version": "2.1.0", "arrays": {}}\n'
    (tmp_path / "part").write_bytes(body + seal(body))
    with pytest.raises(UnknownSchema, match=r"version 2\.1\.0 of the parts, .* reads 1\.0\.0"):
        read_part(tmp_path / "part")


@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "nothing"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(kind, tmp_path):
    path = tmp_path / "part"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        written(tmp_path / "other")
        path.symlink_to("other")
    with pytest.raises(StoreError, match="not a regular file"):
        read_part(path)
