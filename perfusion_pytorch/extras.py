"""Packages that the layers do without, imported where they are used."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

# What the extra `diffusers` installs: each package's name on the index, and the module that it holds.
PACKAGES = {
    "diffusers": "diffusers",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "pillow": "PIL",
    "tqdm": "tqdm",
}
# What other extras install beside them; package and module have one name.
OF_OTHER_EXTRAS = {"gradio", "matplotlib", "peft"}


def required(name: str) -> Any:
    """Import and return a module of an optional package, such as "diffusers" or "PIL.ImageOps".

    Raises:
        ImportError: the module cannot be imported; the message says what to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        own = name.partition(".")[0]
        packages = PACKAGES | ({own: own} if own in OF_OTHER_EXTRAS else {})
        missing = [package for package, module in packages.items() if _is_missing(module)]
        # If none is, one does not fit another: new versions of all do.
        wanted = " ".join(missing) or f"--upgrade {' '.join(packages)}"
        raise ImportError(f"This needs {name} ({error}). Run pip install {wanted}.") from error


def _is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except (ImportError, ValueError):  # as where something else forbids it
        return True
