"""Tasks of lm-evaluation-harness: a tiny one from local files, beside a plain loop."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F
from zoo import tiny_model, tiny_tokenizer

from llmq.errors import CalibrationError, MissingPackageError
from llmq.harness import paired, run_tasks

INSTALLED = importlib.util.find_spec("lm_eval") is not None
ROWS = [
    {"question": "The old miller follows", "choices": [" the harbour", " two letters"], "gold": 0},
    {"question": "A quiet river leaves", "choices": [" its own shadow", " my sister"], "gold": 1},
    {"question": "Every bird", "choices": [" carries", " remembers"], "gold": 1},
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_without_the_package_the_error_says_what_to_install(run, model) -> None:
    with pytest.raises(MissingPackageError, match=r"pip install 'llmq-quant\[eval\]'"):
        run_tasks(None, None, ["lambada_openai"])
    status, _, stderr = run("eval", model, "--tasks", "lambada_openai")
    assert (status, stderr.count("\n")) == (1, 1)
    assert "llmq-quant[eval]" in stderr


@pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed")
@pytest.mark.filterwarnings("default")
def test_a_local_task_scores_as_a_plain_loop_does(tmp_path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tiny.yaml").write_text(TASK.format(path=data))
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    right = 0
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            start = tokenizer(row["question"])["input_ids"]
            ids = torch.tensor([tokenizer(row["question"] + choice)["input_ids"]])
            with torch.no_grad():
                log_p = F.log_softmax(model(ids).logits[0, :-1].float(), -1)
            nll = log_p.gather(1, ids[0, 1:, None])[:, 0]
            scores.append(float(nll[len(start) - 1 :].sum()))
        right += scores.index(max(scores)) == row["gold"]
    found = run_tasks(model, tokenizer, ["tiny_choice"], task_folder=tmp_path)
    assert found["tiny_choice"]["acc"] == pytest.approx(right / 3)
    assert found["tiny_choice"]["n"] == 3
    assert "acc_stderr" in found["tiny_choice"]
    assert "acc_difference" not in found["tiny_choice"]
    found = run_tasks(model, tokenizer, ["tiny_choice"], reference=model, task_folder=tmp_path)[
        "tiny_choice"
    ]
    assert found["acc_reference"] == found["acc"]
    assert (found["acc_difference"], found["acc_difference_95"]) == (0, (0, 0))
    with pytest.raises(CalibrationError, match="no task nonsense"):
        run_tasks(model, tokenizer, ["nonsense"])


def test_differences_are_taken_example_by_example() -> None:
    def samples(scores: Sequence[float], shift: int = 0) -> list[dict]:
        return [
            {"doc_id": i + shift, "filter": "none", "acc": s, "ppl": s, "pair": (s, 1)}
            for i, s in enumerate(scores)
        ]

    own, full = samples([1, 0, 1, 1] * 25), samples([1, 1, 1, 0] * 24 + [1, 0, 1, 1])
    results = {"acc,none": 0.75, "acc_stderr,none": 0.04, "ppl,none": 9.0, "pair,none": 1.0}
    found = paired(results, own, full[::-1])
    assert found.keys() == {f"acc_{k}" for k in ("reference", "difference")} | {
        f"acc_difference_{k}" for k in ("stderr", "95")
    }
    assert found["acc_reference"] == 0.75
    assert found["acc_difference"] == 0
    # 24 examples won, 24 lost, 52 the same
    assert found["acc_difference_stderr"] == pytest.approx((48 / 99) ** 0.5 / 10)
    low, high = found["acc_difference_95"]
    assert -0.2 < low < 0 < high < 0.2
    assert paired(results, own, samples([1] * 100, shift=1)) == {}  # other examples
