"""The study runner, end to end: resumed after a kill, evaluated by a function or a command, refused for bad studies."""

import json
import time
from shutil import copytree

import pytest
from e2e_commands import run, start
from test_study import BASE, STUDY, write


@pytest.fixture(scope="session")
def tokenizer_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    texts = folder / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("to be or not to be, that is the question. " * 40)
    (texts / "b.txt").write_text("all the world's a stage, and all the men and women merely players. " * 40)
    run(folder / "base", "tok_train", f"--data={texts}", "--vocab_size=270").ok()
    return folder / "base"


def test_a_study_resumes_where_it_was_killed(tokenizer_base, tmp_path):
    """Killed in the middle of a cell: finished cells stay, the half-run one goes on from its checkpoint, and
    every number is what it had been.

    With the second of the study's seeds alone: nothing is trained of the first.
    """
    study = write(tmp_path / "study.yaml",
                  STUDY.replace("num_iterations: 6", "num_iterations: 20").replace("pairs: 2", "pairs: 1"))
    whole, broken = (copytree(tokenizer_base, tmp_path / name) for name in ("whole", "broken"))
    only = "--only=mc_teacher=attention"
    done = run(whole, "mc_study", "ablate", str(study), "--seeds=2", only).ok()
    last = json.loads(done.out.splitlines()[-1])
    assert last["cells"] == 2 and "| default | 1 |" in done.out and "## Step time" in done.out

    under_way = start(broken, "mc_study", "ablate", str(study), "--seeds=2", only)
    results, deadline = broken / "ablations" / "study" / "results.jsonl", time.monotonic() + 300
    def second_cell_has_saved():
        tags = [path for path in (broken / "checkpoints").glob("ablate_*") if list(path.glob("complete_*.json"))]
        return results.exists() and results.read_text().count("\n") == 1 and len(tags) == 2
    while not second_cell_has_saved():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    under_way.kill()
    first = results.read_text()
    run(broken, "mc_study", "ablate", str(study), "--seeds=2", only).ok()
    assert results.read_text().startswith(first)
    logs = [path.read_text() for path in (broken / "ablations" / "study" / "logs").glob("[!t]*.log")]
    assert sum("resumed" in log for log in logs) == 1
    key = lambda base: {r["key"]: r["results"]
                        for r in map(json.loads,
                                     (base / "ablations" / "study" / "results.jsonl").read_text().splitlines())
                        if "time" not in r["key"]}
    assert key(whole) == key(broken)
    again = run(broken, "mc_study", "ablate", str(study), "--seeds=2", only).ok()
    assert "2 cells, 2 of them done before" in again.out and results.read_text().startswith(first)


def test_cells_of_one_training_share_it(tokenizer_base, tmp_path):
    """Side by side: one trains, the other waits and finds it trained."""
    study = write(tmp_path / "shared.yaml", STUDY.replace("evaluate.contexts: [3]", "evaluate.batch: [2]"))
    done = run(tokenizer_base, "mc_study", "ablate", str(study), "--seeds=1", "--only=batch=2", "--jobs=2").ok()
    assert json.loads(done.out.splitlines()[-1])["cells"] == 2
    logs = [path.read_text() for path in (tokenizer_base / "ablations" / "shared" / "logs").glob("*.log")]
    assert sorted("done: 6 steps" in log for log in logs) == [False, True]


def test_evaluation_by_a_command(tokenizer_base, tmp_path):
    command = "python -m scripts.base_eval --checkpoint_dir={checkpoint} --eval_tokens=256 --data=random"
    study = write(tmp_path / "c.yaml", f"question: q\nbase: {BASE}\nseeds: [1]\nevaluate: {{command: '{command}'}}\n")
    done = run(tokenizer_base, "mc_study", "ablate", str(study)).ok()
    record = json.loads((tokenizer_base / "ablations" / "c" / "results.jsonl").read_text())
    assert json.loads(done.out.splitlines()[-1])["cells"] == 1 and 4 < record["results"]["loss"] < 8


@pytest.mark.parametrize(("old", "new", "error"), [
    ("depth: 2", "dept: 2", "unrecognized arguments: --dept=2"),
    ("mc_teacher: [attention]", "mc_teacher: [oracle]", "--mc_teacher=oracle: 'oracle' is not a kind"),
    ("mc_recent: 8", "mc_recent: 9", "--mc_recent=9"), ("scripts.eval.measures:focus", "scripts.eval.measures:nothing",
                                                        "there is no function scripts.eval.measures:nothing"),
    ("pairs: 2", "pears: 2", "step_time is a mapping"), ("STUDY", "", "no arm x; it has default")])
def test_refused_before_anything_is_run(tokenizer_base, tmp_path, old, new, error):
    study = write(tmp_path / "bad.yaml", STUDY.replace(old, new))
    found = run(tokenizer_base, "mc_study", "ablate", str(study), *(["--only=x"] if old == "STUDY" else []))
    assert error in found.error and not (tokenizer_base / "ablations" / "bad").exists()
