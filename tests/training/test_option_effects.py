"""Each option of `train_concept` reaches what it is meant for, and does what it says."""

import pytest
import torch
from helpers.tiny_pipes import IMAGES, MASKS, RESOLUTION, disc, with_trainer
from torch.nn.functional import interpolate

from perfusion_pytorch.training.draws import draw_rows
from perfusion_pytorch.training.interruption import Interruption
from perfusion_pytorch.training.material import encode_pictures
from perfusion_pytorch.training.pictures import load_pictures

OUTPUT, EMBEDDING = 0, -1  # of the trained parameters, the first is an output, the last is the embedding


def material_of(folder, **options):
    return with_trainer(folder, lambda trainer: trainer.material, **options)


def test_captions_take_the_place_of_the_templates(tmp_path):
    def check(name, prompts, of_pictures, **options):
        def use(trainer):
            ids = trainer.pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
            assert torch.equal(trainer.material.ids["text_encoder"], ids)
            assert trainer.prompts_of_pictures == of_pictures

        with_trainer(tmp_path / name, use, **options)

    prompts = ["a <car-1>", "a photo of a <car-1>"]
    check("templates", prompts, [[0, 1]] * 3)
    captions = ["a red car", None, "a <car-1> on blue"]
    prompts += ["a red <car-1>", "a <car-1> on blue"]
    check("captions", prompts, [[2], [0, 1], [3]], captions=captions)


def test_masks_are_those_that_are_given_or_none(tmp_path):
    masks = torch.stack([picture.mask for picture in load_pictures(IMAGES, resolution=16, masks=MASKS)])
    expected = interpolate(masks[:, None], (RESOLUTION // 2,) * 2, mode="area")
    assert torch.equal(material_of(tmp_path / "a").masks, expected) and expected.min() == 0
    assert (material_of(tmp_path / "b", masks=None, use_masks=False).masks == 1).all()
    assert (material_of(tmp_path / "c", masks=None).masks == 1).all()


def test_the_resolution_is_that_of_the_latents_and_of_what_sdxl_is_conditioned_on(tmp_path):
    images = [disc(i, edge=64) for i in range(3)]
    for resolution in (RESOLUTION, 2 * RESOLUTION):
        material = material_of(tmp_path / str(resolution), images=images, masks=None, resolution=resolution)
        pictures = load_pictures(images, resolution=resolution)
        assert material.latents.shape[-2:] == (resolution // 2, resolution // 2)
        assert material.time_ids.tolist() == [[64, 64, 0, 0, resolution, resolution]] * 3
        vae = with_trainer(tmp_path / f"v{resolution}", lambda trainer: trainer.pipe.vae)
        assert torch.equal(material.latents, encode_pictures(vae, pictures))


@pytest.mark.parametrize(("center_crop", "left"), [(True, RESOLUTION // 2), (False, 0)])
def test_wide_pictures_are_cropped_or_squeezed(tmp_path, center_crop, left):
    wide = [image.resize((2 * RESOLUTION, RESOLUTION)) for image in IMAGES]

    def use(trainer):
        return trainer.material, trainer.pipe.vae

    material, vae = with_trainer(tmp_path, use, images=wide, masks=None, center_crop=center_crop)
    pictures = load_pictures(wide, resolution=RESOLUTION, center_crop=center_crop)
    assert torch.equal(material.latents, encode_pictures(vae, pictures))
    sizes = [RESOLUTION, 2 * RESOLUTION, 0, left, RESOLUTION, RESOLUTION]
    assert material.time_ids.tolist() == [sizes] * 3


@pytest.mark.parametrize("options", [{}, {"seed": 1}, {"timestep_power": 0.3}])
def test_seed_and_power_decide_what_is_drawn(tmp_path, options):
    def use(trainer):
        noised = []
        add_noise = trainer.noise_scheduler.add_noise
        trainer.noise_scheduler.add_noise = lambda *given: noised.append(given) or add_noise(*given)
        trainer.step(2, Interruption())
        return noised, trainer.material.latents

    ((latents, noise, times),), all_latents = with_trainer(tmp_path, use, **options)
    seed = options.get("seed", 0)
    power = options.get("timestep_power", 1.0)
    prompts = [[0, 1]] * 3
    shape = all_latents.shape[1:]
    draw = draw_rows(
        seed, 2, range(4), 4, prompts_of_pictures=prompts, latent_shape=shape, timestep_power=power
    )
    assert torch.equal(noise, draw.noise) and torch.equal(times, draw.timesteps)
    assert torch.equal(latents, all_latents[draw.pictures])


@pytest.mark.parametrize("decay", [0.99, 0.1])
def test_the_averages_decay_as_asked(tmp_path, decay):
    """After two steps s* is decay · (mean of the first rows) + (1 − decay) · (mean of the second)."""

    def use(trainer):
        for step in range(2):
            trainer.step(step, Interruption())
        return trainer.material, [layer.superclass_input for layer in trainer.trainables.layers.values()]

    material, averages = with_trainer(tmp_path, use, input_decay=decay)
    means = []
    for step in range(2):
        shape = material.latents.shape[1:]
        draw = draw_rows(0, step, range(4), 4, prompts_of_pictures=[[0, 1]] * 3, latent_shape=shape)
        where = material.superclass_indices[draw.prompts]
        means.append(material.superclass_encodings[draw.prompts, where].mean(dim=0))
    assert not torch.allclose(*means, atol=1e-2)
    expected = decay * means[0] + (1 - decay) * means[1]
    assert averages and all(torch.allclose(average, expected, atol=1e-5) for average in averages)


def gradients_and_values(trainer, steps=3):
    """What the optimizer is given in each step, and the parameters before the first and after each."""
    gradients = []
    values = []
    step = trainer.phase.optimizer.step

    def remember():
        if not values:  # only now, since the first forward pass initialises the outputs
            values.append([p.detach().clone() for p in trainer.phase.parameters])
        gradients.append([p.grad.clone() for p in trainer.phase.parameters])
        step()
        values.append([p.detach().clone() for p in trainer.phase.parameters])

    trainer.phase.optimizer.step = remember
    for number in range(steps):
        trainer.step(number, Interruption())
    return gradients, values


def adamw(start, gradients, *, rate, beta1=0.9, beta2=0.999, epsilon=1e-8, decay=0.0):
    """AdamW as its paper has it, in float64; yields the parameter after each step."""
    value = start.double()
    first = torch.zeros_like(value)
    second = torch.zeros_like(value)
    for number, gradient in enumerate(gradients, 1):
        first = beta1 * first + (1 - beta1) * gradient.double()
        second = beta2 * second + (1 - beta2) * gradient.double() ** 2
        direction = (first / (1 - beta1**number)) / ((second / (1 - beta2**number)).sqrt() + epsilon)
        value = value - rate * decay * value - rate * direction
        yield value


@pytest.mark.parametrize(
    ("options", "rates", "settings"),
    [
        ({}, (0.03, 0.006), {}),
        ({"learning_rate": 0.01}, (0.01, 0.006), {}),
        ({"embedding_learning_rate": 1}, (0.03, 1.0), {}),
        ({"adam_beta1": 0.0}, (0.03, 0.006), {"beta1": 0.0}),
        ({"adam_beta2": 0.1}, (0.03, 0.006), {"beta2": 0.1}),
        ({"adam_epsilon": 1.0}, (0.03, 0.006), {"epsilon": 1.0}),
        ({"adam_weight_decay": 10.0}, (0.03, 0.006), {"decay": 10.0}),
    ],
)
def test_the_optimizer_is_adamw_with_these_numbers(tmp_path, options, rates, settings):
    gradients, values = with_trainer(tmp_path, gradients_and_values, **options)
    for which, rate in zip((OUTPUT, EMBEDDING), rates, strict=True):
        start = values[0][which]
        expected = list(adamw(start, [step[which] for step in gradients], rate=rate, **settings))
        for step, value in zip(values[1:], expected, strict=True):
            moved = (value - start).abs().max()
            assert moved > 0 and (step[which] - value).abs().max() < 1e-3 * moved + 1e-7


def test_gradients_are_scaled_down_to_the_norm(tmp_path):
    def norms(**options):
        gradients, _ = with_trainer(tmp_path / str(options), gradients_and_values, **options)
        return [torch.cat([gradient.flatten() for gradient in step]).norm().item() for step in gradients]

    free = norms()
    limit = 0.5 * free[0]
    assert norms(max_grad_norm=limit)[0] == pytest.approx(limit, rel=1e-3)
    assert norms(max_grad_norm=2 * max(free)) == free


def first_gradients(folder, **options):
    return with_trainer(folder, lambda trainer: gradients_and_values(trainer, steps=1)[0][0], **options)


def test_the_gate_of_training(tmp_path):
    """At a lower β the gate is wider open, so that more of the gradient reaches the outputs."""

    def use(trainer):
        layers = trainer.trainables.layers.values()
        return {(layer.train_beta, layer.train_temperature) for layer in layers}

    gate = {"train_beta": 0.5, "train_temperature": 0.3}
    assert with_trainer(tmp_path / "a", use, **gate) == {(0.5, 0.3)}
    norms = [
        first_gradients(tmp_path / str(beta), train_beta=beta)[OUTPUT].norm().item()
        for beta in (0.5, 0.75, 0.95, 1.5)
    ]
    assert norms == sorted(norms, reverse=True) and norms[0] > 10 * norms[-1]


def test_the_gradient_into_the_text_encoder_is_a_fraction(tmp_path):
    """All that reaches the embedding comes from wrapped layers: twice the fraction is twice the gradient."""
    fractions = (0.0, 0.1, 0.2)
    gradients = [
        first_gradients(tmp_path / str(fraction), frac_gradient_concept_embed=fraction)
        for fraction in fractions
    ]
    none, one, two = (gradient[EMBEDDING] for gradient in gradients)
    assert one.abs().max() > 0 and torch.allclose(two - none, 2 * (one - none), rtol=1e-3, atol=1e-7)
    assert all(torch.equal(gradients[0][OUTPUT], gradient[OUTPUT]) for gradient in gradients)
