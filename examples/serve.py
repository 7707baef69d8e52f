"""Pictures for many users from one pipeline: each prompt with its own concept, several prompts a batch.

    pip install -e '.[serve]'
    python examples/serve.py --concept examples/shapes/concepts/*.safetensors
    curl 'http://127.0.0.1:8000/picture?prompt=a+<car-1>+on+a+blue+background&seed=3' > car.png

Requests wait in a queue for at most `--max_wait` milliseconds, until a batch is full; those with other
numbers of steps wait for the next. A user's picture does not depend on who else is in the batch: the seed
is the request's own, and a concept acts on the rows whose prompt holds its token. `GET /concepts` lists the
tokens.
"""

import argparse
import asyncio
import io
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvicorn
from diffusers import StableDiffusionPipeline
from fastapi import FastAPI, HTTPException, Query, Response

from perfusion_pytorch import concept_gates, get_list_concepts, load_concept

MODEL_FOLDER = Path(__file__).parent / "shapes" / "tiny-sd"
MAX_WAITING = 256  # requests; more are told to come back later


@dataclass
class Request:
    """One picture that a user waits for."""

    prompt: str
    seed: int
    steps: int
    beta: float | None
    picture: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batches:
    """A queue of requests, whose pictures are made in batches.

    Args:
        pipe: the pipeline, with loaded concepts.
        max_batch: prompts of one call at most.
        max_wait: seconds that a request waits for others.
    """

    def __init__(self, pipe, max_batch, max_wait):
        self.pipe, self.max_batch, self.max_wait = pipe, max_batch, max_wait
        self.waiting: list[Request] = []
        self.arrived = asyncio.Event()

    async def picture(self, request):
        """Return the picture of a request, once its batch is done."""
        if len(self.waiting) >= MAX_WAITING:
            raise HTTPException(503, "Too many pictures are waiting. Try again in a minute.")
        self.waiting.append(request)
        self.arrived.set()
        return await request.picture

    async def run(self):
        """Make pictures until the task is cancelled."""
        while True:
            await self.arrived.wait()
            await self._wait_for_more()
            batch = self._take()
            try:
                pictures = await asyncio.to_thread(self._pictures, batch)
            except Exception:  # whatever one of them caused: the others are not to suffer for it
                pictures = await asyncio.to_thread(self._one_by_one, batch)
            for request, picture in zip(batch, pictures, strict=True):
                if request.picture.done():  # its user has left
                    continue
                if isinstance(picture, Exception):
                    request.picture.set_exception(picture)
                else:
                    request.picture.set_result(picture)

    async def _wait_for_more(self):
        loop = asyncio.get_running_loop()
        end = loop.time() + self.max_wait
        while len(self.waiting) < self.max_batch and (left := end - loop.time()) > 0:
            self.arrived.clear()
            try:
                await asyncio.wait_for(self.arrived.wait(), left)
            except asyncio.TimeoutError:
                return

    def _take(self):
        """Return the next batch: the first request, and those that fit it, in the order that they came."""
        steps = self.waiting[0].steps
        batch = [request for request in self.waiting if request.steps == steps][: self.max_batch]
        self.waiting = [request for request in self.waiting if request not in batch]
        if self.waiting:
            self.arrived.set()
        else:
            self.arrived.clear()
        return batch

    def _pictures(self, batch):
        generators = [torch.Generator().manual_seed(request.seed) for request in batch]
        with concept_gates(self.pipe, beta=[request.beta for request in batch]):
            return self.pipe(
                [request.prompt for request in batch],
                num_inference_steps=batch[0].steps,
                generator=generators,
            ).images

    def _one_by_one(self, batch):
        pictures = []
        for request in batch:
            try:
                pictures += self._pictures([request])
            except Exception as error:
                pictures.append(error)
        return pictures


def check_prompt(pipe, prompt):
    """Raise an HTTPException where a prompt holds a token of no concept, or loses one of a concept."""
    known = get_list_concepts(pipe)
    unknown = [word for word in re.findall(r"<[^<>\s]+>", prompt) if word not in known]
    if unknown:
        raise HTTPException(400, f"There is no concept {unknown[0]}. There are {', '.join(known)}.")
    try:
        pipe.tokenizer(prompt, truncation=True)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def make_app(pipe, max_batch=8, max_wait=0.02):
    """Return the server for a pipeline with loaded concepts."""
    batches = None

    @asynccontextmanager
    async def lifespan(app):
        nonlocal batches
        batches = Batches(pipe, max_batch, max_wait)  # here, because it belongs to the server's event loop
        task = asyncio.create_task(batches.run())
        yield
        task.cancel()

    app = FastAPI(title="Pictures with concepts", lifespan=lifespan)

    @app.get("/concepts")
    async def concepts() -> list[str]:
        return get_list_concepts(pipe)

    @app.get("/picture", response_class=Response)
    async def picture(
        prompt: str = Query(max_length=500),
        seed: int = Query(0, ge=0, lt=2**63),
        steps: int = Query(20, ge=1, le=100),
        beta: float | None = Query(None, ge=-10, le=10),
    ):
        check_prompt(pipe, prompt)
        image = await batches.picture(Request(prompt, seed, steps, beta))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    return app


def load_pipeline(model, concepts):
    """Return a pipeline with concept files loaded."""
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for concept in concepts:
        load_concept(pipe, concept)
    return pipe


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base_model", default=MODEL_FOLDER, help="folder or name of a Stable Diffusion 1.x or 2.x"
    )
    parser.add_argument("--concept", nargs="+", default=[], help="concept files")
    parser.add_argument("--max_batch", type=int, default=8, help="prompts in one call of the pipeline")
    parser.add_argument(
        "--max_wait", type=float, default=20, help="milliseconds that a request waits for others"
    )
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    app = make_app(load_pipeline(args.base_model, args.concept), args.max_batch, args.max_wait / 1000)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
