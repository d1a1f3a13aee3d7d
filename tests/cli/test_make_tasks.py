"""Tasks of long texts: what is hidden is there once, the answer follows from it, and lengths are as asked for."""

import json
import random
import re

import pytest
from transformers import AutoTokenizer

from ds_ring.cli import make_tasks
from ds_ring.errors import ConfigError
from tests.helpers.launching import save_llama

LENGTHS = (1500, 4000)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the model, folder of the tasks, the command's result)"""
    folder = tmp_path_factory.mktemp("made")
    model = save_llama(folder / "llama")
    words = ["--model", model, "--directory", folder / "tasks", "--lengths", *LENGTHS, "--samples", 5]
    args = make_tasks.make_parser().parse_args([str(word) for word in words])
    make_tasks.check(args)
    return model, folder / "tasks", make_tasks.work(args)


def lines(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", ["needle", "variables"])
def test_prompts_are_nearly_as_long_as_they_may_be(kind, length, made):
    model, folder, result = made
    assert f"{kind}_{length}" in result["tasks"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    for line in lines(folder, f"{kind}_{length}"):
        tokens = len(tokenizer(line["prompt"])["input_ids"])
        assert length - 700 <= tokens <= length - make_tasks.ANSWER_TOKENS


def test_a_needle_is_there_once_among_others_and_asked_for_by_its_key(made):
    places = []
    for line in lines(made[1], "needle_4000"):
        key = re.search(r"The special number of (\w+) is$", line["prompt"])[1]
        found = re.findall(r"The special number of (\w+) is (\d{7})\.", line["prompt"])
        assert len(found) == len(dict(found)) == 4
        assert dict(found)[key] == line["answer"]
        places.append(line["prompt"].index(line["answer"]) / len(line["prompt"]))
    assert max(places) - min(places) > 0.2


def test_a_variable_is_followed_through_its_chain_to_the_answer(made):
    for line in lines(made[1], "variables_4000"):
        assigned = dict(re.findall(r"(VAR_[A-Z]) = (\w+)\.", line["prompt"]))
        assert len(assigned) == 2 * make_tasks.CHAIN
        value, places = re.search(r"(VAR_[A-Z]) =$", line["prompt"])[1], list[int]()
        while value in assigned:
            places.append(line["prompt"].index(f"{value} = "))
            value = assigned[value]
        assert (value, len(places)) == (line["answer"], make_tasks.CHAIN)
        assert places == sorted(places, reverse=True)  # each is assigned before it is used


def test_the_same_seed_makes_the_same_tasks():
    def kinds(seed):
        return [make(random.Random(seed)) for make in make_tasks.KINDS.values()]

    assert kinds("1") == kinds("1") != kinds("2")


def test_lm_eval_reads_them(made):
    tasks = pytest.importorskip("lm_eval.tasks").TaskManager(include_path=str(made[1]))
    assert set(made[2]["tasks"]) <= set(tasks.match_tasks(["needle_*", "variables_*"]))
    task = json.loads((made[1] / "needle_1500.yaml").read_text())
    assert task["dataset_kwargs"] == {"data_files": {"test": str(made[1] / "needle_1500.jsonl")}}


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    args = make_tasks.make_parser().parse_args(["--model", "DIR", "--directory", str(tmp_path / "file")])
    with pytest.raises(ConfigError, match=r"--directory .*file cannot be made: File exists"):
        make_tasks.check(args)
