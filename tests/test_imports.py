"""Imports inside the package go one way, and no module uses another's private names."""

import ast
from pathlib import Path

import pytest

import perfusion_pytorch

PACKAGE = Path(perfusion_pytorch.__file__).parent
# Modules beside the rooms that import nothing of the package, so that all others may import them.
BASE = {"arguments", "files", "protocols", "user_warnings"}
# What the modules of each room may import beside it and BASE. "top" is the modules beside the rooms.
MAY_IMPORT = {
    "layers": set(),
    "captions": set(),
    "top": {"layers"},
    "pipelines": {"layers", "captions", "top"},
    "training": {"layers", "captions", "top", "pipelines"},
    "evaluation": {"layers", "captions", "top", "pipelines", "training"},
    "app": {"layers", "captions", "top", "pipelines", "training", "evaluation"},
    "cli": {"layers", "captions", "top", "pipelines", "training", "evaluation", "app"},
}
FACES = (
    "perfusion_pytorch",
    "perfusion_pytorch.__main__",
)  # they import from all rooms, and nothing imports them


def name_of(path):
    parts = ("perfusion_pytorch", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
ROOMS = {name.split(".")[1] for name in SOURCES if name.count(".") > 1}


def room_of(module):
    room = module.split(".")[1]
    return room if room in ROOMS else "top"


def imports_of(source, modules):
    """Yield (line, module, name) of each import from the package; name is None where a module is imported."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "perfusion_pytorch":
                    yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "a relative import", None
            elif node.module.split(".")[0] == "perfusion_pytorch":
                for alias in node.names:
                    module = f"{node.module}.{alias.name}"
                    yield (
                        (node.lineno, module, None)
                        if module in modules
                        else (node.lineno, node.module, alias.name)
                    )


def wrong_directions(module, source, modules):
    """Return the imports of a module that its room does not allow, as text."""
    if module in FACES:
        return []
    room, wrong = room_of(module), []
    for line, target, _ in imports_of(source, modules):
        is_known = target in modules and target not in FACES
        target_room = room_of(target) if is_known else None
        is_allowed = is_known and (
            target_room == room
            or target_room in MAY_IMPORT[room]
            or target.removeprefix("perfusion_pytorch.") in BASE
        )
        if not is_allowed:
            wrong.append(f"{module}:{line} imports {target}")
    return wrong


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def private_uses(module, source, modules):
    """Return, as text, where a module imports another's private name or reads it from an imported module."""
    tree, wrong, imported = ast.parse(source), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "perfusion_pytorch":
            for alias in node.names:
                if is_private(alias.name):
                    wrong.append(f"{module}:{node.lineno} imports {node.module}.{alias.name}")
                if f"{node.module}.{alias.name}" in modules:
                    imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            imported |= {
                alias.asname or alias.name: alias.name
                for alias in node.names
                if alias.name.split(".")[0] == "perfusion_pytorch"
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in imported:
            wrong.append(f"{module}:{node.lineno} uses {imported[ast.unparse(node.value)]}.{node.attr}")
    return wrong


def test_every_room_is_known():
    assert MAY_IMPORT.keys() - {"top"} == ROOMS


def test_the_base_imports_nothing_of_the_package():
    for name in BASE & {module.removeprefix("perfusion_pytorch.") for module in SOURCES}:
        module = f"perfusion_pytorch.{name}"
        assert list(imports_of(SOURCES[module], SOURCES)) == []


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_one_way(module):
    assert wrong_directions(module, SOURCES[module], SOURCES) == []


@pytest.mark.parametrize("module", SOURCES)
def test_private_names_stay_in_their_module(module):
    assert private_uses(module, SOURCES[module], SOURCES) == []


@pytest.mark.parametrize(
    "module, line",
    [
        ("layers.functional", "from perfusion_pytorch.pipelines.verbs import load_concept"),
        ("layers.functional", "from perfusion_pytorch import wiring"),
        ("layers.functional", "def late():\n    import perfusion_pytorch.training.train"),
        ("captions.words", "from perfusion_pytorch.layers import functional"),
        ("loss", "from perfusion_pytorch.cli import main"),
        ("loss", "from perfusion_pytorch import Rank1EditModule"),
        ("loss", "from .layers import functional"),
        ("pipelines.verbs", "import perfusion_pytorch.training.train as training"),
        ("training.train", "from perfusion_pytorch.cli.main import main"),
        ("training.train", "from perfusion_pytorch.app.page import build"),
        ("app.page", "from perfusion_pytorch.cli.main import main"),
    ],
)
def test_an_import_that_points_up_is_found(module, line):
    assert len(wrong_directions(f"perfusion_pytorch.{module}", line, SOURCES)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from perfusion_pytorch.concept import _secret",
        "from perfusion_pytorch import concept\nconcept._secret()",
        "from perfusion_pytorch import concept as c\ndef late():\n    return c._secret",
        "import perfusion_pytorch.concept\nperfusion_pytorch.concept._secret()",
    ],
)
def test_the_use_of_a_private_name_is_found(source):
    assert len(private_uses("perfusion_pytorch.grids", source, SOURCES)) == 1


def test_what_is_allowed_is_not_found():
    source = """
from perfusion_pytorch.layers import functional
from perfusion_pytorch.layers.functional import concept_dual
import torch

def __getattr__(name):
    return functional.__name__, self._own, torch._C
"""
    assert wrong_directions("perfusion_pytorch.grids", source, SOURCES) == []
    assert private_uses("perfusion_pytorch.grids", source, SOURCES) == []
