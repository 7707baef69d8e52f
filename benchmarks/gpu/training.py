"""What a training step costs: the frozen model's own, this library's, textual inversion's and a LoRA's."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_train import draw_of, loss_of, peak_bytes, plain_step, with_trainer
from gpu.cells import Parts, allocated_bytes, interleaved, medians, ratio, synchronize
from gpu.concepts import SUPERCLASS
from gpu.models import shared_copy, weight_bytes
from gpu.pictures import add_lora_
from PIL import Image

FROZEN = "frozen model"
OUTPUTS, EMBEDDING = "train_concept, outputs", "train_concept, embedding"
INVERSION, LORA = "textual inversion", "LoRA, rank 4"
TOKEN = "<trained-1>"
LEAST_ROUNDS = 2
STEPS = 500  # of a run of `train_concept`: the first half trains the embedding, the second the outputs
TEMPLATES = ["a {}", "a photo of a {}", "a {} on a green background", "a red {}"]


def fixed_step(pipe: Any, trainer: Any, parameters: Sequence[torch.nn.Parameter] = ()) -> Callable[[], float]:
    """Return a step on text encodings that do not change.

    Args:
        pipe: whose UNet runs.
        trainer: what draws the rows.
        parameters: what is trained. Without any it is the frozen model's own step: forward, and backward
            to the encodings.
    """
    from perfusion_pytorch.pipelines.encoding import encode_token_ids

    with torch.no_grad():
        text_enc, pooled = encode_token_ids(pipe, trainer.material.ids)
    optimizer = None
    if parameters:
        optimizer = trainer.accelerator.prepare_optimizer(torch.optim.AdamW(parameters, lr=1e-4))

    def run() -> float:
        draw = draw_of(trainer, 0)
        rows = text_enc[draw.prompts].requires_grad_(optimizer is None)
        loss = loss_of(pipe, trainer, draw, rows, None if pooled is None else pooled[draw.prompts])
        trainer.accelerator.backward(loss)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return run


class Training:
    """The contenders of a model, each on a copy of its own, and their cells.

    Args:
        pipe: the model's pipeline; it stays as it is.
        for_embedding, for_outputs: trainers that `train_concept` made, each on a copy of the pipeline. One
            stays in the phase of the embedding and one in that of the outputs.
        most_rounds: of a cell.
    """

    def __init__(self, pipe: Any, for_embedding: Any, for_outputs: Any, most_rounds: int) -> None:
        from perfusion_pytorch.training.interruption import Interruption

        self.trainers, self.most_rounds = (for_embedding, for_outputs), most_rounds
        self.weights = weight_bytes(pipe)
        self.others = inversion, frozen, with_lora = [shared_copy(pipe) for _ in range(3)]
        lora = add_lora_(with_lora.unet, 4, torch.float32)  # as the training scripts have it
        ready = Interruption()
        self.steps: dict[str, Callable[[], Any]] = {
            FROZEN: fixed_step(frozen, for_outputs),
            OUTPUTS: lambda: for_outputs.step(STEPS - 1, ready),
            EMBEDDING: lambda: for_embedding.step(0, ready),
            INVERSION: plain_step(inversion, for_embedding, TOKEN, SUPERCLASS)[0],
            LORA: fixed_step(with_lora, for_outputs, lora),
        }

    def measure(self, rows: int, is_checkpointing: bool, deadline: float) -> dict[str, Any]:
        """Let all contenders take turns with so many rows a step, and then measure each one's memory."""
        for trainer in self.trainers:
            trainer.rows = rows
        for pipe in (*(trainer.pipe for trainer in self.trainers), *self.others):
            unet = pipe.unet
            if is_checkpointing:
                unet.enable_gradient_checkpointing()
            else:
                unet.disable_gradient_checkpointing()
        runs = {name: self._timed(step) for name, step in self.steps.items()}
        found = interleaved(runs, deadline, least=LEAST_ROUNDS, most=self.most_rounds)
        base = found.rounds.get(FROZEN, [])
        contenders: dict[str, Any] = {}
        for name, rounds in found.rounds.items():
            before = allocated_bytes()
            peak = peak_bytes(self.steps[name])
            contenders[name] = {
                "step over the frozen model's": ratio(rounds, base, ["step"]),
                "milliseconds": 1000 * medians(rounds)["step"],
                "peak memory, bytes": None if peak is None else self.weights + peak - before,
            }
        return {
            "rows": rows,
            "gradient checkpointing": is_checkpointing,
            "rounds": len(base),
            "contenders": contenders | {name: {"error": line} for name, line in found.errors.items()},
        }

    def _timed(self, step: Callable[[], Any]) -> Callable[[], Parts]:
        def run() -> Parts:
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            return {"step": time.perf_counter() - start}

        return run


def with_training(pipe: Any, resolution: int, most_rounds: int, use: Callable[[Training], None]) -> None:
    """Call a function with a model's `Training`.

    Args:
        pipe: the model's pipeline.
        resolution: edge of the training pictures in pixels.
        most_rounds: of a cell.
        use: the function.
    """
    from perfusion_pytorch import InputCovariance

    images = [Image.effect_noise((resolution, resolution), 60) for _ in range(4)]
    options = {
        "token": TOKEN,
        "superclass": SUPERCLASS,
        "covariance": InputCovariance(torch.eye(pipe.unet.config.cross_attention_dim)),  # costs like any
        "train_batch_size": 1,
        "max_train_steps": STEPS,
        "templates": TEMPLATES,
        "resolution": resolution,
        "checkpointing_steps": None,
    }

    def with_first(for_embedding: Any) -> None:
        def with_both(for_outputs: Any) -> None:
            use(Training(pipe, for_embedding, for_outputs, most_rounds))

        with_trainer(shared_copy(pipe), images, options, with_both)

    with_trainer(shared_copy(pipe), images, options, with_first)
