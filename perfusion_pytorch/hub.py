"""Models on the hub: found out within seconds whether one can be had, before a library tries for minutes."""

from pathlib import Path

from perfusion_pytorch.extras import required

SECONDS = 10  # to wait for the hub's answer


def check_is_available(name: str, *, filename: str, revision: str | None = None) -> None:
    """Check that a model is in the local cache, or that the hub can be reached and has it.

    Args:
        name: a model's name on the hub, such as "CIDAS/clipseg-rd64-refined", or a folder, which is not
            checked.
        filename: a file that each such model has; where the cache holds it, the hub is not asked.
        revision: branch, tag or commit.

    Raises:
        OSError: the model is not in the cache, and the hub cannot be reached or does not have it.
    """
    if Path(name).expanduser().exists():
        return
    hub = required("huggingface_hub")
    try:
        if isinstance(hub.try_to_load_from_cache(name, filename, revision=revision), str):
            return
        hub.HfApi().model_info(name, revision=revision, timeout=SECONDS)
    except hub.errors.GatedRepoError as error:
        raise OSError(
            f"The model {name} is behind an agreement on the hub. Accept it there, and log in by "
            "`hf auth login`."
        ) from error
    except (
        hub.errors.HFValidationError,
        hub.errors.RepositoryNotFoundError,
        hub.errors.RevisionNotFoundError,
    ) as error:
        which = f" in revision {revision!r}" if revision else ""
        raise OSError(
            f"There is no model {name}{which}: neither a folder, nor on the hub. Check its name; a private "
            "one needs `hf auth login`."
        ) from error
    except Exception as error:  # of whichever network library the hub's client uses, in this version
        raise OSError(
            f"The model {name} is not in the local cache, and the model hub cannot be reached "
            f"({type(error).__name__}). Connect to the network, or give a model's folder."
        ) from error
