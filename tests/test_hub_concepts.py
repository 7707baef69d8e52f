"""Concepts by their names on the hub: the real client, and a stand-in for the hub on 127.0.0.1."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.hub_server import environment
from helpers.tiny_concepts import tiny_concept
from helpers.tiny_pipes import tiny_pipe
from huggingface_hub import constants, utils

from perfusion_pytorch import get_active_concepts, load_concept
from perfusion_pytorch import hub as hub_module
from perfusion_pytorch.hub import HubName, cached_snapshot, find_concept, hub_name

NAME = "alice/teddy"
FILE = "concept.safetensors"
LIVES = {
    "README.md": b"#",
    "code.py": b"1 / 0",
    "model.bin": b"x",
    "config.json": b"{}",
    "evaluation.json": b"{}",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of two concept files."""
    folder, pipe = tmp_path_factory.mktemp("files"), tiny_pipe()
    for name, seed in (("one", 0), ("two", 1)):
        tiny_concept(pipe, seed=seed).save(folder / name)
    return [(folder / name).read_bytes() for name in ("one", "two")]


def go_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    utils.close_session()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("alice/teddy", HubName("alice/teddy")),
        ("alice/teddy@v1", HubName("alice/teddy", None, "v1")),
        ("alice/teddy/a b/c.safetensors", HubName("alice/teddy", "a b/c.safetensors")),
        ("alice/teddy/c.safetensors@refs/pr/1", HubName("alice/teddy", "c.safetensors", "refs/pr/1")),
        ("teddy/concept.safetensors", None),
        ("teddy.safetensors", None),
        ("./alice/teddy", None),
        ("../teddy", None),
        ("~/teddy", None),
        ("/alice/teddy", None),
        ("alice/teddy/sub", None),
        ("alice\\teddy", None),
        (Path("alice/teddy"), None),
    ],
)
def test_which_texts_are_names_on_the_hub(text, name):
    assert hub_name(text) == name
    if name is not None:
        assert str(name) == text


def test_what_exists_here_is_not_asked_of_the_hub(hub, files, tmp_path, monkeypatch):
    hub.add(NAME, {FILE: files[1]})
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    Path(NAME, FILE).write_bytes(files[0])
    assert find_concept(NAME) == Path(NAME, FILE) and hub.asked == []
    with pytest.raises(ValueError, match="chooses among files on the hub, but alice/teddy is local"):
        find_concept(NAME, revision="v1")
    for missing in ("./alice/bear", "alice/bear.safetensors", Path("alice/bear")):
        assert not find_concept(missing).exists() and hub.asked == []


def test_only_the_concept_is_fetched_and_only_once(hub, files):
    commit = hub.add(NAME, {FILE: files[0]} | LIVES)
    path = find_concept(NAME)
    assert path.read_bytes() == files[0] and hub.fetched == [FILE]
    assert cached_snapshot(path) == (NAME, commit)
    assert find_concept(NAME) == path and hub.fetched == [FILE]


def test_a_new_commit_is_fetched_and_an_old_one_by_its_revision(hub, files):
    first = hub.add(NAME, {FILE: files[0]}, tag="v1")
    hub.add(NAME, {FILE: files[1]})
    assert find_concept(NAME).read_bytes() == files[1]
    for path in (
        find_concept(NAME, revision="v1"),
        find_concept(f"{NAME}@v1"),
        find_concept(f"{NAME}@{first}"),
    ):
        assert path.read_bytes() == files[0] and cached_snapshot(path) == (NAME, first)
    with pytest.raises(ValueError, match="`revision` must be given once, got 'v2' beside 'alice/teddy@v1'"):
        find_concept(f"{NAME}@v1", revision="v2")
    with pytest.raises(OSError, match="There is no concept alice/teddy in revision 'v3': neither a file"):
        find_concept(NAME, revision="v3")


def test_which_of_a_models_files_is_taken(hub, files):
    hub.add(NAME, {"sub/bear.safetensors": files[0]})
    assert find_concept(NAME).read_bytes() == files[0]
    hub.add(NAME, {"other.safetensors": files[1]})
    with pytest.raises(ValueError, match=r"must hold concept.*, or one .*other.*, sub/bear.* Name one"):
        find_concept(NAME)
    assert find_concept(f"{NAME}/sub/bear.safetensors").read_bytes() == files[0]
    with pytest.raises(ValueError, match=r"must hold no.safetensors but holds other.safetensors, sub/bear"):
        find_concept(f"{NAME}/no.safetensors")
    hub.add(NAME, {FILE: files[1]})
    assert find_concept(NAME).read_bytes() == files[1]


def test_what_is_no_concept_is_not_fetched(hub, monkeypatch):
    hub.add("alice/text", LIVES)
    with pytest.raises(ValueError, match=r"one .safetensors file, but holds no .safetensors file. Choose"):
        find_concept("alice/text")
    monkeypatch.setattr(hub_module, "MAX_BYTES", 2**20)
    hub.add("alice/large", {"model.safetensors": bytes(3 * 2**20)})
    with pytest.raises(ValueError, match="at most 1 MB, but has 3 MB"):
        find_concept("alice/large")
    assert hub.fetched == []


def test_a_concept_is_loaded_by_its_name(hub, files):
    hub.add(NAME, {FILE: files[0]}, tag="v1")
    hub.add(NAME, {FILE: files[1][:-1] + b"\0"})
    pipe = tiny_pipe()
    with pytest.raises(ValueError, match="its checksum does not fit its content"):
        load_concept(pipe, NAME)
    assert get_active_concepts(pipe) == []
    assert load_concept(pipe, NAME, revision="v1") == "<car-1>" and get_active_concepts(pipe) == ["<car-1>"]


@pytest.mark.parametrize("way", ["offline mode", "the hub is gone", "503"])
def test_without_the_hub_the_cache_is_used(hub, files, monkeypatch, way):
    hub.add(NAME, {"a.safetensors": files[0]}, tag="v1")
    for name in (NAME, f"{NAME}@v1"):
        find_concept(name)
    if way == "offline mode":
        go_offline(monkeypatch)
    elif way == "503":
        hub.status = 503
    else:
        hub.shutdown(), hub.server_close(), utils.close_session()
    for name in (NAME, f"{NAME}@v1", f"{NAME}/a.safetensors"):
        assert find_concept(name).read_bytes() == files[0]
    started = time.monotonic()
    message = "The concept alice/bear is not in the local cache, and the model hub"
    with pytest.raises(OSError, match=message) as caught:
        find_concept("alice/bear")
    assert "\n" not in str(caught.value) and time.monotonic() - started < 5


def test_what_the_hub_does_not_have_or_not_for_everybody(hub, files, monkeypatch):
    with pytest.raises(OSError, match="There is no concept alice/teddy: neither a file or folder here, nor"):
        find_concept(NAME)
    hub.add(NAME, {FILE: files[0]})
    hub.private.add(NAME)
    assert find_concept(NAME).read_bytes() == files[0]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="a private one needs `hf auth login`"):
        find_concept(NAME)
    hub.status = 503
    with pytest.raises(OSError, match=r"the model hub answered 503\. Try again later, or give a concept's"):
        find_concept("alice/bear")


def test_a_cache_that_cannot_be_written_is_named(hub, files, tmp_path):
    hub.add(NAME, {FILE: files[0]})
    (tmp_path / "hf").write_bytes(b"no folder")
    with pytest.raises(OSError, match=r"alice/teddy cannot be kept in the hub's cache: .*hf.*\. Set HF_HOME"):
        find_concept(NAME)


def test_info_of_a_name_shows_the_commit_and_the_figures(hub, files, run):
    figures = {"summary": {"CLIP text": {"mean": 0.3, "low": 0.25, "high": 0.35}}}
    commit = hub.add(
        NAME, {"a/b.safetensors": files[0], "a/evaluation.json": json.dumps(figures).encode()} | LIVES
    )
    code, out, err = run("info", NAME)
    assert (code, err) == (0, "") and f"  on the hub  {NAME}, commit {commit}\n" in out
    assert "  figure      CLIP text: 0.300 (0.250 to 0.350)\n" in out
    assert hub.fetched == ["a/b.safetensors", "a/evaluation.json"]
    facts = json.loads(run("info", f"{NAME}/a/b.safetensors", "--json")[1])
    assert facts["hub"] == {"name": NAME, "commit": commit} and facts["evaluation"] == figures["summary"]


def test_the_commands_take_names(hub, concepts, run, tmp_path):
    hub.add(NAME, {FILE: (concepts / "car.safetensors").read_bytes()}, tag="v1")
    model = Path(__file__).parents[1] / "examples" / "shapes" / "tiny-sd"
    common = ["generate", "--pretrained_model_name_or_path", model, "--prompt", "a <car-1>"]
    picture = ["--num_inference_steps", 1, "--output", tmp_path / "a.png", "--device", "cpu"]
    out = run(*common, *picture, "--concept", f"{NAME}@v1")[1]
    assert "Loaded <car-1> (car), β 0.7, τ 0.15, from alice/teddy@v1.\n" in out
    code, _, err = run(*common, *picture, "--concept", f"{NAME}@v2")
    assert code == 1 and len(err.splitlines()) == 1 and "in revision 'v2': neither a file or folder" in err


@pytest.mark.slow
def test_a_process_takes_the_hub_from_its_environment(hub, files, tmp_path):
    hub.add(NAME, {FILE: files[0]})

    def info(**variables):
        command = [sys.executable, "-m", "perfusion_pytorch", "info", NAME]
        return subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, timeout=200
        )

    fresh = environment(hub, tmp_path / "fresh")
    result = info(**fresh)
    assert result.returncode == 0 and f"on the hub  {NAME}, commit" in result.stdout and result.stderr == ""
    empty = environment(hub, tmp_path / "empty") | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    result = info(**empty)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and result.stdout == ""
    assert "the model hub cannot be reached (ConnectError). Connect to the network, or" in result.stderr
