"""Metadata and extras of lightning_plugins; tool settings are in pyproject.toml.

The lower bounds are what `make test-oldest` runs on (constraints-oldest.txt); the newest versions tested are in constraints.txt.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Read, not imported: the package's dependencies may not be there yet.
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "lightning_plugins/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
)[1]

VISION = ["torchvision>=0.21", "timm>=1.0.10", "opencv-python-headless>=4.10"]
CLI = ["jsonargparse[signatures]>=4.51", "rich>=13.7", "click>=8.1"]
REPORT = ["matplotlib>=3.8", "jinja2>=3.1", "pillow>=10.4", "defusedxml>=0.7.1"]
WANDB = ["wandb>=0.19.5"]
TEST = [
    "pytest>=8.2",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "scipy",
    "psutil",
    "torchdata>=0.11",
    "markdown-it-py",
    "pyyaml",
    "lightning",
    "setuptools>=77",
]
LINT = ["ruff", "mypy", "import-linter", "types-PyYAML"]
DOCS = ["mkdocs-material", "mkdocstrings[python]"]

setup(
    name="lightning_plugins",
    version=VERSION,
    description="Ten papers' training systems as plugins for PyTorch Lightning",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["lightning_plugins", "lightning_plugins.*"]),
    package_data={"lightning_plugins": ["py.typed", "__init__.pyi", "recipes/*.yaml", "reporting/templates/*"]},
    install_requires=[
        "torch>=2.6",
        # 2.6.2 and 2.6.3 were malicious releases (GHSA-w37p-236h-pfx3).
        "pytorch-lightning>=2.5.1,!=2.6.2,!=2.6.3,<3",
        "lightning-utilities>=0.10",
        "numpy>=1.26",
    ],
    extras_require={
        "vision": VISION,
        "report": REPORT,
        "wandb": WANDB,
        "cli": CLI,
        "deepspeed": ["deepspeed; sys_platform == 'linux'"],
        "docs": DOCS,
        "test": TEST,
        "lint": LINT,
        # Everything that installs everywhere: without deepspeed, which wants a CUDA toolkit.
        "all": VISION + REPORT + WANDB + CLI,
    },
    entry_points={
        "console_scripts": [
            "lightning = lightning_plugins.cli:main",
            "lightning-plugins = lightning_plugins.cli:main",
        ],
        # Each Trainer asks the group of its own namespace; both give nothing unless `lightning run` started the process.
        "lightning.pytorch.callbacks_factory": ["lightning_plugins = lightning_plugins.recipes.world_size:for_lightning"],
        "pytorch_lightning.callbacks_factory": ["lightning_plugins = lightning_plugins.recipes.world_size:for_pytorch_lightning"],
    },
)
