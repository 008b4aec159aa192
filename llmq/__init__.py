"""llmq: weight-only quantization of language models.

`import llmq` is cheap: it loads neither torch nor transformers until a name below is used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmq.api import load, quantize
    from llmq.convert import convert
    from llmq.errors import LlmqError
    from llmq.measure import evaluate
    from llmq.scheme import QuantizedWeight, QuantScheme

__version__ = "0.1.0"

_HOME = {
    "LlmqError": "llmq.errors",
    "QuantScheme": "llmq.scheme",
    "QuantizedWeight": "llmq.scheme",
    "convert": "llmq.convert",
    "evaluate": "llmq.measure",
    "load": "llmq.api",
    "quantize": "llmq.api",
}
__all__ = [
    "LlmqError",
    "QuantScheme",
    "QuantizedWeight",
    "convert",
    "evaluate",
    "load",
    "quantize",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _Package(ModuleType):
    """Keeps `llmq.quantize` the public function although `llmq/quantize.py` is a module too.

    Importing a submodule binds its name on the package; for public names that is refused here,
    so that they always resolve through `__getattr__` above.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
