"""Maps the folder model/ to the package blip2_kernels.model; all metadata is in pyproject.toml."""

from setuptools import find_packages, setup

MODEL_PACKAGES = ["blip2_kernels.model"] + [f"blip2_kernels.model.{name}" for name in find_packages("model")]

setup(
    packages=find_packages(include=["blip2_kernels", "blip2_kernels.*"]) + MODEL_PACKAGES,
    package_dir={"blip2_kernels.model": "model"},
)
