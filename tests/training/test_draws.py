"""What is random in training is a function of seed, step and row."""

import pytest
import torch

from perfusion_pytorch.training.draws import draw_rows

OPTIONS = {"prompts_of_pictures": [[0, 1], [2], [0, 3, 4]], "latent_shape": (4, 2, 2)}
FIELDS = ("pictures", "prompts", "timesteps", "noise")


def draw(seed=0, step=0, rows=range(8), rows_per_step=8, **options):
    return draw_rows(seed, step, rows, rows_per_step, **OPTIONS | options)


def test_rows_do_not_depend_on_who_draws_them():
    whole, state = draw(step=5), torch.get_rng_state()
    for rows in (range(3), range(3, 8), range(4, 5)):
        part = draw(step=5, rows=rows)
        for name in FIELDS:
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows.start : rows.stop])
    assert torch.equal(torch.get_rng_state(), state)


def test_every_picture_comes_once_before_one_comes_again():
    pictures = torch.cat([draw(step=step, rows_per_step=8).pictures for step in range(30)]).view(-1, 3)
    assert (pictures.sort(dim=1).values == torch.arange(3)).all()
    assert len({tuple(order) for order in pictures.tolist()}) == 6  # in all orders


def test_a_picture_gets_its_own_prompts():
    seen = {0: set(), 1: set(), 2: set()}
    for step in range(30):
        found = draw(step=step)
        for picture, prompt in zip(found.pictures.tolist(), found.prompts.tolist(), strict=True):
            seen[picture].add(prompt)
    assert seen == {0: {0, 1}, 1: {2}, 2: {0, 3, 4}}


def test_seeds_steps_and_rows_are_independent():
    noises = torch.cat([draw(seed=seed, step=step).noise for seed in (0, 1) for step in range(200)]).flatten(
        1
    )
    assert len(noises.unique(dim=0)) == len(noises)
    assert abs(noises.mean()) < 0.02 and abs(noises.std() - 1) < 0.02
    correlations = torch.corrcoef(noises[:3200].view(400, -1).T)
    assert (correlations - torch.eye(len(correlations))).abs().max() < 0.25


@pytest.mark.parametrize("power, mean", [(1.0, 0.5), (0.5, 2 / 3), (2.0, 1 / 3)])
def test_times(power, mean):
    times = torch.cat(
        [draw(step=step, num_timesteps=100, timestep_power=power).timesteps for step in range(250)]
    )
    assert times.min() <= 2 and times.max() == 99
    assert abs((times.double().mean() + 0.5) / 100 - mean) < 0.02  # E[u^p] = 1 / (1 + p)
