"""Everything about the package is in pyproject.toml; this file is for native extensions."""

from setuptools import setup

setup()
