"""Packaging: `models/`, `preprocess/` and `converters/` are subpackages of `minimind_mcore`.

The rest of the metadata is in pyproject.toml. Import only `minimind_mcore.*`; the joining of the
folders in a checkout that is not installed is in `minimind_mcore/__init__.py`.
"""

from setuptools import find_packages, setup

ROOMS = ("models", "preprocess", "converters")

packages = find_packages(include=["minimind_mcore", "minimind_mcore.*"])
package_dir = {"minimind_mcore": "minimind_mcore"}
for room in ROOMS:
    packages.append(f"minimind_mcore.{room}")
    package_dir[f"minimind_mcore.{room}"] = room
    for sub in find_packages(room):
        packages.append(f"minimind_mcore.{room}.{sub}")

setup(packages=packages, package_dir=package_dir)
