"""Models on the hub: whether one can be had is known at once, in one line."""

import time

import huggingface_hub
import pytest
from helpers.pictures import half_red
from huggingface_hub import errors

from perfusion_pytorch.hub import check_is_available
from perfusion_pytorch.training.masks import add_masks
from perfusion_pytorch.training.pictures import load_pictures

NAME = "someone/some-model"


def asking(monkeypatch, error):
    """Let the hub answer with an error."""

    def answer(self, name, *, revision, timeout):
        assert timeout <= 10
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("refused"), r"cache, and the model hub cannot be reached \(ConnectionError\)"),
        (errors.OfflineModeIsEnabled("off"), r"the model hub cannot be reached \(OfflineModeIsEnabled\)"),
        (TimeoutError(), r"the model hub cannot be reached \(TimeoutError\). Connect to the network, or"),
        (errors.HFValidationError("odd"), "There is no model someone/some-model: neither a folder, nor on"),
    ],
)
def test_a_model_that_cannot_be_had(monkeypatch, error, message):
    asking(monkeypatch, error)
    with pytest.raises(OSError, match=message) as caught:
        check_is_available(NAME, filename="config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "There is no model someone/some-model in revision 'v2': neither"),
        (errors.RevisionNotFoundError, "There is no model someone/some-model in revision 'v2': neither"),
        (errors.GatedRepoError, "is behind an agreement on the hub. Accept it there, and log in by"),
    ],
)
def test_what_the_hub_answers(monkeypatch, kind, message):
    asking(monkeypatch, kind.__new__(kind))
    with pytest.raises(OSError, match=message):
        check_is_available(NAME, filename="config.json", revision="v2")


def test_the_hub_is_not_asked_for_a_folder_or_what_is_cached(monkeypatch, tmp_path):
    asking(monkeypatch, AssertionError("it was asked"))
    check_is_available(str(tmp_path), filename="config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config"))
    check_is_available(NAME, filename="config.json")


def test_without_a_network_the_command_says_so_within_seconds(run, monkeypatch):
    """Here the connection is refused by a proxy that does not exist."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    started = time.monotonic()
    code, out, err = run(
        "generate", "--pretrained_model_name_or_path", NAME, "--prompt", "a", "--device", "cpu"
    )
    assert (code, out) == (1, "") and len(err.splitlines()) == 1 and time.monotonic() - started < 10
    assert f"The model {NAME} is not in the local cache, and the model hub cannot be reached" in err


def test_a_mask_model_that_cannot_be_had_is_one_line_too(monkeypatch):
    asking(monkeypatch, ConnectionError("refused"))
    picture = load_pictures([half_red()], resolution=64)
    message = (
        f"^`mask_model` must be a CLIPSeg .* but '{NAME}' cannot be loaded: The model .* cannot be reached"
    )
    with pytest.raises(ValueError, match=message):
        add_masks(picture, "car", NAME)
