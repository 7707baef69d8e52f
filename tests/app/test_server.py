"""The page's server, asked by hand: what is outside the run's folder cannot be read or written through it."""

import itertools
import json
import os
import socket
import uuid
from pathlib import Path
from urllib.parse import quote

import pytest

httpx = pytest.importorskip("httpx", reason="needs gradio: pip install gradio")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def client(served):
    with httpx.Client(base_url=served[1], timeout=60) as client:
        yield client


def upload(client, name, data=b"some bytes"):
    """Send a file as the page does, and return where the server says it is."""
    answer = client.post("/gradio_api/upload", files={"files": (name, data)})
    assert answer.status_code == 200, answer.text
    return answer.json()[0]


def call(served, client, name, data, tab=0):
    """Call one of the page's functions by name as the page does, and return the last message about it.

    Of functions with one name, `tab` says which: 0 is the training tab's, 1 the evaluating tab's.
    """
    numbers = [key for key, fn in served[0].blocks.fns.items() if getattr(fn.fn, "__name__", "") == name]
    number = numbers[tab]
    session = uuid.uuid4().hex[:10]
    body = {"data": data, "fn_index": number, "session_hash": session, "trigger_id": None, "event_data": None}
    answer = client.post("/gradio_api/queue/join", json=body)
    assert answer.status_code == 200, answer.text
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix("data: ") or "{}") if line.startswith("data:") else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("no answer")


def described(served, **changed):
    """Return the values of the training tab's inputs."""
    values = {
        "model": "small",
        "pictures": None,
        "masks": None,
        "makes_masks": False,
        "token": "<a-1>",
        "superclass": "car",
        "prompt": "",
    } | changed
    return [*values.values(), 5, 2, 1, "no", False, 0]


def file_data(path):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png", "size": 1}


def test_it_listens_on_this_machine_alone(served):
    assert served[1].startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    "encode", [str, lambda path: quote(path, safe=""), lambda path: path.replace("..", "%2e%2e")]
)
@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        str(ROOT / "setup.py"),
        "setup.py",
        "../../../../../../../../etc/passwd",
        "{uploads}/../runs/secret.txt",
        "{uploads}/../../../../../../../etc/passwd",
        "file:///etc/passwd",
        "/proc/self/environ",
        ".gradio/x",
    ],
)
def test_files_outside_are_not_sent(served, client, path, encode):
    page, _, folder = served
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs" / "secret.txt").write_text("secret")
    answer = client.get(f"/gradio_api/file={encode(path.format(uploads=page.folder))}")
    assert (
        answer.status_code in (403, 404)
        and "root:" not in answer.text
        and "secret" not in answer.content.decode()[:6]
    )


def test_an_upload_lands_in_the_folder_whatever_its_name(served, client):
    for name in ("good.png", "../../evil.png", "/etc/evil.png", "..\\evil.png", ".hidden"):
        path = Path(upload(client, name)).resolve()
        assert path.is_relative_to(served[0].folder) and path.read_bytes() == b"some bytes"
        assert client.get(f"/gradio_api/file={path}").content == b"some bytes"


@pytest.mark.parametrize("outside", ["/etc/passwd", str(ROOT / "examples" / "shapes" / "pictures" / "1.png")])
def test_a_function_is_not_given_files_that_were_not_uploaded(served, client, outside):
    before = {path for path in served[2].rglob("*") if path.is_file()}
    message = call(served, client, "show_squares", described(served, pictures=[file_data(outside)]))
    assert message["success"] is False
    assert {path for path in served[2].rglob("*") if path.is_file()} == before


def evaluation(**changed):
    """Return the values of the evaluating tab's inputs."""
    values = {"model": "small", "labels": ["<car-1>  car.safetensors"], "uploads": None, "files": None}
    values |= {"words": "", "pictures": None, "superclass": "", "prompts": "examples", "lines": ""}
    return [*(values | {"judges": ["checker"]} | changed).values(), "0.5", "1", 1, 2, 3, 0]


@pytest.mark.parametrize(
    "changed",
    [
        {"files": [file_data("/etc/passwd")]},
        {"pictures": [file_data(ROOT / "examples" / "shapes" / "pictures" / "1.png")]},
        {"labels": [str(ROOT / "examples/shapes/concepts/car.safetensors")]},
        {"prompts": "/etc/passwd"},
        {"judges": ["/etc"]},
        {"judges": [f"{ROOT / 'setup.py'}:setup"]},
        {"model": "/etc"},
    ],
)
def test_an_evaluation_is_not_given_files_that_the_page_does_not_offer(served, client, changed):
    understood = evaluation(judges=[])  # the same call without such files comes through
    assert "There must be a judge" in json.dumps(call(served, client, "begin", understood, tab=1)["output"])
    message = call(served, client, "begin", evaluation(**changed), tab=1)
    assert message["success"] is False and served[0].runs.names() == []


def test_an_uploaded_link_or_text_is_no_picture(served, client):
    path = upload(client, "x.png", b"not a picture")
    message = call(served, client, "show_squares", described(served, pictures=[file_data(path)]))
    assert "must be a whole picture" in json.dumps(message["output"]["data"])


def test_a_run_named_like_a_path_is_not_taken(served, client):
    for name in ("..", "../uploads", "/etc"):
        for function, tab in itertools.product(("go_on", "end"), (0, 1)):
            message = call(served, client, function, [name], tab)
            assert message["success"] is False and not (served[2] / "log.txt").exists()


def test_a_concept_named_like_a_path_is_not_taken(served, client):
    values = [
        "small",
        [str(ROOT / "examples/shapes/concepts/car.safetensors")],
        None,
        "a <car-1>",
        0,
        4,
        3,
        64,
        False,
    ]
    message = call(served, client, "draw_grid", ["0.5", *values, *[0.5] * 8])
    assert message["success"] is False
    # Without gradio's own check of choices, too.
    values[2] = {}
    _, note = served[0].generate.actions.draw_grid("0.5", *values, *[0.5] * 8)
    assert "is not offered. Reload the page." in note


def test_another_sites_page_is_refused(client):
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"host": "evil.example"}):
        assert (
            client.post("/gradio_api/upload", files={"files": ("a", b"a")}, headers=headers).status_code
            == 403
        )
        assert client.get("/config", headers=headers).status_code == 403
    same = {"origin": str(client.base_url).rstrip("/")}
    assert client.get("/config", headers=same).status_code == 200


def test_large_requests_and_those_of_unknown_size_are_refused(served, client):
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as line:
        line.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999999999\r\n\r\n"
        )
        assert line.recv(100).startswith(b"HTTP/1.1 413")
    assert client.post("/gradio_api/upload", content=iter([b"a"])).status_code == 411
    before = sorted(served[0].folder.rglob("*"))
    answer = client.post("/gradio_api/upload", files={"files": ("a.png", bytes(31 * 2**20))})
    assert answer.status_code == 413 and sorted(served[0].folder.rglob("*")) == before


@pytest.mark.parametrize(
    "path",
    [
        "proxy=http://127.0.0.1:1/x",
        "file=http://127.0.0.1:1/x",
        "file=HTTPS://a.example/x",
        "vibe-code/",
        "run-history/buckets",
    ],
)
def test_what_the_page_does_not_use_is_shut(client, path):
    assert client.get(f"/gradio_api/{path}").status_code == 403


def test_the_page_names_no_folder_of_this_machine_and_no_other_host(served, client):
    text = client.get("/config").text
    assert str(ROOT) not in text and os.path.expanduser("~") + "/" not in text
    assert json.loads(text)["analytics_enabled"] is False
