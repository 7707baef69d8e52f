"""The loop of a training run: steps, and between them checkpoints, pictures, reports, and stopping."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfusion_pytorch.training.checkpoints import save_checkpoint
from perfusion_pytorch.training.interruption import Interruption, noted_interruption
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.training.progress import LogLines, can_show_bars
from perfusion_pytorch.training.step import NOT_FINITE, Trainer
from perfusion_pytorch.training.validation import write_validation_grid

if TYPE_CHECKING:
    from tqdm import tqdm


@dataclass(eq=False)
class Run:
    """What a run does beside its steps.

    Attributes:
        options: the run's.
        output_dir: its folder.
        settings: what its checkpoints record of it.
        resolution: edge of the validation pictures, in pixels.
        loss: the last step's; None before the first.
    """

    options: TrainingOptions
    output_dir: Path
    settings: Mapping[str, Any]
    resolution: int
    loss: float | None = None

    def steps(self, trainer: Trainer, first: int, last: int) -> None:
        """Train the steps from `first` (counted from 0) to before `last`.

        Raises:
            RuntimeError: a loss is not finite.
            KeyboardInterrupt: Ctrl-C was pressed, or SIGTERM came; a checkpoint of the last whole step was
                written.
        """
        is_main = trainer.accelerator.is_main_process
        is_shown = self.options.progress and is_main
        lines = LogLines(last, is_shown and not can_show_bars())
        with (
            self._bar(first, last, is_shown and can_show_bars()) as bar,
            noted_interruption(bar) as interruption,
        ):
            # A run that was killed between a checkpoint and its pictures has yet to make them.
            if first > 0 and not self._picture(first).exists():
                self._show(trainer, first, last, interruption)
            for step in range(first, last):
                self.loss, is_stopping = trainer.step(step, interruption)
                bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
                bar.update()
                lines.step_done(step + 1, self.loss)
                trainer.accelerator.log({"loss": self.loss, **trainer.rates}, step=step + 1)
                if (is_stopping or self._checkpoint_is_due(step + 1)) and is_main:
                    self._save(trainer, step + 1)
                if is_stopping:
                    self._stop(trainer, step + 1, interruption.error)
                self._show(trainer, step + 1, last, interruption)

    def _bar(self, first: int, last: int, is_shown: bool) -> "tqdm":
        from tqdm import tqdm

        return tqdm(total=last, initial=first, desc="training", disable=not is_shown, mininterval=0.5)

    def _checkpoint_is_due(self, step: int) -> bool:
        interval = self.options.checkpointing_steps
        return interval is not None and step % interval == 0

    def _save(self, trainer: Trainer, step: int) -> None:
        tensors, about = trainer.state()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise RuntimeError(
                    f"What is trained must be finite, but after step {step} '{name}' is not. {NOT_FINITE}"
                )
        about = {"settings": self.settings, **about}
        limit = self.options.checkpoints_total_limit
        save_checkpoint(self.output_dir, step, tensors, about, limit=limit)

    def _stop(self, trainer: Trainer, step: int, error: type[KeyboardInterrupt]) -> None:
        trainer.accelerator.wait_for_everyone()  # a launcher ends all processes when the first ends
        raise error(
            f"Stopped; {self.output_dir}/checkpoint-{step} was written. Resume from 'latest' "
            "(`resume_from_checkpoint`)."
        )

    def _picture(self, step: int) -> Path:
        return self.output_dir / f"validation-{step:06d}.png"

    def _show(self, trainer: Trainer, step: int, last: int, interruption: Interruption) -> None:
        """Write the validation pictures if they are due after a step."""
        options = self.options
        is_due = step % options.validation_steps == 0 or step == last
        if not (options.validation_prompts and is_due and trainer.accelerator.is_main_process):
            return
        write_validation_grid(
            trainer.pipe,
            trainer.trainables.layers,
            self._picture(step),
            options.validation_prompts,
            token=options.token,
            count=options.num_validation_images,
            resolution=self.resolution,
            seed=options.seed,
            interruption=interruption,
        )
