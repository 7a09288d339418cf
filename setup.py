"""Packaging. Pure Python: nothing is compiled, and torch is not needed to build or install."""

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = ["accelerate>=1.0", "jsonargparse[signatures]>=4.30", "pyyaml>=6", "safetensors>=0.4", "tensorboard", "tqdm"]
HF = ["datasets>=3.0", "safetensors>=0.4", "tokenizers>=0.20", "transformers>=5.0"]
EXPORT = ["onnx", "onnxruntime>=1.20", "onnxscript", "torchao>=0.18"]
REPORT = ["matplotlib>=3.7", "pyyaml>=6", "scipy>=1.15", "vl-convert-python>=1.9"]
TEST = ["grimp", "hypothesis", "import-linter>=2.6", "markdown-it-py>=3", "peft>=0.18"]
TEST += ["pytest>=8", "pytest-xdist", "ruff", "scikit-learn>=1.5"]

readme = Path(__file__).with_name("README.md")

setup(
    name="smoe",
    version="0.1.0",
    description="Sparse mixtures of experts with a fixed random router, and dropout by the number of activated experts",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["smoe", "smoe.*", "transformer_xl", "transformer_xl.*", "bert", "bert.*"]),
    package_data={
        "smoe": ["**/*.yaml", "report/page.html"],
        "transformer_xl": ["configs/*.yaml"],
        "bert": ["configs/*.yaml"],
    },
    # The oldest torch that the tests run with: smoe calls private functions of it (torch._C._functorch,
    # torch._C._autograd, torch._foreach_mul_, torch._disable_dynamo), which other versions may lack or change.
    install_requires=["torch>=2.13", "numpy"],
    extras_require={
        "train": TRAIN,
        "hf": HF,
        "export": EXPORT,
        "report": REPORT,
        "test": sorted({*TRAIN, *HF, *EXPORT, *REPORT, *TEST}),
    },
    entry_points={"console_scripts": ["smoe=smoe.cli:main"]},
)
