"""Packages that the layers do without, imported where they are used."""

from importlib import import_module


def required(name: str):
    """Import a module of the extra `diffusers`, or raise an ImportError that says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"This needs {name} ({error}). Run pip install 'perfusion-pytorch[diffusers]'."
        ) from error
