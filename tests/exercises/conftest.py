"""The fixture `exercise`: the module under test, e03.py for test_e03.py.

By default the solutions beside this file; the environment variable EXERCISES names another folder:
`make exercise N=03` tests the reader's own tutorials/exercises/e03.py, and tests/test_exercises.py
the blanks.
"""

import os
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def exercise(request):
    name = re.search(r"e\d\d", request.path.stem)[0]
    folder = Path(os.environ.get("EXERCISES") or Path(__file__).parent)
    spec = spec_from_file_location(f"exercise_{name}", folder / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
