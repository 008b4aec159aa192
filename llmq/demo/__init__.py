"""The embedded default: a tiny trained model and text, for `llmq demo` and for tests.

`benchmarks/train_demo.py` made it; NOTICE says from what.
"""

from importlib.resources import files
from pathlib import Path

__all__ = ["calibration_path", "evaluation_path", "model_path"]


def model_path() -> Path:
    """Folder of a Llama with one million parameters, bf16, in the layout of `from_pretrained`."""
    return _path("model")


def calibration_path() -> Path:
    """Text (UTF-8) from the part that the model was trained on."""
    return _path("calibration.txt")


def evaluation_path() -> Path:
    """Text (UTF-8) that neither the model nor its tokenizer has seen."""
    return _path("evaluation.txt")


def _path(name: str) -> Path:
    # Wheels of llmq are always unpacked on disk, so a resource is a real path.
    return Path(str(files(__name__).joinpath(name)))
