"""What a file is, told by its content."""

from dataclasses import replace

import pytest
import torch
from helpers.tiny_pipes import IMAGES, tiny_pipe
from safetensors.torch import save_file

from perfusion_pytorch import Concept, evaluate_concepts
from perfusion_pytorch.evaluation.candidates import candidates_of


def facts(files, words=None):
    return [(c.name, c.kind, c.words, c.superclass, c.knob) for c in candidates_of(files, words)]


def test_the_kind_is_recognised_from_the_content(made):
    files = [made / "mine.safetensors", made / "diffusers", made / "peft", made / "inversion.safetensors"]
    assert facts(files, "sks car")[:3] == [
        ("mine", "Perfusion", "<car-1>", "car", "beta"),
        ("diffusers", "LoRA", "sks car", None, "scale"),
        ("peft", "LoRA", "sks car", None, "scale"),
    ]
    assert facts(files[3:]) == [("inversion", "textual inversion", "<my-car>", None, None)]
    assert facts(files[3:], "<other>") == [("inversion", "textual inversion", "<other>", None, None)]


def test_words_for_one_file(made):
    lora, rows = str(made / "peft"), str(made / "two-rows.safetensors")
    assert [fact[2] for fact in facts([lora, rows], {lora: "sks car", rows: "<mine>"})] == [
        "sks car",
        "<mine>",
    ]


def test_the_lora_of_other_trainers_is_recognised(tmp_path):
    for number, key in enumerate(
        ("lora_unet_down.lora_down.weight", "unet.x.processor.to_k_lora.down.weight")
    ):
        save_file({key: torch.ones(2, 2)}, tmp_path / f"{number}.safetensors")
        assert facts([tmp_path / f"{number}.safetensors"], "w")[0][1] == "LoRA"


def test_a_textual_inversion_of_sdxl_has_two_rows(tmp_path):
    save_file({"clip_l": torch.ones(1, 4), "clip_g": torch.ones(1, 6)}, tmp_path / "a.safetensors")
    assert facts([tmp_path / "a.safetensors"], "<a>") == [("a", "textual inversion", "<a>", None, None)]


def test_the_digest_is_of_what_pictures_depend_on_and_not_of_beta(made, tmp_path):
    concept = Concept.load(made / "mine.safetensors")
    digests = set()
    for name, gate in (("same", concept.eval_gate), ("beta", (0.2, 0.15)), ("temperature", (0.7, 0.3))):
        replace(concept, eval_gate=gate).save(tmp_path / f"{name}.safetensors")
        digests.add(candidates_of([tmp_path / f"{name}.safetensors"], None)[0].digest)
    assert len(digests) == 2
    one, other = (candidates_of([made / "peft"], words)[0].digest for words in ("sks car", "my car"))
    assert one != other


def test_files_of_one_name_are_told_apart(made, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Concept.load(made / "mine.safetensors").save(tmp_path / folder / "car.safetensors")
    files = [tmp_path / folder / "car.safetensors" for folder in ("a", "b")]
    assert [fact[0] for fact in facts(files)] == ["car 1", "car 2"]


def test_what_cannot_be_used_is_refused(made, tmp_path):
    mine, inversion = made / "mine.safetensors", made / "two-rows.safetensors"
    for files, words, message in (
        ([], None, "must hold at least one concept file"),
        ([mine, mine], None, "Each file must be given once"),
        ([mine, made / "." / "mine.safetensors", f"{made}/../{made.name}/mine.safetensors"], None, "once"),
        ([made / "peft"], None, "is a LoRA, which does not say .* Give the words .*as `words`"),
        ([inversion], None, "does not say its token. Choose one, .*as `words`"),
        ([mine], {"other": "w"}, "`words` must name one of the files .*got 'other'"),
        ([mine], {str(mine): "w"}, "must not name .*mine.safetensors, which says its own token, '<car-1>'"),
    ):
        with pytest.raises(ValueError, match=message):
            candidates_of(files, words)
    with pytest.raises(FileNotFoundError, match="There is no file nowhere"):
        candidates_of(["nowhere"], None)
    with pytest.raises(
        FileNotFoundError, match=r"must hold one of concept.safetensors.*but holds \['inversion"
    ):
        candidates_of([made], None)
    (tmp_path / "a.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(
        ValueError, match=r"must be a whole safetensors file, .*can run code when they are opened"
    ):
        candidates_of([tmp_path / "a.bin"], None)
    save_file({"a": torch.ones(2, 2, 2), "b": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"must be a concept of Perfusion, a LoRA or .*tensors are \['a', 'b'\]"
    ):
        candidates_of([tmp_path / "x.safetensors"], None)


def test_a_concept_on_the_hub_is_read_and_never_written(made, hub, tmp_path):
    hub.add("alice/teddy", {"concept.safetensors": (made / "mine.safetensors").read_bytes()})
    (found,) = candidates_of(["alice/teddy"], None)
    (local,) = candidates_of([made / "mine.safetensors"], None)
    assert (found.words, found.digest) == (local.words, local.digest)
    before = found.path.read_bytes()
    with pytest.raises(ValueError, match="needs concept files of your own"):
        evaluate_concepts(
            tiny_pipe(), "alice/teddy", IMAGES, output_dir=tmp_path / "out", checkers=[print], write=True
        )
    assert found.path.read_bytes() == before and not (tmp_path / "out").exists()
