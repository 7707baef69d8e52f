"""The README's code and commands do what they say."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from perfusion_pytorch.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BASH_BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the repository's examples, in which a block finds the files that the blocks before it wrote."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.mark.filterwarnings("ignore:The covariance is not positive definite")
@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda block: block.split("\n")[1])
def test_python_blocks_run_as_pasted(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(block, "README.md", "exec"), {})


def test_the_perfusion_commands_run_as_pasted(folder, monkeypatch, capsys):
    """One after the other; training is cut short."""
    monkeypatch.chdir(folder)
    commands = [shlex.split(block) for block in BASH_BLOCKS if block.startswith("perfusion ")]
    assert [command[1] for command in commands] == ["train", "generate", "info"]
    for command in commands:
        short = {
            "train": ["--max_train_steps", "3", "--cache_dir", "cache"],
            "generate": ["--num_inference_steps", "2"],
        }
        assert main([*command[1:], *short.get(command[1], [])]) == 0, capsys.readouterr().err
    assert "<car-1>, a car" in capsys.readouterr().out
    assert (folder / "car" / "concept.safetensors").exists() and Image.open(folder / "car.png").width > 2 * 64


def test_first_block_is_about_thirty_lines_and_states_shapes():
    assert len(PYTHON_BLOCKS[0].strip().split("\n")) <= 40
    assert "(4, 256, 1024)" in PYTHON_BLOCKS[0]


def test_commands_set_up_and_run_files_and_extras_that_exist():
    commands = [part for block in BASH_BLOCKS for part in block.strip().split(" && ")]
    extras = re.findall(r'"(\w+)": DIFFUSERS', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert len(BASH_BLOCKS) >= 2
    for command in commands:
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            assert re.search(r"\[(\w+)\]", words[-1]).group(1) in extras
        elif len(words) > 1 and words[1].endswith(".py"):
            assert (ROOT / words[1]).exists()
        elif words[0] != "perfusion":
            assert words == ["python", "-m", "pytest"]


def test_pictures_and_links_of_the_readme_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
