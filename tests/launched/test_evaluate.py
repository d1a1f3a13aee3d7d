"""lm_eval's command line in real processes: the figures of its own back-end."""

import json

import pytest

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.tasks import TaskManager

from tests.helpers.launching import deepspeed, last_line

pytestmark = pytest.mark.launch

CHOICES = [("One and one are", [" two", " three", " a fish"], 0), ("The sky is", [" red", " blue"], 1)]
TEXTS = ["A text of some words, which is not short.", "Another one.", "The third: it has a colon, and a comma."]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of each kind of request, over files of its own."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [{"q": q, "choices": choices, "answer": answer} for q, choices, answer in CHOICES]
    (folder / "choices.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "texts.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))

    def task(name, file, **fields):
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / file)}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, "test_split": "test", **fields}))

    task(
        "local_choice", "choices.jsonl", output_type="multiple_choice", doc_to_text="{{q}}",
        doc_to_choice="{{choices}}", doc_to_target="answer", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    task(
        "local_rolling", "texts.jsonl", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    )  # fmt: skip
    task(
        "local_words", "texts.jsonl", output_type="generate_until", doc_to_text="{{text[:9]}}",
        doc_to_target="{{text}}", generation_kwargs={"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "data_sets"))


NAMES = ["local_choice", "local_rolling", "local_words"]


def test_two_ranks_print_the_figures_of_lm_eval_s_own_back_end(llama, tasks, tmp_path):
    done = deepspeed(
        2, "launch/evaluate.py", "--model", llama, "--dtype", "fp32", "--ring-degree", 2, "--",
        "--tasks", *NAMES, "--include_path", tasks, "--output_path", tmp_path / "out", "--log_samples",
    )  # fmt: skip
    found = last_line(done)
    want = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(llama), "dtype": "float32", "softmax_dtype": "float64"}, device="cpu",
        tasks=NAMES, task_manager=TaskManager(include_path=str(tasks)),
    )  # fmt: skip
    assert found["layout"] == "ring2"
    assert set(found["lm_eval"]["results"]) == set(NAMES)
    for name in NAMES:
        figures = {n: value for n, value in want["results"][name].items() if isinstance(value, float)}
        assert len(figures) >= 2
        for figure, value in figures.items():
            assert found["lm_eval"]["results"][name][figure] == pytest.approx(value, rel=1e-5), (name, figure)
    assert done.stderr.count("|local_rolling|") == 1  # the table, by rank 0 alone
    assert len(list((tmp_path / "out").glob("*/results_*.json"))) == 1
    (file,) = (tmp_path / "out").glob("*/samples_local_words_*.jsonl")
    lines = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda line: line["doc_id"])
    assert [line["resps"] for line in lines] == [sample["resps"] for sample in want["samples"]["local_words"]]
