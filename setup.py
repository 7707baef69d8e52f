from pathlib import Path

from setuptools import find_packages, setup

DIFFUSERS = ["accelerate>=1.0", "diffusers>=0.36", "pillow>=10.1", "tqdm>=4.60", "transformers>=5.6"]
BENCHMARKS = ["matplotlib>=3.7", "peft>=0.18"]
TEST = ["hypothesis>=6", "pytest>=8", "ruff>=0.12", "tensorboard>=2.14"]

setup(
    name="perfusion-pytorch",
    version="1.0.0.dev0",
    description="Key-locked rank-1 editing for text-to-image personalization (Perfusion), as PyTorch layers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["perfusion_pytorch", "perfusion_pytorch.*"]),
    package_data={"perfusion_pytorch": ["py.typed"]},
    entry_points={"console_scripts": ["perfusion=perfusion_pytorch.cli.main:main"]},
    python_requires=">=3.10",
    install_requires=["beartype>=0.18", "einops>=0.7", "safetensors>=0.4.3", "torch>=2.5"],
    extras_require={
        "diffusers": DIFFUSERS,
        "benchmarks": DIFFUSERS + BENCHMARKS,
        "test": DIFFUSERS + BENCHMARKS + TEST,
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
