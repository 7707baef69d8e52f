"""What does it cost to have a thousand concepts loaded, each for the prompts that hold its token?

    python benchmarks/bench_concepts.py

The model is the small one of this repository; its car's concept is varied into `--count` different ones.
Times of pictures are of 20 steps, with one concept loaded and with all, in turn in one process; the ratio
is the median over rounds. Loading and deleting are timed one by one: the medians of the first and of the
last ten.

`--output` gets the figures as JSON, with versions, threads and device.
"""

import argparse
import json
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

HERE = Path(__file__).parent
SHAPES = HERE.parent / "examples" / "shapes"
PROMPT = "a photo of a <c-0> on a red background"


def load_pipeline():
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(SHAPES / "tiny-sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_variations(folder, count):
    """Write concept files that differ a little, and return their paths."""
    from perfusion_pytorch import Concept

    concept = Concept.load(next((SHAPES / "concepts").glob("car*.safetensors")))
    generator = torch.Generator().manual_seed(0)

    def varied(tensor):
        return tensor.float() + 0.1 * torch.randn(tensor.shape, generator=generator)

    for i in range(count):
        concept_input = varied(concept.concept_input)
        other = replace(
            concept,
            token=f"<c-{i}>",
            concept_input=concept_input,
            concept_dual=concept.concept_dual / (concept.concept_dual @ concept_input),
            outputs={name: varied(output) for name, output in concept.outputs.items()},
        )
        other.save(folder / f"{i}.safetensors")
    return [folder / f"{i}.safetensors" for i in range(count)]


def seconds(call, *arguments):
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def first_and_last(times):
    return {"first ten, ms": 1e3 * median(times[:10]), "last ten, ms": 1e3 * median(times[-10:])}


def bytes_of(pipe):
    """Return the bytes of the tensors that loaded concepts take: the tables, and the embeddings' rows."""
    from perfusion_pytorch.embedding import EmbeddingWrapper

    table = pipe.unet._perfusion_concepts.concepts.edits.table
    tensors = [tensor for columns in table.columns.values() for tensor in columns.values()]
    tensors += [m.concept_embedding for m in pipe.text_encoder.modules() if isinstance(m, EmbeddingWrapper)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(count, rounds):
    from perfusion_pytorch import delete_concepts, load_concept

    with tempfile.TemporaryDirectory() as folder:
        files = write_variations(Path(folder), count)
        one, many = load_pipeline(), load_pipeline()
        load_concept(one, files[0])
        loading = [seconds(load_concept, many, file) for file in files]
        size = sum(file.stat().st_size for file in files)
    took = bytes_of(many)

    def picture(pipe):
        return seconds(lambda: pipe(PROMPT, num_inference_steps=20, output_type="latent"))

    for pipe in (one, many):
        picture(pipe)
    times = [(picture(one), picture(many)) for _ in range(rounds)]
    deleting = [seconds(delete_concepts, many, f"<c-{i}>") for i in range(1, count)]
    return {
        "concepts": count,
        "a picture with all loaded over one with one": median(b / a for a, b in times),
        "loading one": first_and_last(loading),
        "deleting one": first_and_last(deleting),
        "bytes of the files": size,
        "bytes in memory": took,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=HERE / "bench_concepts.json")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    result = {
        "versions": {name: __import__(name).__version__ for name in ("torch", "diffusers", "transformers")}
        | {"python": platform.python_version()},
        "threads": args.num_threads,
        "device": f"cpu, {platform.machine()}",
    } | measure(args.count, args.rounds)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
