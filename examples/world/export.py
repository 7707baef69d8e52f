"""Write the model as a folder in half precision that `StableDiffusionPipeline.from_pretrained` loads in float32, as it is."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from perfusion_pytorch.pipelines.model_notes import NOTES_FILE

MAX_SHARD_SIZE = "14MB"
TEMPLATES = (
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a drawing of a {}",
    "this is a {}",
    "there is a {}",
    "one {}",
)  # what the model's captions are like, for the training of concepts


def write_model(pipe, folder, captions):
    """Write a pipeline; its weights are stored as float16 in files of at most 14 MB.

    A plain `from_pretrained` gives a model of diffusers float32, and one of transformers the type that its configuration names. So the
    text encoder's configuration names float32, and the loaded pipeline has one type throughout. Beside the model are captions and templates
    of the kind that it knows: `perfusion train` finds them there.

    Args:
        pipe: a `StableDiffusionPipeline`; its modules are float16 afterwards.
        folder: where to; what was there is replaced once everything is written.
        captions: of the kind that the model was trained on.
    """
    folder = Path(folder)
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.to("cpu", torch.float16).save_pretrained(temporary, max_shard_size=MAX_SHARD_SIZE)
    path = temporary / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    # Shipped Stable Diffusions name CLIP's weights so, and every transformers reads that; not every one writes it.
    path = temporary / "text_encoder" / "model.safetensors"
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    (temporary / "captions.txt").write_text("\n".join(captions) + "\n")
    notes = {"captions": "captions.txt", "templates": TEMPLATES}
    (temporary / NOTES_FILE).write_text(json.dumps(notes, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
