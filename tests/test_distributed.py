"""Data parallelism: two processes reach the state that one process with the joint batch has."""

import pytest
import torch
from helpers.ranks import join, leave_together
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from perfusion_pytorch import concept_inputs, get_finetune_optimizer, wrap_cross_attentions_

STEPS, BATCH, D, OUT = 3, 4, 6, 5


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.to_k = nn.Linear(D, OUT)
        self.to_v = nn.Linear(D, OUT)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

        self.gain = nn.Parameter(torch.ones(D))  # stands for the text encoder's embedding

    def forward(self, text_enc):
        text_enc = text_enc * self.gain
        return self.to_k(text_enc) * self.to_v(text_enc)


def batches(positions):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield *torch.randn(2, BATCH, 3, D, generator=generator), torch.tensor(positions)


def train(case, rows, parallel):
    """Train on some rows of every batch; return state, the gain's last gradient, number of collectives."""
    positions, slots = case
    model = Attention()
    options = {"input_decay": 0.5, "num_finetune_prompts": 3}
    wrap_cross_attentions_(model, C=torch.eye(D) + 0.1, key_names=["to_k"], value_names=["to_v"], **options)
    called = DistributedDataParallel(model) if parallel else model
    optimizer = get_finetune_optimizer(model)
    collectives = []
    all_reduce = distributed.all_reduce
    distributed.all_reduce = lambda *args, **kwargs: (collectives.append(args), all_reduce(*args, **kwargs))
    for text_enc, superclass, indices in batches(positions):
        inputs = {"text_enc_with_superclass": superclass[rows], "concept_indices": indices[rows]}
        if slots is not None:
            inputs["prompt_ids"] = torch.tensor(slots)[rows]
        model.zero_grad()
        with concept_inputs(model, **inputs):
            called(text_enc[rows]).square().mean().backward()
        optimizer.step()
    distributed.all_reduce = all_reduce
    return model.state_dict(), model.gain.grad, len(collectives)


def work(rank, case, rows, folder):
    torch.set_num_threads(1)
    join(folder, rank, 2)
    torch.save(train(case, rows[rank], parallel=True), folder / f"{rank}.pt")
    leave_together(folder, rank, 2)


def on_two_ranks(case, rows, folder):
    torch.multiprocessing.spawn(work, (case, rows, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


HALVES, ALL = ([0, 1], [2, 3]), ([0, 1, 2, 3],) * 2
CASES = [
    ([0, 2, 1, 1], None),
    ([0, 2, -1, 1], None),  # unequal numbers of rows with the concept
    ([1, 2, -1, -1], None),  # one rank has none
    ([0, 2, 1, 1], [0, 2, 2, 0]),
    ([0, 2, 1, -1], [0, 0, 1, 2]),  # each rank has a slot of its own, and nobody has slot 2
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_reach_the_state_of_one_with_the_joint_batch(assert_near, tmp_path, case):
    (first, _, calls), (second, *_) = on_two_ranks(case, HALVES, tmp_path)
    joint, _, no_calls = train(case, ALL[0], parallel=False)
    assert calls == STEPS and no_calls == 0  # one small collective a step, for all layers together
    for name, value in joint.items():
        assert torch.equal(first[name], second[name]), name
        if value.is_floating_point():
            assert_near(first[name], value)
        else:
            assert torch.equal(first[name], value)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[3]])
def test_ranks_of_equal_rows_have_the_gradient_of_one(assert_near, tmp_path, case):
    """A rank's gradient through i* is that of its own rows, so the ranks' mean has one process's scale."""
    (_, gradient, _), (_, other, _) = on_two_ranks(case, ALL, tmp_path)
    assert torch.equal(gradient, other)
    assert_near(gradient, train(case, ALL[0], parallel=False)[1])
