"""Each prompt of a batch has its own concepts: what a row gives depends on its own prompt alone."""

import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
)
from helpers.tiny_concepts import tiny_concept
from helpers.tiny_pipes import tiny_pipe

from perfusion_pytorch import (
    Concept,
    concept_gates,
    delete_concepts,
    get_list_concepts,
    load_concept,
    set_concepts,
    unload_concepts,
)
from perfusion_pytorch.layers.loaded import LoadedProjection
from perfusion_pytorch.pipelines.attach import attach
from perfusion_pytorch.pipelines.encoded_prompts import remember_prompts
from perfusion_pytorch.pipelines.parts import loaded_on

NAMES = ["<car-1>", "<car-2>", "<car-3>", "<car-4>"]


def noise(count):
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    return torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])


def pictures(pipe, prompts, **options):
    """The latents of each prompt of a batch, each from its own noise."""
    options = {"latents": noise(len(prompts)), "num_inference_steps": 2, "output_type": "latent"} | options
    return pipe(prompts, **options).images


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Concepts for a tiny pipeline, one of them in the other form."""
    folder, pipe = tmp_path_factory.mktemp("rows"), tiny_pipe()
    for seed, name in enumerate(NAMES):
        concept = tiny_concept(pipe, token=name, seed=seed)
        object.__setattr__(concept, "gates_removal", name != NAMES[1])
        concept.save(folder / f"{seed}.safetensors", dtype=torch.float32)
    return [folder / f"{seed}.safetensors" for seed in range(len(NAMES))]


@pytest.fixture
def pipe(files):
    pipe = tiny_pipe()
    pipe.set_progress_bar_config(disable=True)
    for file in files:
        load_concept(pipe, file)
    return pipe


def base():
    pipe = tiny_pipe()
    pipe.set_progress_bar_config(disable=True)
    return pipe


PLAIN = ["a car on red", "a photo of a house", ""]
# Sixteen prompts: each with another concept or two or none.
MIXED = [
    *(f"a {name} on red" for name in NAMES),
    *(f"a photo of a {name} and a {other}" for name, other in pairwise(NAMES)),
    *PLAIN,
    *(f"a {name} on a road" for name in NAMES),
    "two cars",
    f"{NAMES[3]} {NAMES[0]} {NAMES[2]}",
]


def test_a_batch_is_its_prompts_one_by_one(pipe):
    assert len(MIXED) == 16
    together = pictures(pipe, MIXED)
    for row, prompt in enumerate(MIXED):
        alone = pictures(pipe, [prompt], latents=noise(len(MIXED))[row : row + 1])
        assert torch.allclose(together[row], alone[0], rtol=1e-5, atol=1e-5 * alone.abs().max().item()), (
            prompt
        )
    for row, name in enumerate(NAMES):  # and they are not the same
        other = pictures(pipe, [MIXED[row].replace(name, "car")], latents=noise(16)[row : row + 1])
        assert not torch.allclose(together[row], other[0], atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"negative_prompt": ["a house"] * 5},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_rows_without_a_concept_are_the_base_models_to_the_bit(pipe, options):
    """In one batch with rows that have some, as the base model's in a batch of the same size."""
    assert_others_are_the_base_models(pipe, base(), options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the schedulers
@pytest.mark.parametrize(
    "scheduler",
    sorted(DDIMScheduler().compatibles, key=lambda kind: kind.__name__),
    ids=lambda kind: kind.__name__,
)
def test_also_with_every_scheduler(pipe, scheduler):
    plain = base()
    for p in (pipe, plain):
        try:
            p.scheduler = scheduler.from_config(p.scheduler.config)
        except ImportError as error:
            pytest.skip(str(error).strip().splitlines()[0])
    assert_others_are_the_base_models(pipe, plain, {"num_inference_steps": 5})


def test_also_in_sdxl(tmp_path):
    """Two text encoders, whose encodings are side by side; also by another pipeline of the same parts."""
    pipe, plain = tiny_pipe("SDXL"), tiny_pipe("SDXL")
    for seed in range(3):
        concept = tiny_concept(pipe, token=f"<car-{seed + 1}>", seed=seed)
        concept.save(tmp_path / f"{seed}.safetensors", dtype=torch.float32)
    for seed in range(3):
        load_concept(pipe, tmp_path / f"{seed}.safetensors")
    for p in (pipe, plain):
        p.set_progress_bar_config(disable=True)
    options = {"height": 16, "width": 16}
    assert_others_are_the_base_models(pipe, plain, options)
    assert_others_are_the_base_models(type(pipe).from_pipe(pipe), plain, options)


def test_the_text_encoders_alone_tell_it_too(tmp_path):
    """A loop of a user's own over two text encoders, without `encode_prompt`."""
    pipe = tiny_pipe("SDXL")
    tiny_concept(pipe, token="<car-1>").save(tmp_path / "car.safetensors")
    load_concept(pipe, tmp_path / "car.safetensors")
    prompts, states = ["a <car-1> on red", "a house"], []
    for encoder, tokenizer in (
        (pipe.text_encoder, pipe.tokenizer),
        (pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "return_tensors": "pt"}
        ids = tokenizer(prompts, **options).input_ids
        states.append(encoder(ids, output_hidden_states=True).hidden_states[-2])
    found = loaded_on(pipe).concepts.edits.prompts.find(torch.cat(states, dim=-1))
    assert found.is_known.tolist() == [True, True]
    assert (found.slots >= 0).any(dim=1).tolist() == [True, False]


def test_encodings_are_known_in_the_denoisers_dtype_too(pipe):
    """Also those of an `encode_prompt` that are not as the text encoder returned them."""
    pipe.unet.to(torch.bfloat16)
    stored, encoded = loaded_on(pipe).concepts, torch.randn(1, 16, 12)
    remember_prompts(pipe, stored, {"prompt": "a <car-1> on red"}, (encoded, None))
    for dtype, is_known in ((torch.float32, True), (torch.bfloat16, True), (torch.float16, False)):
        assert stored.edits.prompts.find(encoded.to(dtype)).is_known.tolist() == [is_known]


def assert_others_are_the_base_models(pipe, plain, options):
    given = [*PLAIN, "a <car-1> on red", "a <car-2> and a <car-3>"]
    latents = noise(len(given) * options.get("num_images_per_prompt", 1))
    one = pictures(pipe, given, latents=latents, generator=torch.Generator().manual_seed(1), **options)
    other = pictures(
        plain,
        [*PLAIN, "a car on red", "a car and a car"],
        latents=latents,
        generator=torch.Generator().manual_seed(1),
        **options,
    )
    count = len(PLAIN) * options.get("num_images_per_prompt", 1)
    assert torch.equal(one[:count], other[:count])
    assert not torch.allclose(one[count:], other[count:], atol=1e-2)


def test_the_negative_prompts_rows_are_edited_by_their_own_concepts_alone(pipe):
    """A concept in the negative prompt acts there; one in the prompt does not."""
    encoded, negative = pipe.encode_prompt("a <car-1> on red", "cpu", 1, True, "a <car-2>")
    layer = next(m for m in pipe.unet.modules() if isinstance(m, LoadedProjection) and not m.is_key_proj)
    set_concepts(pipe, ["<car-1>"])
    both = torch.cat([negative, encoded])
    values, plain = layer(both), torch.nn.functional.linear(both, layer.weight)
    assert torch.equal(values[0], plain[0]) and not torch.allclose(values[1], plain[1], atol=1e-2)
    set_concepts(pipe, ["<car-2>"])
    values = layer(both)
    assert torch.equal(values[1], plain[1]) and not torch.allclose(values[0], plain[0], atol=1e-2)


def test_encodings_may_be_made_first_and_used_later(pipe):
    prompts = ["a <car-1> on red", "a house", "a <car-2> on red"]
    expected = pictures(pipe, prompts)
    encoded, negative = pipe.encode_prompt(prompts, "cpu", 1, True)
    pictures(pipe, ["a <car-3>"])
    order = [2, 0, 1]
    again = pipe(
        prompt_embeds=encoded[order].clone(),
        negative_prompt_embeds=negative[order],
        latents=noise(3)[order],
        num_inference_steps=2,
        output_type="latent",
    ).images
    assert torch.allclose(again, expected[order], atol=1e-5)


def test_encodings_made_elsewhere_hold_the_concepts_that_they_are_similar_to(pipe):
    """Weighted encodings are those of no prompt: a concept acts where a token is at least half its own."""
    layer = next(m for m in pipe.unet.modules() if isinstance(m, LoadedProjection) and not m.is_key_proj)
    edits, (concept, *_) = layer.edits, loaded_on(pipe).concepts.values()
    text_enc = torch.zeros(3, 5, concept.dim)
    orthogonal = torch.linalg.lstsq(  # a direction that only the first concept sees
        edits.active_duals(torch.device("cpu")), torch.tensor([1.0, 0.0, 0.0, 0.0])
    ).solution
    text_enc[0, 1], text_enc[1, 2] = 0.6 * orthogonal, 0.4 * orthogonal
    split = edits.split(text_enc)
    assert (split.gate[0].amax() > 0.05) and split.gate[1:].amax() == 0
    assert torch.equal(layer(text_enc)[1:], torch.nn.functional.linear(text_enc, layer.weight)[1:])


def test_a_concept_that_is_not_active_edits_no_row(pipe):
    plain = base()
    set_concepts(pipe, "<car-1>")
    one = pictures(pipe, ["a <car-1> on red", "a <car-2> on red"])
    set_concepts(pipe, [])
    without = pictures(pipe, ["a <car-1> on red", "a <car-2> on red"])
    assert torch.equal(one[1], without[1]) and not torch.allclose(one[0], without[0], atol=1e-2)
    unload_concepts(pipe)
    assert torch.equal(pictures(pipe, PLAIN), pictures(plain, PLAIN))


def test_concepts_that_are_nearly_parallel_are_warned_of_in_one_prompt(pipe):
    concept = loaded_on(pipe).concepts["<car-1>"]
    other = concept.concept_input + 2e-2 * torch.randn(
        concept.dim, generator=torch.Generator().manual_seed(0)
    )
    dual = other / (other @ other)
    attach(pipe, replace(concept, token="<twin>", concept_input=other, concept_dual=dual))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures(pipe, ["a <twin>", "a <car-1>", "a <car-2> and a <twin>"])
    with pytest.warns(UserWarning, match=r"\['<car-1>', '<twin>'\] are nearly parallel"):
        pictures(pipe, ["a <car-1> and a <twin>"])
    attach(pipe, replace(concept, token="<same>"))
    with pytest.raises(ValueError, match=r"\['<same>', '<car-1>'\] cannot be in one prompt"):
        pictures(pipe, ["a <same> and a <car-1>"])
    set_concepts(pipe, "<car-1>")  # where only one of them acts, it is no trouble
    pictures(pipe, ["a <same> and a <car-1>"])


# -------------------------------------------------------------------------------------- gates for a call


def test_each_prompt_may_have_a_gate_of_its_own(pipe):
    """Also where prompts are the same, so that a grid over β is one call."""
    prompt, betas = "a <car-1> on red", [0.2, 0.7, 1.5]
    latents = noise(1).expand(3, -1, -1, -1)
    with concept_gates(pipe, beta=betas):
        together = pictures(pipe, [prompt] * 3, latents=latents)
    for row, beta in enumerate(betas):
        set_concepts(pipe, NAMES, beta=beta)
        assert torch.allclose(together[row], pictures(pipe, [prompt])[0], atol=1e-5), beta
    assert not torch.allclose(together[0], together[2], atol=1e-2)


def test_gates_by_name_and_for_several_pictures_of_a_prompt(pipe):
    prompts, latents = ["a <car-1> and a <car-2>"] * 2, noise(1).expand(4, -1, -1, -1)
    given = [{"<car-1>": 0.2}, {"<car-2>": 1.2}]
    with concept_gates(pipe, beta=given, temperature=0.3):
        together = pictures(pipe, prompts, latents=latents, num_images_per_prompt=2)
    assert torch.allclose(together[0], together[1], atol=1e-5)
    assert torch.allclose(together[2], together[3], atol=1e-5)
    for row, beta in zip((0, 2), given, strict=True):
        set_concepts(pipe, NAMES, beta=0.7, temperature=0.3)
        set_concepts(pipe, NAMES, beta=beta)
        assert torch.allclose(together[row], pictures(pipe, prompts[:1])[0], atol=1e-5)


def test_gates_of_a_call_are_gone_after_the_block(pipe):
    prompt = ["a <car-1> on red"]
    before = pictures(pipe, prompt)
    with pytest.raises(KeyError), concept_gates(pipe, beta=0.1, temperature=0.5):
        inside = pictures(pipe, prompt)
        raise KeyError
    assert torch.equal(pictures(pipe, prompt), before) and not torch.allclose(inside, before, atol=1e-2)
    assert [concept.eval_gate for concept in loaded_on(pipe).concepts.values()] == [(0.7, 0.15)] * 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": float("nan")}, "finite"),
        ({"temperature": 0}, "τ above 0"),
        ({"temperature": [0.1, -1]}, "τ above 0"),
        ({"beta": {"<dog-1>": 1.0}}, r"\['<dog-1>'\] are not loaded"),
    ],
)
def test_bad_gates_of_a_call_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message), concept_gates(pipe, **options):
        pass


def test_gates_are_for_prompts_and_not_for_the_negative_one(pipe):
    prompts = ["a <car-1> on red", "a <car-1> on a road"]
    with concept_gates(pipe, beta=[0.2, 0.9]):
        found = pictures(pipe, prompts, negative_prompt=["a <car-2>"] * 2)
        encoded, negative = pipe.encode_prompt(prompts, "cpu", 1, True, ["a <car-2>"] * 2)
    again = pipe(
        prompt_embeds=encoded,
        negative_prompt_embeds=negative,
        latents=noise(2),
        num_inference_steps=2,
        output_type="latent",
    ).images
    assert torch.allclose(found, again, atol=1e-5)


def test_as_many_gates_as_prompts(pipe):
    with concept_gates(pipe, beta=[0.1, 0.2]), pytest.raises(ValueError, match="one for each of 3, got 2"):
        pictures(pipe, ["a <car-1>"] * 3)


# ------------------------------------------------------------------------------------ coming and going


def test_a_slot_that_is_used_again_is_another_concepts(pipe, files):
    """What was remembered of prompts with the deleted concept does not hold for its successor."""
    encoded, _ = pipe.encode_prompt("a <car-1> on red", "cpu", 1, False)
    layer = next(m for m in pipe.unet.modules() if isinstance(m, LoadedProjection) and not m.is_key_proj)
    delete_concepts(pipe, "<car-1>")
    load_concept(pipe, files[0], token="<mine>")
    assert get_list_concepts(pipe) == [*NAMES[1:], "<mine>"]
    assert torch.equal(layer(encoded), torch.nn.functional.linear(encoded, layer.weight))
    one = pictures(pipe, ["a <mine> on red"])
    alone = base()
    load_concept(alone, files[0])
    assert torch.allclose(one, pictures(alone, ["a <car-1> on red"]), atol=1e-5)


def test_many_concepts_come_and_go(files):
    """More than the table had room for; each is found again, whatever came and went."""
    pipe, concept = base(), None
    concepts = {f"<car-{i + 10}>": tiny_concept(pipe, token=f"<car-{i + 10}>", seed=i) for i in range(12)}
    for concept in concepts.values():
        attach(pipe, concept)
    delete_concepts(pipe, ["<car-11>", "<car-15>", "<car-20>"])
    for name in ("<car-15>", "<car-11>"):
        attach(pipe, concepts[name])
    stored = loaded_on(pipe).concepts
    assert len(stored) == 11 and list(stored)[-2:] == ["<car-15>", "<car-11>"]
    for name in stored:
        assert stored[name].has_equal_tensors(concepts[name]) and stored[name].token == name
    only = base()
    attach(only, concepts["<car-15>"])
    prompt = ["a <car-15> on red"]
    assert torch.allclose(pictures(pipe, prompt), pictures(only, prompt), atol=1e-5)


def test_concepts_of_several_precisions_are_in_one_table(files):
    pipe = base()
    for n, dtype in enumerate((torch.float16, torch.bfloat16)):
        path = files[0].with_name(f"half-{n}.safetensors")
        Concept.load(files[n]).save(path, dtype=dtype)
        load_concept(pipe, path)
        assert load_concept(pipe, path) == NAMES[n]  # the same file twice
    name = next(iter(loaded_on(pipe).concepts["<car-1>"].outputs))
    outputs = [concept.outputs[name] for concept in loaded_on(pipe).concepts.values()]
    assert {output.dtype for output in outputs} == {torch.float32}
    assert torch.equal(outputs[1], Concept.load(path).outputs[name].float())


# ---------------------------------------------------------------------------------- siblings and parts


def test_img2img_and_controlnet_of_the_same_parts(pipe):
    """What a row without a concept gives there is the base model's to the bit too."""
    plain = base()
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(4, 8))
    with torch.no_grad():
        for block in control.controlnet_down_blocks:
            torch.nn.init.normal_(block.weight, std=0.1)

    def made(p, kind):
        torch.manual_seed(0)
        prompts = ["a house", "a <car-1> on red" if p is pipe else "a car on red"]
        options = {"num_inference_steps": 4, "output_type": "latent", "image": image}
        if kind == "img2img":
            sibling = StableDiffusionImg2ImgPipeline.from_pipe(p)
            generators = [torch.Generator().manual_seed(i) for i in range(2)]
            return sibling(prompts, strength=0.5, generator=generators, **options).images
        sibling = StableDiffusionControlNetPipeline.from_pipe(p, controlnet=control)
        return sibling(prompts, latents=noise(2), **options).images

    for kind in ("img2img", "controlnet"):
        one, other = made(pipe, kind), made(plain, kind)
        assert torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1], atol=1e-2), kind


def test_a_compiled_denoiser_takes_batches_of_any_concepts(pipe):
    """In one graph: which row holds what is found by tensors alone."""
    prompts = ["a <car-1> on red", "a house", "a <car-2> and a <car-3>"]
    expected = pictures(pipe, prompts)
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    assert torch.allclose(pictures(pipe, prompts), expected, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    again = pictures(pipe, [prompts[2], prompts[0], "a photo"], latents=noise(3)[[2, 0, 1]])
    assert torch.allclose(again[:2], expected[[2, 0]], atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # new prompts compile nothing
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_encodings_that_change_in_place_are_seen(pipe, mode):
    layer = next(m for m in pipe.unet.modules() if isinstance(m, LoadedProjection) and not m.is_key_proj)
    with mode():
        encoded, _ = pipe.encode_prompt(["a <car-1> on red", "a house"], "cpu", 1, False)
        encoded = encoded.clone()
        first = layer(encoded)
        if mode is torch.no_grad:
            assert layer.edits.split(encoded) is layer.edits.split(encoded)  # once for all layers
        encoded.copy_(encoded.flip(0).clone())
        layer.edits.begin_call()
        assert torch.allclose(layer(encoded), first.flip(0), atol=1e-5)


def test_nothing_of_a_call_outlives_its_encodings(pipe):
    pictures(pipe, ["a <car-1> on red"])
    assert loaded_on(pipe).concepts.edits._splits == {}


def test_a_gradient_reaches_the_encodings_in_every_step(pipe):
    encoded, _ = pipe.encode_prompt("a <car-1> on red", "cpu", 1, False)
    encoded = encoded.detach().requires_grad_(True)
    layer = next(m for m in pipe.unet.modules() if isinstance(m, LoadedProjection) and not m.is_key_proj)
    gradients = [torch.autograd.grad(layer(encoded).sum(), encoded)[0] for _ in range(2)]
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0
    plain = torch.autograd.grad(torch.nn.functional.linear(encoded, layer.weight).sum(), encoded)[0]
    assert not torch.allclose(gradients[0], plain, atol=1e-3)
