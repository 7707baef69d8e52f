"""The phases of a run: the embedding first and alone, then the value outputs with everything else settled."""

import shutil

import pytest
import torch
from helpers.tiny_pipes import (
    IMAGES,
    KINDS,
    SETTLED,
    assert_same_runs,
    learned,
    options_for,
    tiny_pipe,
    with_trainer,
)

from perfusion_pytorch import Concept, load_concept, token_similarities, train_concept
from perfusion_pytorch.pipelines.encoding import prompt_encoder
from perfusion_pytorch.pipelines.parts import loaded_on
from perfusion_pytorch.training.checkpoints import load_checkpoint
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.training.step import Trainer


def settled(folder, kind="SD 1", **options):
    return options_for(folder, kind, **SETTLED | options)


def named(tensors, ending):
    return {name: tensor for name, tensor in tensors.items() if name.endswith(ending)}


@pytest.mark.parametrize("kind", KINDS)
def test_first_the_embedding_is_trained_and_then_the_outputs(kind, tmp_path):
    options = settled(tmp_path, kind, max_train_steps=5, embedding_steps=3, checkpointing_steps=1)
    train_concept(tiny_pipe(kind), IMAGES, **options)
    states = {step: learned(tmp_path, step) for step in range(1, 6)}
    for step in (1, 2, 3):
        assert not any(tensor.any() for tensor in named(states[step], "concept_output").values())
        assert not any(tensor.any() for tensor in named(states[step], "initialized").values())
    for step in (2, 3):
        for name, tensor in named(states[step], "concept_embedding").items():
            assert not torch.equal(tensor, states[step - 1][name])
    for step in (4, 5):
        for name, tensor in states[step].items():
            is_trained = name.endswith("concept_output")
            if name.endswith("concept_embedding"):
                assert torch.equal(tensor, states[3][name])
            elif step == 5:
                assert torch.equal(tensor, states[4][name]) != is_trained, name


def test_inputs_are_exact_means_over_the_prompts(assert_near, tmp_path):
    """What the layers hold is what the pipeline itself encodes with the finished embedding."""
    templates = ["a {}", "a photo of a {}", "a {} on red"]
    pipe = tiny_pipe()
    options = settled(tmp_path, templates=templates, max_train_steps=4)
    train_concept(pipe, IMAGES, **options)
    concept = Concept.load(tmp_path / "concept.safetensors")

    def mean_at(word):
        (token_id,) = pipe.tokenizer(word, add_special_tokens=False).input_ids
        rows = []
        for template in templates:
            prompt = template.format(word)
            encodings, _ = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
            ids = pipe.tokenizer(prompt, padding="max_length", truncation=True).input_ids
            rows.append(encodings[0, ids.index(token_id)])
        return torch.stack(rows).mean(dim=0)

    embedding = pipe.text_encoder.get_input_embeddings()
    # The file has it in half precision; i* was made before it was rounded.
    embedding.concept_embedding.data[0] = learned(tmp_path, 4)["text_encoder.concept_embedding"][0]
    assert_near(concept.concept_input, mean_at("<car-1>"))
    assert_near(concept.superclass_input, mean_at("car"))
    inverse = options["covariance"].inverse("cpu", torch.float64)
    image = inverse @ concept.concept_input.double()
    assert_near(concept.concept_dual, image / (image @ concept.concept_input.double()))


def test_outputs_start_at_the_superclass(assert_near, tmp_path):
    """A rate of 0 leaves them there."""
    pipe = tiny_pipe()
    weights = {name: m.weight.clone() for name, m in pipe.unet.named_modules() if name.endswith("attn2.to_v")}
    train_concept(pipe, IMAGES, **settled(tmp_path, learning_rate=0.0))
    superclass = Concept.load(tmp_path / "concept.safetensors").superclass_input.double()
    outputs = named(learned(tmp_path, 4), "concept_output")
    assert len(outputs) == len(weights) > 0
    for name, weight in weights.items():
        assert_near(outputs[f"{name}.concept_output"][0], weight.double() @ superclass)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_ends_as_if_uninterrupted(kind, step, tmp_path):
    """Within the embedding's steps, at their end, and within those of the outputs."""
    options = settled(tmp_path / "whole", kind, checkpointing_steps=1)
    train_concept(tiny_pipe(kind), IMAGES, **options)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "resumed" / f"checkpoint-{step}")
    options["output_dir"] = tmp_path / "resumed"
    train_concept(tiny_pipe(kind), IMAGES, **options, resume_from_checkpoint="latest")
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed", 4)


def test_a_checkpoint_of_the_other_way_of_training_is_refused(tmp_path):
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path, max_train_steps=2))
    with (
        pytest.warns(UserWarning, match="other settings than it began with: .*embedding_steps"),
        pytest.raises(ValueError, match="`embedding_steps` must be what the run began with"),
    ):
        train_concept(tiny_pipe(), IMAGES, **settled(tmp_path), resume_from_checkpoint="latest")


def test_the_text_encoder_is_not_called_by_the_outputs_steps(tmp_path, monkeypatch):
    calls = []

    def counted(self, step, rows, inner=Trainer._output_pass):
        before = len(calls)
        loss = inner(self, step, rows)
        assert len(calls) == before
        return loss

    monkeypatch.setattr(Trainer, "_output_pass", counted)
    pipe = tiny_pipe()
    forward = pipe.text_encoder.forward
    pipe.text_encoder.forward = lambda *args, **kwargs: calls.append(args) or forward(*args, **kwargs)
    train_concept(pipe, IMAGES, **settled(tmp_path))
    assert calls


def test_training_has_its_own_gate_and_the_file_the_recommended_one(tmp_path, monkeypatch):
    seen = []

    def watched(self, draw, outputs, inner=Trainer._loss):
        layer = next(iter(self.trainables.layers.values()))
        seen.append((round(layer.eval_beta.item(), 3), round(layer.eval_temperature.item(), 3)))
        return inner(self, draw, outputs)

    monkeypatch.setattr(Trainer, "_loss", watched)
    gates = {"train_beta": 0.3, "train_temperature": 0.2, "eval_beta": 0.6, "eval_temperature": 0.07}
    train_concept(tiny_pipe(), IMAGES, **settled(tmp_path, **gates))
    assert seen == [(0.6, 0.07)] * 2 + [(0.3, 0.2)] * 2
    concept = Concept.load(tmp_path / "concept.safetensors")
    assert (concept.train_gate, concept.eval_gate) == ((0.3, 0.2), (0.6, 0.07))


@pytest.mark.parametrize("gates_removal", [True, False])
def test_the_form_is_kept_by_the_file_and_the_pipeline(gates_removal, tmp_path):
    train_concept(tiny_pipe(), IMAGES, **settled(tmp_path, gates_removal=gates_removal))
    assert Concept.load(tmp_path / "concept.safetensors").gates_removal is gates_removal
    pipe = tiny_pipe()
    load_concept(pipe, tmp_path / "concept.safetensors")
    (concept,) = loaded_on(pipe).concepts.values()
    assert concept.gates_removal is gates_removal


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_relative_rates_do_the_same_on_rescaled_values(factor, tmp_path):
    """The function of the model is kept; so are the loss and, in their own scale, the outputs."""
    losses = []
    outputs = []
    for scale in (1.0, factor):
        pipe = tiny_pipe()
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn2"):
                module.to_v.weight.data *= scale
                module.to_out[0].weight.data /= scale
        folder = tmp_path / f"{scale}"
        options = settled(folder, max_train_steps=8, checkpointing_steps=8, adam_epsilon=0.0)
        losses.append(train_concept(pipe, IMAGES, **options).loss)
        outputs.append({n: t / scale for n, t in named(learned(folder, 8), "concept_output").items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, output in outputs[0].items():
        torch.testing.assert_close(outputs[1][name], output, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_relative_rates_do_the_same_on_rescaled_embeddings(factor, tmp_path):
    losses = []
    rows = []
    for scale in (1.0, factor):
        pipe = tiny_pipe()
        encoder = pipe.text_encoder
        with torch.no_grad():  # everything that the residual stream adds up, so that its norms see no change
            for name, parameter in encoder.named_parameters():
                if "_embedding" in name or ".out_proj." in name or ".fc2." in name:
                    parameter *= scale
        for module in encoder.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 0.0
        folder = tmp_path / f"{scale}"
        options = settled(folder, max_train_steps=8, checkpointing_steps=8, adam_epsilon=0.0)
        losses.append(train_concept(pipe, IMAGES, **options).loss)
        rows.append(learned(folder, 8)["text_encoder.concept_embedding"] / scale)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-3, atol=1e-4)


def test_learning_rates_are_reported_by_name(tmp_path):
    rates = with_trainer(tmp_path, lambda trainer: [phase.rates for phase in trainer.phases], **SETTLED)
    assert [list(rate) for rate in rates] == [["lr_embedding"], ["lr_output"]]
    assert all(value > 0 for rate in rates for value in rate.values())
    joint = with_trainer(tmp_path, lambda trainer: [phase.rates for phase in trainer.phases])
    assert joint == [{"lr_output": 0.03, "lr_embedding": 0.006}]


def test_steps_must_be_left_for_the_outputs(tmp_path):
    with pytest.raises(ValueError, match=r"must be below `max_train_steps`, 4, .* got 4"):
        train_concept(tiny_pipe(), IMAGES, **settled(tmp_path, embedding_steps=4))
    options = {"images": "p", "token": "<a>", "superclass": "car", "output_dir": "o"}
    assert TrainingOptions(**options, max_train_steps=300).num_embedding_steps == 150
    assert TrainingOptions(**options, embedding_steps=20).num_embedding_steps == 20


def test_checkpoints_record_where_the_phases_end(tmp_path):
    train_concept(tiny_pipe(), IMAGES, **settled(tmp_path))
    _, about = load_checkpoint(tmp_path / "checkpoint-4")
    settings = about["settings"]
    assert settings["embedding_steps"] is None and settings["max_train_steps"] == 4


def test_the_similarity_at_the_token_is_reported(tmp_path):
    """Of one prompt the mean is that prompt's own encoding, so r is exactly 1."""
    one = train_concept(tiny_pipe(), IMAGES, **settled(tmp_path / "one", templates=["a {}"]))
    assert one.similarity == pytest.approx((1.0, 1.0), abs=1e-5)
    pipe = tiny_pipe()
    templates = ["a {}", "a photo of a {} on red"]
    options = settled(tmp_path / "two", templates=templates)
    low, high = train_concept(pipe, IMAGES, **options).similarity
    pipe.text_encoder.get_input_embeddings().concept_embedding.data[0] = learned(tmp_path / "two", 4)[
        "text_encoder.concept_embedding"
    ][0]
    rows = token_similarities(
        pipe.unet, pipe.tokenizer, prompt_encoder(pipe), [t.format("<car-1>") for t in templates]
    )
    found = [r for row in rows for word, (r,) in row if word == "<car-1>"]
    assert (low, high) == pytest.approx((min(found), max(found)), rel=1e-4)
    assert low < 1 < high


def test_a_concept_that_differs_from_prompt_to_prompt_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "similarity", lambda self: (0.4, 1.1))
    message = (
        r"r of <car-1> to its concept should be near 1 .* goes from 0.40 to 1.10 .* Train with more steps"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        train_concept(tiny_pipe(), IMAGES, **settled(tmp_path))
    assert {warning.filename for warning in caught if "similarity r" in str(warning.message)} == {__file__}
