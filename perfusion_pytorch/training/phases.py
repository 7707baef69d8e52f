"""The phases of a run: which parameters are trained in which steps, and how fast.

By default the embedding is trained first, alone, with the layers unedited. Then it is frozen, i* and s are
computed once as exact means, and the value outputs are trained. The paper trains all of it at once and lets
moving averages follow; with `embedding_steps=0` so does this library.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfusion_pytorch.extras import required
from perfusion_pytorch.layers.metric import concept_dual
from perfusion_pytorch.optimizer import get_finetune_parameters
from perfusion_pytorch.pipelines.encoding import encode_token_ids
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.training.material import Material
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.training.preparation import Trainables

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

Trained = Literal["embedding", "outputs", "all"]


@dataclass(eq=False)
class Phase:
    """Some steps of a run that train the same parameters.

    Attributes:
        trains: what is trained: the embedding alone, the value outputs alone, or all at once.
        first: the number of its first step.
        optimizer, lr_scheduler: over what is trained. The optimizer is prepared by the accelerator, and each
            of its groups has a "name" for reports.
        parameters: what is trained, as the optimizer has it.
    """

    trains: Trained
    first: int
    optimizer: "AcceleratedOptimizer"
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def rates(self) -> dict[str, float]:
        """The mean learning rate of the groups of each name."""
        rates: dict[str, list[float]] = {}
        groups = zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True)
        for group, rate in groups:
            rates.setdefault(group["name"], []).append(float(rate))
        return {name: sum(values) / len(values) for name, values in rates.items()}


def make_phases(
    options: TrainingOptions, trainables: Trainables, material: Material, accelerator: "Accelerator"
) -> tuple[Phase, ...]:
    """Return the phases of a run, the first one first."""
    layers = trainables.layers.values()
    # Whatever froze them meanwhile: they require gradients.
    get_finetune_parameters(*layers, *trainables.embeddings.values())
    embeddings = [
        {
            "params": [embedding.concept_embedding],
            "lr": options.embedding_learning_rate * _scale(options, embedding.weight.float().std()),
            "name": "lr_embedding",
        }
        for embedding in trainables.embeddings.values()
    ]
    superclass = mean_superclass(material)
    outputs = [
        {
            "params": [layer.concept_output],
            "lr": options.learning_rate
            * _scale(options, projected(layer, superclass).square().mean().sqrt()),
            "name": "lr_output",
        }
        for layer in layers
        if not layer.is_key_proj
    ]
    num_steps = options.max_train_steps
    if options.num_embedding_steps == 0:
        return (_phase("all", 0, num_steps, [*outputs, *embeddings], options, accelerator),)
    return (
        _phase("embedding", 0, options.num_embedding_steps, embeddings, options, accelerator),
        _phase("outputs", options.num_embedding_steps, num_steps, outputs, options, accelerator),
    )


def _scale(options: TrainingOptions, size: Tensor) -> float:
    """Return what a learning rate is multiplied by: the size of the numbers that it is relative to, or 1."""
    return size.item() if options.relative_learning_rates else 1.0


def _phase(
    trains: Trained,
    first: int,
    last: int,
    groups: Sequence[dict[str, Any]],
    options: TrainingOptions,
    accelerator: "Accelerator",
) -> Phase:
    optimizer = torch.optim.AdamW(
        groups,
        betas=(float(options.adam_beta1), float(options.adam_beta2)),
        weight_decay=float(options.adam_weight_decay),
        eps=float(options.adam_epsilon),
    )
    lr_scheduler = required("diffusers.optimization").get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=max(1, last - first),
    )
    return Phase(trains, first, accelerator.prepare_optimizer(optimizer), lr_scheduler)


def projected(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Return W x without the bias, shape (d,) to (o,), in float32."""
    return F.linear(inputs.to(layer.weight.dtype), layer.weight).float()


def mean_superclass(material: Material) -> Tensor:
    """Return s, the mean encoding of the superclass's token over the prompts: shape (d,), float32."""
    rows = torch.arange(len(material.superclass_indices), device=material.superclass_indices.device)
    return material.superclass_encodings[rows, material.superclass_indices].float().mean(dim=0)


@torch.no_grad()
def encode_prompts(pipe: StableDiffusion, material: Material) -> list[Tensor]:
    """Return the text encoders' outputs for all prompts: encodings (p, n, d), for SDXL also pooled ones."""
    outputs = [
        encode_token_ids(pipe, {name: ids[[p]] for name, ids in material.ids.items()})
        for p in range(len(material.concept_indices))
    ]
    encodings, pooled = zip(*outputs, strict=True)
    return [torch.cat(encodings), *([] if pooled[0] is None else [torch.cat(pooled)])]


@torch.no_grad()
def settle_(trainables: Trainables, material: Material, encodings: Tensor) -> None:
    """Give all layers i* and s of an embedding that no longer moves, and start the value outputs at W s.

        i* = mean over prompts of the encoding at the concept's token,   s = the same of the superclass

    Args:
        trainables: their layers are changed.
        material: of the run.
        encodings: of the training prompts with the trained embedding, shape (p, n, d).
    """
    rows = torch.arange(len(material.concept_indices), device=encodings.device)
    concept = encodings[rows, material.concept_indices].float().mean(dim=0)
    superclass = mean_superclass(material)
    for layer in trainables.layers.values():
        layer.concept_input[0, 0] = concept
        layer.superclass_input[0, 0] = superclass
        layer.initialized[0, 0] = True
        if layer.covariance is None:
            raise RuntimeError("Training needs the input covariance, but a layer was made with C=None.")
        layer.concept_dual[0] = concept_dual(concept, layer.covariance.inverse(concept.device, concept.dtype))
        if not layer.is_key_proj:
            layer.concept_output.data[0] = projected(layer, superclass)
