"""The package as an ordinary install: a wheel of this tree in a virtual environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[2]


class Installed:
    """A wheel, the environment that it is installed in, and a folder outside the repository to run from."""

    def __init__(self, folder):
        self.folder = folder
        source = folder / "source"
        source.mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "perfusion_pytorch", source / "perfusion_pytorch", ignore=ignored)
        flags = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
        pip = [sys.executable, "-m", "pip"]
        self.check(*pip, "wheel", *flags, "--no-build-isolation", "--wheel-dir", folder, source)
        (self.wheel,) = folder.glob("*.whl")
        environment = folder / "environment"
        venv.create(environment, symlinks=os.name != "nt")
        scheme = "nt" if os.name == "nt" else "posix_prefix"
        paths = sysconfig.get_paths(scheme, vars={"base": environment, "platbase": environment})
        self.scripts = Path(paths["scripts"])
        self.python = self.scripts / Path("python").with_suffix(sysconfig.get_config_var("EXE") or "")
        # The dependencies are those of the environment that runs the tests. Its .pth files, an editable
        # install's among them, are not read.
        installed = [path for path in sys.path if path.endswith("-packages")]
        (Path(paths["purelib"]) / "dependencies.pth").write_text("\n".join(installed))
        self.check(*pip, "--python", self.python, "install", *flags, self.wheel)

    def run(self, *command):
        """Run a command outside the repository, without its PYTHONPATH."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [str(word) for word in command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def check(self, *command):
        """Run a command that must succeed, and return its output."""
        result = self.run(*command)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def files(self):
        """Return the names of the files in the wheel."""
        with ZipFile(self.wheel) as archive:
            return set(archive.namelist())
