"""The package's metadata, dependencies and extras."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PACKAGE = ROOT / "perfusion_pytorch" / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"$', PACKAGE.read_text(encoding="utf-8"), re.MULTILINE).group(1)

DIFFUSERS = ["accelerate>=1.0", "diffusers>=0.36", "pillow>=10.1", "tqdm>=4.60", "transformers>=5.6"]
APP = ["gradio>=6.31"]
BENCHMARKS = ["matplotlib>=3.7", "peft>=0.18"]
SERVE = ["fastapi>=0.165", "httpx>=0.28", "uvicorn>=0.54"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]
TEST = [
    "hypothesis>=6",
    "mypy>=1.11",
    "playwright>=1.50",  # drives the browser of the page's tests
    "pytest>=8",
    "pytest-cov>=5",
    "pytest-xdist>=3.5",
    "ruff>=0.12",
    "setuptools>=77",  # the wheel test builds with it, without an index
    "tensorboard>=2.14",
]

setup(
    name="perfusion-pytorch",
    version=VERSION,
    description="Key-locked rank-1 editing for text-to-image personalization (Perfusion), as PyTorch layers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["perfusion_pytorch", "perfusion_pytorch.*"]),
    package_data={"perfusion_pytorch": ["py.typed"]},
    entry_points={"console_scripts": ["perfusion=perfusion_pytorch.cli.main:main"]},
    python_requires=">=3.10",
    install_requires=["beartype>=0.18", "einops>=0.7", "safetensors>=0.4.3", "torch>=2.5"],
    extras_require={
        "diffusers": DIFFUSERS,
        "app": DIFFUSERS + APP + BENCHMARKS,  # its evaluations need them
        "evaluate": DIFFUSERS + BENCHMARKS,
        "benchmarks": DIFFUSERS + BENCHMARKS,
        "docs": DOCS,
        "serve": DIFFUSERS + SERVE,
        "test": DIFFUSERS + APP + BENCHMARKS + SERVE + TEST,
    },
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
