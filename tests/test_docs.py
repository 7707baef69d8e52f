"""The code and commands of README, CONTRIBUTING and `docs/` do what they say."""

import re

import pytest
from helpers.snippets import PAGES, ROOT, blocks, commands, name_of

import perfusion_pytorch
from perfusion_pytorch.cli.main import main
from perfusion_pytorch.cli.parser import make_parser

SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
SMALL_MODEL = "examples/shapes/tiny-sd"
PYTHON_BLOCKS = [
    pytest.param(name_of(page), block, id=f"{name_of(page)}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks(page, "python"), start=1)
]
# What makes a command short.
SHORT = {
    "train": ["--max_train_steps", "3", "--num_captions", "300", "--cache_dir", "cache"],
    "generate": ["--num_inference_steps", "2"],
    "evaluate": ["--num_inference_steps", "1", "--num_images_per_prompt", "1", "--betas", "0.5"],
    "covariance": ["--num_captions", "300", "--cache_dir", "cache"],
    "similarities": [],
    "info": [],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the repository's examples."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page, block", PYTHON_BLOCKS)
def test_python_blocks_run_as_pasted(page, block, folder):
    exec(compile(block, page, "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=name_of)
def test_perfusion_commands_run_as_pasted(page, folder, capsys):
    """One after the other, cut short; those for the hub, or a model of elsewhere, are only parsed."""
    for program, *words in commands(page):
        if program != "perfusion":
            continue
        arguments = make_parser().parse_args(words)
        if words[0] == "push":  # needs the hub, see test_push.py
            continue
        if getattr(arguments, "pretrained_model_name_or_path", SMALL_MODEL) == SMALL_MODEL:
            assert main([*words, *SHORT[words[0]]]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_other_commands_name_files_and_extras_that_exist(page):
    extras = set(re.findall(r'"(\w+)": ', SETUP))
    for words in commands(page):
        if words[:3] == ["pip", "install", "-e"]:
            named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[3]).group(1)
            assert not named or extras >= set(named.split(","))
        elif words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1]).exists(), words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_reference_holds_all_public_names():
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md")]
    names = [name for page in pages for name in re.findall(r"^::: perfusion_pytorch\.(\w+)$", page, re.M)]
    assert sorted(names) == perfusion_pytorch.__all__


def test_every_page_can_be_reached():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in navigation
