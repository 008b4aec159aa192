"""Publish a checkpoint on the Hugging Face Hub.

    check       a folder is whole: every file is there and has its checksum
    push        check, write the model card, create the repository, upload

An upload that was interrupted is taken up by pushing again: what has arrived is not sent twice
(files in LFS by their hash, data in Xet by its chunks).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # type: ignore[attr-defined]
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from llmq import verify
from llmq.card import MARK, model_card
from llmq.errors import FormatError, HubError, SourceError
from llmq.output import writing
from llmq.report import REPORT_FILE, read_report
from llmq.stored import inspect_checkpoint

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Push:
    """What was uploaded, or would be.

    Attributes:
        repo: "user/name".
        url: of the repository; None after a dry run.
        files: path -> bytes.
        card: the text of README.md.
        private: as asked for.
    """

    repo: str
    url: str | None
    files: dict[str, int]
    card: str
    private: bool


def check(folder: Path) -> dict[str, Any]:
    """Refuse a folder that is not a whole checkpoint; its report.

    Raises:
        SourceError: no checkpoint, no report or no tokenizer.
        FormatError: a file that is missing or has changed (see `verify.check`), or nothing in it
            is quantized.
    """
    report = read_report(folder)
    if report is None:
        raise SourceError(
            f"{folder}: no {REPORT_FILE}. Push a folder that llmq quantize wrote, as a whole."
        )
    if not any(layer.quantized for layer in inspect_checkpoint(folder)):
        raise FormatError(f"{folder}: no quantized layer in it.")
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise SourceError(f"{folder}: no tokenizer. Copy the original's tokenizer files into it.")
    verify.check(folder)
    return report


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    base_model: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Push:
    """Upload a folder that `llmq quantize` wrote, with a model card made from its report.

    A README.md that somebody else wrote stays as it is.

    Args:
        folder: the checkpoint.
        repo: "user/name" on the Hub; created if it is not there.
        private: create it as private; an existing public one is refused.
        dry_run: check and make the card, but write and send nothing.
        base_model: name on the Hub of the original, if the report does not know one.
        token: of the Hub; None = the one that `hf auth login` stored.
        endpoint: URL of the Hub; None = that of huggingface_hub.

    Raises:
        SourceError, FormatError: see `check`; nothing has been sent then.
        HubError: no token, not your repository, or the connection broke.
    """
    report = check(folder)
    _check_name(repo)
    if base_model is not None:
        _check_name(base_model)
    path = folder / CARD_FILE
    written = path.read_text(encoding="utf-8") if path.is_file() else None
    foreign = written is not None and MARK not in written
    card = written if foreign and written else model_card(report, repo, base_model=base_model)
    files = {name: (folder / name).stat().st_size for name in _files(folder)}
    files[CARD_FILE] = len(card.encode())
    if dry_run:
        return Push(repo, None, files, card, private)
    check_access(repo, token)
    if not foreign:
        with writing(folder):
            path.write_text(card, encoding="utf-8")
    api = HfApi(endpoint=endpoint, token=token)
    with _explained(repo):
        _create(api, repo, private)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=f"Upload {folder.resolve().name} with llmq",
            allow_patterns=sorted(files),
            delete_patterns=["model*.safetensors", "model.safetensors.index.json"],
        )
    return Push(repo, f"{api.endpoint}/{repo}", files, card, private)


def _create(api: HfApi, repo: str, private: bool) -> None:
    """Make the repository if it is not there. A token may write to one without this right."""
    try:
        api.create_repo(repo, private=private or None)
        return
    except HfHubHTTPError as error:
        if error.response.status_code not in (403, 409) or not api.repo_exists(repo):
            raise
    if private and not api.model_info(repo).private:
        raise HubError(f"{repo}: exists and is public. Make it private there first.")


def check_access(repo: str, token: str | None = None) -> None:
    """Refuse what is bound to fail, before any work: a bad name, no token. Asks nobody.

    Raises:
        HubError: says which.
    """
    _check_name(repo)
    if (token or get_token()) is None:
        raise HubError("No token for the Hub: run `hf auth login`, or set HF_TOKEN.")


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"{repo}: not a name on the Hub: {error}") from error
    if "/" not in repo:
        raise HubError(f"{repo}: give the whole name: user/{repo}.")


def _files(folder: Path) -> Iterator[str]:
    """Files to upload, relative to `folder`; none that is hidden, or in a hidden folder."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in parts):
            yield "/".join(parts)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """What goes wrong on the way to the Hub, as a HubError that says what to do."""
    again = "Push again: what has arrived is not sent twice."
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError(f"{repo}: huggingface_hub is in offline mode (HF_HUB_OFFLINE).") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise HubError(f"{repo}: the Hub refuses this token. Run `hf auth login`.") from error
        if status in (403, 404):
            raise HubError(
                f"{repo}: you may not write there. It is not yours, or your token may only read."
            ) from error
        raise HubError(f"{repo}: the Hub answered {status}. {again}") from error
    except (HTTPError, OSError, RuntimeError) as error:
        reason = (
            (str(error.__cause__ or error).strip() or type(error).__name__)
            .splitlines()[0]
            .rstrip(".")
        )
        raise HubError(f"{repo}: the upload was interrupted: {reason}. {again}") from error
