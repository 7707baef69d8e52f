"""Two objects that were learned separately, in one picture: for pairs of `run.py`'s cells.

    python benchmarks/evidence/mix.py

A pair is an object and the next one in the list, of another superclass. Custom Diffusion joins concepts
by an optimisation of its own, which is not done here.
"""

import argparse
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from methods import CROSS_ATTENTION
from safetensors.torch import load_file
from sheets import lay_out
from task import WORLD, generate, objects, prompts_for_two, scores_of_two
from tqdm import tqdm

from perfusion_pytorch import add_concept_token_, global_key_lock, load_concept
from perfusion_pytorch.files import write_atomically

HERE = Path(__file__).parent
NOISE = 3000


def put_perfusion(pipe, paths, superclasses):
    """Load concept files; returns the objects' words."""
    return [load_concept(pipe, path, token=f"<new-{i}>") for i, path in enumerate(paths)]


def put_tokens(pipe, paths, superclasses):
    """Add tokens with their trained embeddings; returns the objects' words."""
    words = []
    for i, (path, superclass) in enumerate(zip(paths, superclasses, strict=True)):
        words.append(f"<new-{i}>")
        embedding = add_concept_token_(pipe.text_encoder, pipe.tokenizer, words[-1], superclass)
        embedding.concept_embedding.data[-1] = load_file(path)["embedding"][0].float()
    return words


def put_loras(pipe, paths, superclasses, *, rank):
    """Load LoRAs of `methods.lora`, both at their full strength; returns the objects' words."""
    from peft import LoraConfig
    from peft.utils import set_peft_model_state_dict

    names = [f"new{i}" for i in range(len(paths))]
    for name, path in zip(names, paths, strict=True):
        tensors = {key: t.float() for key, t in load_file(path).items() if key != "embedding"}
        pipe.unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=list(CROSS_ATTENTION)), adapter_name=name
        )
        set_peft_model_state_dict(pipe.unet, tensors, adapter_name=name)
    pipe.unet.set_adapters(names, weights=[1.0] * len(names))
    return put_tokens(pipe, paths, superclasses)


def as_they_are(pipe):
    """Make pictures in no context."""
    return nullcontext()


WAYS = {
    "perfusion": ("perfusion", put_perfusion, as_they_are),
    "perfusion, global lock": ("perfusion", put_perfusion, global_key_lock),
    "textual inversion": ("textual inversion", put_tokens, as_they_are),
    "LoRA, rank 1": ("LoRA, rank 1", partial(put_loras, rank=1), as_they_are),
    "LoRA, rank 4": ("LoRA, rank 4", partial(put_loras, rank=4), as_they_are),
}  # name: (the cells' contender, how to load two, what pictures are made in)


def file_of(folder, name, subject, seed):
    """Return what a contender learned of an object, or None where that cell was not run."""
    for path in sorted(folder.glob(f"{name.replace(' ', '_').replace(',', '')}-*.json")):
        record = json.loads(path.read_text())
        key = record["name"], record["superclass"], record["object"], record["seed"]
        if key == (name, subject.superclass, subject.seed, seed):
            found = list((folder / "trained" / path.stem).glob("*.safetensors"))
            return found[0] if found else None
    return None


def run_pair(way, pair, paths, args, checker):
    """Put two objects into pictures, and return the figures and the pictures."""
    from evaluate import load_pipeline

    _, put, context = WAYS[way]
    pipe, prompts = (
        load_pipeline(args.pretrained_model_name_or_path),
        prompts_for_two(*pair, args.num_prompts),
    )
    words = put(pipe, paths, [subject.superclass for subject in pair])
    with context(pipe):
        images = generate(pipe, [prompt.text.format(*words) for prompt in prompts], seed=NOISE)
    record = {"way": way, "pair": [[s.superclass, s.seed] for s in pair]}
    return record | scores_of_two(images, checker, pair, prompts), images


def main(argv=None):
    from checker import Checker

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", default=WORLD / "tiny-sd")
    parser.add_argument("--split", choices=("development", "test"), default="test")
    parser.add_argument("--objects_per_superclass", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_prompts", type=int, default=40)
    parser.add_argument("--results_dir", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    subjects, checker = objects(args.split, args.objects_per_superclass), Checker.load()
    folder = args.results_dir / "mix"
    folder.mkdir(parents=True, exist_ok=True)
    for pair in tqdm(list(zip(subjects[::2], subjects[1::2], strict=True)), desc="pairs"):
        for way, (name, _, _) in WAYS.items():
            stem = (
                "-".join([way, *(f"{s.superclass}{s.seed}" for s in pair)]).replace(" ", "_").replace(",", "")
            )
            paths = [file_of(args.results_dir, name, subject, args.seed) for subject in pair]
            if None in paths or (folder / f"{stem}.json").exists():
                continue
            record, images = run_pair(way, pair, paths, args, checker)
            lay_out(images).save(folder / f"{stem}.png")
            write_atomically(folder / f"{stem}.json", (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
