"""One step of training a concept: draw rows, predict, weigh by masks, average over processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perfusion_pytorch.concept_inputs import batch_given
from perfusion_pytorch.layers.training_batch import TrainingBatch
from perfusion_pytorch.loss import loss_fn_weighted_by_mask
from perfusion_pytorch.pipelines.encoding import encode_token_ids
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.training.draws import Draw, draw_rows
from perfusion_pytorch.training.interruption import Interruption
from perfusion_pytorch.training.material import Material
from perfusion_pytorch.training.phases import Phase, encode_prompts, settle_
from perfusion_pytorch.training.preparation import Trainables, gate_of
from perfusion_pytorch.training.state import restore_training_tensors, training_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator
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
        phases: what is trained in which steps.
        train_gate: (β, τ) in training.
        prompts_of_pictures, seed, timestep_power: see `draw_rows`.
        rows: rows of a forward pass in each process.
        passes: forward passes of a step, whose gradients are averaged.
        max_grad_norm: gradients of a larger norm are scaled down to it.
        phase: the phase of the last step, or the first phase.
        rates: the last step's learning rates, by name.
        outputs: the text encoders' outputs for all prompts, once the embedding is settled.
    """

    pipe: StableDiffusion
    accelerator: "Accelerator"
    trainables: Trainables
    material: Material
    noise_scheduler: "DDPMScheduler"
    phases: Sequence[Phase]
    train_gate: tuple[float, float]
    prompts_of_pictures: Sequence[Sequence[int]]
    seed: int
    rows: int
    passes: int
    max_grad_norm: float | None = None
    timestep_power: float = 1.0
    phase: Phase = field(init=False)
    rates: dict[str, float] = field(init=False, default_factory=dict)
    outputs: list[Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._enter(self.phases[0])
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
        phase = self._phase_of(step)
        if phase is not self.phase:
            self._enter(phase)
        if phase.trains == "outputs" and self.outputs is None:
            self.outputs = self._encode()
            settle_(self.trainables, self.material, self.outputs[0])
        passes = {
            "embedding": self._embedding_pass,
            "outputs": self._output_pass,
            "all": self._joint_pass,
        }
        self.rates = phase.rates
        losses = []
        for number in range(self.passes):
            start = (number * self.accelerator.num_processes + self.accelerator.process_index) * self.rows
            losses.append(passes[phase.trains](step, range(start, start + self.rows)))
        loss, is_stopping = self._average(torch.stack(losses).mean(), interruption.is_wanted)
        if not loss < float("inf"):  # nor NaN
            raise RuntimeError(f"The loss must be finite, got {loss} in step {step + 1}. {NOT_FINITE}")
        if self.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(phase.parameters, self.max_grad_norm)
        phase.optimizer.step()
        if not phase.optimizer.step_was_skipped:
            phase.lr_scheduler.step()
        phase.optimizer.zero_grad()
        return loss, is_stopping

    def _phase_of(self, step: int) -> Phase:
        return [phase for phase in self.phases if phase.first <= step][-1]

    def _enter(self, phase: Phase) -> None:
        """Let a phase begin: its parameters alone get gradients; layers average if all is trained at once."""
        self.phase = phase
        for other in self.phases:
            for parameter in other.parameters:
                parameter.requires_grad_(other is phase)
        for layer in self.trainables.layers.values():
            layer.train(phase.trains == "all")

    def _encode(self) -> list[Tensor]:
        with self.accelerator.autocast():
            return encode_prompts(self.pipe, self.material)

    def similarity(self) -> tuple[float, float]:
        """Return the smallest and the largest r of the concept's token over the training prompts."""
        encodings, *_ = self._encode() if self.outputs is None else self.outputs
        layer = next(iter(self.trainables.layers.values()))
        rows = torch.arange(len(encodings), device=encodings.device)
        at_token = encodings[rows, self.material.concept_indices].to(layer.concept_dual.dtype)
        similarities = at_token @ layer.concept_dual[0]
        return similarities.min().item(), similarities.max().item()

    def _embedding_pass(self, step: int, rows: range) -> Tensor:
        """Add the gradients of some rows into the embedding; return their loss. No layer has an edit yet."""
        draw = self._draw(step, rows)
        used, which = draw.prompts.unique(return_inverse=True)  # each prompt is encoded once
        with self.accelerator.autocast():
            encodings, pooled = encode_token_ids(
                self.pipe, {name: ids[used] for name, ids in self.material.ids.items()}
            )
        outputs = [encodings] if pooled is None else [encodings, pooled]
        loss = self._loss(draw, [output.index_select(0, which) for output in outputs])
        self.accelerator.backward(loss / self.passes)
        return loss.detach()

    def _output_pass(self, step: int, rows: range) -> Tensor:
        """Add the gradients of some rows into the value outputs; return their loss. Nothing else moves."""
        assert self.outputs is not None
        draw = self._draw(step, rows)
        with gate_of(self.trainables.layers.values(), *self.train_gate):
            loss = self._loss(draw, [output[draw.prompts] for output in self.outputs])
            self.accelerator.backward(loss / self.passes)
        return loss.detach()

    def _joint_pass(self, step: int, rows: range) -> Tensor:
        """Add the gradients of some rows into all that is trained; return their loss.

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
        parameters = self.phase.parameters
        flat = torch.cat([*(_gradient_of(p).flatten() for p in parameters), news])
        *gradients, news = self.accelerator.reduce(flat, "mean").split([*(p.numel() for p in parameters), 2])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            _gradient_of(parameter).copy_(gradient.view_as(parameter))
        mean_loss, stopping = news.tolist()
        return mean_loss, stopping > 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that a run changes: tensors, and what JSON can hold."""
        scaler = self.accelerator.scaler
        about = {
            "trains": self.phase.trains,
            "lr_scheduler": self.phase.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return training_tensors(self.trainables, self.phase.optimizer), about

    def restore(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Put back what `state` returned after so many steps; a ValueError where it is of another model."""
        phase = self._phase_of(max(0, step - 1))
        if about.get("trains", "all") != phase.trains:
            raise ValueError(
                f"`embedding_steps` must be what the run began with: its step {step} trained "
                f"{about.get('trains', 'all')}, but now it would train {phase.trains}."
            )
        restore_training_tensors(tensors, self.trainables, phase.optimizer)
        self._enter(phase)
        if phase.trains == "outputs":
            self.outputs = self._encode()
        phase.lr_scheduler.load_state_dict(dict(about["lr_scheduler"]))
        rates = phase.lr_scheduler.get_last_lr()
        for group, rate in zip(phase.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.accelerator.scaler is not None and about["scaler"]:
            self.accelerator.scaler.load_state_dict(about["scaler"])
