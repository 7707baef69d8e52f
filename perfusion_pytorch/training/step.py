"""One step of training a concept: draw rows, predict, weigh by masks, and average gradients over processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perfusion_pytorch.concept_inputs import batch_given
from perfusion_pytorch.layers.training_batch import TrainingBatch
from perfusion_pytorch.loss import loss_fn_weighted_by_mask
from perfusion_pytorch.pipelines.encoding import encode_token_ids
from perfusion_pytorch.training.checkpoints import restore_training_tensors, training_tensors
from perfusion_pytorch.training.draws import draw_rows
from perfusion_pytorch.training.interruption import Interruption
from perfusion_pytorch.training.preparation import Cached, Prepared

NOT_FINITE = "Lower the learning rates, or train a pipeline in float32 without mixed precision; checkpoints that were written before are good."


@dataclass(eq=False)
class Trainer:
    """What a run of `train_concept` works with.

    Attributes:
        pipe: the prepared pipeline.
        accelerator: accelerate's; gradients are averaged over its processes here and not by DistributedDataParallel, since there are few.
        prepared, cached: what is trained, and what the frozen model says.
        noises: the training noise scheduler.
        optimizer, lr_scheduler: over what is trained; the optimizer is prepared by the accelerator.
        prompts_of_pictures: see `draw_rows`, as seed and timestep_power.
        rows: rows of a forward pass in each process.
        passes: forward passes of a step, whose gradients are averaged.
        max_grad_norm: gradients of a larger norm are scaled down to it.
    """

    pipe: object
    accelerator: object
    prepared: Prepared
    cached: Cached
    noises: object
    optimizer: object
    lr_scheduler: object
    prompts_of_pictures: Sequence[Sequence[int]]
    seed: int
    rows: int
    passes: int
    max_grad_norm: float | None = None
    timestep_power: float = 1.0

    def __post_init__(self):
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.device, self.dtype = (
            self.pipe.unet.device,
            self.pipe.unet.dtype,
        )  # once: the UNet goes through all of its modules to tell

    def step(self, step: int, interruption: Interruption) -> tuple[float, bool]:
        """Train one step.

        Args:
            step: its number, from 0.
            interruption: whether this process is wanted to stop after it.

        Returns:
            The loss, and whether any process is wanted to stop.

        Raises:
            RuntimeError: the loss is not finite; nothing was learned from it.
        """
        losses = []
        for number in range(self.passes):
            start = (number * self.accelerator.num_processes + self.accelerator.process_index) * self.rows
            losses.append(self._forward_and_backward(step, range(start, start + self.rows)))
        loss, stopping = self._average(torch.stack(losses).mean(), interruption.is_wanted)
        if not loss < float("inf"):  # nor NaN
            raise RuntimeError(f"The loss must be finite, got {loss} in step {step + 1}. {NOT_FINITE}")
        if self.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return loss, stopping

    def _forward_and_backward(self, step, rows):
        """Add the gradients of some rows; return their loss, a tensor.

        The text encoder's part of backward comes after that of the UNet, so that the gradient that reaches i* can be averaged over
        processes in between. i* is a mean over all of them: each row of each process gets its share of the joint gradient.
        """
        cached, unet, accelerator = self.cached, self.pipe.unet, self.accelerator
        device = self.device
        draw = draw_rows(
            self.seed,
            step,
            rows,
            self.rows * self.passes * accelerator.num_processes,
            prompts_of_pictures=self.prompts_of_pictures,
            latent_shape=cached.latents.shape[1:],
            num_timesteps=self.noises.config.num_train_timesteps,
            timestep_power=self.timestep_power,
        )
        pictures, prompts, times = (
            draw.pictures.to(device),
            draw.prompts.to(device),
            draw.timesteps.to(device),
        )
        noise, latents = draw.noise.to(device), cached.latents[pictures]
        noisy = self.noises.add_noise(latents, noise, times)
        used, which = prompts.unique(return_inverse=True)  # a prompt that several rows have is encoded once
        with accelerator.autocast():
            encodings, pooled = encode_token_ids(
                self.pipe, {name: ids[used] for name, ids in cached.ids.items()}
            )
        outputs = [encodings] if pooled is None else [encodings, pooled]
        leaves = [output.detach().requires_grad_() for output in outputs]
        # Below, `index_select` adds the gradients of a prompt's rows in one order; an index would do so in any, where threads share them.
        conditions = None
        if pooled is not None:
            conditions = {
                "text_embeds": leaves[1].index_select(0, which),
                "time_ids": cached.time_ids[pictures].to(pooled.dtype),
            }
        positions = cached.concept_indices[prompts]
        concept_gradient = torch.zeros(1, encodings.shape[-1], device=device, requires_grad=True)
        inputs = TrainingBatch(
            text_enc_with_superclass=cached.superclass_encodings[prompts],
            concept_indices=positions,
            superclass_indices=cached.superclass_indices[prompts],
            concept_gradient=concept_gradient,
            joint=True,
            is_split_once=True,
        )
        with batch_given(self.prepared.layers.values(), inputs):
            with accelerator.autocast():
                prediction = unet(
                    noisy.to(self.dtype),
                    times,
                    leaves[0].index_select(0, which),
                    added_cond_kwargs=conditions,
                ).sample
            loss = loss_fn_weighted_by_mask(
                prediction, self._target(latents, noise, times), cached.masks[pictures]
            )
            accelerator.backward(loss / self.passes)
        share = accelerator.reduce(concept_gradient.grad, "mean") / len(rows)
        gradients = [leaf.grad for leaf in leaves]
        gradients[0].index_put_(
            (which, positions), share.to(gradients[0].dtype).expand(len(rows), -1), accumulate=True
        )
        torch.autograd.backward(outputs, gradients)
        return loss.detach()

    def _target(self, latents, noise, times):
        kind = self.noises.config.prediction_type
        if kind == "v_prediction":
            return self.noises.get_velocity(latents, noise, times)
        return noise if kind == "epsilon" else latents

    def _average(self, loss, is_stopping) -> tuple[float, bool]:
        """Average the gradients over processes, in one collective, with the loss and the wish to stop."""
        if self.accelerator.num_processes == 1:
            return loss.item(), is_stopping
        news = torch.stack([loss, torch.full_like(loss, is_stopping)])
        flat = torch.cat([*(p.grad.flatten() for p in self.parameters), news])
        *gradients, news = self.accelerator.reduce(flat, "mean").split(
            [*(p.numel() for p in self.parameters), 2]
        )
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad.copy_(gradient.view_as(parameter))
        loss, stopping = news.tolist()
        return loss, stopping > 0

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Return all that a run changes: tensors, and what JSON can hold."""
        scaler = self.accelerator.scaler
        about = {
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return training_tensors(self.prepared.layers, self.prepared.embeddings, self.optimizer), about

    def restore(self, tensors: Mapping[str, Tensor], about: Mapping) -> None:
        """Put back what `state` returned; a ValueError where it is of another model."""
        restore_training_tensors(tensors, self.prepared.layers, self.prepared.embeddings, self.optimizer)
        self.lr_scheduler.load_state_dict(dict(about["lr_scheduler"]))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.accelerator.scaler is not None and about["scaler"]:
            self.accelerator.scaler.load_state_dict(about["scaler"])
