"""Data parallelism: two processes reach the state that one process with the joint batch has."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from perfusion_pytorch import concept_inputs, get_finetune_optimizer, wrap_cross_attentions_

STEPS, BATCH, D, OUT = 3, 4, 6, 5


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.to_k, self.to_v = nn.Linear(D, OUT), nn.Linear(D, OUT)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, text_enc):
        return self.to_k(text_enc) * self.to_v(text_enc)


def batches(positions):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield *torch.randn(2, BATCH, 3, D, generator=generator), torch.tensor(positions)


def train(positions, rows, parallel):
    """Train on some rows of every batch, and return the state."""
    model = Attention()
    wrap_cross_attentions_(model, C=torch.eye(D) + 0.1, key_names=["to_k"], value_names=["to_v"], input_decay=0.5)
    called = DistributedDataParallel(model) if parallel else model
    optimizer = get_finetune_optimizer(model)
    for text_enc, superclass, indices in batches(positions):
        inputs = {"text_enc_with_superclass": superclass[rows], "concept_indices": indices[rows]}
        with concept_inputs(model, **inputs):
            called(text_enc[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def work(rank, positions, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    state = train(positions, slice(2 * rank, 2 * rank + 2), parallel=True)
    torch.save(state, f"{folder}/state-{rank}.pt")
    distributed.barrier()  # gloo aborts a process whose peer leaves while its own threads still talk
    distributed.destroy_process_group()


@pytest.mark.parametrize("positions", [[0, 2, 1, 1], [0, 2, -1, 1], [1, 2, -1, -1]])
def test_two_ranks_reach_the_state_of_one_with_the_joint_batch(assert_near, tmp_path, positions):
    """Also where the ranks have unequal numbers of rows with the concept, or one of them none."""
    torch.multiprocessing.spawn(work, (positions, str(tmp_path)), nprocs=2)
    states = [torch.load(tmp_path / f"state-{rank}.pt") for rank in range(2)]
    joint = train(positions, slice(None), parallel=False)
    for name, value in joint.items():
        assert torch.equal(states[0][name], states[1][name]), name
        if value.is_floating_point():
            assert_near(states[0][name], value)
        else:
            assert torch.equal(states[0][name], value)
