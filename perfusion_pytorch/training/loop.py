"""The loop of a training run: steps, checkpoints, validation pictures, a progress bar, trackers, and how it is stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perfusion_pytorch.training.checkpoints import save_checkpoint
from perfusion_pytorch.training.interruption import noted_interruption
from perfusion_pytorch.training.step import NOT_FINITE, Trainer
from perfusion_pytorch.training.validation import write_validation_grid


@dataclass(eq=False)
class Run:
    """What a run does beside its steps, and what it has written.

    Attributes:
        output_dir: its folder.
        settings: what a checkpoint says of the run.
        checkpointing_steps, checkpoints_total_limit: see `train_concept`.
        prompts, num_images, validation_steps, resolution: of the validation pictures.
        progress: whether to show a bar.
        loss: the last step's.
    """

    output_dir: Path
    settings: Mapping
    checkpointing_steps: int | None
    checkpoints_total_limit: int | None
    prompts: Sequence[str]
    num_images: int
    validation_steps: int
    resolution: int
    progress: bool
    loss: float | None = None

    def steps(self, trainer: Trainer, first: int, last: int) -> None:
        """Train the steps from `first` (counted from 0) to before `last`.

        Raises:
            RuntimeError: a loss is not finite.
            KeyboardInterrupt: Ctrl-C was pressed; a checkpoint of the last whole step is there.
        """
        accelerator, names = trainer.accelerator, ("lr_output", "lr_embedding")
        with (
            self._bar(first, last, accelerator.is_main_process) as bar,
            noted_interruption(bar) as interruption,
        ):
            if (
                first > 0 and not self._picture(first).exists()
            ):  # the run was killed between a checkpoint and its pictures
                self._show(trainer, first, last, interruption)
            for step in range(first, last):
                rates = dict(zip(names, trainer.lr_scheduler.get_last_lr(), strict=True))
                self.loss, is_stopping = trainer.step(step, interruption)
                bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
                bar.update()
                accelerator.log({"loss": self.loss, **rates}, step=step + 1)
                is_due = self.checkpointing_steps is not None and (step + 1) % self.checkpointing_steps == 0
                if (is_due or is_stopping) and accelerator.is_main_process:
                    self._save(trainer, step + 1)
                if is_stopping:
                    accelerator.wait_for_everyone()  # a launcher ends all processes with the first
                    raise KeyboardInterrupt(
                        f"Stopped; {self.output_dir}/checkpoint-{step + 1} was written. Resume from 'latest'."
                    )
                self._show(trainer, step + 1, last, interruption)

    def _bar(self, first, last, is_main_process):
        from tqdm import tqdm

        return tqdm(
            total=last,
            initial=first,
            desc="training",
            disable=not (self.progress and is_main_process),
            mininterval=0.5,
        )

    def _save(self, trainer, step):
        tensors, about = trainer.state()
        wrong = [
            name
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and not tensor.isfinite().all()
        ]
        if wrong:
            raise RuntimeError(
                f"What is trained must be finite, but after step {step} '{wrong[0]}' is not. {NOT_FINITE}"
            )
        save_checkpoint(
            self.output_dir,
            step,
            tensors,
            {"settings": self.settings, **about},
            limit=self.checkpoints_total_limit,
        )

    def _picture(self, step):
        return self.output_dir / f"validation-{step:06d}.png"

    def _show(self, trainer, step, last, interruption):
        """Write the validation pictures, where they are due after a step."""
        if (
            self.prompts
            and (step % self.validation_steps == 0 or step == last)
            and trainer.accelerator.is_main_process
        ):
            write_validation_grid(
                trainer.pipe,
                trainer.prepared.layers,
                self._picture(step),
                self.prompts,
                count=self.num_images,
                resolution=self.resolution,
                seed=trainer.seed,
                interruption=interruption,
            )
