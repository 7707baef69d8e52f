"""The README is short, shows the picture first, and its commands are those that the other tools rely on."""

import re

from helpers.snippets import ROOT, blocks, commands
from PIL import Image

from perfusion_pytorch.cli.main import main

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_it_is_short():
    assert len(TEXT.encode()) <= 10_000


def test_its_first_screen_has_the_picture_and_three_lines_of_result():
    start, _, _ = TEXT.partition("## Install")
    assert start.index("](examples/shapes/grid.png)") < start.index("\n- ")
    assert len(re.findall(r"^- ", start, re.M)) == 3 and start.count("\n") <= 25


def test_the_first_command_after_installing_makes_a_picture(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    install, (program, *words), *_ = commands(README)
    assert install == ["pip", "install", "-e", ".[diffusers]"] and (program, words[0]) == (
        "perfusion",
        "generate",
    )
    assert main([*words, "--num_inference_steps", "1"]) == 0
    assert Image.open("car.png").width > 2 * 64


def test_the_layer_takes_about_twelve_lines_and_states_shapes():
    layer = blocks(README, "python")[-1]
    assert "Rank1EditModule(" in layer and len(layer.strip().split("\n")) <= 13
    assert "(4, 77, 1024)" in layer


def test_the_test_command_stands_where_ci_looks_for_it():
    _, _, rest = TEXT.partition("<!-- test command -->\n```bash\n")
    command, _, _ = rest.partition("\n```")
    assert command == "pip install -e '.[test]' && python -m pytest -n 2 --dist worksteal"
