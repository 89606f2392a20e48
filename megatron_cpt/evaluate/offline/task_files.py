"""Task files for lm-evaluation-harness: which prompt, which answers, which metrics."""

from __future__ import annotations

from typing import Any

import yaml

from megatron_cpt.evaluate.offline.question_rows import CODE, EXAMS, HELDOUT, LETTERS, MULTIPLE_CHOICE

NUM_FEWSHOT = 5
# OLMES divides the probability of an answer by its probability without the question in these two.
UNCONDITIONAL = ("openbookqa", "commonsenseqa")
# Names in lm-eval's own task files. Programs of HumanEval run in this project's sandbox, so its task is ours.
PAPER = ["mmlu", "hellaswag", "humaneval_gen", "mgsm_native_cot_es", "mgsm_native_cot_ja", "mgsm_native_cot_th"]
PAPER_OWN = ("humaneval_gen",)

Config = dict[str, Any]


class Function(str):
    """Dotted name of a Python function, `!function NAME` in a task file."""


class Dumper(yaml.SafeDumper):
    """Writer of task files."""


Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))

SCORES = "megatron_cpt.evaluate.offline.scores"
LETTERED = (
    f"{{{{query}}}}{{% for choice in choices %}}\n {{{{'{LETTERS}'[loop.index0]}}}}. {{{{choice}}}}"
    f"{{% endfor %}}\nAnswer:"
)


def task_files() -> dict[str, str]:
    """Return file name -> content of every task and group."""
    return {
        f"{config.get('task') if isinstance(config.get('task'), str) else config['group']}.yaml": yaml.dump(
            config, Dumper=Dumper, sort_keys=False, allow_unicode=True
        )
        for config in [*all_tasks(), *all_groups()]
    }


def all_tasks() -> list[Config]:
    """Return the configuration of every task."""
    tasks = []
    for name in (*MULTIPLE_CHOICE, *EXAMS):
        tasks += [cloze(name), multiple_choice(name)]
    tasks += [answers("truthfulqa"), answers("asdiv"), asdiv_gen(), humaneval_cloze(), humaneval_gen()]
    return tasks + [heldout(name) for name in HELDOUT]


def all_groups() -> list[Config]:
    """Return the configuration of every group; a mean over tasks counts each task equally."""
    exams_cloze, exams_mc = ([f"{name}_{kind}" for name in EXAMS] for kind in ("cloze", "mc"))
    clozes = [*(f"{name}_cloze" for name in MULTIPLE_CHOICE), "truthfulqa_cloze", "asdiv_cloze"]
    clozes += [f"{name}_cloze" for name in CODE]
    choices = [f"{name}_mc" for name in MULTIPLE_CHOICE]
    return [
        group("heldout", [*HELDOUT], ["bits_per_byte"]),
        group("offline_cloze", clozes, ["bits_per_byte"]),
        group("offline_mc", choices, ["bits_per_byte", "acc"]),
        group("exams_cloze", exams_cloze, ["bits_per_byte", "acc", "acc_norm"]),
        group("exams_mc", exams_mc, ["bits_per_byte", "acc"]),
        group("offline", ["heldout", "offline_cloze", "offline_mc", "exams_cloze", "exams_mc", "asdiv_gen"], []),
        group("paper", PAPER, []),
    ]


def group(name: str, members: list[str], metrics: list[str]) -> Config:
    """Return a group, with the mean of `metrics` over its tasks."""
    config: Config = {"group": name, "task": members, "metadata": {"version": 1}}
    if metrics:
        config["aggregate_metric_list"] = [
            {"metric": metric, "aggregation": "mean", "weight_by_size": False} for metric in metrics
        ]
    return config


def base(name: str, dataset: str, output_type: str) -> Config:
    """Return the fields that every task has."""
    return {
        "task": name,
        "custom_dataset": Function("megatron_cpt.evaluate.offline.task_data.load"),
        "dataset_kwargs": {"dataset": dataset},
        "output_type": output_type,
        "test_split": "test",
        "metadata": {"version": 1},
    }


def with_fewshot(config: Config) -> Config:
    """Show the five examples of the dataset before each question, always in the same order."""
    shots = {"fewshot_split": "fewshot", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": NUM_FEWSHOT}
    return {**config, **shots}


def metric(name: str, *, higher_is_better: bool, aggregation: str = "mean") -> Config:
    """Return an entry of `metric_list`."""
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


def metrics(*accuracies: str) -> list[Config]:
    """Return bits per byte of the right answer, then accuracies."""
    return [
        metric("bits_per_byte", higher_is_better=False),
        *(metric(name, higher_is_better=True) for name in accuracies),
    ]


def cloze(dataset: str) -> Config:
    """Return the task in which the model rates the text of each choice without seeing the others."""
    accuracies = ["acc", "acc_norm", "acc_bytes", "acc_tokens"]
    accuracies += ["acc_mutual_info"] if dataset in UNCONDITIONAL else []
    return with_fewshot(base(f"{dataset}_cloze", dataset, "multiple_choice")) | {
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "process_results": Function(f"{SCORES}.score_choices"),
        "metric_list": metrics(*accuracies),
    }


def multiple_choice(dataset: str) -> Config:
    """Return the task in which the model sees lettered choices and rates the letters."""
    return with_fewshot(base(f"{dataset}_mc", dataset, "multiple_choice")) | {
        "doc_to_text": LETTERED,
        "doc_to_choice": f"{{{{'{LETTERS}'[:choices|length]|list}}}}",
        "doc_to_target": "gold",
        "process_results": Function(f"{SCORES}.score_letters"),
        "metric_list": metrics("acc"),
    }


def answers(dataset: str) -> Config:
    """Return the task that has only correct answers, so bits per byte is its only metric."""
    return with_fewshot(base(f"{dataset}_cloze", dataset, "multiple_choice")) | {
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "process_results": Function(f"{SCORES}.score_answers"),
        "metric_list": metrics(),
    }


def asdiv_gen() -> Config:
    """Return the task that generates the answer of an arithmetic problem."""
    return with_fewshot(base("asdiv_gen", "asdiv", "generate_until")) | {
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32, "do_sample": False},
        "process_results": Function(f"{SCORES}.score_number"),
        "metric_list": [metric("exact_match", higher_is_better=True)],
    }


def humaneval_cloze() -> Config:
    """Return the task that rates the official body of each function; nothing is executed."""
    return base("humaneval_cloze", "humaneval", "multiple_choice") | {
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "process_results": Function(f"{SCORES}.score_answers"),
        "metric_list": metrics(),
    }


def humaneval_gen() -> Config:
    """Return the task that runs generated functions; with the prompt and the stop strings of lm-eval's `humaneval`."""
    return base("humaneval_gen", "humaneval", "generate_until") | {
        "unsafe_code": True,
        "doc_to_text": "prompt",
        "doc_to_target": "test",
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 1024,
            "do_sample": False,
        },
        "process_results": Function(f"{SCORES}.score_program"),
        "metric_list": [metric("pass@1", higher_is_better=True)],
    }


def heldout(dataset: str) -> Config:
    """Return the task that rates whole texts."""
    return base(dataset, dataset, "loglikelihood_rolling") | {
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            metric("bits_per_byte", higher_is_better=False, aggregation="bits_per_byte"),
        ],
    }
