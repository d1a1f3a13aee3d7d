"""Options of ``ds-ring evaluate``: what is refused before ranks start, and what lm_eval's own parser says."""

import json
from importlib.util import find_spec

import pytest

from ds_ring.cli import evaluate
from ds_ring.cli import main as command
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError
from tests.helpers.launching import save_llama

WITH_LM_EVAL = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed; pip install lm_eval")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A folder with something like a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR").mkdir()
    (tmp_path / "DIR" / "config.json").write_text("{}")


def check(*words: str, ranks: int = 1) -> None:
    evaluate.check(evaluate.make_parser().parse_args(["--model", "DIR", *words]), ranks)


def test_a_machine_without_lm_eval_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lm_eval is not installed; pip install 'ds_ring\[eval\]'"):
        check("--", "--tasks", "t")


def test_the_command_takes_a_model_and_lm_eval_s_options_behind_dashes():
    words = command.named("evaluate", ["DIR", "--ring-degree", "2", "--", "--tasks", "a", "b", "--limit", "3"])
    args = evaluate.make_parser().parse_args(words)
    assert (args.model, args.ring_degree) == ("DIR", 2)
    assert args.lm_eval == ["--tasks", "a", "b", "--limit", "3"]


@WITH_LM_EVAL
@pytest.mark.parametrize("words", [["--tasks", "a,b"], ["run", "--tasks", "a", "b"]], ids=" ".join)
def test_options_are_read_by_lm_eval_s_own_parser(words):
    found = evaluate.parsed([*words, "--num_fewshot", "5", "--batch_size", "4", "--model_args", "add_bos_token=true"])
    assert (found.tasks, found.num_fewshot, found.batch_size) == (["a", "b"], 5, "4")
    assert found.model_args == {"add_bos_token": True}
    config = evaluate.run_config(evaluate.make_parser().parse_args(["--model", "DIR"]), found)
    assert config.workload.micro_batch_size == 4
    given = evaluate.make_parser().parse_args(["--model", "DIR", "--micro-batch-size", "2"])
    assert evaluate.run_config(given, found).workload.micro_batch_size == 2


@WITH_LM_EVAL
@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "no tasks: give options of lm_eval behind --, such as -- --tasks hellaswag"),
        (["--limit", "3"], "no tasks"),
        (["--task", "t", "--no-such", "x"], "lm_eval: unrecognized arguments: --no-such x"),
        (["--tasks", "t", "--num_fewshot", "x"], "lm_eval: argument --num_fewshot/-f: invalid int value: 'x'"),
        (["--tasks", "t", "--model", "hf"], "lm_eval's --model is not taken: DIR, or --model in front of --"),
        (["--tasks", "t", "--device", "cpu"], "lm_eval's --device is not taken: the launch decides on devices"),
        (["--tasks", "t", "--config", "c.yaml"], "lm_eval's --config is not taken: give its settings as options"),
        (["--tasks", "t", "--trust_remote_code"], "lm_eval's --trust_remote_code is not taken: no code"),
        (["--tasks", "t", "--model_args", "dtype=float16"], "lm_eval's --model_args dtype is not taken; there may be"),
        (["--tasks", "t", "--batch_size", "auto"], "lm_eval's --batch_size auto must be a whole number of at least 1"),
        (["--tasks", "t", "--use_cache", "x"], "lm_eval's --use_cache is for one process, these are 2 ranks"),
        (["--tasks", "t", "--cache_requests"], "lm_eval's --cache_requests is for one process, these are 2 ranks"),
    ],
)
def test_options_that_mean_nothing_here_are_refused(words, text):
    with pytest.raises(ConfigError, match=text):
        check("--", *words, ranks=2)


@WITH_LM_EVAL
def test_one_process_may_keep_answers():
    check("--", "--tasks", "t", "--use_cache", "x", ranks=1)


@WITH_LM_EVAL
def test_degrees_are_those_of_the_ranks():
    with pytest.raises(ConfigError, match="= 3 ranks, but 2 were launched"):
        check("--ring-degree", "3", "--", "--tasks", "t", ranks=2)


def test_results_are_json_without_what_is_no_number():
    found = evaluate._plain({"a": float("nan"), 1: [float("inf"), 2.5, True, None], "c": {"d": (1, "x")}, "e": {3}})
    assert json.loads(json.dumps(found)) == {
        "a": None, "1": [None, 2.5, True, None], "c": {"d": [1, "x"]}, "e": "{3}",
    }  # fmt: skip


TASK = {
    "task": "local_task", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "no_such_file.jsonl"}},
    "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}],
}  # fmt: skip


@WITH_LM_EVAL
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none", "^lm_eval: Tasks not found: none$"),
        ("local_task", "^lm_eval cannot load the tasks: .*no_such_file"),
    ],
)
def test_tasks_that_cannot_be_loaded_are_refused_before_weights_load(name, text, tmp_path, monkeypatch):
    from ds_ring import api

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(api, "from_pretrained", lambda config: pytest.fail("weights load"))
    (tmp_path / "local_task.yaml").write_text(json.dumps(TASK))
    config = RunConfig.load(None, model=str(save_llama(tmp_path / "llama")))
    with pytest.raises(ConfigError, match=text):
        evaluate.evaluated(config, evaluate.parsed(["--tasks", name, "--include_path", str(tmp_path)]))
