"""Concept files that are not what was saved."""

import json
import pickle

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from perfusion_pytorch.files import checksum


def rewritten(path, *, tensors=None, about=None, metadata=None, is_signed=False):
    """Write a file anew with changed content, with a fitting checksum or the old one."""
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    said = json.loads(told.pop("perfusion_pytorch"))
    old = said.pop("sha256")
    content = (tensors or (lambda t: t))(load_file(path))
    said, told = (about or (lambda a: a))(said), (metadata or (lambda m: m))(told)
    said["sha256"] = checksum(content, said, told) if is_signed else old
    save_file(content, path, metadata=told | {"perfusion_pytorch": json.dumps(said)})


def damaged_files(path, rng):
    """Yield (what was done, bytes) of many files that are not what was saved."""
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in [
        0,
        1,
        7,
        8,
        9,
        header - 1,
        header,
        len(whole) - 1,
        *(rng.randrange(len(whole)) for _ in range(90)),
    ]:
        yield f"cut to {length}", whole[:length]
    for count in [1, 2, 8, 4096]:
        yield f"{count} bytes more", whole + bytes(count)
    for _ in range(300):
        where, bit = rng.randrange(len(whole)), rng.randrange(8)
        yield (
            f"bit {bit} of byte {where}",
            whole[:where] + bytes([whole[where] ^ 1 << bit]) + whole[where + 1 :],
        )
    for _ in range(60):
        where = rng.randrange(header)
        yield (
            f"header byte {where}",
            whole[:where] + bytes([rng.randrange(256) ^ whole[where] or 1]) + whole[where + 1 :],
        )
    for _ in range(40):
        start, size = rng.randrange(len(whole)), rng.randrange(1, 64)
        yield f"{size} zeros at {start}", (whole[:start] + bytes(size) + whole[start + size :])[: len(whole)]
    for size in (2**63, 2**40, 100_000_001, len(whole), 0, 1):
        yield f"a header of {size} bytes", size.to_bytes(8, "little") + whole[8:]
    yield "another file", b"not a concept at all"
    yield "a pickle", pickle.dumps({"token": "<cat-1>"})
    yield "noise", rng.randbytes(5000)
    names = list(load_file(path))
    for _ in range(30):
        one, other = rng.sample(names, 2)
        rewritten(path, tensors=lambda t, one=one, other=other: t | {one: t[other], other: t[one]})
        yield f"{one} and {other} swapped", path.read_bytes()
        path.write_bytes(whole)
    for name in names:
        for what, change in (
            ("renamed", lambda t, name: {(k + "x" if k == name else k): v for k, v in t.items()}),
            ("missing", lambda t, name: {k: v for k, v in t.items() if k != name}),
            ("as integers", lambda t, name: t | {name: t[name].to(torch.int32)}),
            ("as NaN", lambda t, name: t | {name: t[name] * torch.nan}),
            ("longer", lambda t, name: t | {name: torch.cat([t[name], t[name]])}),
            ("two-dimensional", lambda t, name: t | {name: t[name][None]}),
        ):
            rewritten(path, tensors=lambda t, change=change, name=name: change(t, name))
            yield f"{name} {what}", path.read_bytes()
            path.write_bytes(whole)
    for key, value in (
        ("token", "<dog-1>"),
        ("dim", 9),
        ("concept_norm", 2.0),
        ("eval_gate", [0.1, 0.1]),
        ("base_model", "Other"),
    ):
        rewritten(path, about=lambda a, key=key, value=value: a | {key: value})
        yield f"{key} changed", path.read_bytes()
        path.write_bytes(whole)
    save_file({"lora_A.weight": torch.ones(2, 2)}, path, metadata={"format": "pt"})
    yield "a LoRA", path.read_bytes()
    path.write_bytes(whole)


def cut_or_flipped(whole, rng, count):
    """Yield (what was done, bytes) of a file cut at so many places, and with so many single bits flipped.

    Half of the flips are in the header, which is a small part of a file.
    """
    header = min(len(whole), 8 + int.from_bytes(whole[:8], "little"))
    for i in range(count):
        length = rng.randrange(len(whole))
        yield f"cut to {length}", whole[:length]
        where, bit = rng.randrange(header if i % 2 else len(whole)), rng.randrange(8)
        yield (
            f"bit {bit} of byte {where}",
            whole[:where] + bytes([whole[where] ^ 1 << bit]) + whole[where + 1 :],
        )
