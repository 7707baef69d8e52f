"""Checksums of texts, bytes, tensors and whole files; writing files is tested with concept files."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from perfusion_pytorch.files import (
    check_can_be_written,
    check_signed,
    described,
    sha256_of,
    signed,
    tensors_in,
    write_atomically,
)


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


def test_what_can_be_written_is_found_out_without_leaving_anything(tmp_path):
    for path, is_folder in ((tmp_path / "new" / "er" / "a.png", False), (tmp_path / "new", True)):
        check_can_be_written(path, is_folder=is_folder)
    (tmp_path / "a.png").write_bytes(b"old")
    check_can_be_written(tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"


def test_what_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, is_folder, message in (
        (tmp_path, False, "must be a file that can be written, but it is a folder"),
        (tmp_path / "file" / "a.png", False, r"cannot be written, because .*file is not a folder"),
        (tmp_path / "file", True, r"cannot be written, because .*file is not a folder"),
        (tmp_path / "link" / "a.png", False, r"cannot be written, because .*link is not a folder"),
    ):
        with pytest.raises(OSError, match=message):
            check_can_be_written(path, is_folder=is_folder)

    def refuse(self, *_, **__):
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(OSError, match=r"a.png cannot be written: Read-only file system. Choose another"):
        check_can_be_written(tmp_path / "new" / "a.png")


def test_long_names(tmp_path):
    """A file system takes 255 bytes; the partial file's name must not be the longer one."""
    longest = tmp_path / ("x" * 251 + ".png")
    check_can_be_written(longest)
    write_atomically(longest, b"whole")
    assert longest.read_bytes() == b"whole"
    with pytest.raises(OSError, match=r"cannot be written: File name too long. Choose another place"):
        check_can_be_written(tmp_path / ("x" * 300))


def test_signed_metadata_that_are_not_those_that_were_written():
    tensors, plain = {"a": torch.ones(2)}, {"format": "pt"}
    metadata = signed(tensors, {"dim": 2}, plain, "about")
    assert check_signed(tensors, metadata, "about") == {"dim": 2}
    for changed, others in (
        ({"a": torch.zeros(2)}, metadata),
        ({"b": torch.ones(2)}, metadata),
        (tensors, metadata | {"format": "tf"}),
        (tensors, metadata | {"more": ""}),
        (tensors, metadata | {"about": metadata["about"].replace("dim", "din")}),
        (tensors, metadata | {"about": '{"dim":2}'}),
    ):
        with pytest.raises(ValueError, match="its checksum does not fit its content"):
            check_signed(changed, others, "about")
    with pytest.raises(ValueError, match="not as they were written"):
        check_signed(tensors, metadata | {"about": metadata["about"].replace(":2", ":2 ")}, "about")
    with pytest.raises(ValueError, match="hold no facts under 'about'"):
        check_signed(tensors, plain, "about")


def test_a_failed_write_names_the_file_and_not_its_partial_one(tmp_path):
    for path, kind in ((tmp_path / "none" / "c", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(kind, match=f"^{path} cannot be written: ") as caught:
            write_atomically(path, b"x")
        assert "partial" not in str(caught.value) and caught.value.errno
    assert list(tmp_path.iterdir()) == []


def test_tensors_come_back_in_the_order_of_their_names():
    names = [f"layer.{i}" for i in range(9)]
    tensors, metadata = tensors_in(save({name: torch.ones(2) for name in reversed(names)}, {"a": "b"}))
    assert list(tensors) == names and metadata == {"a": "b"}
