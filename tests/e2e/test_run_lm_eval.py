"""The lm-evaluation-harness on our checkpoints, with a task defined by local YAML and local
data; generated tasks as files."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from e2e_commands import run
from test_tasks import LINES, TOKENIZER

from nanochat.common import UserError
from nanochat.tasks.external import load_examples
from nanochat.tasks.generated import task_rows
from nanochat.tasks.schema import Example
from nanochat.tasks.words import Words
from scripts import run_lm_eval

TASKS = {
    "made_choice": """output_type: multiple_choice
doc_to_choice: '{{choices}}'
doc_to_target: '{{label}}'
target_delimiter: ''
metric_list: [{metric: acc}]""",
    "made_document": """output_type: loglikelihood_rolling
doc_to_target: '{{text}}'
metric_list: [{metric: word_perplexity}]""",
    "made_answer": """output_type: generate_until
doc_to_target: ' x'
generation_kwargs: {until: ["!"], max_gen_toks: 3}
metric_list: [{metric: exact_match}]""",
}


@pytest.fixture
def folder(tmp_path):
    """YAML of three tasks, one per kind of request, on one file of five documents, one of
    them longer than the window."""
    path = tmp_path / "tasks"
    path.mkdir()
    docs = [{"text": "def main(" + "argument, " * n + "self", "choices": [" self", "):", " ???"], "label": n % 3}
            for n in (1, 2, 3, 4, 45)]
    (path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, body in TASKS.items():
        (path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: "
            f"'{path}/docs.jsonl'}}\ntest_split: test\n"
            f"doc_to_text: '{{{{text}}}}'\n{body}\nmetadata: {{version: 1}}\n"
        )
    return path


@pytest.mark.parametrize("kind", ["vanilla", "mc"])
def test_local_tasks_run_on_a_checkpoint(reference, folder, tmp_path, kind):
    pytest.importorskip("lm_eval")
    base, flags = reference[kind], ["--mc_enabled=1"] if kind == "mc" else []
    done = run(
        base,
        "run_lm_eval",
        f"--checkpoint_dir={base}/checkpoints/t",
        f"--tasks={','.join(TASKS)}",
        f"--include_path={folder}",
        "--device=cpu",
        f"--out={tmp_path}/found.json",
        *flags,
        HF_HOME=str(tmp_path / "hf"),
        HF_HUB_OFFLINE="1",
    ).ok()
    summary, found = json.loads(done.out.splitlines()[-1]), json.loads((tmp_path / "found.json").read_text())
    assert summary["results"] == found["results"] and found["documents"] == dict.fromkeys(TASKS,
                                                                                          5) and found["mc"] == (kind == "mc")  # noqa: E501
    assert 0 <= found["results"]["made_choice"]["acc,none"] <= 1 and found["results"]["made_answer"]["exact_match,none"] == 0  # noqa: E501
    assert 1 < found["results"]["made_document"]["word_perplexity,none"] < 1e30
    assert (found["cut"] > 0) == (kind == "vanilla"), "sessions cut nothing"
    assert ("note: " in done.out) == (kind == "vanilla") and not any(name.startswith("mc.")
                                                                     for name in done.modules if kind == "vanilla")


def test_what_the_user_got_wrong_is_said_in_a_line(reference, folder):
    pytest.importorskip("lm_eval")
    base = reference["vanilla"]
    flags = [f"--checkpoint_dir={base}/checkpoints/t", f"--include_path={folder}"]
    assert "names no task" in run(base, "run_lm_eval", *flags, "--tasks=,").error
    assert "was trained with --mc_enabled=1" in run(base, "run_lm_eval", *flags, "--tasks=made_choice",
                                                    "--mc_enabled=1").error
    assert "no such folder" in run(base, "run_lm_eval", flags[0], "--tasks=x", f"--include_path={folder}/no").error


def test_an_unknown_task_is_looked_for_among_the_harness_own(monkeypatch, tmp_path):
    """With a manager that is quick: the harness's index of its own thousands takes most of a minute."""
    asked = []

    def manager(include_path, include_defaults):
        asked.append((include_path, include_defaults))
        return SimpleNamespace(all_tasks=["mine", *["theirs"] * include_defaults])

    monkeypatch.setattr(run_lm_eval, "import_harness", lambda: (None, manager))
    monkeypatch.setattr(sys, "argv", ["run_lm_eval", "--checkpoint_dir=x", f"--include_path={tmp_path}",
                                      "--tasks=mine,no_such_task"])
    with pytest.raises(UserError, match="--tasks=mine,no_such_task: not all of these"):
        run_lm_eval.main()
    assert asked == [(str(tmp_path), False), (str(tmp_path), True)]


def test_generated_tasks_as_files_in_kvpress_schema(tmp_path):
    base, texts, out = tmp_path / "base", tmp_path / "texts", tmp_path / "out"
    TOKENIZER.save(base / "tokenizer")
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text("\n".join(LINES * 5))
    flags = [f"--data={texts}", f"--out={out}", "--length=352", "--count=3"]
    done = run(base, "make_data", "tasks", *flags, "--tasks=mqar,qa2").ok()
    assert json.loads(done.out.splitlines()[-1])["examples"] == 6
    rows = [json.loads(line) for line in (out / "qa2_352.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and list(rows[0])[:5] == ["context", "question", "answer_prefix", "answer", "max_new_tokens"]
    assert set(rows[0]) == set(Example.__dataclass_fields__)
    words = Words.of(TOKENIZER, np.array([i for line in LINES for i in TOKENIZER.encode(" " + line)]))
    made = task_rows("mqar", words, "val", range(3), 352).examples
    assert [(e.context, e.references) for e in load_examples(out / "mqar_352.jsonl", "kvpress")] == [
        (e.context, e.references) for e in made
    ]
    assert "no task 'none'" in run(base, "make_data", "tasks", *flags, "--tasks=none").error
    assert "n is a multiple of the block" in run(base, "make_data", "tasks", *flags, "--length=350").error
