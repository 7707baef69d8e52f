"""`perfusion covariance`, `info` and `similarities`; each takes the parsed arguments and a function that shows a line."""

import json
import time
from pathlib import Path

from perfusion_pytorch.cli.base_model import (
    DTYPES,
    captions_of,
    check_concepts,
    device_of,
    load_concepts,
    load_pipeline,
    ridge_of,
)
from perfusion_pytorch.concept import Concept
from perfusion_pytorch.concept_file import ARCHITECTURES

FAR_FROM_ONE = 0.2  # of the concept's own similarity; more is worth a warning


def run_covariance(args, say) -> None:
    """Estimate an input covariance, or find it in the cache."""
    from perfusion_pytorch.pipelines.covariance_cache import cached_covariance, covariance_path

    started, captions = time.monotonic(), captions_of(args)
    device = device_of(args)
    pipe = load_pipeline(args, dtype=DTYPES[args.dtype or "float32"], device=device)
    where = {"cache_dir": args.cache_dir, "ridge": ridge_of(args)}
    path = covariance_path(pipe, captions, **where)
    before = path.stat().st_mtime_ns if path.exists() else None
    covariance = cached_covariance(
        pipe, captions, **where, batch_size=args.batch_size, progress=not args.no_progress
    )
    was_there = path.exists() and path.stat().st_mtime_ns == before  # a damaged one is written anew
    if args.output is not None:
        covariance.save(args.output)
    seconds, how = time.monotonic() - started, "found in the cache" if was_there else "computed"
    say(
        f"Input covariance of {covariance.num_tokens:,} tokens of {len(captions):,} captions, {how} in {seconds:.1f} s."
    )
    say(f"  text encodings    {covariance.dim} features")
    say(f"  condition number  {covariance.condition_number:.1e} with a ridge of {covariance.ridge:g}")
    say(f"  cached in         {path}")
    if args.output is not None:
        say(f"  written to        {args.output}")


def run_info(args, say) -> None:
    """Say what a concept file holds."""
    from safetensors import safe_open

    concept = Concept.load(args.file)
    with safe_open(args.file, framework="pt") as file:
        about = json.loads(file.metadata()["perfusion_pytorch"])
    rows = [*concept.embeddings.values(), *concept.outputs.values()]
    facts = {
        "file": str(args.file),
        "bytes": Path(args.file).stat().st_size,
        "token": concept.token,
        "superclass": concept.superclass,
        "base_model": concept.base_model,
        "architecture": ARCHITECTURES.get(concept.dim),
        "dim": concept.dim,
        "train_gate": {"beta": concept.train_gate[0], "temperature": concept.train_gate[1]},
        "eval_gate": {"beta": concept.eval_gate[0], "temperature": concept.eval_gate[1]},
        "embeddings": {name: len(row) for name, row in concept.embeddings.items()},
        "outputs": {name: len(row) for name, row in concept.outputs.items()},
        "trained_numbers": sum(len(row) for row in rows),
        "dtype": str(rows[0].dtype).removeprefix("torch."),
        "concept_norm": concept.concept_norm,
        "format_version": about["format_version"],
        "library_version": about.get("library_version"),
    }
    if args.json:
        say(json.dumps(facts, indent=2))
        return
    of_encoders = " + ".join(f"{len(row)} ({name})" for name, row in concept.embeddings.items())
    (beta, temperature), (train_beta, train_temperature) = concept.eval_gate, concept.train_gate
    known = f", that of {facts['architecture']}" if facts["architecture"] else ""
    say(f"{args.file}: the concept {concept.token}, a {concept.superclass}")
    say(f"  base model  {concept.base_model} for text encodings of {concept.dim} features{known}")
    say(f"  gate        β {beta:g}, τ {temperature:g}; trained at β {train_beta:g}, τ {train_temperature:g}")
    parts = f"an embedding of {of_encoders}, outputs of {len(concept.outputs)} layers"
    say(f"  trained     {facts['trained_numbers']:,} numbers in {facts['dtype']}: {parts}")
    say(f"  size        {facts['bytes']:,} bytes, written by perfusion-pytorch {facts['library_version']}")


def run_similarities(args, say) -> None:
    """Show the similarity r of each token of prompts to the concepts."""
    from perfusion_pytorch.diagnostics import token_similarities
    from perfusion_pytorch.pipelines.encoding import prompt_encoder
    from perfusion_pytorch.pipelines.parts import denoiser_of, loaded_on

    check_concepts(args)
    pipe = load_pipeline(args, dtype=DTYPES[args.dtype or "float32"], device=device_of(args))
    names = load_concepts(pipe, args, say=lambda line: None)
    concepts = [loaded_on(pipe).concepts[name] for name in names]
    prompts = args.prompt or [
        f"a photo of a {word}" for concept in concepts for word in (concept.token, concept.superclass)
    ]
    rows = token_similarities(denoiser_of(pipe), pipe.tokenizer, prompt_encoder(pipe), prompts)
    tables = [_without_padding(row, pipe.tokenizer.eos_token) for row in rows]
    remarks = [_remarks(table, concepts) for table in tables]
    if args.json:
        entries = zip(prompts, tables, remarks, strict=True)
        tokens = [
            {
                "prompt": prompt,
                "tokens": [{"token": token, "r": dict(zip(names, r, strict=True))} for token, r in table],
                "remarks": said,
            }
            for prompt, table, said in entries
        ]
        say(json.dumps(tokens, indent=2))
        return
    wide = max(len(token) for table in tables for token, _ in table)
    for prompt, table, said in zip(prompts, tables, remarks, strict=True):
        say(f"{prompt}\n  {'':{wide}}  " + "  ".join(f"{name:>8}" for name in names))
        for token, r in table:
            say(
                f"  {token:{wide}}  "
                + "  ".join(f"{value:{max(8, len(name))}.2f}" for value, name in zip(r, names, strict=True))
            )
        for line in said:
            say(f"  ! {line}")
    say(
        f"r is near 1 at the concept's own token and near 0 elsewhere; the gate is half open at r = β ({_gates(concepts)})."
    )


def _gates(concepts):
    return ", ".join(f"{concept.eval_gate[0]:g} of {concept.token}" for concept in concepts)


def _without_padding(row, end):
    """Return a prompt's (token, r), with the end and all padding after it as one row that holds the largest r of them."""
    tokens = [token for token, _ in row]
    stop = tokens.index(end) if end in tokens else len(row)
    rest = [r for _, r in row[stop:]]
    return row[:stop] + (
        [("(end, padding)", tuple(max(values) for values in zip(*rest, strict=True)))] if rest else []
    )


def _remarks(table, concepts):
    """Say in words what is wrong with similarities."""
    lines = []
    for j, concept in enumerate(concepts):
        beta, name = concept.eval_gate[0], concept.token
        own = [r[j] for token, r in table if token == name]
        for r in own:
            if r < beta:
                lines.append(
                    f"{name} is at r = {r:.2f}, below β {beta:g}: the gate hides the concept. Take a lower β, or train it longer."
                )
            elif abs(r - 1) > FAR_FROM_ONE:
                lines.append(
                    f"{name} is at r = {r:.2f}, far from 1: this prompt is unlike those that it was trained with."
                )
        for token, r in table:
            if token != name and r[j] > beta:
                higher = r[j] < min(own, default=1.0)
                remedy = (
                    "A higher β keeps it out."
                    if higher
                    else "No β tells the two apart: train longer, or with more captions."
                )
                lines.append(
                    f"{token} is at r = {r[j]:.2f}, above β {beta:g}: {name} shows there too. {remedy}"
                )
    return lines
