"""A concept for a tiny pipeline, made up instead of trained, and a picture that it shows in."""

import torch

from perfusion_pytorch import Concept, add_concept_token_, remove_concept_token_
from perfusion_pytorch.pipelines.encoding import encode_token_ids, token_ids
from perfusion_pytorch.pipelines.parts import projections_of, text_encoders_of

PROMPT = "a <car-1> on red"


@torch.no_grad()
def tiny_concept(pipe, token="<car-1>", superclass="car", seed=0):
    """A concept whose gate is open at its token in `a … on red`; the pipeline is left as it was."""
    generator = torch.Generator().manual_seed(seed)
    encoders = text_encoders_of(pipe)
    flags = [(p, p.requires_grad) for encoder, _ in encoders.values() for p in encoder.parameters()]
    rows = {}
    for name, pair in encoders.items():
        embedding = add_concept_token_(*pair, token, superclass)
        embedding.concept_embedding += torch.randn(embedding.embedding_dim, generator=generator)
        rows[name] = embedding.concept_embedding[0].clone()
    ids = token_ids(pipe, [f"a {token} on red", f"a {superclass} on red"])
    encodings, _ = encode_token_ids(pipe, ids)
    for pair in encoders.values():
        remove_concept_token_(*pair, token)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    i, s = encodings[:, 2]  # after the start and "a"
    layers = {name: layer for name, (layer, is_key) in projections_of(pipe.unet).items() if not is_key}
    return Concept(
        token=token,
        superclass=superclass,
        base_model=type(pipe.unet).__name__,
        embeddings=rows,
        concept_input=i.clone(),
        concept_dual=i / (i @ i),
        superclass_input=s.clone(),
        concept_norm=(i @ i).item(),
        outputs={
            name: 3 * torch.randn(layer.out_features, generator=generator) for name, layer in layers.items()
        },
    )


def picture(pipe, prompt=PROMPT, **options):
    """The picture that a pipeline makes from fixed noise in two steps, as numbers from 0 to 1."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    options = {"latents": noise.to(pipe.unet.dtype), "num_inference_steps": 2, "output_type": "pt"} | options
    return pipe(prompt, **options).images.float()
