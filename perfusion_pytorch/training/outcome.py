"""What a run leaves: the concept file, with where it comes from, and its card."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from perfusion_pytorch.concept import Concept
from perfusion_pytorch.model_card import write_card
from perfusion_pytorch.pipelines.origin import base_model_facts
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.push import push_concept
from perfusion_pytorch.training.inputs import TrainingInputs
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.training.preparation import Trainables
from perfusion_pytorch.user_warnings import warn_user

# Settings that the file says elsewhere, or that mean nothing without the run's other files.
ELSEWHERE = (
    "token",
    "superclass",
    "gates_removal",
    "train_beta",
    "train_temperature",
    "eval_beta",
    "eval_temperature",
    "pictures",
    "prompts",
    "covariance",
)


def write_concept(
    pipe: StableDiffusion,
    options: TrainingOptions,
    inputs: TrainingInputs,
    settings: Mapping[str, Any],
    trainables: Trainables,
    path: Path,
) -> None:
    """Write the concept file and its card.

    Args:
        pipe: the pipeline, with the trained layers.
        options, inputs: the run's.
        settings: what its checkpoints record, see `settings_of_run`.
        trainables: what was trained.
        path: the concept file.
    """
    rows = {name: embedding.concept_embedding[0] for name, embedding in trainables.embeddings.items()}
    concept = Concept.of_model(pipe.unet, token=options.token, superclass=options.superclass, embeddings=rows)
    origin = base_model_facts(pipe) | {"training": settings_in_file(options, inputs, settings)}
    concept = replace(concept, origin=origin)
    concept.save(path)
    write_card(concept, path)


def settings_in_file(
    options: TrainingOptions, inputs: TrainingInputs, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a concept file says of its training: numbers, and nothing that names files or people."""
    facts = {
        "pictures": len(inputs.pictures),
        "masks": sum(picture.mask is not None for picture in inputs.pictures),
        "prompts": len(inputs.prompts),
        "resolution": inputs.resolution,
        "max_train_steps": options.max_train_steps,
    }
    facts |= {name: value for name, value in settings.items() if name not in ELSEWHERE}
    return facts | {"embedding_steps": options.num_embedding_steps}


def pushed(options: TrainingOptions, concept: Path) -> str | None:
    """Push the concept where that was asked for, and return the address of its page.

    Warns:
        UserWarning: it was not pushed. The run is good all the same.
    """
    if options.push_to_hub is None:
        return None
    try:
        return push_concept(concept, options.push_to_hub)
    except (OSError, ValueError) as error:
        warn_user(
            f"The concept is trained and in {concept}, but it is not on the hub: {error} Push it by "
            f"`perfusion push {concept} {options.push_to_hub}`."
        )
        return None
