"""The serving example: requests of several users in one batch, each with its own concept, seed and gate."""

import asyncio
import importlib.util
import io

import numpy as np
import pytest
from helpers.small_model import MODEL
from PIL import Image

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

SHAPES = MODEL.parent
spec = importlib.util.spec_from_file_location("serve", SHAPES.parent / "serve.py")
serve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serve)


@pytest.fixture(scope="module")
def pipe():
    return serve.load_pipeline(MODEL, sorted((SHAPES / "concepts").glob("*.safetensors")))


def ask(app, requests):
    """The responses to requests that come at once, or the errors that a server would answer with 500."""

    async def run():
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://serve", timeout=120) as client,
        ):
            calls = [client.get(path, params=given) for path, given in requests]
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


def pixels(response):
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)), dtype=np.int16)


def test_users_of_one_batch_get_their_own_pictures(pipe, monkeypatch):
    """As if each were alone: concept, seed and gate are the request's."""
    requests = [
        ("/picture", {"prompt": prompt, "seed": seed, "steps": 2} | gate)
        for prompt in ("a <car-1> on a blue background", "a <house-1>", "a panda")
        for seed, gate in ((1, {}), (2, {"beta": 0.2}))
    ]
    sizes, call = [], type(pipe).__call__
    monkeypatch.setattr(
        type(pipe), "__call__", lambda self, *a, **k: sizes.append(len(a[0])) or call(self, *a, **k)
    )
    together = ask(serve.make_app(pipe, max_batch=4, max_wait=0.5), requests)
    assert sizes == [4, 2]
    alone = [ask(serve.make_app(pipe, max_batch=1, max_wait=0), [request])[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    assert np.abs(pixels(alone[0]) - pixels(alone[1])).max() > 20


def test_a_bad_request_harms_nobody_else(pipe, monkeypatch):
    """One that is refused by its words, and one that fails in the batch."""
    call = type(pipe).__call__

    def fails(self, prompts, **options):
        if any("cursed" in prompt for prompt in prompts):
            raise RuntimeError("no")
        return call(self, prompts, **options)

    monkeypatch.setattr(type(pipe), "__call__", fails)
    prompts = ["a <dog-1>", "a <CAR-1>", "a " * 30 + "<car-1>", "a cursed panda", "a panda"]
    requests = [("/picture", {"prompt": prompt, "steps": 1}) for prompt in prompts]
    app = serve.make_app(pipe, max_batch=4, max_wait=0.2)
    *refused, cursed, good = ask(app, requests)
    assert [response.status_code for response in refused] == [400] * 3
    assert "There is no concept <dog-1>. There are <car-1>, <house-1>" in refused[0].text
    assert "within the prompt's first" in refused[2].text
    assert isinstance(cursed, RuntimeError) and pixels(good).shape == (64, 64, 3)


def test_the_list_of_concepts_and_ranges(pipe):
    app = serve.make_app(pipe)
    listed, *bad = ask(
        app,
        [
            ("/concepts", {}),
            ("/picture", {"prompt": "a panda", "steps": 0}),
            ("/picture", {"prompt": "a panda", "seed": -1}),
            ("/picture", {}),
        ],
    )
    assert listed.json() == ["<car-1>", "<house-1>"]
    assert [response.status_code for response in bad] == [422] * 3


def test_too_many_requests_are_sent_away(pipe, monkeypatch):
    monkeypatch.setattr(serve, "MAX_WAITING", 3)
    requests = [("/picture", {"prompt": "a panda", "steps": 1, "seed": n}) for n in range(6)]
    statuses = [r.status_code for r in ask(serve.make_app(pipe, max_batch=8, max_wait=0.2), requests)]
    assert sorted(statuses) == [200] * 3 + [503] * 3
