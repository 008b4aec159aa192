"""Tasks of lm-evaluation-harness: a tiny one from local files, beside a plain loop."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch.nn import functional as F
from zoo import tiny_model, tiny_tokenizer

from llmq.errors import CalibrationError, MissingPackageError
from llmq.harness import run_tasks

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
    with pytest.raises(CalibrationError, match="no task nonsense"):
        run_tasks(model, tokenizer, ["nonsense"])
