"""Inputs that the fuzzing found (tests/fuzz), at their smallest: each ended in a traceback, a panic or a hang, and
is refused in one line now."""

import json
import sqlite3
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mc.model import load_mega_context
from mc.store.catalog import FILE, Catalog
from mc.store.disk.commits import SLOT_BYTES, note_bytes
from mc.store.disk.store import DiskStore
from mc.store.ram import StoreFormat
from mc.arms.utility_labels import LabelFolder
from nanochat.checkpoint import load_model_state, save_checkpoint
from nanochat.common import UserError
from nanochat.loading import load_model
from nanochat.tasks.external import load_examples
from nanochat.tokenizer import Tokenizer
from scripts import base_train, mc_dash, mc_store
from scripts.eval.importance import read_labels, read_manifest
from scripts.studies.suite import read_suite

DEEP = "[" * 3000


def refused(read, *arguments) -> str:
    """The one line of a refusal."""
    with pytest.raises(UserError) as e:
        read(*arguments)
    assert str(e.value).isprintable() and len(str(e.value)) <= 1500
    return str(e.value)


@pytest.mark.parametrize("line",
                         ['{"step": 1}', '{"step": 1, "time": NaN}', '{"step": 1, "time": 1, "train.loss": "x"}',
                          '{"step": [], "time": 1}', '{"step": 1, "time": 1, "val.loss": 1' + 400 * "0" + "}", DEEP,
                          "[]", '"\\ud800"'])
def test_lines_of_metrics(line, tmp_path, capsys):
    """Alone it is no log of a run, and refused; among rows it is left out, and that is said."""
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    assert "line 1" in refused(mc_dash.load_run, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time": 1}\n' + line + "\n")
    mc_dash.load_run(tmp_path)
    assert "the first is line 2" in capsys.readouterr().err


@pytest.mark.parametrize("values", [{"train.loss": [1e308, -1e308]}, {"train.loss": [0.0, 5e-324]},
                                    {"train.loss": [1e-15, 2e-15]}, {"train.loss{lod<0}": [1.0, 2.0]},
                                    {"train.loss": [float("inf"), 1.0]},
                                    {"mc.val.delta_nll{shown=lens}": [1e308, 1.0],
                                     "mc.val.delta_nll{shown=window}": [1e-300, 1.0]}])  # fmt: skip
def test_numbers_at_the_ends_of_float64_are_drawn(values, tmp_path):
    rows = [{"step": i, "time": i, **{name: x[i] for name, x in values.items()}} for i in range(2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = mc_dash.page([mc_dash.load_run(tmp_path)])
    assert page.endswith("</html>\n") and ">nan" not in page and ">inf" not in page


def test_an_error_is_one_printable_line():
    assert str(UserError("a\nb \ud800 \x1b[31m" + "x" * 9000)).startswith(
        "a b � �[31mxxx") and len(str(UserError("x" * 9000))) == 1500


@pytest.mark.parametrize("changed",
                         [{"tokens": []}, {"tokens": ["YQ==", "YQ=="]},
                          {"reserved": {"keys": 10**30, "aliases": 0, "values": 0}}, {"reserved": []},
                          {"pattern": None}, {"pattern": ""}])
def test_tokenizers_that_tiktoken_would_panic_at(changed, tmp_path):
    path = Tokenizer([bytes([i]) for i in range(256)]).save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert "damaged tokenizer" in refused(Tokenizer.load, tmp_path)
    path.write_text(DEEP)
    assert "nested too deeply" in refused(Tokenizer.load, tmp_path)


SMALL = dict(sequence_len=8, vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)


@pytest.mark.parametrize("changed", [{"n_layer": "1"}, {"n_layer": 10**9}, {"n_embd": 2**40}, {"vocab_size": 2**40},
                                     {"rope_base": None}, {"smear": "no"}, {"n_head": 10**30}, {"n_layer": 0.5}])
def test_configurations_of_no_model(changed, tmp_path):
    """Before memory is taken, and without a layer after the other being built."""
    save_checkpoint(tmp_path, 1, model={"w": torch.zeros(2)}, optimizer_shard={},
                    meta={"model_config": SMALL | changed})
    refused(load_model, tmp_path)


@pytest.mark.parametrize("state",
                         [{"w": 1}, {"w": None}, {1: torch.zeros(2)},
                          {"transformer.wte.weight": torch.zeros(64, 32).long()}])
def test_weights_that_are_none(state, tmp_path):
    save_checkpoint(tmp_path, 1, model=state, optimizer_shard={}, meta={"model_config": SMALL})
    assert "do not fit" in refused(load_model, tmp_path)


@pytest.mark.parametrize("change", [{"levels": None}, {"levels": {"L0": [2**53, 0]}}, {"levels": {"x": [1, 0]}},
                                    {"version": -1}, {"version": "0"}, {"sequence": None}, {"durable": 1}])
def test_commits_that_no_store_wrote(change, tmp_path):
    with DiskStore.create(tmp_path / "s", StoreFormat(4, 6, 1, 3)) as store:
        commit = store._commits.last
    (tmp_path / "s" / "manifest").write_bytes(2 * note_bytes(commit | change).ljust(SLOT_BYTES, b"\0"))
    for mode in ("r", "rw"):
        assert "damaged" in refused(DiskStore.open, tmp_path / "s", mode)


@pytest.mark.parametrize("column, value", [("start", 0.5), ("start", 3), ("tokens", "x"), ("tokens", -1),
                                           ("time", float("inf")), ("uri", b"\xff"), ("edits", 0.5)])
def test_cells_that_no_catalog_wrote(column, value, tmp_path):
    with Catalog(tmp_path, 4) as catalog:
        catalog.add_source("a", 0, tokens=3, complete=True)
    db = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    db.execute(f"UPDATE sources SET {column} = ?", (value,))
    db.close()
    with Catalog(tmp_path, 4, read_only=True) as catalog:
        assert "catalog" in refused(catalog.sources)


def test_a_foreign_file_among_the_versions_of_a_store_is_left_alone(tmp_path):
    with DiskStore.create(tmp_path / "s", StoreFormat(4, 6, 1, 3)) as store:
        store.commit()
    (tmp_path / "s" / "versions" / "x.ctx").write_bytes(b"mine")
    for mode in ("r", "rw"):
        with DiskStore.open(tmp_path / "s", mode) as store:
            assert store.n_tokens == 0
    assert (tmp_path / "s" / "versions" / "x.ctx").read_bytes() == b"mine"


@pytest.mark.parametrize("flags", [["--span=²:³"], ["--source=9223372036854775808"], ["--limit=99999999999999999999"]])
def test_queries_that_no_column_can_answer(flags, tmp_path, monkeypatch, capsys):
    with DiskStore.create(tmp_path / "s", StoreFormat(4, 6, 1, 3)), Catalog(tmp_path / "s", 4):
        pass
    monkeypatch.setattr(sys, "argv", ["mc_store", "query", f"--store={tmp_path / 's'}", *flags])
    with pytest.raises((UserError, SystemExit)) as e:
        mc_store.main()
    assert isinstance(e.value, UserError) or e.value.code == 2 and capsys.readouterr().err.startswith("error: ")


SUITE = ("title: x\nseeds: [1]\nmodels: {m: {train: {}}}\ncells: [{model: m, tasks: %s, systems: [full], lengths: "
         "[64], budgets: [32]}]\n")


@pytest.mark.parametrize("text", [DEEP, "2026-13-45", SUITE % "[[]]", SUITE % "[passkey]" + "cost: [1]",
                                  SUITE % "[passkey]" + "overlay: {a: 1}", SUITE % "[passkey]" + "texts: {a: []}"])
def test_suites_that_are_none(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    refused(read_suite, tmp_path / "x.yaml")


@pytest.mark.parametrize("most", ["1" + 320 * "0", "1e308", "Infinity", "NaN", "2147483648", "0.5"])
def test_lengths_that_no_answer_has(most, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "canonical_solution": "b", "max_new_tokens": %s}\n' % most)
    assert "row 1: no humaneval example: max_new_tokens" in refused(load_examples, tmp_path / "x.jsonl", "humaneval")


def test_labels_that_do_not_fit(tmp_path):
    (tmp_path / "manifest.json").write_text("null")
    refused(read_manifest, tmp_path)
    np.savez(tmp_path / "labels_00000.npz", row_C=np.arange(2), tokens_CT=np.zeros((2, 8), int),
             n_CQ=np.zeros((2, 1), int), block_CQE=np.zeros(6, int),
             utility_CQE=np.zeros((2, 1, 3), np.float32), valid_CQE=np.ones((2, 1, 3), bool),
             nll_CQ=np.zeros((2, 1), np.float32))  # fmt: skip
    assert "damaged" in refused(LabelFolder(tmp_path).read)
    save_file({"tokens": torch.zeros(4, 4).int(), "importance": torch.zeros(2, 4)},
              tmp_path / "labels_000000.safetensors")
    assert "damaged" in refused(read_labels, tmp_path)


def test_facts_of_a_checkpoint_that_are_none(tmp_path):
    save_checkpoint(tmp_path, 1, model={"w": torch.zeros(1)}, optimizer_shard={}, meta={"model_config": {}})
    record = tmp_path / "complete_000001.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"facts": None}))
    assert "facts is None" in refused(load_model_state, tmp_path)


def test_levels_that_were_trained_are_numbers(tmp_path):
    save_checkpoint(tmp_path, 1, model={}, optimizer_shard={}, meta={}, mc={"w": torch.zeros(1)})
    assert "names no levels" in refused(load_mega_context, tmp_path, 1, {"mc": {"config": {}, "trained_lods": None}}, 8)


def test_bytes_of_a_catalog_that_are_no_text(tmp_path):
    with Catalog(tmp_path, 4) as catalog:
        catalog.add_source("a.txt", 0, hash="aa", kind="text", tokens=4, complete=True)
    db = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    db.execute("UPDATE sources SET uri = CAST(x'61c4' AS TEXT)")
    db.close()
    with Catalog(tmp_path, 4, read_only=True) as catalog:
        assert "catalog" in refused(catalog.sources)


def test_a_flag_that_names_an_arm_and_has_no_value(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["base_train", "--mc_enabled=1", "--mc_lens"])
    with pytest.raises(SystemExit) as e:
        base_train.main()
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
