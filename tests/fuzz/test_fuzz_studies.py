"""What experiments read: studies and suites in YAML, labels in shards, classifiers, tasks
of the lm-evaluation-harness."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fuzzing import Intact, changes, command, dumped, fuzzed, image, json_changes, put_image, tried
from hypothesis import strategies as st
from safetensors.torch import save_file

from mc.arms.utility_labels import LabelFolder, Labels
from scripts import mc_study
from scripts.eval import importance
from scripts.eval.methods.token_classifier import (  # noqa: E501
    TokenClassifier,
    TokenClassifierConfig,
    load_token_classifier,
    save_token_classifier,
)
from scripts.studies import run_ablate as ablate
from scripts.studies import run_suite as run_benchmarks

STUDY = Intact(b"""question: Which?
base: {data: recall, depth: 2, max_seq_len: 352, recall_blocks: 8, num_iterations: 4, mc_enabled: 1, init_from: "$HOME/{seed}"}
seeds: [1, 2]
factors: {mc_lens: [bilinear, perceiver], evaluate.contexts: [4, 8], smear: [true]}
arms: {wide: {mc_lens_keys: 8, mc_lens_lr: 0.05}}
evaluate: {function: "scripts.eval.measures:focus", contexts: 8}
report: {regret: nll_lens - nll_oracle, closed: (a - b) / (a - -c)}
step_time: {pairs: 6, steps: 2}
""")  # noqa: E501
SUITE = Intact(b"""title: What does it keep?
seeds: [1, 2]
models:
  bases: {tag: "s_{seed}", train: {data: tasks, depth: 2, mc_enabled: 1}}
  tasks: {train: {init_from: "$HOME/{seed}"}, after: bases, finetune: {steps: 4}, keep_drop: {label: {batches: 2}, train: {steps: 3}}}
texts: {prose: $TEXT/prose}
files: {qasper: {path: $DATA/q.jsonl, format: longbench}}
cells:
  - {model: tasks, tasks: [alias, passkey, prose], systems: [full, window, gists_lens, drop_learned], lengths: [64, 1024], budgets: [32], documents: 4, batch: 2}
  - {model: bases, tasks: [qasper], systems: [full], lengths: [96], budgets: [32]}
cost: {step: {model: tasks, command: "python -m scripts.mc_bench train --checkpoint_dir={checkpoint}"}}
overlay: {recall: [a, b]}
ablations: [runs/ablations/lens_targets.yaml]
""")  # noqa: E501


@pytest.fixture(scope="module", autouse=True)
def nothing_runs(tmp_path_factory):
    """What is read is planned, and not run."""

    def planned(cells, *_, **__):
        json.dumps(cells)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        for module in (ablate, run_benchmarks):
            patch.setattr(module, "run_cells", planned)
        patch.setattr(run_benchmarks, "prepare", planned)
        yield


def study_or_suite(kind: str, data: bytes, work: Path) -> None:
    folder = put_image(work / "yaml", {"x.yaml": data})
    command(kind, mc_study.main, "ablate" if kind.startswith("study") else "suite", str(folder / "x.yaml"))
    assert image(folder) == {"x.yaml": data}


@fuzzed(st.sampled_from([STUDY, SUITE]), changes())
def test_bytes_of_yaml(work, whole, change):
    study_or_suite("study, bytes" if whole is STUDY else "suite, bytes", change(whole), work)


@fuzzed(st.sampled_from([STUDY, SUITE]), json_changes(2))
def test_values_of_yaml(work, whole, change):
    found = change(yaml.safe_load(whole))
    study_or_suite("study, values" if whole is STUDY else "suite, values",
                   yaml.safe_dump(found).encode("utf-8", "surrogatepass"), work)


@fuzzed(json_changes(3),
        st.sampled_from(["x:1", "x:2", "x:0", "x:-1", "x:", "x", "x:9999999999999999999999", "x:²", "gone:1"]), cost=2)
def test_a_record_to_be_run_again(work, change, where):
    record = {"key": "k", "name": "n", "system": "full", "task": "passkey", "length": 64, "budget": 32, "seed": 1,
              "documents": 2, "batch": 1, "text": None, "results": {"nll": [1.0, 2.0], "acc": [0.0, 1.0]},
              "model": {"name": "m", "seed": 1, "tag": "t", "flags": {"depth": "1"}, "finetune": None,
                        "keep_drop": None, "after": None}}
    folder = put_image(work / "rerun", {"x": dumped(change(record)) + b"\n"})
    command("record, run again", mc_study.main, "suite", f"--rerun={folder}/{where}")


# ---------------------------------------------------------------------------------------------------------------------
# Labels


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """Two shards of utility labels under a manifest."""
    folder = LabelFolder(tmp_path_factory.mktemp("labels") / "l")
    folder.begin({"model": "abc", "data": "recall"}, {"commit": "x"})
    for i in range(2):
        folder.add(i, Labels(torch.arange(2), torch.arange(16).view(2, 8), torch.full((2, 1), 4),
                             torch.zeros(2, 1, 3).long(), torch.zeros(2, 1, 3), torch.ones(2, 1, 3).bool(),
                             torch.zeros(2, 1)))
    return image(folder.folder)


def read_utilities(folder: Path) -> None:
    there = LabelFolder(folder)
    there.manifest()["settings"].get("model")
    found = there.read()
    C, Q, E = found.utility_CQE.shape
    assert found.tokens_CT.shape[0] == len(found.row_C) == C and found.block_CQE.shape == found.valid_CQE.shape == (C, Q, E) and found.nll_CQ.shape == found.n_CQ.shape == (C, Q)  # noqa: E501
    assert found.utility_CQE.dtype == torch.float32 and found.tokens_CT.dtype == torch.int64 and found.valid_CQE.dtype == torch.bool  # noqa: E501


@fuzzed(st.sampled_from(["manifest.json", "labels_00000.npz", "labels_00001.npz"]), changes())
def test_bytes_of_utility_labels(labels, work, name, change):
    folder = put_image(work / "labels", {**labels, name: change(labels[name])})
    tried("utility labels, bytes", lambda: read_utilities(folder))


@fuzzed(st.data())
def test_arrays_of_utility_labels(labels, work, data):
    with np.load(io.BytesIO(labels["labels_00001.npz"])) as arrays:
        made = dict(arrays)
    name = data.draw(st.sampled_from(sorted(made)))
    old = made.pop(name)
    what = data.draw(st.sampled_from(["gone", "shape", "longer", "type", "text", "object", "scalar"]))
    new = {"shape": lambda: old.reshape(-1), "longer": lambda: np.concatenate([np.atleast_1d(old)] * 2),
           "text": lambda: np.array(["x"] * old.size), "scalar": lambda: np.array(1.0),
           "type": lambda: old.astype(data.draw(st.sampled_from(["float64", "int8", "bool", "complex64", "float16"]))),
           "object": lambda: np.array([None, {}])}  # fmt: skip
    if what != "gone":
        made[name] = new[what]()
    np.savez(written := io.BytesIO(), **made)
    folder = put_image(work / "labels", {**labels, "labels_00001.npz": written.getvalue()})
    tried("utility labels, arrays", lambda: read_utilities(folder))


@fuzzed(json_changes())
def test_a_manifest_of_labels(labels, work, change):
    made = change(json.loads(labels["manifest.json"]))
    folder = put_image(work / "labels", {**labels, "manifest.json": dumped(made)})
    tried("labels' manifest", lambda: read_utilities(folder))
    tried("labels' manifest", lambda: importance.read_manifest(folder).get("base"))
    tried("labels' manifest", lambda: LabelFolder(folder).begin({"model": "abc", "data": "recall"}, {}))
    tried("labels' manifest", lambda: importance.write_labels(folder, {"base": "b"}, lambda i: None,
                                                              0, lambda done: None))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "s"
    importance.write_labels(folder, {"base": "b"}, lambda i: (torch.arange(8).view(2, 4), torch.rand(2, 4)),
                            2, lambda done: None)
    save_token_classifier(folder / "keep_drop.safetensors", TokenClassifier(TokenClassifierConfig(16, 8, 2, 1, 8)),
                          {"share": 0.5})
    return image(folder)


def read_shards(folder: Path) -> None:
    for tokens, worth in importance.read_labels(folder):
        assert tokens.dtype == torch.int64 and worth.dtype == torch.float32 and tokens.shape == worth.shape and tokens.ndim == 2  # noqa: E501
        importance.keep_labels(worth, 0.5)


@fuzzed(st.sampled_from(["labels_000000.safetensors", "labels_000001.safetensors", "keep_drop.safetensors",
                         "manifest.json"]), changes())
def test_bytes_of_importance_labels(shards, work, name, change):
    folder = put_image(work / "shards", {**shards, name: change(shards[name])})
    for read in (lambda: read_shards(folder), lambda: load_token_classifier(folder
                                                                            / "keep_drop.safetensors"), lambda: importance.read_manifest(folder).get("base")):  # noqa: E501
        tried("importance labels", read)


@fuzzed(st.sampled_from(["gone", "longer", "integers", "vector", "empty", "three", "nan"]),
        st.sampled_from(["tokens", "importance"]))
def test_tensors_of_importance_labels(shards, work, what, name):
    folder = put_image(work / "shards", shards)
    content = {"tokens": torch.arange(8).view(2, 4).int(), "importance": torch.rand(2, 4)}
    old = content.pop(name)
    new = {"longer": lambda: torch.cat([old, old]),
           "integers": lambda: (old * 5).to(torch.int16 if name == "importance" else torch.float64),
           "vector": lambda: old[0], "empty": lambda: old[:0],
           "three": lambda: old[None], "nan": lambda: old.float() * torch.nan}  # fmt: skip
    save_file(content | ({} if what == "gone" else {name: new[what]().clone()}), folder / "labels_000001.safetensors")
    tried("importance labels, tensors", lambda: read_shards(folder))


@fuzzed(json_changes(2))
def test_config_of_a_classifier(work, change):
    model, path = TokenClassifier(TokenClassifierConfig(16, 8, 2, 1, 8)), work / "keep_drop.safetensors"
    config = change({"d_model": 16, "width": 8, "n_head": 2, "n_layer": 1, "span": 8})
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path,
              metadata={"config": json.dumps(config), "meta": "{}"})
    tried("classifier of tokens", lambda: load_token_classifier(path))
