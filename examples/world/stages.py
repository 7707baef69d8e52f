"""One stage of the training: a loop with a budget in steps or minutes, checkpoints, and an average of the weights."""

import os
import time

import torch
from torch import nn
from tqdm import tqdm


def device():
    """Return the device that everything is trained on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def schedule(progress, step, *, warmup_steps=200, decay_from=0.6):
    """Return the learning rate in parts of its peak: a short rise, a plateau, and a fall to zero; `progress` in [0, 1]."""
    return min(1.0, (step + 1) / warmup_steps, (1 - progress) / (1 - decay_from))


class Average:
    """An exponential moving average of weights in float32, whose memory grows with the number of steps."""

    def __init__(self, module, longest=0.999):
        self.longest = longest
        self.weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module, step):
        """Move towards the module's weights after `step` steps."""
        decay = min(self.longest, (step + 1) / (step + 20))
        state = module.state_dict()
        torch._foreach_lerp_(list(self.weights.values()), [state[name] for name in self.weights], 1 - decay)


def orthogonalised(matrix, steps=5):
    """Return about the nearest matrix of orthonormal rows or columns, by Newton and Schulz's iteration; matrix of (rows, columns)."""
    x = matrix / (matrix.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.mT if is_tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised, for weights of two axes and more (Jordan et al. 2024, "Muon").

    After fifty steps of the autoencoder, once each: 13.8 dB, and 12.0 with AdamW. Longer runs were not compared.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                mean = state.setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                move = orthogonalised(weight.grad.lerp(mean, group["momentum"]).flatten(1))
                move *= max(1, move.shape[0] / move.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                    move.view_as(weight), alpha=group["lr"]
                )


def clock():
    """Return seconds of work: on a CPU those of one of the threads, so that what else runs there does not spend a stage's budget."""
    if device() == "cuda":
        torch.cuda.synchronize()
        return time.monotonic()
    return time.process_time() / torch.get_num_threads()


def optimizers(modules, peak, muon_peak):
    """Return AdamW for all parameters, or with `muon_peak` for those of one axis and Muon for the others."""
    matrices = [p for p in modules.parameters() if p.ndim > 1]
    others = [p for p in modules.parameters() if p.ndim <= 1]
    found = []
    if muon_peak is not None:
        found.append(Muon(matrices, lr=muon_peak))
    groups = [{"params": others, "weight_decay": 0.0}]
    groups += [{"params": matrices, "weight_decay": 0.01}] if muon_peak is None else []
    found.append(torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


def train_stage(name, folder, modules, batch_loss, *, steps=None, minutes=None, peak, muon_peak=None, save_every=180.0,
                after=None, report_every=100, average=None):  # fmt: skip
    """Train `modules` until the budget is spent; what is random in a step is a function of the step.

    Args:
        name: stage; its checkpoint is `name.pt` in `folder`.
        folder: work folder.
        modules: a `ModuleDict`, restored from the checkpoint and trained in place.
        batch_loss: `(step, progress, generator) -> (scalar loss, {what to report: number})`; the generator is the device's.
        steps, minutes: the budget, minutes as `clock` counts them; with both, the one that is spent first counts. What earlier runs
            spent counts too.
        peak: highest learning rate of AdamW.
        muon_peak: that of Muon, which then trains the weights of two axes and more; None: AdamW trains all.
        save_every: seconds between checkpoints.
        after: called with the step after each checkpoint.
        report_every: steps between lines about the losses.
        average: an `Average` of the modules, updated and saved along.
    """
    path, on = folder / f"{name}.pt", device()
    running = optimizers(modules, peak, muon_peak)
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=on, weights_only=True)
        modules.load_state_dict(state["modules"])
        for optimizer, earlier in zip(running, state["optimizers"], strict=True):
            optimizer.load_state_dict(earlier)
        step, spent = state["step"], state["seconds"]
        if average is not None:
            average.weights = state["average"]

    def save():
        state = {"modules": modules.state_dict(), "step": step, "seconds": spent}
        state["optimizers"] = [optimizer.state_dict() for optimizer in running]
        if average is not None:
            state["average"] = average.weights
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
        if after is not None:
            after(step)

    def progress():
        parts = [step / steps if steps else 1.0] if steps is not None else []
        parts += [spent / (60 * minutes)] if minutes is not None else []
        return max(parts)

    modules.train()
    generator = torch.Generator(on)
    saved_at, began = time.monotonic(), clock()
    sums, count = {}, 0
    while progress() < 1:
        for group in (group for optimizer in running for group in optimizer.param_groups):
            group["lr"] = group["peak"] * schedule(min(1.0, progress()), step)
        loss, numbers = batch_loss(step, progress(), generator.manual_seed(step))
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for optimizer in running:
            optimizer.step()
        modules.zero_grad()
        if average is not None:
            average.update(modules, step)
        step, count = step + 1, count + 1
        for key, value in ({"loss": loss.detach()} | numbers).items():
            sums[key] = sums.get(key, 0.0) + value
        if on == "cpu" or step % 20 == 0:  # on a GPU it waits for the device
            now = clock()
            spent, began = spent + now - began, now
        if step % report_every == 0:
            words = ", ".join(f"{key} {float(value) / count:.4f}" for key, value in sums.items())
            tqdm.write(
                f"{time.strftime('%H:%M:%S')} {name} step {step} ({progress():.1%}, {spent / 60:.1f} min): {words}"
            )
            sums, count = {}, 0
        if time.monotonic() - saved_at > save_every:
            save()
            saved_at, began = time.monotonic(), clock()
    if (
        not path.exists()
        or torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"] != step
    ):
        save()
    modules.eval().requires_grad_(False)
