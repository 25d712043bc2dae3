"""What ``pyproject.toml`` can't say: the folder ``configs`` at the top is installed inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("src"), "bcos_train.configs"],
    package_dir={"": "src", "bcos_train.configs": "configs"},
    package_data={"bcos_train": ["py.typed", "weights/*.jinja"], "bcos_train.configs": ["**/*.yaml"]},
)
