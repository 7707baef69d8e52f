"""What does batching bring a server of many users, each with their own concept? Is anything mixed up?

    pip install -e '.[benchmarks,serve]' && python benchmarks/bench_serve.py

The server is `examples/serve.py` with the small model, in a process of its own, asked over HTTP by
`--users` users at once, each with another concept; every user asks again as soon as the picture is there.
It runs once with batches of `--max_batch` and once with one prompt a batch, as a server must that changes
the pipeline's concepts for each user. A picture is right if it is closer to the user's own, made alone,
than to that of any other user; all are compared.

`--output` gets pictures a second, the wait (median and 95th percentile) and the pictures that were mixed
up, as JSON.
"""

import argparse
import asyncio
import io
import json
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import torch
from bench_concepts import HERE, load_pipeline, write_variations
from PIL import Image

SEEDS = 4  # different pictures of a user
STEPS = 6


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)), dtype=np.float32).ravel()


def prompt_of(user):
    return f"a photo of a <c-{user}> on a blue background"


def expected_pictures(files):
    """Return the picture of each user and seed, made alone: (users, seeds, pixels)."""
    from perfusion_pytorch import load_concept

    pipe, found = load_pipeline(), []
    for file in files:
        load_concept(pipe, file)
    for user in range(len(files)):
        for seed in range(SEEDS):
            image = pipe(
                prompt_of(user), num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed)
            )
            found.append(np.asarray(image.images[0], dtype=np.float32).ravel())
    return np.stack(found).reshape(len(files), SEEDS, -1)


async def load_test(port, users, requests, expected):
    """Ask for pictures, each user one after the other; return the waits and how many were mixed up."""
    waits, mixed_up = [], 0

    async def user(client, number):
        nonlocal mixed_up
        for n in range(number, requests, users):
            seed, start = n // users % SEEDS, time.perf_counter()
            given = {"prompt": prompt_of(number), "seed": seed, "steps": STEPS}
            response = await client.get("/picture", params=given)
            waits.append(time.perf_counter() - start)
            response.raise_for_status()
            distances = np.abs(expected[:, seed] - pixels(response.content)).mean(axis=1)
            mixed_up += int(distances.argmin() != number or distances[number] > 1)

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
        start = time.perf_counter()
        await asyncio.gather(*(user(client, number) for number in range(users)))
        return time.perf_counter() - start, waits, mixed_up


def measure(files, max_batch, requests, expected):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, str(HERE.parent / "examples" / "serve.py"), "--port", str(port)]
    command += ["--max_batch", str(max_batch), "--concept", *map(str, files)]
    server = subprocess.Popen(command)
    try:
        for _ in range(300):
            try:
                httpx.get(f"http://127.0.0.1:{port}/concepts")
                break
            except httpx.ConnectError:
                time.sleep(0.2)
        took, waits, mixed_up = asyncio.run(load_test(port, len(files), requests, expected))
    finally:
        server.terminate()
        server.wait()
    return {
        "requests": requests,
        "pictures a second": requests / took,
        "wait, median, s": float(np.median(waits)),
        "wait, 95th percentile, s": float(np.percentile(waits, 95)),
        "pictures that are not the user's own": mixed_up,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--max_batch", type=int, default=8)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=HERE / "bench_serve.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = write_variations(Path(folder), args.users)
        expected = expected_pictures(files)
        apart = min(
            np.abs(expected[a] - expected[b]).mean(axis=1).min() for a in range(args.users) for b in range(a)
        )
        result = {
            "versions": {name: __import__(name).__version__ for name in ("torch", "diffusers", "fastapi")}
            | {"python": platform.python_version()},
            "threads": torch.get_num_threads(),
            "device": f"cpu, {platform.machine()}",
            "users": args.users,
            "steps of a picture": STEPS,
            "least distance of two users' pictures, of 255": float(apart),
            f"batches of {args.max_batch}": measure(files, args.max_batch, args.requests, expected),
            "one prompt a batch": measure(files, 1, max(args.users, args.requests // 4), expected),
        }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
