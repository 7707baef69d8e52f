"""The loop of a training run: steps, checkpoints, validation pictures, a progress bar, trackers, and how it is stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perfusion_pytorch.checkpoints import save_checkpoint
from perfusion_pytorch.run_folder import noted_interruption
from perfusion_pytorch.trainer import Trainer
from perfusion_pytorch.validation import write_validation_grid


@dataclass(eq=False)
class Run:
    """What a run does beside its steps, and what it has written.

    Attributes:
        output_dir: its folder.
        settings: what a checkpoint says of the run.
        checkpointing_steps, checkpoints_total_limit: see `train_concept`.
        prompts, num_images, validation_steps, resolution: of the validation pictures.
        progress: whether to show a bar.
        pictures: the validation pictures written so far.
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
    pictures: list[Path] = field(default_factory=list)
    loss: float | None = None

    def steps(self, trainer: Trainer, first: int, last: int) -> None:
        """Train the steps from `first` (counted from 0) to before `last`.

        Raises:
            RuntimeError: a loss is not finite.
            KeyboardInterrupt: Ctrl-C was pressed; a checkpoint of the last whole step is there.
        """
        accelerator, names = trainer.accelerator, ("lr_output", "lr_embedding")
        with self._bar(first, last, accelerator.is_main_process) as bar, noted_interruption() as interruption:
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
                    raise KeyboardInterrupt(f"Stopped; {self.output_dir}/checkpoint-{step + 1} was written. Resume from 'latest'.")
                is_shown = (step + 1) % self.validation_steps == 0 or step + 1 == last
                if self.prompts and is_shown and accelerator.is_main_process:
                    self._show(trainer, step + 1)

    def _bar(self, first, last, is_main_process):
        from tqdm import tqdm

        return tqdm(total=last, initial=first, desc="training", disable=not (self.progress and is_main_process), mininterval=0.5)

    def _save(self, trainer, step):
        tensors, about = trainer.state()
        save_checkpoint(self.output_dir, step, tensors, {"settings": self.settings, **about}, limit=self.checkpoints_total_limit)

    def _show(self, trainer, step):
        options = {"count": self.num_images, "resolution": self.resolution, "seed": trainer.seed}
        path = self.output_dir / f"validation-{step:06d}.png"
        self.pictures.append(write_validation_grid(trainer.pipe, trainer.prepared.layers, path, self.prompts, **options))
