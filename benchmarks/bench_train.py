"""What does a step of `train_concept` cost, and where does the time go?

    python benchmarks/bench_train.py

By default the model is the small one of this repository. A step is compared with the frozen model's own:
the same rows, text encoding, UNet, loss, and backward into the token's embedding, as textual inversion does,
on plain projections. The two run in one process, in turn; the ratio is the median over rounds. Memory is what
a step keeps for backward, and what the layers add permanently; on a GPU also the peak. What is kept is
measured with hooks, under which layers share nothing, so it is an upper bound.

`--output` gets ratio, milliseconds, the parts of a step and memory, with versions, threads and device.
"""

import argparse
import cProfile
import json
import platform
import pstats
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

HERE = Path(__file__).parent
SHAPES = HERE.parent / "examples" / "shapes"


def load(path, device):
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = torch.float32 if device == "cpu" else torch.float16
    return DiffusionPipeline.from_pretrained(path).to(device, dtype)


class Captured(Exception):
    """Leaves `train_concept` once its trainer has been used."""


def with_trainer(pipe, images, options, use):
    """Call `use(trainer)` in the place of the training loop of a run."""
    from perfusion_pytorch import train_concept
    from perfusion_pytorch.training.loop import Run

    results, steps = [], Run.steps

    def instead(run, trainer, first, last):
        results.append(use(trainer))
        raise Captured

    Run.steps = instead
    try:
        with tempfile.TemporaryDirectory() as folder:
            train_concept(pipe, images, output_dir=folder, progress=False, **options)
    except Captured:
        return results[0]
    finally:
        Run.steps = steps


def loss_of(pipe, trainer, draw, text_enc, pooled):
    """Return the loss of a step's rows on a pipeline, given their text encodings."""
    from perfusion_pytorch import loss_fn_weighted_by_mask

    material = trainer.material
    latents = material.latents[draw.pictures]
    noisy = trainer.noise_scheduler.add_noise(latents, draw.noise, draw.timesteps).to(pipe.unet.dtype)
    conditions = None
    if pooled is not None:
        time_ids = material.time_ids[draw.pictures].to(pooled.dtype)
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
    with trainer.accelerator.autocast():
        prediction = pipe.unet(noisy, draw.timesteps, text_enc, added_cond_kwargs=conditions).sample
    target = trainer.target(latents, draw.noise, draw.timesteps)
    return loss_fn_weighted_by_mask(prediction, target, material.masks[draw.pictures])


def draw_of(trainer, step):
    """Draw a step's rows as the trainer does."""
    from perfusion_pytorch.training.draws import draw_rows

    draw = draw_rows(
        trainer.seed,
        step,
        range(trainer.rows),
        trainer.rows,
        prompts_of_pictures=trainer.prompts_of_pictures,
        latent_shape=trainer.material.latents.shape[1:],
    )
    return draw.to(trainer.device)


def plain_step(pipe, trainer, token, superclass):
    """Return a step that trains the token's embedding alone, on plain projections, and the frozen models."""
    from perfusion_pytorch import add_concept_token_
    from perfusion_pytorch.pipelines.encoding import encode_token_ids
    from perfusion_pytorch.pipelines.parts import text_encoders_of

    material = trainer.material
    pipe.unet.requires_grad_(False).eval()
    rows = [
        add_concept_token_(*pair, token, superclass).concept_embedding
        for pair in text_encoders_of(pipe).values()
    ]
    optimizer = torch.optim.AdamW(rows, lr=0.006)
    optimizer = trainer.accelerator.prepare_optimizer(optimizer)

    def run(step=0):
        draw = draw_of(trainer, step)
        used, which = draw.prompts.unique(return_inverse=True)
        with trainer.accelerator.autocast():
            ids = {name: ids[used] for name, ids in material.ids.items()}
            text_enc, pooled = encode_token_ids(pipe, ids)
        loss = loss_of(pipe, trainer, draw, text_enc[which], None if pooled is None else pooled[which])
        trainer.accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run, models_of(pipe)


@contextmanager
def timed_parts(trainer, parts):
    """Add the seconds of a step's parts up in `parts`; a part within a part counts for itself alone."""
    from perfusion_pytorch.training import step as module

    undo, running, names, cuda = [], [], [], torch.cuda.is_available()

    def timed(owner, attribute, name):
        original = getattr(owner, attribute)

        def run(*args, **kwargs):
            if owner is module.torch.autograd and "UNet, backward" in names:  # which ends there too
                return original(*args, **kwargs)
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            running.append(0.0), names.append(name)
            try:
                return original(*args, **kwargs)
            finally:
                if cuda:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                names.pop()
                parts[name] = parts.get(name, 0.0) + seconds - running.pop()
                if running:
                    running[-1] += seconds

        undo.append((owner, attribute, original, attribute in vars(owner)))
        setattr(owner, attribute, run)

    timed(module, "draw_rows", "draws")
    timed(module, "encode_token_ids", "text encoder, forward")
    timed(trainer.pipe.unet, "forward", "UNet, forward")
    timed(trainer.accelerator, "backward", "UNet, backward")
    timed(module.torch.autograd, "backward", "text encoder, backward")
    timed(module, "loss_fn_weighted_by_mask", "loss")
    timed(trainer.phase.optimizer, "step", "optimizer")
    timed(trainer, "step", "the rest")
    try:
        yield
    finally:
        for owner, attribute, original, was_own in reversed(undo):
            if was_own:
                setattr(owner, attribute, original)
            else:
                delattr(owner, attribute)


def models_of(pipe):
    from perfusion_pytorch.pipelines.parts import text_encoders_of

    return [pipe.unet, *(encoder for encoder, _ in text_encoders_of(pipe).values())]


def saved_bytes(run, frozen):
    """Bytes of different tensors that a step keeps for backward, without the frozen models' weights."""
    seen = {}
    weights = {p.untyped_storage().data_ptr() for model in frozen for p in model.parameters()}

    def remember(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr(), storage.nbytes()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        run()
    return sum(size for (address, size) in seen if address not in weights)


def peak_bytes(run):
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def times_of(runs, rounds):
    """Return the seconds of each run in each round. Runs take turns; the first five rounds warm up."""
    times = {name: [] for name in runs}
    for number in range(-5, rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def share_of_library(run):
    """Return the share of the time that is spent in Python code of the library."""
    profile = cProfile.Profile()
    profile.runcall(lambda: [run() for _ in range(5)])
    stats = pstats.Stats(profile)
    ours = sum(own for (file, *_), (_, _, own, *_) in stats.stats.items() if "perfusion_pytorch" in file)
    return ours / stats.total_tt


def memory_of(trainer, wrapped, plain, plain_models):
    layers = trainer.trainables.layers.values()
    added = [
        t for m in layers for t in (*m.buffers(), *m.parameters()) if t is not m.weight and t is not m.bias
    ]
    added += [embedding.concept_embedding for embedding in trainer.trainables.embeddings.values()]
    d = next(iter(layers)).in_features
    models = models_of(trainer.pipe)
    weights = [p for model in models for p in model.parameters()]
    return {
        "kept for backward, bytes": {
            "frozen": saved_bytes(plain, plain_models),
            "train_concept": saved_bytes(wrapped, models),
        },
        "peak on the GPU, bytes": {"frozen": peak_bytes(plain), "train_concept": peak_bytes(wrapped)},
        "state of layers and embeddings, bytes": sum(t.numel() * t.element_size() for t in added),
        "Adam's moments, bytes": sum(2 * p.numel() * 4 for p in trainer.phase.parameters),
        "inverse covariance, bytes": d * d * 4,
        "the frozen models' weights, bytes": sum(p.numel() * p.element_size() for p in weights),
    }


def measure(trainer, path, device, token, superclass, rounds):
    from perfusion_pytorch.training.interruption import Interruption

    ready = Interruption()
    plain, plain_models = plain_step(load(path, device), trainer, token, superclass)

    def wrapped():
        trainer.step(0, ready)

    times = times_of({"frozen": plain, "train_concept": wrapped}, rounds)
    ratios = [t / p for t, p in zip(times["train_concept"], times["frozen"], strict=True)]
    parts = {}
    with timed_parts(trainer, parts):
        for _ in range(rounds):
            wrapped()
    total = sum(parts.values())
    return {
        "time of a step over the frozen model's": median(ratios),
        "milliseconds of a step": {name: median(seconds) * 1000 for name, seconds in times.items()},
        "parts of a step, in 1": {
            name: seconds / total for name, seconds in sorted(parts.items(), key=lambda item: -item[1])
        },
        "Python code of the library, in 1 of a profiled step": share_of_library(wrapped),
        "memory": memory_of(trainer, wrapped, plain, plain_models),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", default=str(SHAPES / "tiny-sd"))
    parser.add_argument("--instance_data_dir", default=str(SHAPES / "pictures"))
    parser.add_argument("--token", default="<car-1>")
    parser.add_argument("--superclass", default="car")
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=HERE / "bench_train.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.num_threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load(args.pretrained_model_name_or_path, device)
    from perfusion_pytorch import InputCovariance
    from perfusion_pytorch.pipelines.encoding import prompt_encoder

    d = prompt_encoder(pipe)(["a"])[0].shape[-1]
    options = {
        "token": args.token,
        "superclass": args.superclass,
        "covariance": InputCovariance(torch.eye(d)),  # its values cost nothing
        "train_batch_size": args.train_batch_size,
        "checkpointing_steps": None,
        "embedding_steps": 0,  # all is trained in every step
    }

    def use(trainer):
        return measure(
            trainer, args.pretrained_model_name_or_path, device, args.token, args.superclass, args.rounds
        )

    result = {
        "versions": {n: __import__(n).__version__ for n in ("torch", "diffusers", "accelerate")}
        | {"python": platform.python_version()},
        "threads": args.num_threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {platform.machine()}",
        "model": Path(args.pretrained_model_name_or_path).name,
        "rows of a step": args.train_batch_size,
        **with_trainer(pipe, args.instance_data_dir, options, use),
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
