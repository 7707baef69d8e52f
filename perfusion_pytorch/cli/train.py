"""`perfusion train`: a thin layer over `train_concept`, with a flag for each of its arguments."""

import argparse
import inspect
import os
import shlex
import subprocess
import time
from pathlib import Path

import torch

from perfusion_pytorch.cli.base_model import captions_of, load_pipeline, ridge_of
from perfusion_pytorch.cli.flag_types import count, count_or_none, fraction, number, positive, whole
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.pipelines.covariance_cache import cached_covariance
from perfusion_pytorch.training.options import SCHEDULERS, process_state
from perfusion_pytorch.training.train import train_concept

DEFAULTS = {
    name: parameter.default for name, parameter in inspect.signature(train_concept).parameters.items()
}
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# The flags by groups: name, argument of `train_concept`, help, and what argparse wants. Defaults are those of `train_concept`.
REQUIRED = {"required": True}
FOLDER = {"type": Path, "metavar": "FOLDER"}
TEXTS = {"nargs": "+", "metavar": "TEXT"}
FLAGS = {
    "the concept": [
        ("instance_data_dir", "images", "pictures of the object: jpg, png, webp; name.txt beside name.jpg holds captions",
         REQUIRED | FOLDER),
        ("token", "token", 'the new word for it in prompts, lower case, in quotes: "<teddy-1>"', REQUIRED | {"metavar": "TOKEN"}),
        ("superclass", "superclass",
         'what it is one of, in words that the model knows well: "teddy bear"', REQUIRED | {"metavar": "WORDS"}),
        ("output_dir", "output_dir", "for concept.safetensors, checkpoints and validation pictures", REQUIRED | FOLDER),
        ("instance_prompt", "templates", "prompts with {} for the token, instead of the built-in ones", TEXTS),
        ("resolution", "resolution", "edge of the pictures (default: the model's own)", {"type": count, "metavar": "PIXELS"}),
        ("center_crop", "center_crop", "cut out the middle square; otherwise the whole picture is squeezed into one",
         {"action": argparse.BooleanOptionalAction}),
    ],
    "masks: where the object is, so that the background is not learned with it": [
        ("mask_dir", "masks", "a mask of each picture's name, white where the object is (default: FOLDER/masks, where there is one)",
         FOLDER),
        ("mask_model", "mask_model", "make masks from the superclass's words by this CLIPSeg model, such as CIDAS/clipseg-rd64-refined",
         {"metavar": "MODEL"}),
        ("no_masks", "use_masks", "leave even FOLDER/masks alone", {"action": "store_false"}),
    ],
    "training": [
        ("max_train_steps", "max_train_steps", "steps", {"type": count, "metavar": "N"}),
        ("train_batch_size", "train_batch_size", "rows of a forward pass on each device", {"type": count, "metavar": "N"}),
        ("gradient_accumulation_steps", "gradient_accumulation_steps", "forward passes of a step", {"type": count, "metavar": "N"}),
        ("gradient_checkpointing", "gradient_checkpointing", "save memory at the cost of time", {"action": "store_true"}),
        ("embedding_steps", "embedding_steps",
         "how many of them train the embedding, alone and first (default: half; 0 trains all at once, as the paper does)",
         {"type": whole, "metavar": "N"}),
        ("mixed_precision", "mixed_precision", "load the model and compute in half precision; what is trained stays float32 (default: no)",
         {"choices": tuple(PRECISIONS)}),
        ("learning_rate", "learning_rate", "of the value outputs", {"type": number, "metavar": "RATE"}),
        ("embedding_learning_rate", "embedding_learning_rate", "of the token's embedding", {"type": number, "metavar": "RATE"}),
        ("relative_learning_rates", "relative_learning_rates",
         "whether the rates are relative to the sizes of the model's own outputs and embeddings",
         {"action": argparse.BooleanOptionalAction}),
        ("lr_scheduler", "lr_scheduler", "how both rates change", {"choices": SCHEDULERS}),
        ("lr_warmup_steps", "lr_warmup_steps", "steps over which they rise", {"type": int, "metavar": "N"}),
        ("adam_beta1", "adam_beta1", "decay of AdamW's first moment", {"type": fraction, "metavar": "B"}),
        ("adam_beta2", "adam_beta2", "of the second moment", {"type": fraction, "metavar": "B"}),
        ("adam_weight_decay", "adam_weight_decay", "AdamW's weight decay", {"type": number, "metavar": "W"}),
        ("adam_epsilon", "adam_epsilon", "AdamW's epsilon", {"type": positive, "metavar": "E"}),
        ("max_grad_norm", "max_grad_norm", "scale larger gradients down to this norm",
         {"type": positive, "metavar": "NORM"}),
        ("timestep_power", "timestep_power", "below 1, noisier times are drawn more often", {"type": positive, "metavar": "P"}),
        ("seed", "seed", "of everything random", {"type": int}),
    ],
    "the edit": [
        ("gates_removal", "gates_removal", "close the whole edit where the gate is shut; otherwise the paper's eq. 3",
         {"action": argparse.BooleanOptionalAction}),
        ("train_beta", "train_beta", "gate bias while training", {"type": number, "metavar": "BETA"}),
        ("train_temperature", "train_temperature", "gate temperature while training", {"type": positive, "metavar": "TAU"}),
        ("eval_beta", "eval_beta", "gate bias that the file recommends for inference", {"type": number, "metavar": "BETA"}),
        ("eval_temperature", "eval_temperature", "and its gate temperature", {"type": positive, "metavar": "TAU"}),
        ("input_decay", "input_decay", "of the moving averages of encodings", {"type": fraction, "metavar": "D"}),
        ("frac_gradient_concept_embed", "frac_gradient_concept_embed", "scales the gradient from the edit into the text encoder",
         {"type": number, "metavar": "F"}),
    ],
    "checkpoints": [
        ("checkpointing_steps", "checkpointing_steps", "steps from one to the next; 0 for none", {"type": count_or_none, "metavar": "N"}),
        ("checkpoints_total_limit", "checkpoints_total_limit", "how many to keep (default: all)", {"type": count, "metavar": "N"}),
        ("resume_from_checkpoint", "resume_from_checkpoint", '"latest" or a checkpoint\'s folder: go on from there', {"metavar": "WHICH"}),
    ],
    "validation and reports": [
        ("validation_prompt", "validation_prompt", "make pictures of these prompts now and then, and at the end", TEXTS),
        ("num_validation_images", "num_validation_images", "pictures of each", {"type": count, "metavar": "N"}),
        ("validation_steps", "validation_steps", "steps from one time to the next", {"type": count, "metavar": "N"}),
        ("report_to", "report_to", "a tracker of accelerate's, such as tensorboard", {"metavar": "TRACKER"}),
        ("logging_dir", "logging_dir", "where in the output folder it writes", {"metavar": "FOLDER"}),
        ("no_progress", "progress", "show no progress bars", {"action": "store_false"}),
    ],
}  # fmt: skip
NOT_FLAGS = {
    "pipe",
    "captions",
    "covariance",
}  # given by the model's flags, by files beside the pictures, and by the covariance's flags


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each argument of `train_concept`, with its default."""
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, argument, text, options in flags:
            options = options if options.get("required") else options | {"default": DEFAULTS[argument]}
            group.add_argument(f"--{flag}", dest=argument, help=text, **options)
    group = parser.add_argument_group("hardware (devices and processes are accelerate's choice)")
    group.add_argument(
        "--allow_tf32", action="store_true", help="faster and less exact products on Ampere GPUs and newer"
    )


def run_train(args, say) -> None:
    """Train a concept, and say where everything is."""
    started, process = time.monotonic(), process_state()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    pipe = load_pipeline(args, dtype=PRECISIONS[args.mixed_precision or "no"], device=process.device)
    if args.covariance is not None:
        covariance = InputCovariance.load(args.covariance)
    else:
        progress = args.progress and process.is_main_process

        def covariance():
            return cached_covariance(
                pipe, captions_of(args), cache_dir=args.cache_dir, ridge=ridge_of(args), progress=progress
            )

    given = {name: getattr(args, name) for name in DEFAULTS.keys() - NOT_FLAGS}
    summary = train_concept(pipe, given.pop("images"), covariance=covariance, **given)
    if process.is_main_process:
        _report(args, summary, time.monotonic() - started, say)
    process.destroy_process_group()  # the whole process is ours


def _report(args, summary, seconds, say):
    loss = "" if summary.loss is None else f", the last at a loss of {summary.loss:.4f}"
    say(f"Trained {summary.token} ({args.superclass}): {summary.num_steps} steps{loss}.")
    say(f"  time          {summary.seconds:.0f} s of training, {seconds:.0f} s in all")
    say(f"  trainable     {summary.num_trainable:,} numbers")
    say(f"  concept       {summary.concept} ({summary.num_bytes:,} bytes)")
    for name, paths in (("checkpoint", summary.checkpoints), ("pictures", summary.validation_pictures)):
        if paths:
            say(f"  {name:13} {paths[-1]}" + (f" and {len(paths) - 1} before it" if len(paths) > 1 else ""))
    if summary.logging_dir is not None:
        say(f"  logs          {summary.logging_dir}")
    say("What to type next:")
    model = f"--pretrained_model_name_or_path {_quoted(args.pretrained_model_name_or_path)}"
    flags = "".join(
        f" --{name} {value}" for name in ("revision", "variant") if (value := getattr(args, name)) is not None
    )
    say(
        f'  perfusion generate {model}{flags} --concept {_quoted(summary.concept)} --prompt "a photo of a {summary.token}"'
    )


def _quoted(value):
    return subprocess.list2cmdline([os.fspath(value)]) if os.name == "nt" else shlex.quote(os.fspath(value))
