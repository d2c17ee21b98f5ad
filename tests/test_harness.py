"""Our model in the lm-evaluation-harness says what the harness's own adapter says of its export."""

from __future__ import annotations

import json
import random

import pytest
import torch

from composer_gpt2.evaluation.evaluations import check_evaluations, evaluate, find_evaluations
from composer_gpt2.evaluation.harness import HarnessSettings, harness_results
from composer_gpt2.evaluation.likelihood import Scorer
from composer_gpt2.model import GPT2Model
from composer_gpt2.tokenizer import get_tokenizer

pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is of the [eval] extra")

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "quickly", "late"]


@pytest.fixture(scope="module")
def model() -> GPT2Model:
    torch.manual_seed(7)
    model = GPT2Model.from_name("gpt2-tiny", n_embd=32, n_positions=64, dropout=0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


@pytest.fixture(scope="module")
def ours(model):
    from composer_gpt2.evaluation.harness_model import HarnessModel

    return HarnessModel(Scorer(model, batch_tokens=256, progress=False))


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("exported")
    model.model.save_pretrained(folder)
    get_tokenizer().save_pretrained(folder)
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of our four tasks, with examples that are made up; one is beyond the context."""
    generator = random.Random(2)

    def words(n: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(n))

    records = {
        "lambada": [{"text": words(n)} for n in (3, 8, 20, 90)],
        "piqa": [
            {"goal": words(6), "sol1": words(5), "sol2": words(n), "label": n % 2}
            for n in range(1, 7)
        ],
        "hellaswag": [
            {"query": words(n), "choices": [words(k) for k in (3, 4, 5, 6)], "gold": n % 4}
            for n in (4, 17, 30)
        ],
        "winogrande": [
            {
                "sentence": f"{words(n)} _ {words(4)}",
                "option1": "Ann",
                "option2": "Bea",
                "answer": str(n % 2 + 1),
            }
            for n in (2, 9, 11)
        ],
    }
    folder = tmp_path_factory.mktemp("examples")
    paths = {}
    for name, examples in records.items():
        paths[name] = str(folder / f"{name}.jsonl")
        with open(paths[name], "w") as file:
            file.writelines(json.dumps(example) + "\n" for example in examples)
    return paths


def requests(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, each, i) for i, each in enumerate(arguments)]


def test_every_answer_is_that_of_the_harness_s_adapter(ours, theirs, data):
    tasks = find_evaluations([], data).tasks
    mine = harness_results(lambda: ours, tasks=tasks, samples=True)
    its = harness_results(lambda: theirs, tasks=tasks, samples=True)
    assert set(mine["samples"]) == {"lambada", "piqa", "hellaswag", "winogrande"}
    for name, samples in its["samples"].items():
        assert len(samples) == len(mine["samples"][name])
        for left, right in zip(mine["samples"][name], samples, strict=True):
            for (ours_, ours_greedy), (hf, hf_greedy) in zip(
                _flat(left["resps"]), _flat(right["resps"]), strict=True
            ):
                assert float(ours_) == pytest.approx(float(hf), abs=1e-4)
                assert bool(ours_greedy) == bool(hf_greedy)
    direct = evaluate(ours.scorer, find_evaluations([], data))
    for each in direct:
        if each.metric != "acc_per_token":
            for results in (mine, its):
                said = results["results"][each.task][f"{each.metric},none"]
                assert each.value == pytest.approx(said, rel=1e-4), (each.task, each.metric)


def _flat(answers) -> list:
    """(log-likelihood, greedy) of each request of an example, however the harness nests them."""
    if not isinstance(answers[0], tuple | list):
        return [answers]
    return [each for answer in answers for each in _flat(answer)]


def test_whole_texts_are_cut_in_the_same_windows(ours, theirs):
    texts = [(" ".join(WORDS * n),) for n in (1, 5, 9)]
    mine = ours.loglikelihood_rolling(requests(*texts))
    its = theirs.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    assert mine == pytest.approx(its, abs=1e-3)


def test_continuations_end_at_the_stop_string(ours, theirs):
    free = ours.generate_until(requests(("the cat", {"until": [], "max_gen_toks": 12})))
    its = theirs.generate_until(requests(("the cat", {"until": [], "max_gen_toks": 12})))
    assert free == its
    stop = free[0][10:13]
    (cut,) = ours.generate_until(requests(("the cat", {"until": [stop], "max_gen_toks": 12})))
    assert cut == free[0][: free[0].index(stop)]
    with pytest.raises(ValueError, match="shorter than the context of 64 tokens"):
        ours.generate_until(requests(("the cat", {"until": [], "max_gen_toks": 64})))


def test_tasks_of_other_people(ours, tmp_path, data):
    (tmp_path / "guess.yaml").write_text(
        json.dumps(
            {
                "task": "composer_gpt2_test_guess",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": data["piqa"]}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{goal}}",
                "doc_to_choice": "{{[sol1, sol2]}}",
                "doc_to_target": "label",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        )
    )
    evaluations = find_evaluations(
        ["composer_gpt2_test_guess", "piqa"],
        {"piqa": data["piqa"]},
        limit=4,
        harness=HarnessSettings(str(tmp_path)),
        ours_by_harness=True,
    )
    found = {(each.task, each.metric): each for each in evaluate(ours.scorer, evaluations)}
    assert found["composer_gpt2_test_guess", "acc"].n == 4
    direct = evaluate(ours.scorer, find_evaluations([], {"piqa": data["piqa"]}, limit=4))
    for each in direct:
        assert found["piqa", each.metric].value == pytest.approx(each.value)
        # The harness divides by n - 1, as we do.
        assert found["piqa", each.metric].stderr == pytest.approx(each.stderr)
    with pytest.raises(ValueError, match="only examples are those of the test"):
        find_evaluations(
            [], {"piqa": data["piqa"]}, harness=HarnessSettings(None, 3), ours_by_harness=True
        )


@pytest.mark.parametrize("look", [evaluate, check_evaluations])
def test_a_task_that_needs_what_is_not_installed_says_so(look, ours, tmp_path, data):
    (tmp_path / "guessing.py").write_text("import a_package_of_theirs\n\nask = str\n")
    (tmp_path / "guess.yaml").write_text(
        "task: composer_gpt2_test_imports\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data['piqa']}}}}}\n"
        "test_split: test\n"
        "output_type: loglikelihood\n"
        "doc_to_text: !function guessing.ask\n"
        "doc_to_target: '{{sol1}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    names = ["composer_gpt2_test_imports"]
    evaluations = find_evaluations(names, {}, harness=HarnessSettings(str(tmp_path)))
    with pytest.raises(RuntimeError, match=r"test_imports: .* module 'a_package_of_theirs' for"):
        look(ours.scorer, evaluations)
