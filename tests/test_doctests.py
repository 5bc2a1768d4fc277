"""The examples in docstrings hold. Those that name `model_path` run on the real SmolLM2."""

import doctest
import importlib

import pytest
from test_imports import modules, source


@pytest.mark.parametrize("module", ["", *(name for name in modules() if ">>>" in source(name))])
def test_the_examples_of_a_module_hold(module, request):
    imported = importlib.import_module(f"realm_web.{module}".rstrip("."))
    names = {}
    if module and "model_path" in source(module):
        names["model_path"] = str(request.getfixturevalue("smollm2_path"))
    failed, attempted = doctest.testmod(imported, extraglobs=names)
    assert attempted and not failed
