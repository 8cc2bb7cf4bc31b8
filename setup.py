"""Maps cli/ and weights_map/ into the package; all else is in pyproject.toml."""

from setuptools import find_packages, setup


ROOTS = {"eqxdiff": "eqxdiff", "eqxdiff.cli": "cli", "eqxdiff.weights_map": "weights_map"}

packages = []
for package, folder in ROOTS.items():
    packages += [package] + [f"{package}.{sub}" for sub in find_packages(folder)]

setup(package_dir=ROOTS, packages=packages)
