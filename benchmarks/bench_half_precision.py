"""How much do pictures change because a concept file holds half precision?

    python benchmarks/bench_half_precision.py

The script trains a concept on the small model. Then it makes pictures of the same prompts and noises from
three files: the concept's own in float16, one in bfloat16, and one in float32 that is made from the last
checkpoint.
"""

import json
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "shapes"))

import personalize  # noqa: E402
import world  # noqa: E402
from evaluate import generate, load_pipeline  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from perfusion_pytorch import Concept, load_concept, train_concept, unload_concepts  # noqa: E402

NUM_PROMPTS, TOKEN = 60, "<car-1>"


def main():
    torch.manual_seed(0)
    pipe = load_pipeline()
    with tempfile.TemporaryDirectory() as folder:
        summary = train_concept(
            pipe,
            ROOT / "examples" / "shapes" / "pictures",
            token=TOKEN,
            superclass="car",
            output_dir=folder,
            checkpointing_steps=500,
        )
        unload_concepts(pipe)
        exact, half = load_file(summary.checkpoints[-1] / "state.safetensors"), Concept.load(summary.concept)
        concept = replace(
            half,
            embeddings={name: exact[f"{name}.concept_embedding"][0] for name in half.embeddings},
            outputs={name: exact[f"{name}.concept_output"][0] for name in half.outputs},
        )
        prompts = [
            p.format(TOKEN)
            for p, _, _ in personalize.evaluation_prompts(NUM_PROMPTS, "car", world.HELD_OUT["car"][1])
        ]
        pictures, num_bytes = {}, {}
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            path = Path(folder) / f"{dtype}.safetensors"
            concept.save(path, dtype=dtype)
            load_concept(pipe, path)
            pictures[dtype] = np.stack(
                [np.asarray(image, float) for image in generate(pipe, prompts, desc=str(dtype))]
            )
            num_bytes[str(dtype)] = path.stat().st_size
            unload_concepts(pipe)
    results = {
        "question": __doc__.split("\n")[0],
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "prompts": NUM_PROMPTS,
        "file_bytes": num_bytes,
        "change_of_255": {
            str(dtype): {
                "largest": np.abs(pictures[dtype] - pictures[torch.float32]).max(),
                "mean": round(np.abs(pictures[dtype] - pictures[torch.float32]).mean(), 4),
                "largest mean of a picture": round(
                    np.abs(pictures[dtype] - pictures[torch.float32]).mean(axis=(1, 2, 3)).max(), 4
                ),
            }
            for dtype in (torch.float16, torch.bfloat16)
        },
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
