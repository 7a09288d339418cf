"""Files that are no modules of a package, such as scripts, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def load(name: str, path: str) -> ModuleType:
    """The file `path` of the checkout under the name `name`, which its dataclasses look up."""
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
