"""`perfusion info`: what a concept file holds."""

import json

from perfusion_pytorch import Concept


def test_info_in_words_and_as_json(run, concepts):
    path = concepts / "bear.safetensors"
    code, out, err = run("info", path)
    assert (code, err) == (0, "") and out.startswith(f"{path}: the concept <bear-1>, a teddy bear\n")
    assert "β 0.7, τ 0.15; trained at β 0.75, τ 0.1" in out and f"{path.stat().st_size:,} bytes" in out
    code, out, err = run("info", path, "--json")
    facts, concept = json.loads(out), Concept.load(path)
    assert (code, err) == (0, "")
    assert (facts["token"], facts["superclass"], facts["dim"]) == ("<bear-1>", "teddy bear", concept.dim)
    assert facts["eval_gate"] == {"beta": 0.7, "temperature": 0.15} and facts["dtype"] == "float32"
    assert facts["outputs"] == {name: len(row) for name, row in concept.outputs.items()}
    assert facts["trained_numbers"] == sum(facts["outputs"].values()) + sum(facts["embeddings"].values())
    assert facts["bytes"] == path.stat().st_size and facts["architecture"] is None


def test_info_of_a_damaged_file(run, concepts, tmp_path):
    data = bytearray((concepts / "car.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "car.safetensors").write_bytes(data)
    code, _, err = run("info", tmp_path / "car.safetensors")
    assert code == 1 and "its checksum does not fit its content" in err and len(err.splitlines()) == 1
