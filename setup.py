"""Builds flow-kernels; everything static is in pyproject.toml."""

from setuptools import setup

setup()
