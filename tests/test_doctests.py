"""The examples in docstrings hold."""

import doctest
import importlib

import pytest
from test_imports import modules, source


@pytest.mark.parametrize("module", ["", *(name for name in modules() if ">>>" in source(name))])
def test_the_examples_of_a_module_hold(module):
    failed, attempted = doctest.testmod(importlib.import_module(f"realm_web.{module}".rstrip(".")))
    assert attempted and not failed
