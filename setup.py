"""Install the top-level folder ``configs`` inside the package, which ``pyproject.toml`` can't express."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("src"), "bcos_train.configs"],
    py_modules=["bcos_train_commands"],
    package_dir={"": "src", "bcos_train.configs": "configs"},
    package_data={"bcos_train": ["py.typed", "weights/*.jinja"], "bcos_train.configs": ["**/*.yaml"]},
)
