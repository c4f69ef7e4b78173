"""Puts configs/ into the wheel: model configurations into jaxgen, tuning tables into kernels_pallas.

All else is in pyproject.toml, which cannot add a folder to the packages it finds.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = {"jaxgen.configs": "configs", "kernels_pallas.configs": "configs/kernels"}

setup(
    packages=[*find_namespace_packages(include=["jaxgen*", "kernels_pallas*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={package: ["*.json", "*.md"] for package in FOLDERS},
)
