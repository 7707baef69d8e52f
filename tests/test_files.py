"""Checksums of texts, bytes and tensors; writing files is tested with concept files."""

import hashlib

import pytest
import torch

from perfusion_pytorch.files import described, sha256_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_counts_by_its_bytes(dtype):
    tensor = torch.tensor([[0, 1, 1], [1, 0, 2]]).to(dtype)
    data = tensor.view(torch.uint8).numpy().tobytes()
    assert sha256_of([tensor]) == hashlib.sha256(data).hexdigest()
    assert sha256_of([tensor.T]) == sha256_of([tensor.T.contiguous()]) != sha256_of([tensor])
    assert sha256_of([tensor[0, 0]]) == hashlib.sha256(bytes(tensor.element_size())).hexdigest()


def test_parts_are_joined():
    assert sha256_of(["β", b"yte", torch.empty(0)]) == hashlib.sha256("βyte".encode()).hexdigest()
    assert sha256_of([]) == hashlib.sha256().hexdigest()


def test_described_tensors_differ_by_name_dtype_and_shape():
    ones = torch.ones(4)
    kinds = [
        {"a": ones},
        {"b": ones},
        {"a": ones.half()},
        {"a": ones.view(2, 2)},
        {"a": ones[:2], "": ones[2:]},
    ]
    assert len({sha256_of(described(tensors)) for tensors in kinds}) == len(kinds)
    (head, tensor) = described({"a": ones})
    assert head == '["a", "torch.float32", [4]]' and tensor is ones
