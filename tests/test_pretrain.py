"""The pretraining script: a run of a few steps writes a Stable Diffusion, and a resumed run ends where an uninterrupted one does."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "shapes"))

import pretrain
import world


def run(work_dir, output_dir, *flags, **steps):
    work_dir.mkdir(exist_ok=True)
    options = {"num_pictures": 64, "text_steps": 2, "vae_steps": 2, "unet_steps": 2, **steps}
    arguments = ["--work_dir", str(work_dir), "--output_dir", str(output_dir), *flags]
    pretrain.main(arguments + [word for name, value in options.items() for word in (f"--{name}", str(value))])


def test_a_short_run_writes_a_pipeline_in_half_precision(tmp_path):
    run(tmp_path / "work", tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model").to(torch.float32)
    assert pipe("a bear on red", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    weights = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in weights.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model" / "tokenizer")
    assert tokenizer("a bear").input_ids == pipe.tokenizer("a bear").input_ids and tokenizer.model_max_length == pretrain.NUM_TOKENS
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


@pytest.mark.parametrize("has_new_encoder", [False, True])
def test_a_finished_model_can_be_trained_on(tmp_path, has_new_encoder):
    run(tmp_path / "work", tmp_path / "first")
    flags = ["--new_text_encoder"] if has_new_encoder else []
    run(tmp_path / "more", tmp_path / "second", *flags, start_from=tmp_path / "first", text_steps=3)
    changed = {Path("unet/diffusion_pytorch_model.safetensors")} | ({Path("text_encoder/model.safetensors")} if has_new_encoder else set())
    for path in (p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*") if p.is_file()):
        is_same = (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes()
        assert is_same == (path not in changed), path


def test_the_tokenizer_is_kept(tmp_path):
    """The trainer breaks ties by chance, so that a resumed run must not make its own."""
    captions = [world.sample(seed).caption for seed in range(200)]
    first = pretrain.make_tokenizer(tmp_path, captions)
    again = pretrain.make_tokenizer(tmp_path, captions[:1])
    assert again.get_vocab() == first.get_vocab() and again(captions[5]).input_ids == first(captions[5]).input_ids
    assert again.model_max_length == pretrain.NUM_TOKENS
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_a_translation_lets_a_unet_read_another_encoder():
    class Encoder(torch.nn.Module):
        def __init__(self, table):
            super().__init__()
            self.table, self.config = table, SimpleNamespace(hidden_size=6)

        def forward(self, ids):
            return SimpleNamespace(last_hidden_state=self.table[ids])

    table, matrix = torch.randn(30, 6), torch.randn(6, 6)
    translation = pretrain.translation(Encoder(table), Encoder(table @ matrix.T), torch.randint(30, (40, 5)))
    assert torch.allclose(translation, matrix, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_leakage_is_what_a_noun_changes_behind_itself(share):
    """Of an encoder that adds a share of the token before: a change Δ of one word changes the next by share · Δ, and no other."""
    table = torch.randn(10, 6)

    def encoder(ids):
        own = table[ids]
        return SimpleNamespace(last_hidden_state=own + share * torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], dim=1))

    ids = torch.tensor([[0, 3, 4, 5, 9, 9]])  # start, three words, end
    is_word = (ids != 0) & (ids != 9)
    found = set()
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        found.add(round(pretrain.leakage(encoder, ids, encoder(ids).last_hidden_state, is_word, is_word, generator).item(), 4))
    # Of two words behind the first one changes; of one word behind all; behind the last word there is none, and a word may be drawn anew.
    wanted = {round(share**2 / 2, 4), round(share**2, 4), 0.0}
    assert wanted <= {value for value in found if value == value} <= wanted


def test_the_unet_is_trained_on_whitened_encodings_and_takes_plain_ones_in_the_end():
    pipe = StableDiffusionPipeline.from_pretrained(pretrain.MODEL_FOLDER).to(torch.float32)
    ids = pretrain.tokenize(pipe.tokenizer, [world.sample(seed).caption for seed in range(600)])
    white = pretrain.whitening(pipe.text_encoder, ids, scale=2.0)
    with torch.no_grad():
        encodings = pipe.text_encoder(ids).last_hidden_state
        whitened = (encodings @ white).flatten(0, 1).double()
        moment = torch.linalg.eigvalsh(whitened.T @ whitened / len(whitened))
        assert moment.max() < 4.01 and moment.median() > 3.5 and (moment < 2).sum() <= 2  # the last layer norm leaves one direction empty
        noisy, times = torch.randn(2, 4, 16, 16), torch.tensor([999, 500])
        expected = pipe.unet(noisy, times, encodings[:2]).sample
        pretrain.change_basis_(pipe.unet, torch.linalg.inv(white))
        assert torch.allclose(pipe.unet(noisy, times, encodings[:2] @ white).sample, expected, atol=1e-4)
        assert not torch.allclose(pipe.unet(noisy, times, encodings[:2]).sample, expected, atol=1e-2)
        pretrain.change_basis_(pipe.unet, white)
        assert torch.allclose(pipe.unet(noisy, times, encodings[:2]).sample, expected, atol=1e-4)


def test_training_on_for_no_step_gives_the_model_back(tmp_path):
    """What is multiplied into keys and values before the training on whitened encodings is taken out again after it."""
    run(tmp_path / "work", tmp_path / "first")
    run(tmp_path / "more", tmp_path / "second", start_from=tmp_path / "first", unet_steps=0)
    first, second = (load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("first", "second"))
    for name, weight in first.items():
        assert torch.allclose(second[name].float(), weight.float(), atol=2e-3), name
