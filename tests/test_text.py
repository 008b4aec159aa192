"""Sources of text: every format reads the same, and every mistake is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zoo import tiny_text, tiny_tokenizer

from llmq.calibrate import adds_bos, token_stream, token_windows
from llmq.errors import CalibrationError
from llmq.text import load_text, wikitext_rows

DOCUMENTS = ["The old miller.\r\n", "A quiet river — leaves.", "My sister waits."]
JOINED = "\n\n".join(DOCUMENTS)
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Rain."}]


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest):
    kind = request.param
    rows = [{"text": text} for text in DOCUMENTS]
    if kind == "list":
        return DOCUMENTS
    if kind == "txt":
        (tmp_path / "a.txt").write_bytes(JOINED.encode())
        return tmp_path / "a.txt"
    if kind == "jsonl":
        lines = "\n".join(map(json.dumps, rows)) + "\n\n"
        (tmp_path / "a.jsonl").write_text(lines)
        return str(tmp_path / "a.jsonl")
    datasets = pytest.importorskip("datasets")
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("source", ["list", "txt", "jsonl", "parquet", "saved"], indirect=True)
def test_every_source_is_the_same_text(source) -> None:
    assert load_text(source) == JOINED


def test_a_hub_name_is_split_and_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked, read = [], []

    def rows():
        for number in range(10_000):
            read.append(number)
            yield {"text": "word " * 100}

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_text("owner/name:config:validation", max_tokens=100)
    load_text("owner/name", max_tokens=100)
    assert asked[0] == (("owner/name", "config"), {"split": "validation", "streaming": True})
    assert asked[1] == (("owner/name", None), {"split": "train", "streaming": True})
    assert len(read) < 20  # of 10,000: reading stops when there is enough


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nosuch' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CalibrationError, match=r"nosuch: neither a file nor a data set"):
        load_text("nosuch")


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(2)))
    tokenizer = type(tiny_tokenizer())(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    assert load_text(path, tokenizer) == "<user>Why?\n<assistant>Rain.\n" * 2
    with pytest.raises(CalibrationError, match=r"chats\.jsonl, line 1: .* chat template"):
        load_text(path, tiny_tokenizer())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2: not JSON"),
        ("a.jsonl", b'{"content": "a"}', r"line 1: neither `text` nor `messages`, but keys conte"),
        ("a.jsonl", b"[1, 2]", r"line 1: neither `text` nor `messages`, but list"),
        ("a.txt", b"", r"empty; 0 tokens"),
        ("a.txt", b" \n ", r"empty; 0 tokens"),
        ("a.txt", b"\xff\xfe\x00", r"not UTF-8"),
        ("a.parquet", b"no parquet", r"not a readable parquet file"),
        ("folder/a.txt", b"text", r"a folder must be what"),
        ("missing.txt", None, r"no such file"),
    ],
)
def test_unusable_text_is_named(tmp_path: Path, name: str, content, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        load_text(tmp_path / "folder" if "folder" in name else path)
    assert str(tmp_path) in str(caught.value)


def test_a_parquet_without_text_lists_its_columns(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match="no column `text` or `messages` among body, id"):
        load_text(tmp_path / "a.parquet")


def test_wikitext_rows_are_those_of_the_dataset() -> None:
    raw = " \n = Title = \n \n Some text . \n More . \n"
    # As served by the Hub's version: "" for blank lines, line breaks kept on the others.
    rows = ["", " = Title = \n", "", " Some text . \n", " More . \n"]
    assert wikitext_rows(raw) == rows
    assert load_text([raw], join="wikitext") == "\n\n".join(rows)


def test_plain_text_and_jsonl_need_no_datasets(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.jsonl").write_text('{"text": "text"}')
    code = (
        "import sys; from llmq.text import load_text\n"
        f"assert load_text({str(tmp_path / 'a.txt')!r}) == 'text'\n"
        f"assert load_text({str(tmp_path / 'a.jsonl')!r}) == 'text'\n"
        "assert not {'datasets', 'pyarrow', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_windows_are_consecutive_pieces_of_the_stream(tmp_path: Path) -> None:
    text = tiny_text(50)
    expected = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    windows = token_windows([text], tiny_tokenizer(), seq_len=7)
    assert windows.dtype == torch.int64
    assert windows.flatten().tolist() == expected[: len(expected) // 7 * 7]
    first = token_windows([text], tiny_tokenizer(), seq_len=7, samples=3)
    assert torch.equal(first, windows[:3])


def test_a_seed_chooses_windows_and_leaves_the_global_state_alone() -> None:
    ids = torch.arange(1000).view(1, -1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (
        token_windows(ids, None, seq_len=10, samples=8, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.manual_seed(6)
    assert torch.equal(one, token_windows(ids, None, seq_len=10, samples=8, seed=1))
    starts = one[:, 0].tolist()
    assert starts == sorted(set(starts))  # in the order of the text, none twice
    assert all(start % 10 == 0 for start in starts)


def test_bos_starts_every_window_and_takes_one_place() -> None:
    tokenizer = tiny_tokenizer()
    assert adds_bos(tokenizer)
    plain = token_windows([tiny_text(50)], tokenizer, seq_len=9)
    windows = token_windows([tiny_text(50)], tokenizer, seq_len=10, bos=True)
    assert windows[:, 0].tolist() == [tokenizer.bos_token_id] * len(windows)
    assert torch.equal(windows[:, 1:], plain)


def test_token_ids_are_taken_as_they_are() -> None:
    rows = [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert token_windows(rows, None, seq_len=4, samples=2, seed=3).tolist() == rows
    given = torch.tensor(rows, dtype=torch.int32)
    assert token_windows(given, None, seq_len=4, bos=True).tolist() == rows
    assert token_stream(given, None)[0].dtype == torch.int64


@pytest.mark.parametrize(
    "bad", [torch.ones(4), [[1.5, 2]], [1, 2, 3], torch.ones(4, dtype=torch.bool)]
)
def test_ids_that_are_not_ids_are_refused(bad) -> None:
    with pytest.raises(CalibrationError, match="Token ids must be"):
        token_windows(bad, None, seq_len=2)


def test_too_little_text_says_how_much_was_found_and_needed() -> None:
    with pytest.raises(CalibrationError, match=r"found 100 tokens, need 128 \(4 windows of 32\)"):
        token_windows(torch.arange(100), None, seq_len=32, samples=4)
    short = token_windows(torch.arange(100), None, seq_len=32, samples=4, short_ok=True)
    assert short.shape == (3, 32)
    with pytest.raises(CalibrationError, match="found 31 tokens, need 128"):
        token_windows(torch.arange(31), None, seq_len=32, samples=4, short_ok=True)
    with pytest.raises(CalibrationError, match="at least 2 tokens"):
        token_windows(torch.arange(31), None, seq_len=1)
    with pytest.raises(CalibrationError, match="at least 1 window"):
        token_windows(torch.arange(31), None, seq_len=4, samples=0)


def test_several_texts_take_turns(tmp_path: Path) -> None:
    tokenizer, sizes = tiny_tokenizer(), {"seq_len": 16, "bos": True}
    paths = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"]
    for number, path in enumerate(paths):
        path.write_text(tiny_text(2000, seed=number))
    for seed in (None, 3):
        found = token_windows(paths, tokenizer, samples=7, seed=seed, spare=1, **sizes)
        assert found.shape == (8, 16)
        for number, (path, share) in enumerate(zip(paths, (3, 2, 2), strict=True)):
            spare = 1 if number == 0 else 0
            alone = token_windows(path, tokenizer, samples=share, seed=seed, spare=spare, **sizes)
            assert torch.equal(found[:7][number::3], alone[:share])
            if spare:
                assert torch.equal(found[7:], alone[share:])
    with pytest.raises(CalibrationError, match="3 texts need 3 windows"):
        token_windows(paths, tokenizer, samples=2, **sizes)
    with pytest.raises(CalibrationError, match=r"none\.txt: no such file"):
        token_windows([*paths, tmp_path / "none.txt"], tokenizer, samples=4, **sizes)
