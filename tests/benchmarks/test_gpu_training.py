"""Training contenders of the GPU benchmark train what they are named after, and nothing else."""

import pytest
import torch
from gpu.models import SMALL_MODELS, build
from gpu.training import EMBEDDING, FROZEN, INVERSION, LORA, OUTPUTS, with_training


def trained_by(step, tensors):
    """Return the names of the tensors that a step changes."""
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    step()
    return {name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL_MODELS)
def test_each_contender_trains_its_own(kind):
    pipe = build(SMALL_MODELS[kind], torch.device("cpu"), torch.float32)
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    seen = []

    def use(training):
        seen.append(training)
        for trainer in training.trainers:
            trainer.rows = 2
        pipes = [*(trainer.pipe for trainer in training.trainers), *training.others]
        tensors = {
            f"{number} {part} {name}": parameter
            for number, pipe in enumerate(pipes)
            for part in ("unet", "text_encoder", "text_encoder_2")
            if getattr(pipe, part, None) is not None
            for name, parameter in getattr(pipe, part).named_parameters()
        }
        names = {"SD 1.5": ["text_encoder"], "SDXL": ["text_encoder", "text_encoder_2"]}[kind]

        def embeddings(number):
            return {
                name
                for name in tensors
                if name.startswith(f"{number} text_encoder") and name.endswith("concept_embedding")
            }

        training.steps[OUTPUTS]()  # the first one settles i* and s
        for step in training.steps.values():
            step()
        assert trained_by(training.steps[FROZEN], tensors) == set()
        assert trained_by(training.steps[EMBEDDING], tensors) == embeddings(0)
        outputs = {name for name in tensors if name.startswith("1 unet") and "concept_output" in name}
        assert trained_by(training.steps[OUTPUTS], tensors) == outputs != set()
        assert trained_by(training.steps[INVERSION], tensors) == embeddings(2)
        lora = {name for name in tensors if name.startswith("4 unet") and "lora_" in name}
        assert trained_by(training.steps[LORA], tensors) == lora != set()
        assert len(embeddings(0)) == len(embeddings(2)) == len(names)

    with_training(pipe, SMALL_MODELS[kind].resolution, 2, use)
    assert len(seen) == 1
    assert pipe.unet.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipe.unet.state_dict().items())


@pytest.mark.slow
def test_the_frozen_models_step_goes_back_to_the_encodings(monkeypatch):
    pipe = build(SMALL_MODELS["SD 1.5"], torch.device("cpu"), torch.float32)
    reached = []

    def use(training):
        unet = training.others[1].unet

        def remember(module, args, kwargs):
            encodings = args[2]
            encodings.register_hook(lambda gradient: reached.append(tuple(gradient.shape)))

        unet.register_forward_pre_hook(remember, with_kwargs=True)
        for trainer in training.trainers:
            trainer.rows = 3
        training.steps[FROZEN]()

    with_training(pipe, 16, 2, use)
    assert reached == [(3, 77, 32)]
