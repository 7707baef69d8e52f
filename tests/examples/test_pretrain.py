"""The pretraining script: a short run writes a Stable Diffusion, and resuming changes nothing."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "shapes"))

import pretrain
import world

TEXT_ENCODER = pretrain.MODEL_FOLDER / "text_encoder" / "model.safetensors"


def run(work_dir, output_dir, *flags, **steps):
    work_dir.mkdir(exist_ok=True)
    options = {"num_pictures": 64, "text_steps": 2, "vae_steps": 2, "unet_steps": 2, **steps}
    arguments = ["--work_dir", str(work_dir), "--output_dir", str(output_dir), *flags]
    pretrain.main(arguments + [word for name, value in options.items() for word in (f"--{name}", str(value))])


@pytest.mark.slow
def test_a_short_run_writes_a_pipeline_in_half_precision(tmp_path):
    run(tmp_path / "work", tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipe("a bear on red", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    weights = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in weights.values())
    names = load_file(tmp_path / "model" / "text_encoder" / "model.safetensors")
    # The names are those of shipped models.
    assert all(name.startswith("text_model.") for name in names)
    assert names.keys() == load_file(TEXT_ENCODER).keys()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model" / "tokenizer")
    assert (
        tokenizer("a bear").input_ids == pipe.tokenizer("a bear").input_ids
        and tokenizer.model_max_length == pretrain.NUM_TOKENS
    )
    assert (tmp_path / "work" / "samples-00002.png").exists()


def test_a_stage_that_was_killed_ends_where_an_uninterrupted_one_does(tmp_path):
    def train(folder, kill_at=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        modules = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 1)})

        def loss(step, generator):
            if step == kill_at:
                raise KeyboardInterrupt
            return modules["layer"](torch.randn(8, 4, generator=generator)).square().mean()

        pretrain.train_stage("stage", folder, modules, loss, steps=9, peak=0.1, every=2)
        return modules.state_dict()

    whole = train(tmp_path / "whole")
    try:
        train(tmp_path / "killed", kill_at=5)
    except KeyboardInterrupt:
        resumed = train(tmp_path / "killed")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name])


@pytest.mark.slow
def test_the_unet_that_was_killed_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    """With its average, and in the changed basis."""
    captions = [world.sample(seed).caption for seed in range(64)]
    latents = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(pretrain, "train_stage", partial(pretrain.train_stage, every=1))
    steps, velocity = [], pretrain.DDPMScheduler.get_velocity

    def train(folder, kill_at=None):
        def killed(*args):
            steps.append(folder.name)
            if len(steps) == kill_at:
                raise KeyboardInterrupt
            return velocity(*args)

        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(pretrain.DDPMScheduler, "get_velocity", killed)
        start = StableDiffusionPipeline.from_pretrained(pretrain.MODEL_FOLDER)
        unet = pretrain.make_unet(start.text_encoder)
        pretrain.train_unet(
            folder,
            unet,
            start.tokenizer,
            start.text_encoder,
            start.vae,
            latents,
            captions,
            steps=3,
            peak=1e-3,
            first_power=0.6,
        )
        return unet.state_dict()

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", kill_at=3)
    resumed, whole = train(tmp_path / "killed"), train(tmp_path / "whole")
    assert steps == ["killed"] * 4 + ["whole"] * 3
    for name, tensor in whole.items():
        assert torch.allclose(tensor, resumed[name], rtol=1e-4, atol=1e-6), name


def test_latents_are_those_of_their_pictures_and_their_autoencoder(tmp_path):
    vae = StableDiffusionPipeline.from_pretrained(pretrain.MODEL_FOLDER).vae
    images = np.stack([np.asarray(world.sample(seed).image) for seed in range(3)])
    first = pretrain.encode_pictures(tmp_path, vae, images[:2], set_scale=False)
    assert len(pretrain.encode_pictures(tmp_path, vae, images, set_scale=False)) == 3
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1.5)
    other = pretrain.encode_pictures(tmp_path, vae, images[:2], set_scale=False)
    assert first.shape == other.shape and not torch.allclose(first, other, atol=1e-2)


@pytest.mark.slow
def test_a_finished_model_can_be_trained_on(tmp_path):
    run(tmp_path / "work", tmp_path / "first")
    run(tmp_path / "more", tmp_path / "second", start_from=tmp_path / "first")
    for path in (p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*") if p.is_file()):
        is_same = (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes()
        assert is_same == (path != Path("unet/diffusion_pytorch_model.safetensors")), path


def test_the_tokenizer_is_kept(tmp_path):
    """The trainer breaks ties by chance, so that a resumed run must not make its own."""
    captions = [world.sample(seed).caption for seed in range(200)]
    first = pretrain.make_tokenizer(tmp_path, captions)
    again = pretrain.make_tokenizer(tmp_path, captions[:1])
    assert (
        again.get_vocab() == first.get_vocab()
        and again(captions[5]).input_ids == first(captions[5]).input_ids
    )
    assert again.model_max_length == pretrain.NUM_TOKENS
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


class ReachingEncoder(torch.nn.Module):
    """Adds to each word's embedding a share of the one before."""

    def __init__(self, share):
        super().__init__()
        self.share, self.table = share, torch.nn.Embedding(10, 6)

    def get_input_embeddings(self):
        return self.table

    def forward(self, ids):
        own = self.table(ids)
        return SimpleNamespace(
            last_hidden_state=own + self.share * torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], dim=1)
        )


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_leakage_is_what_a_noun_changes_behind_itself(share):
    """A change Δ of one word changes the next by share · Δ, and nothing else."""
    encoder, ids = ReachingEncoder(share), torch.tensor([[0, 3, 4, 5, 9, 9]])
    is_noun = (ids != 0) & (ids != 9)
    found = set()
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        found.add(
            round(
                pretrain.leakage(encoder, ids, encoder(ids).last_hidden_state, is_noun, generator).item(), 4
            )
        )
    assert found == {round(share**2 / positions_behind, 4) for positions_behind in (4, 3, 2)}
    assert encoder.table.weight.grad is None and not encoder.table._forward_hooks


def test_words_are_grounded_in_what_they_stand_for():
    things = (
        world.Thing("bear", world.Look("red", "white", "green", "spots"), None, 28, 16, 32),
        world.Thing("fish", world.BREEDS["koi"][1], "koi", 26, 48, 40),
    )
    scene = world.Scene("blue", world.COLOURS["blue"], things)
    caption = "a red teddy bear left of a koi on a blue wall"
    names, places = pretrain.groundings([caption], [scene])
    at = {word: i for i, word in enumerate(caption.split(), start=1)}
    koi = world.BREEDS["koi"][1]
    expected = {
        "superclass": {"bear": "bear", "koi": "fish"},
        "body": {"bear": "red", "koi": koi.body},
        "second": {"bear": "white", "koi": koi.second},
        "accent": {"bear": "green", "koi": koi.accent},
        "pattern": {"bear": "spots", "koi": koi.pattern},
        "background": {"red": "none", "blue": "blue"},
    }
    for name, words in expected.items():
        wanted = torch.full((pretrain.NUM_TOKENS,), -1)
        for word, choice in words.items():
            wanted[at[word]] = pretrain.GROUNDS[name].index(choice)
        assert torch.equal(names[name][0], wanted), name
    seen = (~places[0].isnan().any(dim=-1)).nonzero().flatten().tolist()
    assert seen == [at["bear"], at["left"], at["koi"]]
    assert places[0, at["left"]].tolist() == [0.25, 0.5, 28 / 64] and places[0, at["koi"]].tolist() == [
        0.75,
        0.625,
        26 / 64,
    ]


@pytest.mark.slow
def test_the_text_encoder_tells_looks_and_backgrounds_apart(tmp_path):
    """For the committed model, a linear map reads them from the words' encodings, and nouns do not leak."""
    pipe = StableDiffusionPipeline.from_pretrained(pretrain.MODEL_FOLDER)
    pictures = [world.sample(seed) for seed in range(3000)]
    ids = pretrain.tokenize(pipe.tokenizer, [picture.caption for picture in pictures])
    names, _ = pretrain.groundings(
        [picture.caption for picture in pictures], [picture.scene for picture in pictures]
    )
    with torch.no_grad():
        encodings = pipe.text_encoder(ids).last_hidden_state
        breeds = torch.isin(
            ids,
            torch.tensor(pipe.tokenizer.convert_tokens_to_ids([f"{breed}</w>" for breed in world.BREEDS])),
        )
        for name, known in (
            (("superclass", breeds)),
            ("body", breeds),
            ("pattern", breeds),
            ("background", names["background"] >= 0),
        ):
            rows, targets = encodings[known].double(), F.one_hot(names[name][known]).double()
            half = len(rows) // 2
            fit = torch.linalg.lstsq(rows[:half], targets[:half]).solution
            assert ((rows[half:] @ fit).argmax(1) == targets[half:].argmax(1)).double().mean() > 0.95, name
        generator = torch.Generator().manual_seed(0)
        leaks = pretrain.leakage(pipe.text_encoder, ids, encodings, names["superclass"] >= 0, generator)
    assert leaks < 0.005


def test_the_unet_is_trained_on_whitened_encodings_and_takes_plain_ones_in_the_end():
    pipe = StableDiffusionPipeline.from_pretrained(pretrain.MODEL_FOLDER)
    ids = pretrain.tokenize(pipe.tokenizer, [world.sample(seed).caption for seed in range(600)])
    white = pretrain.whitening(pipe.text_encoder, ids, scale=2.0)
    with torch.no_grad():
        encodings = pipe.text_encoder(ids).last_hidden_state
        whitened = (encodings @ white).flatten(0, 1).double()
        moment = torch.linalg.eigvalsh(whitened.T @ whitened / len(whitened))
        # The last layer norm leaves one direction empty.
        assert moment.max() < 4.01 and moment.median() > 3.5 and (moment < 2).sum() <= 2
        noisy, times = torch.randn(2, 4, 16, 16), torch.tensor([999, 500])
        expected = pipe.unet(noisy, times, encodings[:2]).sample
        pretrain.change_basis_(pipe.unet, torch.linalg.inv(white))
        assert torch.allclose(pipe.unet(noisy, times, encodings[:2] @ white).sample, expected, atol=1e-4)
        assert not torch.allclose(pipe.unet(noisy, times, encodings[:2]).sample, expected, atol=1e-2)
        pretrain.change_basis_(pipe.unet, white)
        assert torch.allclose(pipe.unet(noisy, times, encodings[:2]).sample, expected, atol=1e-4)


@pytest.mark.slow
def test_training_on_for_no_step_gives_the_model_back(tmp_path):
    """Multiplying the whitening into keys and values, and taking it out again, leaves the model as it was."""
    run(tmp_path / "work", tmp_path / "first")
    run(tmp_path / "more", tmp_path / "second", start_from=tmp_path / "first", unet_steps=0)
    first, second = (
        load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
        for name in ("first", "second")
    )
    for name, weight in first.items():
        assert torch.allclose(second[name].float(), weight.float(), atol=2e-3), name
