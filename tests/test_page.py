"""The pages: self-contained, well formed, and the numbers in them are those of the report."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from zoo import save_tiny

import llmq
from llmq import comparison, plots
from llmq.errors import OutputError, SourceError
from llmq.page import block_of, compare_page, kind_of, plus_minus, report_page, stored_bits
from llmq.stored import bits_per_weight, inspect_checkpoint

VOID = {"meta"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


class Checked(HTMLParser):
    """Every tag is closed in order; collects text and the plots."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def check(page: str) -> Checked:
    """Well formed, and asks for nothing from outside."""
    parsed = Checked()
    parsed.feed(page)
    assert parsed.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in parsed.tags}
    assert "url(" not in page
    assert not any({"href", "src"} & set(attributes) for _, attributes in parsed.tags)
    assert "prefers-color-scheme:dark" in page
    assert "width=device-width" in page
    for svg in re.findall(r"<svg.*?</svg>", page):
        root = ElementTree.fromstring(svg)
        assert "nan" not in svg
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for circle in root.iter("circle"):
            assert 0 <= float(circle.attrib["cx"]) <= width
            assert 0 <= float(circle.attrib["cy"]) <= height
        for box in root.iter("rect"):
            assert float(box.attrib["height"]) >= 0
            assert float(box.attrib["x"]) + float(box.attrib["width"]) <= width + 0.1
    return parsed


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, text) -> Path:
    """A quantized mixture of experts, measured."""
    root = tmp_path_factory.mktemp("page")
    source = save_tiny("qwen3_moe", root / "source", torch.bfloat16)
    settings: dict[str, Any] = {"samples": 4, "seq_len": 64, "group_size": 64}
    llmq.quantize(source, root / "a", calibration=str(text), **settings)
    llmq.evaluate(root / "a", str(text), seq_len=64, windows=4, reference=source, record=True)
    return root / "a"


def test_every_run_leaves_a_page_with_every_plot(mixture: Path) -> None:
    report = json.loads((mixture / "quantization_report.json").read_text())
    page = (mixture / "quantization_report.html").read_text(encoding="utf-8")
    assert page == report_page(report)
    parsed = check(page)
    titles = {attributes["aria-label"] for tag, attributes in parsed.tags if tag == "svg"}
    assert titles == {
        "Relative output error per layer and kind",
        "Layers with the largest relative output error",
        "Packed size per block",
        "KL per token",
        "Tokens per expert",
        "Seconds in the solver per kind of layer",
    }
    words = " ".join(parsed.words)
    [measured] = report["evaluations"]
    assert plus_minus(measured["kl"], measured["kl_stderr"]) in words
    assert plots.short(measured["reference_perplexity"]) in words
    worst = max(report["layers"], key=lambda layer: layer["error"])["name"]
    assert worst in words
    assert report["command"] in words
    assert measured["protocol"] in words
    svg = re.findall(r"<svg[^>]*Relative output error per layer.*?</svg>", page)[0]
    kinds = {kind_of(layer["name"]) for layer in report["layers"]}
    assert svg.count("<polyline") == len(kinds) == 6
    assert svg.count("<circle") == 2 * len(kinds)  # two blocks


def test_what_was_not_measured_is_said_to_be_so(mixture: Path) -> None:
    report = json.loads((mixture / "quantization_report.json").read_text())
    del report["evaluations"], report["expert_coverage"]
    parsed = check(report_page(report))
    assert "Not measured." in parsed.words
    check(report_page({}))  # an old report without anything


def test_text_from_outside_cannot_become_markup() -> None:
    name = "model.layers.0.<script>alert(1)</script>"
    layer = {"name": name, "error": 0.1, "shape": [4, 64], "bits": 4, "group_size": 64}
    report = {"source": "<b>", "layers": [{**layer, "symmetric": True, "seconds": 1.0}]}
    check(report_page(report))


def test_mixed_bits_are_drawn() -> None:
    layers = [
        {
            "name": f"model.layers.{i}.fc",
            "error": 0.0,
            "shape": [4, 64],
            "bits": 2 + 2 * i,
            "group_size": 64,
            "symmetric": True,
        }
        for i in range(2)
    ]
    page = report_page({"layers": layers})
    check(page)
    assert "Bits per layer" in page


def test_stored_bits_are_those_on_disk(mixture: Path) -> None:
    report = json.loads((mixture / "quantization_report.json").read_text())
    weights = sum(math.prod(layer["shape"]) for layer in report["layers"])
    stored = sum(math.prod(x["shape"]) * stored_bits(x) for x in report["layers"]) / weights
    assert stored == pytest.approx(bits_per_weight(inspect_checkpoint(mixture)), rel=0.01)


def test_names_of_layers() -> None:
    assert kind_of("model.layers.12.mlp.experts.3.down_proj") == "mlp.experts.down_proj"
    assert kind_of("transformer.h.0.attn.c_attn") == "attn.c_attn"
    assert (kind_of("lm_head"), block_of("lm_head"), block_of("a.7.b.2.c")) == ("lm_head", None, 7)


def test_numbers_for_people() -> None:
    said = [plots.short(value) for value in (0, 1e-5, 0.01234, 34.56, 1234.5, float("inf"))]
    assert said == ["0", "1.0e-05", "0.0123", "34.6", "1234", "inf"]
    assert plus_minus(12.3456, 0.0671) == "12.346 ± 0.067"
    assert (plus_minus(12.3456, None), plus_minus(5, 40)) == ("12.3", "5 ± 40")


def test_the_histogram_shows_every_token() -> None:
    edges, counts = [10.0**k for k in range(-3, 2)], [0, 30, 10, 0]
    svg = plots.histogram(edges, counts, title="t", x_label="x")
    bars = list(ElementTree.fromstring(svg).iter("rect"))
    assert [bar.findtext("title") for bar in bars] == ["0.01 to 0.1: 75%", "0.1 to 1: 25%"]
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights[0] == pytest.approx(3 * heights[1], abs=0.2)


def test_no_numbers_no_plot() -> None:
    assert plots.line_plot({}, title="", x_label="", y_label="") == ""
    assert plots.histogram([1, 2], [0], title="", x_label="") == ""
    assert plots.bars([], title="") == plots.columns([], title="", x_label="", y_label="") == ""
    assert plots.scatter([], title="", x_label="", y_label="") == ""


@pytest.fixture
def twins(mixture: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints that were measured alike."""
    return mixture, Path(shutil.copytree(mixture, tmp_path / "b"))


def test_compare_puts_checkpoints_on_one_page(run, twins, tmp_path) -> None:
    out = tmp_path / "compare.html"
    status, stdout, stderr = run("compare", *twins, "--out", out, "--json")
    assert status == 0, stderr
    found = json.loads(stdout.splitlines()[-1])
    assert [entry["name"] for entry in found["checkpoints"]] == ["a", "b"]
    entry = found["checkpoints"][0]
    assert entry["bytes"] == sum(layer.bytes for layer in inspect_checkpoint(twins[0]))
    page = out.read_text(encoding="utf-8")
    words = " ".join(check(page).words)
    assert found["protocol"] in words
    assert plus_minus(entry["kl"], entry["kl_stderr"]) in words
    assert page == compare_page(found["checkpoints"], found["protocol"])


def test_what_cannot_be_compared(twins, tmp_path, model) -> None:
    report = json.loads((twins[1] / "quantization_report.json").read_text())
    report["evaluations"][0]["protocol"] = "another"
    (twins[1] / "quantization_report.json").write_text(json.dumps(report))
    with pytest.raises(SourceError, match="not measured in the same way"):
        comparison.collect(twins)
    for folder in (model, tmp_path / "nothing"):
        with pytest.raises(SourceError, match="no KL was recorded"):
            comparison.collect([folder])
    with pytest.raises(OutputError):
        comparison.write(tmp_path / "no" / "page.html", [], "")


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_draws_the_page_without_sideways_scrolling(mixture, tmp_path, width) -> None:
    """Chromium lays the page out and says how wide it became; nothing reaches the network."""
    page = (mixture / "quantization_report.html").read_text(encoding="utf-8")
    probe = (
        "<script>addEventListener('load',()=>document.title=["
        "document.documentElement.scrollWidth-document.documentElement.clientWidth,"
        "[...document.querySelectorAll('svg')].every(s=>s.getBoundingClientRect().height>60)]"
        ".join(' '))</script></body>"
    )
    inner = tmp_path / "page.html"
    inner.write_text(page.replace("</body>", probe), encoding="utf-8")
    frame = (  # headless windows have a least width; a frame has none
        f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"'
        ' onload="document.title=contentDocument.title"></iframe>'
    )
    (tmp_path / "frame.html").write_text(frame)
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",  # it is small in containers
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=3000",
            "--dump-dom",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    assert "<title>0 true</title>" in done.stdout
