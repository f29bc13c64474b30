"""Files that are no checkpoint of ``torch.save``, or one that lies, and folders of such files."""

# ruff: noqa: E501 - a case a line

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save as safetensors_bytes

from hostile.checkpoints import COMMAND, SHAPES, Call, Write, put, saved, state
from hostile.judge import MARKER


def headers() -> dict[str, Write]:
    """Files in the format of safetensors with lies in their header."""
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    lies: dict[str, object] = {
        "no tensors": {},
        "a list": [],
        "null": None,
        "a tensor of null": {"a": None},
        "negative offsets": {"a": tensor | {"data_offsets": [-8, 0]}},
        "backward offsets": {"a": tensor | {"data_offsets": [8, 0]}},
        "overlap": {"a": tensor, "b": tensor},
        "offsets beyond": {"a": tensor | {"data_offsets": [0, 1 << 60]}},
        "a negative shape": {"a": tensor | {"shape": [-2]}},
        "a shape that overflows": {"a": tensor | {"shape": [1 << 62, 1 << 62]}},
        "a shape of text": {"a": tensor | {"shape": ["2"]}},
        "an unknown type": {"a": tensor | {"dtype": "F31"}},
        "a rare type": {"a": tensor | {"dtype": "F4", "shape": [16]}},
        "metadata of ints": {"__metadata__": {"format": 3}, "a": tensor},
        "metadata of tensorflow": {"__metadata__": {"format": "tf"}, "a": tensor},
        "a hostile format": {"__metadata__": {"format": "\x1b[31m"}, "a": tensor},
        "hostile names": {"\x1b[31m" + "y" * 4000: tensor},
        "a name of nothing": {"": tensor},
    }
    made = {n: _header(json.dumps(lie).encode()) for n, lie in lies.items()}
    made |= {
        "nested lists": _header(b"[" * 100_000),
        "nested objects": _header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        "a name twice": _header(b'{"a":%s,"a":%s}' % ((json.dumps(tensor).encode(),) * 2)),
        "no JSON": _header(b"{" + b"\xff" * 64),
        "NaN": _header(b'{"a": NaN}'),
        "a huge length": _content(struct.pack("<Q", (1 << 64) - 1) + b"{" + bytes(64)),
        "a length of 4 GB": _content(struct.pack("<Q", (1 << 32) - 1) + b"{" + bytes(64)),
        "a length of 0": _content(bytes(8) + b"{}"),
        "seven bytes": _content(bytes(7)),
    }
    return {f"safetensors, {name}": write for name, write in made.items()}


def _header(text: bytes) -> Write:
    return _content(struct.pack("<Q", len(text)) + text + bytes(8))


def archives() -> dict[str, Write]:
    """Zip files that are no checkpoint, or one that lies."""
    sound = saved(state())

    def entries(
        change: Callable[[dict[str, bytes]], Mapping[str, bytes]], *, deflated: bool = False
    ) -> Write:
        with zipfile.ZipFile(io.BytesIO(sound)) as archive:
            held = {name: archive.read(name) for name in archive.namelist()}
        buffer = io.BytesIO()
        method = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, content in change(held).items():
                archive.writestr(name, content)
        return _content(buffer.getvalue())

    bomb = 64 << 20
    return {
        "an empty zip": _content(b"PK\x05\x06" + bytes(18)),
        "a zip's first bytes": _content(b"PK\x03\x04"),
        "a zip of nothing known": entries(lambda _: {"readme.txt": b"hello"}),
        "a numpy archive": entries(lambda _: {"a.npy": b"\x93NUMPY"}),
        "a zip deflated": entries(lambda held: held, deflated=True),
        "a zip bomb beside": entries(lambda h: h | {"archive/data/99": bytes(bomb)}, deflated=True),
        "a zip bomb of a pickle": entries(lambda h: h | {"archive/data.pkl": bytes(bomb)}, deflated=True),
        "a zip without storages": entries(lambda h: {n: c for n, c in h.items() if "/data/" not in n}),
        "a zip with short storages": entries(lambda h: {n: c[: len(c) // 2] if "/data/" in n else c for n, c in h.items()}),
        "a zip with an empty pickle": entries(lambda h: h | {"archive/data.pkl": b""}),
        "a zip of another byte order": entries(lambda h: h | {"archive/byteorder": b"big"}),
        "a zip of a strange byte order": entries(lambda h: h | {"archive/byteorder": b"\xff\x1b"}),
        "a zip of another version": entries(lambda h: h | {"archive/version": b"999\n"}),
        "a zip with climbing names": entries(lambda h: h | {"../../EXECUTED": b"x"}),
        "TorchScript": entries(lambda h: h | {"archive/constants.pkl": b"x"}),
        "an exported program": entries(lambda _: {"m/models/model.json": b"{}", "m/version": b"1"}),
    }  # fmt: skip


def pickles() -> dict[str, Write]:
    """Plain and hand-made pickles."""
    magic = saved(state(), legacy=True)
    return {
        "a plain pickle": _content(pickle.dumps(state())),
        "a plain pickle, protocol 0": _content(pickle.dumps({"a": 1}, protocol=0)),
        "legacy magic alone": _content(magic[:16]),
        "legacy with a long memo": _content(magic[:40] + b"r\xff\xff\xff\xff"),
        "legacy with a huge string": _content(magic[:40] + b"X\xff\xff\xff\x7f"),
        "legacy with a huge long": _content(magic[:40] + b"\x8b\xff\xff\xff\x7f"),
        "legacy with a frame": _content(magic[:40] + b"\x95" + b"\xff" * 8),
    }


def plain() -> dict[str, Write]:
    """Files that are something else, and things that are no file."""
    return {
        "an empty file": _content(b""),
        "one byte": _content(b"\x80"),
        "zeros": _content(bytes(4096)),
        "text": _content(b"weights: please\n" * 9),
        "a script": _content(b"#!/bin/sh\ntouch EXECUTED\n"),
        "HDF5": _content(b"\x89HDF\r\n\x1a\n" + bytes(64)),
        "gzip": _content(b"\x1f\x8b\x08" + bytes(64)),
        "nothing there": lambda path: None,
        "an empty folder": Path.mkdir,
        "a FIFO": os.mkfifo,
        "a loop of links": lambda path: path.symlink_to(path),
        "a dangling link": lambda path: path.symlink_to(path.with_name("nowhere")),
        "a link to /dev/null": lambda path: path.symlink_to("/dev/null"),
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link to a folder": lambda path: path.symlink_to("/"),
    }


def directories() -> dict[str, Write]:
    """Folders that look like those of Hugging Face, of shards, or of other tools."""
    shard = safetensors_bytes(state())
    good = {"weight_map": dict.fromkeys(SHAPES, "a.safetensors")}
    indexes: dict[str, object] = {
        "sound": good,
        "no map": {},
        "a list": [],
        "a map of lists": {"weight_map": {"0.bias": ["a"]}},
        "an empty map": {"weight_map": {}},
        "a map to nothing": {"weight_map": {"0.bias": "gone.safetensors"}},
        "a map upward": {"weight_map": {"0.bias": "../../../etc/passwd"}},
        "a map to the root": {"weight_map": {"0.bias": "/etc/passwd"}},
        "a map to Windows": {"weight_map": {"0.bias": "C:\\boot.ini"}},
        "a map to a null": {"weight_map": {"0.bias": "a\0b"}},
        "a map to a surrogate": {"weight_map": {"0.bias": "a\ud800"}},
        "a map to the folder": {"weight_map": {"0.bias": "."}},
        "a map to a long name": {"weight_map": {"0.bias": "y" * 4000}},
        "a map to escapes": {"weight_map": {"\x1b[31m": "\x1b[31m.bin"}},
        "a map to itself": {"weight_map": {"0.bias": "model.safetensors.index.json"}},
        "a map with a name too many": {"weight_map": good["weight_map"] | {"ghost": "a.safetensors"}},
        "a map with one too few": {"weight_map": {"0.bias": "a.safetensors"}},
    }  # fmt: skip
    made: dict[str, Write] = {}
    for name, index in indexes.items():
        files = {"a.safetensors": shard, "model.safetensors.index.json": json.dumps(index).encode()}
        made[f"an index with {name}"] = _folder(files)
    texts = {
        "no JSON": b"{",
        "bytes": b"\xff\xfe\x00",
        "nested lists": b"[" * 100_000,
        "a name twice": b'{"weight_map": {"a": "b"}, "weight_map": {"a": "c"}}',
        "a huge number": b'{"weight_map": ' + b"9" * 10_000 + b"}",
    }
    for name, text in texts.items():
        made[f"an index of {name}"] = _folder({"model.safetensors.index.json": text})
    configs = {
        "no model": b"{}",
        "no JSON": b"\xff{",
        "a hostile model": json.dumps(
            {"model_type": "\x1b[31m", "architectures": [3, None]}
        ).encode(),
        "a model of lists": json.dumps(
            {"model_type": ["gpt2"], "architectures": "GPT2LMHeadModel"}
        ).encode(),
        "remote code": json.dumps(
            {
                "model_type": "gpt2",
                "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
            }
        ).encode(),
        "nested lists": b"[" * 100_000,
    }
    for name, config in configs.items():
        evil = f"open({MARKER!r}, 'w').close()\n".encode()
        made[f"a config with {name}"] = _folder(
            {"config.json": config, "model.safetensors": shard, "evil.py": evil}
        )
    made |= {
        "a folder without weights": _folder({"config.json": b"{}"}),
        "a folder of DCP": _folder({".metadata": b"\x80\x04.", "__0_0.distcp": b"x"}),
        "a folder with an adapter": _folder({"adapter_config.json": b"{}", "adapter_model.bin": b""}),
        "a folder with optimizer bytes": _folder({"model.safetensors": shard, "optimizer.pt": b"\x80\x04"}),
        "a folder with a hostile optimizer": _folder(
            {"model.safetensors": shard, "optimizer.pt": saved({"state": 3, "param_groups": [7]})}
        ),
        "a folder with an evil optimizer": _folder(
            {"model.safetensors": shard, "optimizer.pt": saved(Call(os.system, COMMAND))}
        ),
        "a folder with training arguments": _folder(
            {"model.safetensors": shard, "training_args.bin": saved(Call(os.system, COMMAND))}
        ),
        "a folder with a state of lists": _folder({"model.safetensors": shard, "trainer_state.json": b"[]"}),
        "a folder with a step of text": _folder(
            {"model.safetensors": shard, "trainer_state.json": b'{"global_step": "\\u001b[31m"}'}
        ),
        "a folder with a huge step": _folder(
            {"model.safetensors": shard, "trainer_state.json": b'{"global_step": 1e400}'}
        ),
    }  # fmt: skip
    return made


def _folder(files: Mapping[str, bytes]) -> Write:
    def write(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)

    return write


def _content(content: bytes) -> Write:
    return lambda path: put(path, content)
