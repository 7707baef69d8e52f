"""Packages that the layers do without, imported where they are used."""

from importlib import import_module
from typing import Any

PACKAGES = ("diffusers", "transformers", "accelerate", "pillow", "tqdm")  # of the extra `diffusers`


def required(name: str) -> Any:
    """Import and return a module of an optional package, such as "diffusers" or "PIL.ImageOps".

    Raises:
        ImportError: the module cannot be imported; the message says what to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"This needs {name} ({error}). Run pip install {' '.join(PACKAGES)}.") from error
