"""The README's code and commands do what they say."""

import re
import shlex
from pathlib import Path

import pytest

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
    for other in PYTHON_BLOCKS[: PYTHON_BLOCKS.index(block) + 1]:
        if other == block or ("save_concept(" in other and "load_concept(" in block):
            exec(compile(other, "README.md", "exec"), {})


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
        else:
            assert words == ["python", "-m", "pytest"]


def test_pictures_and_links_of_the_readme_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
