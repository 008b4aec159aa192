"""Where a checkpoint comes from, in words fit to be published: no path of this machine in them."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

CARRIED_OVER = ("license", "license_name", "license_link", "language")  # of the original's card
_HERE = (
    "device",
    "progress",
    "fresh",
    "activations",
    "tell",
)  # arguments that belong to this machine, not to the result
_PATTERNS = ("skip",)  # lists of strings; others are documents


def public_name(source: object) -> str:
    """A Hub name as it is; of a path that exists here or is absolute, its last part."""
    text = os.fspath(source) if isinstance(source, str | os.PathLike) else str(source)
    path = Path(text)
    return path.resolve().name if path.exists() or path.is_absolute() else text


def origin(src: str, config: Any) -> dict[str, Any]:
    """What a report says of the original.

    Args:
        src: folder or Hub name.
        config: its config, as transformers loaded it.

    Returns:
        source; model_type; for a model of the Hub also base_model and base_revision (its commit);
        card: those of CARRIED_OVER that the original's own card states.
    """
    found: dict[str, Any] = {"source": public_name(src), "card": card_fields(src)}
    found["model_type"] = config.model_type
    if not Path(src).is_dir():
        found["base_model"] = src
        if revision := getattr(config, "_commit_hash", None):
            found["base_revision"] = revision
    return found


def card_fields(src: str) -> dict[str, Any]:
    """Those of CARRIED_OVER that the card of `src` states; {} without a readable README.md."""
    path = Path(src) / "README.md"
    try:
        if not Path(src).is_dir():
            path = Path(hf_hub_download(src, "README.md"))
        content = path.read_text(encoding="utf-8")
        data = ModelCard(content, ignore_metadata_errors=True).data.to_dict()
    except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return {}
    except yaml.YAMLError:
        return {}
    return {key: data[key] for key in CARRIED_OVER if data.get(key) is not None}


def command(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """The shell command that does what calling `function` with the arguments `given` does.

    Arguments at their defaults, and those that belong to this machine, are left out.
    """
    words = ["llmq", function.__name__]
    for name, parameter in inspect.signature(function).parameters.items():
        value, option = given[name], "--" + name.replace("_", "-")
        if parameter.default is parameter.empty:
            words.append(public_name(value))
        elif value == parameter.default or name in _HERE:
            continue
        elif isinstance(value, bool):
            no = "--asymmetric" if name == "symmetric" else "--no-" + option[2:]
            words.append(option if value else no)
        elif isinstance(value, str | os.PathLike):
            words += [option, public_name(value)]
        elif isinstance(value, list | tuple) and all(isinstance(v, os.PathLike) for v in value):
            words += [word for v in value for word in (option, public_name(v))]
        elif isinstance(value, list | tuple) and all(isinstance(v, int) for v in value):
            words += [option, ",".join(map(str, value))]
        elif name in _PATTERNS:
            words += [word for v in value for word in (option, v)]
        elif isinstance(value, int | float):
            words += [option, str(value)]
        else:
            words += [option, f"<{type(value).__name__}>"]
    return shlex.join(words)
