"""Global key-locking: all keys are those of the superclass prompt."""

import pytest
import torch
from helpers.small_model import latents, make_pipe
from safetensors.torch import save_file
from torch import nn

from perfusion_pytorch import (
    global_key_lock,
    load_concept,
    set_concepts,
    unload_concepts,
)
from perfusion_pytorch.layers.loaded import LoadedProjection


@pytest.mark.slow
def test_global_key_locking(pipe, files):
    """Keys are the superclass prompt's plain ones, token by token, though the superclass has two."""
    load_concept(pipe, files / "bear.safetensors")
    seen = {}
    hooked = [m for m in pipe.unet.modules() if isinstance(m, LoadedProjection)]
    layers = {layer.is_key_proj: layer for layer in hooked}
    prompt, n = "a <bear-1> left of a house", pipe.tokenizer.model_max_length

    def calls(**options):
        seen.clear()
        latents(pipe, prompt, **options)
        return seen["keys"], seen["values"]

    with global_key_lock(pipe):
        handles = [
            layers[is_key].register_forward_hook(
                lambda _, __, output, key=key: seen.setdefault(key, output.detach())
            )
            for key, is_key in (("keys", True), ("values", False))
        ]
        locked_keys, locked_values = calls()
    with torch.no_grad():
        plain = pipe.encode_prompt(prompt.replace("<bear-1>", "teddy bear"), "cpu", 1, False)[0]
    where = [0, 1, *range(3, n), n - 1]  # of "teddy bear" the last token stays
    assert torch.allclose(
        locked_keys[1], nn.functional.linear(plain[0, where], layers[True].weight), atol=1e-4
    )
    keys, values = calls()
    assert torch.equal(values, locked_values)
    assert torch.equal(keys[0], locked_keys[0])  # the empty prompt keeps its own
    assert not torch.allclose(keys[1], locked_keys[1], atol=1e-2)
    for handle in handles:
        handle.remove()
    assert not any(layer._forward_hooks for layer in hooked)
    house = latents(pipe, "a house on red")
    with global_key_lock(pipe):
        assert torch.equal(latents(pipe, "a house on red"), house)
        with pytest.raises(RuntimeError, match="cannot be nested"), global_key_lock(pipe):
            pass


@pytest.mark.slow
def test_key_locks_hold_while_concepts_are_set(pipe, files):
    load_concept(pipe, files / "car.safetensors")
    prompt, reference = "a <car-1> on red", []
    for beta in (0.3, 0.6):
        set_concepts(pipe, "<car-1>", beta=beta)
        with global_key_lock(pipe):
            reference.append(latents(pipe, prompt))
    assert not torch.allclose(*reference, atol=1e-3)
    with global_key_lock(pipe):
        for beta, expected in zip((0.3, 0.6), reference, strict=True):
            set_concepts(pipe, "<car-1>", beta=beta)
            assert torch.equal(latents(pipe, prompt), expected)
        assert len(pipe.unet._perfusion_key_lock.pairs) == 1  # however often the prompt came
        unload_concepts(pipe)
        assert torch.equal(latents(pipe, "a car on red"), latents(make_pipe(), "a car on red"))


def test_key_locks_beside_a_lora_and_an_inversion_of_several_vectors(pipe, files, tmp_path):
    """A LoRA's part is the superclass prompt's too; a word of several vectors shifts what follows."""
    from peft import LoraConfig

    width, n = pipe.text_encoder.config.hidden_size, pipe.tokenizer.model_max_length
    save_file(
        {"<many>": torch.randn(3, width, generator=torch.Generator().manual_seed(0)) * 0.1},
        tmp_path / "many.safetensors",
    )
    pipe.load_textual_inversion(tmp_path / "many.safetensors", token="<many>")
    load_concept(pipe, files / "bear.safetensors")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    outer = next(m for name, m in pipe.unet.named_modules() if name.endswith("attn2.to_k"))
    seen, prompt = [], "a <many> beside a <bear-1> on red"
    handle = outer.register_forward_hook(lambda _, inputs, keys: seen.append(keys.detach()))
    with global_key_lock(pipe):
        latents(pipe, prompt)
    handle.remove()
    set_concepts(pipe, [])
    with torch.no_grad():
        plain = pipe.encode_prompt(prompt.replace("<bear-1>", "teddy bear"), "cpu", 1, False)[0]
        where = [
            *range(7),
            *range(8, n),
            n - 1,
        ]  # after the start: a, three vectors, beside, a, and of "teddy bear" the last token
        assert torch.allclose(seen[0][1], outer(plain[:, where])[0], atol=1e-4)


def test_key_locks_are_gone_after_an_exception(pipe, files):
    load_concept(pipe, files / "car.safetensors")
    before = latents(pipe, "a <car-1>")
    with pytest.raises(KeyError), global_key_lock(pipe):
        latents(pipe, "a <car-1>")
        raise KeyError
    assert torch.equal(latents(pipe, "a <car-1>"), before)
