"""Push to a Hub on the loopback interface, and load from it by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK
from fakehub import FakeHub
from huggingface_hub import ModelCard, constants
from zoo import tiny_ids

import llmq
from llmq import hf, hub, verify
from llmq.card import MARK, model_card
from llmq.errors import FormatError, HubError, LlmqError, SourceError
from llmq.origin import card_fields, command, public_name

# huggingface_hub's own LFS upload, as its HTTP client sees it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory, model) -> Path:
    """The tiny model with a card of its own."""
    folder = tmp_path_factory.mktemp("hub") / "original"
    shutil.copytree(model, folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Tiny\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(source: Path, text: Path) -> Path:
    """Quantized, with a recorded measurement."""
    out = source.parent / "tiny-int4"
    settings: dict[str, Any] = {"samples": 4, "seq_len": 64, "group_size": 64}
    llmq.quantize(source, out, calibration=str(text), **settings)
    llmq.evaluate(out, str(text), seq_len=64, windows=4, reference=source, record=True)
    return out


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the fake knows LFS only
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with FakeHub() as fake:
        yield fake


def push(folder: Path, server: FakeHub, repo: str = "me/tiny", **options) -> hub.Push:
    return hub.push(folder, repo, token=server.token, endpoint=server.url, **options)


def test_a_push_holds_every_file_and_a_card_of_measured_numbers(checkpoint, server) -> None:
    done = push(checkpoint, server, base_model="org/tiny")
    files = server.repos["me/tiny"].files
    on_disk = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert files == on_disk
    assert done.files == {name: len(data) for name, data in files.items()}
    assert done.url == f"{server.url}/me/tiny"

    card: Any = ModelCard(files["README.md"].decode())  # huggingface_hub's own parser
    report = json.loads(files["quantization_report.json"])
    [measured] = report["evaluations"]
    assert card.data.base_model == "org/tiny"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert (card.data.license, card.data.language) == ("mit", "en")
    assert card.data.eval_results is not None
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {key: measured[key] for key in ("perplexity", "kl", "top1")}
    text = card.text
    assert report["calibration"]["sha256"] in text
    assert report["command"] in text
    assert measured["protocol"] in text
    worst = max(report["layers"], key=lambda layer: layer["error"])
    assert f"`{worst['name']}`" in text
    assert 'llmq.load("me/tiny"' in text
    assert "llmq convert me/tiny gguf --format gguf" in text
    assert "not measured" not in text
    for data in files.values():  # nothing of this machine is published
        assert str(checkpoint.parent).encode() not in data


def test_what_was_not_measured_is_said_to_be_so(checkpoint) -> None:
    report = json.loads((checkpoint / "quantization_report.json").read_text())
    del report["evaluations"]
    card: Any = ModelCard(model_card(report, "me/tiny"))
    assert card.text.count("not measured") == 3
    assert "llmq convert" in card.text
    assert "writes GGUF for llama" in model_card({**report, "model_type": "gemma2"}, "me/tiny")
    other = {**report, "bits": 8, "symmetric": False}
    assert "no block of GGUF holds 8 bits" in model_card(other, "me/tiny")
    assert card.data.eval_results is None
    assert card.data.base_model is None
    assert report["source"] == "original"  # a folder's own name, no path


def test_a_dry_run_sends_and_writes_nothing(folder, server) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = hub.push(folder, "me/tiny", dry_run=True, endpoint=server.url)  # and needs no token
    assert (done.url, server.repos, server.uploads) == (None, {}, [])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert done.card.startswith("---\n")
    assert {"model.safetensors", "README.md"} <= set(done.files)


def test_private_is_private(folder, server) -> None:
    push(folder, server, private=True)
    assert server.repos["me/tiny"].private
    push(folder, server, "me/open")
    assert not server.repos["me/open"].private
    with pytest.raises(HubError, match="exists and is public"):
        push(folder, server, "me/open", private=True)


def test_a_card_by_hand_stays(folder, server) -> None:
    (folder / "README.md").write_text("mine")
    push(folder, server)
    assert server.repos["me/tiny"].files["README.md"] == b"mine"
    (folder / "README.md").write_text(f"{MARK} old")
    push(folder, server)
    assert b"old" not in server.repos["me/tiny"].files["README.md"][-10:]


def test_no_token(folder, server) -> None:
    with pytest.raises(HubError, match="hf auth login"):
        hub.push(folder, "me/tiny", endpoint=server.url)
    with pytest.raises(HubError, match="refuses this token"):
        hub.push(folder, "me/tiny", token="hf_wrong", endpoint=server.url)
    assert server.repos == {}


def test_a_repository_of_somebody_else(checkpoint, folder, server) -> None:
    push(checkpoint, server)
    server.repos["you/tiny"] = server.repos.pop("me/tiny")
    before = dict(server.repos["you/tiny"].files)
    for repo in ("you/tiny", "you/new"):
        with pytest.raises(HubError, match=f"{repo}: you may not write there"):
            push(folder, server, repo)
    assert server.repos["you/tiny"].files == before


@pytest.mark.parametrize("repo", ["tiny", "me/ti ny", "a/b/c"])
def test_names_that_cannot_be(folder, server, repo) -> None:
    with pytest.raises(HubError):
        push(folder, server, repo)


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The checkpoint in several files, with its report."""
    packed = hf.load(folder)
    out = folder.parent / "sharded"
    hf.save(packed, out, source=folder, max_shard_size="100KB")
    for name in ("quantization_report.json", "quantization_report.html"):
        shutil.copy(folder / name, out / name)
    verify.seal(out, {})
    assert len(list(out.glob("*.safetensors"))) > 3
    return out


def test_an_interrupted_upload_goes_on_where_it_stopped(sharded, server) -> None:
    server.cut_after = 2
    with pytest.raises(HubError, match="Push again: what has arrived is not sent twice"):
        push(sharded, server)
    assert server.repos["me/tiny"].files == {}  # no half of a model is ever visible
    arrived = set(server.uploads)
    server.cut_after = None
    push(sharded, server)
    assert len(arrived) >= 2
    assert (
        len(server.uploads) == len(set(server.uploads)) == len(list(sharded.glob("*.safetensors")))
    )


def test_a_push_over_an_older_one_leaves_no_stale_shards(sharded, checkpoint, server) -> None:
    push(sharded, server)
    push(checkpoint, server)
    names = {name for name in server.repos["me/tiny"].files if "model" in name}
    assert names == {"model.safetensors"}


def test_push_and_load_by_name_give_identical_logits(sharded, server, tmp_path) -> None:
    """In a process that knows the fake Hub as the Hub; `model.push_to_hub` too."""
    push(sharded, server)
    code = (
        "import sys, torch, llmq\n"
        "torch.set_num_threads(1)\n"
        "ids = torch.load(sys.argv[1])\n"
        "model = llmq.load('me/tiny')\n"
        "with torch.no_grad(): first = model(ids).logits\n"
        "model.push_to_hub('me/again', token=sys.argv[3])\n"
        "again = llmq.load('me/again')\n"
        "with torch.no_grad(): torch.save([first, again(ids).logits], sys.argv[2])\n"
    )
    ids = tiny_ids()
    torch.save(ids, tmp_path / "ids")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_ETAG_TIMEOUT": "900",  # 10 seconds else, which a busy machine may need
        "HF_HUB_DOWNLOAD_TIMEOUT": "900",
    }
    arguments = [tmp_path / "ids", tmp_path / "logits", server.token]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**inherited, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = hf.load(sharded)(ids).logits
    for logits in torch.load(tmp_path / "logits"):
        assert torch.equal(logits, expected)
    assert {"config.json", "model.safetensors"} <= set(server.repos["me/again"].files)


def break_report(folder: Path) -> None:
    (folder / "quantization_report.json").unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def lose_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


def lose_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (break_report, SourceError, "no quantization_report.json"),
        (cut_weights, FormatError, "is not the file that was written"),
        (lose_tokenizer, SourceError, "no tokenizer"),
        (lose_config, FormatError, "generation_config.json: missing"),
    ],
)
def test_an_incomplete_folder_is_refused(folder, server, damage, error, message) -> None:
    damage(folder)
    with pytest.raises(error, match=message):
        push(folder, server)
    assert server.repos == {}


def test_a_model_that_is_not_quantized_is_refused(source, tmp_path, server) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "dense"))
    (folder / "quantization_report.json").write_text("{}")
    with pytest.raises(FormatError, match="no quantized layer"):
        push(folder, server)


def test_the_command_line(run, folder, server, monkeypatch) -> None:
    status, stdout, stderr = run("push", folder, "me/tiny", "--dry-run")
    assert (status, server.repos) == (0, {}), stderr
    assert "model.safetensors" in stdout
    assert "license: mit" in stdout
    status, _, stderr = run("push", folder, "me/tiny", "--endpoint", server.url)
    assert (status, stderr.count("\n")) == (1, 1)
    assert "hf auth login" in stderr
    monkeypatch.setattr(hub, "get_token", lambda: server.token)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: server.token)
    status, stdout, stderr = run("push", folder, "me/cli", "--endpoint", server.url, "--json")
    assert status == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["url"] == f"{server.url}/me/cli"
    assert "model.safetensors" in server.repos["me/cli"].files


def test_quantize_and_push_in_one_command(run, source, text, tmp_path, server, monkeypatch) -> None:
    options = ["--calibration", text, "--push-to", "me/one", *QUICK]
    status, _, stderr = run("quantize", source, tmp_path / "out", *options)
    assert (status, (tmp_path / "out").exists()) == (1, False)  # no token: known before the work
    assert "hf auth login" in stderr
    monkeypatch.setattr(hub, "get_token", lambda: server.token)
    pushed = hub.push
    monkeypatch.setattr(
        hub, "push", lambda *a, **k: pushed(*a, **k, token=server.token, endpoint=server.url)
    )
    status, stdout, stderr = run(
        "quantize", source, tmp_path / "out", *options, "--private", "--eval-text", text
    )
    assert status == 0, stderr
    assert "paired difference" in stdout
    assert server.repos["me/one"].private
    assert b"not measured" not in server.repos["me/one"].files["README.md"]


def test_words_fit_to_be_published(tmp_path) -> None:
    assert public_name("org/model") == "org/model"
    assert public_name(tmp_path / "x") == "x"
    given = {"src": "org/model", "out": tmp_path / "out"}
    for name, value in {"bits": 3, "symmetric": False, "skip": ["a", "b c"]}.items():
        given[name] = value
    defaults = {
        name: parameter.default
        for name, parameter in __import__("inspect").signature(llmq.quantize).parameters.items()
    }
    said = command(llmq.quantize, {**defaults, **given, "calibration": tmp_path / "c.txt"})
    assert said == (
        "llmq quantize org/model out --bits 3 --asymmetric --calibration c.txt "
        "--skip a --skip 'b c'"
    )
    several = {"calibration": [tmp_path / "own.jsonl", tmp_path / "c.txt"], "widths": [4, 8]}
    said = command(llmq.quantize, {**defaults, **given, "skip": (), **several})
    assert said.endswith("--widths 4,8 --asymmetric --calibration own.jsonl --calibration c.txt")
    documents = command(llmq.quantize, {**defaults, **given, "calibration": ["a text", "more"]})
    assert "--calibration '<list>'" in documents


@pytest.mark.parametrize("content", ["no metadata", "---\n: [\n---\n", "---\nlicense: \n---\n"])
def test_a_card_that_says_nothing(tmp_path, content) -> None:
    (tmp_path / "README.md").write_text(content)
    assert card_fields(str(tmp_path)) == {}
    assert card_fields(str(tmp_path / "none")) == {}


def test_recording_needs_a_report(source, text) -> None:
    with pytest.raises(LlmqError, match="record needs a folder"):
        llmq.evaluate(source, str(text), seq_len=64, windows=2, record=True)
