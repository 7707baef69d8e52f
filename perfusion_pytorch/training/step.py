"""One step of training a concept: draw rows, predict, weigh by masks, average over processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perfusion_pytorch.concept_inputs import batch_given
from perfusion_pytorch.layers.training_batch import TrainingBatch
from perfusion_pytorch.loss import loss_fn_weighted_by_mask
from perfusion_pytorch.pipelines.encoding import encode_token_ids
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.training.draws import Draw, draw_rows
from perfusion_pytorch.training.interruption import Interruption
from perfusion_pytorch.training.material import Material
from perfusion_pytorch.training.preparation import Trainables
from perfusion_pytorch.training.state import restore_training_tensors, training_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from diffusers import DDPMScheduler

NOT_FINITE = (
    "Lower the learning rates, or train a pipeline in float32 without mixed precision; "
    "checkpoints that were written before are good."
)


def _gradient_of(tensor: Tensor) -> Tensor:
    """Return the gradient of a tensor that has one after backward."""
    assert tensor.grad is not None
    return tensor.grad


@dataclass(eq=False)
class Trainer:
    """Trains one step at a time.

    Attributes:
        pipe: the prepared pipeline.
        accelerator: accelerate's. Gradients are averaged over its processes here and not by
            DistributedDataParallel, since there are few.
        trainables: what is trained.
        material: what the frozen model makes of pictures and prompts.
        noise_scheduler: adds noise to latents.
        optimizer, lr_scheduler: over what is trained; the optimizer is prepared by the accelerator.
        prompts_of_pictures, seed, timestep_power: see `draw_rows`.
        rows: rows of a forward pass in each process.
        passes: forward passes of a step, whose gradients are averaged.
        max_grad_norm: gradients of a larger norm are scaled down to it.
        parameters: what is trained, as the optimizer has it.
    """

    pipe: StableDiffusion
    accelerator: "Accelerator"
    trainables: Trainables
    material: Material
    noise_scheduler: "DDPMScheduler"
    optimizer: "AcceleratedOptimizer"
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    prompts_of_pictures: Sequence[Sequence[int]]
    seed: int
    rows: int
    passes: int
    max_grad_norm: float | None = None
    timestep_power: float = 1.0
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        # Once and not in each step, because the UNet goes through all of its modules to find out.
        self.device: torch.device = self.pipe.unet.device
        self.dtype: torch.dtype = self.pipe.unet.dtype

    def step(self, step: int, interruption: Interruption) -> tuple[float, bool]:
        """Train one step.

        Args:
            step: its number, from 0.
            interruption: whether this process has been asked to stop after it.

        Returns:
            The loss, and whether any process has been asked to stop.

        Raises:
            RuntimeError: the loss is not finite; nothing was learned from it.
        """
        losses = []
        for number in range(self.passes):
            start = (number * self.accelerator.num_processes + self.accelerator.process_index) * self.rows
            losses.append(self._forward_and_backward(step, range(start, start + self.rows)))
        loss, is_stopping = self._average(torch.stack(losses).mean(), interruption.is_wanted)
        if not loss < float("inf"):  # nor NaN
            raise RuntimeError(f"The loss must be finite, got {loss} in step {step + 1}. {NOT_FINITE}")
        if self.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return loss, is_stopping

    def _forward_and_backward(self, step: int, rows: range) -> Tensor:
        """Add the gradients of some rows; return their loss.

        The text encoder's part of backward comes after that of the UNet, so that the gradient that reaches i*
        can be averaged over processes in between. i* is a mean over all of them: each row of each process
        gets its share of the joint gradient.
        """
        draw = self._draw(step, rows)
        used, which = draw.prompts.unique(return_inverse=True)  # each prompt is encoded once
        with self.accelerator.autocast():
            ids = {name: ids[used] for name, ids in self.material.ids.items()}
            encodings, pooled = encode_token_ids(self.pipe, ids)
        outputs = [encodings] if pooled is None else [encodings, pooled]
        leaves = [output.detach().requires_grad_() for output in outputs]
        concept_gradient = torch.zeros(1, encodings.shape[-1], device=self.device, requires_grad=True)
        batch = self._batch(draw, concept_gradient)
        with batch_given(self.trainables.layers.values(), batch):
            # `index_select` adds the gradients of a prompt's rows in one order. An index would do so in any
            # order where threads share them.
            loss = self._loss(draw, [leaf.index_select(0, which) for leaf in leaves])
            self.accelerator.backward(loss / self.passes)
        share = self.accelerator.reduce(_gradient_of(concept_gradient), "mean") / len(rows)
        gradients = [_gradient_of(leaf) for leaf in leaves]
        gradients[0].index_put_(
            (which, batch.concept_indices),
            share.to(gradients[0].dtype).expand(len(rows), -1),
            accumulate=True,
        )
        torch.autograd.backward(outputs, gradients)
        return loss.detach()

    def _draw(self, step: int, rows: range) -> Draw:
        """Return what the rows of a step are, on the device."""
        draw = draw_rows(
            self.seed,
            step,
            rows,
            self.rows * self.passes * self.accelerator.num_processes,
            prompts_of_pictures=self.prompts_of_pictures,
            latent_shape=self.material.latents.shape[1:],
            num_timesteps=self.noise_scheduler.config.num_train_timesteps,
            timestep_power=self.timestep_power,
        )
        return draw.to(self.device)

    def _batch(self, draw: Draw, concept_gradient: Tensor) -> TrainingBatch:
        """Return what the wrapped layers need beside the text encodings."""
        return TrainingBatch(
            text_enc_with_superclass=self.material.superclass_encodings[draw.prompts],
            concept_indices=self.material.concept_indices[draw.prompts],
            superclass_indices=self.material.superclass_indices[draw.prompts],
            concept_gradient=concept_gradient,
            joint=True,
            is_split_once=True,
        )

    def _loss(self, draw: Draw, outputs: list[Tensor]) -> Tensor:
        """Return the loss of rows, given the text encoder's outputs: encodings, for SDXL also pooled ones."""
        encodings, *pooled = outputs
        conditions = None
        if pooled:
            time_ids = self.material.time_ids[draw.pictures].to(pooled[0].dtype)
            conditions = {"text_embeds": pooled[0], "time_ids": time_ids}
        latents = self.material.latents[draw.pictures]
        noisy = self.noise_scheduler.add_noise(latents, draw.noise, draw.timesteps).to(self.dtype)
        with self.accelerator.autocast():
            prediction = self.pipe.unet(noisy, draw.timesteps, encodings, added_cond_kwargs=conditions).sample
        target = self.target(latents, draw.noise, draw.timesteps)
        return loss_fn_weighted_by_mask(prediction, target, self.material.masks[draw.pictures])

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the UNet is to predict: noise, velocity, or the latents themselves."""
        kind = self.noise_scheduler.config.prediction_type
        if kind == "v_prediction":
            return self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return noise if kind == "epsilon" else latents

    def _average(self, loss: Tensor, is_stopping: bool) -> tuple[float, bool]:
        """Average gradients and loss over processes, and find out whether any is to stop."""
        if self.accelerator.num_processes == 1:
            return loss.item(), is_stopping
        news = torch.stack([loss, torch.full_like(loss, is_stopping)])
        flat = torch.cat([*(_gradient_of(p).flatten() for p in self.parameters), news])
        *gradients, news = self.accelerator.reduce(flat, "mean").split(
            [*(p.numel() for p in self.parameters), 2]
        )
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            _gradient_of(parameter).copy_(gradient.view_as(parameter))
        mean_loss, stopping = news.tolist()
        return mean_loss, stopping > 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that a run changes: tensors, and what JSON can hold."""
        scaler = self.accelerator.scaler
        about = {
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return training_tensors(self.trainables, self.optimizer), about

    def restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Put back what `state` returned; a ValueError where it is of another model."""
        restore_training_tensors(tensors, self.trainables, self.optimizer)
        self.lr_scheduler.load_state_dict(dict(about["lr_scheduler"]))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.accelerator.scaler is not None and about["scaler"]:
            self.accelerator.scaler.load_state_dict(about["scaler"])
