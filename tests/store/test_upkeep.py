"""Pruning, gists made again, export, statistics and sizes of a history."""

import json
import re
from pathlib import Path

import pytest
import torch

from mc.mega_context import build_tree
from mc.model import Entries, run_entries
from mc.store.catalog import Catalog, measure_variance, open_history
from mc.store.disk.store import DiskStore
from mc.store.history import MAX_BLOCKS, History, store_format
from mc.store.networks import Networks, untrained_networks
from mc.store.pruning import least_useful, prune, restore
from mc.store.ram import DROPPED, ERASED, VOID, RamStore, StoreFormat
from mc.store.rebuild import regist
from mc.store.sensitivity import CONTEXT, measure_sensitivity
from nanochat.common import UserError
from scripts.bench.store import bytes_per_slot
from tiny_gpt import random_tokens
from tiny_mc import K, tiny_base, tiny_mc

GPT = tiny_base()
MC = tiny_mc(GPT, max_lod=3).model.eval()
OTHER = tiny_mc(GPT, max_lod=3, gist="mean").model.eval()


def filled(history: History, catalog: Catalog, lengths=(70, 13, 200)) -> None:
    for length in lengths:
        catalog.add_source(f"of {length}", history.n_tokens, tokens=length, complete=True)
        history.append(random_tokens(length, seed=length))
        history.end_source()


@pytest.fixture
def ram():
    history, catalog = open_history(GPT, MC)
    filled(history, catalog)
    return history, catalog


@pytest.fixture
def folder(tmp_path) -> Path:
    """A store on disk, closed."""
    history, catalog = open_history(GPT, MC, "disk", tmp_path / "store")
    filled(history, catalog)
    history.store.close(), catalog.close()
    return tmp_path / "store"


def test_pruned_are_the_least_useful(ram):
    history, catalog = ram
    n = history.store.n_nodes(1)
    for block, accesses, sensitivity in ((0, 5, 0.4), (1, 9, 0.1), (2, 1, -3.0), (40, 2, None)):
        for _ in range(accesses):
            catalog.count_access(torch.zeros(1, dtype=torch.long), torch.tensor([block * K]))
        if sensitivity is not None:
            catalog.count_sensitivity(0, block, sensitivity)
    catalog.flush()
    assert least_useful(history.store, catalog, max_utility=0).tolist() == [i for i in range(n)
                                                                      if i not in (0, 1)], "help below 0 counts as none"
    all_blocks = least_useful(history.store, catalog, share=1.0)
    assert all_blocks[-2:].tolist() == [1, 0] and sorted(all_blocks) == list(range(n))
    assert least_useful(history.store, catalog, share=0.1).tolist() == [i for i in range(n)
                                                                  if i not in (0, 1)][: int(0.1 * n)]
    assert max(least_useful(history.store, catalog, share=1.0, keep_last=33)) == (history.n_tokens - 33) // K - 1
    assert least_useful(history.store, catalog, share=1.0, source=2).tolist() == list(catalog.source(2).blocks(K))
    for wrong in (dict(), dict(share=1.5), dict(share=0.5, keep_last=-1)):
        with pytest.raises(UserError, match="--share|--keep_last"):
            least_useful(history.store, catalog, **wrong)


def test_prune_and_restore(ram):
    history, catalog = ram
    store, n = history.store, history.store.n_nodes(1)
    blocks = least_useful(store, catalog, share=0.5)
    report = prune(store, catalog, blocks)
    assert (report.blocks, report.slots, report.detailed) == (n // 2, n // 2 * K, n - n // 2)
    assert store.has_detail(torch.arange(n)).tolist() == [i not in set(blocks.tolist()) for i in range(n)]
    assert sum(count for _, count, _ in catalog.tombstones()) == n // 2 and len(least_useful(store, catalog,
                                                                                             share=0.5)) == 0
    assert restore(store, catalog, source=2).blocks == len(catalog.source(2).blocks(K))
    store.set_detail(torch.tensor([3]), ERASED)
    report = restore(store, catalog)
    assert (report.erased, report.detailed) == (1, n - 1) and [t[:2] for t in catalog.tombstones()] == [(3, 1)]


def test_variance_is_that_of_the_children(ram):
    history, catalog = ram
    catalog.count_access(torch.tensor([2, 1, 1]), torch.tensor([0, 17, 20]))
    assert (history.store.tokens(torch.arange(17 * K, 18 * K)) == VOID).any(), "block 17 ends the first source"
    catalog.flush()
    assert measure_variance(history, catalog) == 3 and measure_variance(history, catalog) == 0
    found = {(s.lod, s.index): s.variance for s in catalog.statistics()}
    for block in (17, 20):
        ids = history.store.tokens(torch.arange(block * K, (block + 1) * K))
        embeds = GPT.embed(ids[ids != VOID]).detach()
        assert found[1, block] == pytest.approx(float(embeds.var(0, correction=0).mean()), abs=1e-12)
    assert found[2, 0] == pytest.approx(float(history.store.gists(1, torch.arange(K)).var(0, correction=0).mean()),
                                        abs=1e-12)


def test_no_variance_is_measured_of_tokens_that_are_gone(ram):
    history, catalog = ram
    catalog.count_access(torch.tensor([2, 1, 1]), torch.tensor([0, 2, 3]))
    catalog.flush()
    history.store.set_detail(torch.tensor([2]), ERASED)
    assert measure_variance(history, catalog) == 2
    found = {(s.lod, s.index): s.variance for s in catalog.statistics()}
    assert found[1, 2] is None and found[1, 3] > 0 and found[2, 0] > 0, "gists of erased blocks are there"


def test_sensitivity_is_what_the_next_block_loses(ram):
    """Against one working context at a time, through the pass that training uses."""
    history, catalog = ram
    blocks = [9, 15, 16, 17, 30, 40]  # block 17 has void slots, and 16 stands before it
    catalog.count_access(torch.zeros(len(blocks), dtype=torch.int64), torch.tensor(blocks) * K)
    # fewer than CONTEXT blocks before it
    catalog.count_access(torch.zeros(1, dtype=torch.int64), torch.tensor([2 * K]))
    catalog.flush()
    assert measure_sensitivity(history, catalog) == 4 and measure_sensitivity(history, catalog) == 0
    found = {s.index: s.sensitivity for s in catalog.statistics(lod=0)}
    ids = history.store.tokens(torch.arange(history.n_tokens))
    with torch.no_grad():
        tree = build_tree(GPT.embed(ids.clamp_min(0))[None], MC.gistnet, K, 1)
    for block in (9, 15, 30, 40):
        nll = {}
        for raw in (False, True):
            nodes = [(1, i) for i in range(block - CONTEXT, block)]
            nodes += [(0, block * K + i) for i in range(K)] if raw else [(1, block)]
            nodes += [(0, (block + 1) * K + i) for i in range(K)]
            lod, index = torch.tensor(nodes).T[:, None]
            entries = Entries(lod, index, torch.ones_like(lod, dtype=torch.bool), torch.tensor([len(nodes)]))
            with torch.no_grad():
                logits = GPT.logits(run_entries(GPT, MC, tree, ids[None], entries))[0, -K - 1:-1]
            nll[raw] = float(torch.nn.functional.cross_entropy(logits, ids[(block + 1) * K:(block + 2) * K]))
        assert found[block] == pytest.approx(nll[False] - nll[True], abs=1e-9)
    assert found[17] is None and found[2] is None


def test_where_a_history_is_kept(folder, tmp_path):
    history, catalog = open_history(GPT, MC, "disk", folder)
    assert catalog.notes == [] and len(catalog.sources()) == 3
    with pytest.raises(UserError, match="is being written by process"):
        open_history(GPT, MC, "disk", folder)
    reader, read_catalog = open_history(GPT, MC, "disk", folder, mode="r")
    assert reader.n_tokens == history.n_tokens and read_catalog.read_only
    reader.store.close(), read_catalog.close(), history.store.close(), catalog.close()
    for arguments, message in (
        (("ram", folder), "needs --mc_tree=disk"),
        (("disk", None), "needs --mc_store=DIR"),
        (("tape", None), "use ram or disk"),
    ):
        with pytest.raises(UserError, match=message):
            open_history(GPT, MC, *arguments)
    with pytest.raises(UserError, match="made by another model"):
        open_history(GPT, OTHER, "disk", folder)
    with pytest.raises(UserError, match="keeps its vectors as torch.float64, not torch.int8"):
        open_history(GPT, MC, "disk", folder, dtype=torch.int8)
    open_history(GPT, MC, "disk", folder)[0].store.close()  # and no lock was left behind


class Killed(BaseException):
    pass


def test_gists_made_again_go_on_after_a_kill_and_switch_at_once(folder, monkeypatch):
    networks = Networks(GPT, OTHER, untrained_networks().tokenizer, json.dumps({"checkpoint_dir": "/other", "step": 1}))
    monkeypatch.setattr("mc.store.rebuild.BATCH_BLOCKS", 20)
    with DiskStore.open(folder) as store, Catalog(folder, K) as catalog:
        before, n = store.gists(1, torch.arange(store.n_nodes(1))), store.n_tokens

        def die(done, total):
            if done >= total // 2:
                raise Killed

        with pytest.raises(Killed):
            regist(store, catalog, networks, progress=die)
        assert torch.equal(store.gists(1, torch.arange(store.n_nodes(1))),
                           before) and store.format.model == catalog_model(GPT, MC)
    open_history(GPT, MC, "disk", folder)[0].store.close()
    with DiskStore.open(folder) as store, Catalog(folder, K) as catalog:
        assert regist(store, catalog, networks) >= n // 2 - 20 * K
        assert list(folder.glob("regist.*")) == []
        with pytest.raises(UserError, match="has the gists of these networks already"):
            regist(store, catalog, networks)
        assert catalog.versions()[-1]["origin"] == networks.origin
        with DiskStore.open(folder, "r", version=0) as old:
            assert torch.equal(old.gists(1, torch.arange(len(before))), before)
    history, catalog = open_history(GPT, OTHER, "disk", folder)
    made = History(GPT, OTHER, RamStore(store_format(GPT, OTHER)))
    made.fill(history.store.tokens(torch.arange(n)))
    for lod in (1, 2, 3):
        index = torch.arange(made.store.n_nodes(lod))
        torch.testing.assert_close(history.store.gists(lod, index), made.store.gists(lod, index), rtol=0, atol=1e-12)
    torch.testing.assert_close(history.store.keys(torch.arange(n // K)), made.store.keys(torch.arange(n // K)), rtol=0,
                               atol=1e-12)
    assert history.store.verify() == []
    history.store.close(), catalog.close()


def catalog_model(gpt, mc) -> str:
    return store_format(gpt, mc).model


def test_gists_made_again_start_anew_after_an_edit(folder, monkeypatch):
    """What was done before an edit is of another text."""
    from mc.store.edits import edit_source

    networks = Networks(GPT, OTHER, untrained_networks().tokenizer, "{}")
    monkeypatch.setattr("mc.store.rebuild.BATCH_BLOCKS", 20)

    def die(done, total):
        raise Killed

    with DiskStore.open(folder) as store, Catalog(folder, K) as catalog:
        with pytest.raises(Killed):
            regist(store, catalog, networks, progress=die)
    history, catalog = open_history(GPT, MC, "disk", folder)
    edit_source(history, catalog, 1, 3, 2, torch.tensor([1, 2]))
    assert regist(history.store, catalog, networks) == 0
    history.store.close(), catalog.close()


def test_what_a_kill_behind_the_switch_leaves_is_cleaned_up(folder, monkeypatch):
    networks = Networks(GPT, OTHER, untrained_networks().tokenizer, "{}")
    with DiskStore.open(folder) as store, Catalog(folder, K) as catalog:

        def die(path, **_):
            if store.version:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr("mc.store.rebuild.shutil.rmtree", die)
            with pytest.raises(Killed):
                regist(store, catalog, networks)
        assert [p.name for p in folder.glob("regist.*")] == [f"regist.{store.format.model}.float64.v0"]
        (folder / "regist.another.float64.v1").mkdir()
        with pytest.raises(UserError, match="has the gists of these networks already"):
            regist(store, catalog, networks)
        assert [p.name for p in folder.glob("regist.*")] == ["regist.another.float64.v1"], "what was begun stays"


def test_gists_are_not_made_of_what_is_gone(folder):
    networks = Networks(GPT, OTHER, untrained_networks().tokenizer, "{}")
    with DiskStore.open(folder) as store, Catalog(folder, K) as catalog:
        store.set_detail(torch.tensor([2, 5]), DROPPED)
        store.commit()
        store.compact()
        with pytest.raises(UserError, match="2 blocks were pruned and compacted away"):
            regist(store, catalog, networks)
        other_blocks = Networks(GPT, tiny_mc(GPT, block_size=8).model, networks.tokenizer, "{}")
        with pytest.raises(UserError, match="blocks of 4 tokens, these networks of 8"):
            regist(store, catalog, other_blocks)


FORMATS = [
    StoreFormat(32, d, p, c, dtype)
    for d, p, c, dtype in (
        (64, 4, 128, torch.float32),
        (128, 4, 128, torch.bfloat16),
        (48, 2, 16, torch.float16),
        (128, 4, 128, torch.int8),
        (33, 1, 7, torch.int8),
    )
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_bytes_are_those_of_the_arithmetic(format, tmp_path):
    """Within 2 %, headers included, at a million slots."""
    with DiskStore.create(tmp_path / "s", format, durability="none") as store:
        n = 1 << 18
        store.append_tokens(torch.zeros(n, dtype=torch.long))
        for start in range(0, n // 32, MAX_BLOCKS):
            count = min(MAX_BLOCKS, n // 32 - start)
            store.append_nodes(1, torch.ones(count, format.d_model), torch.ones(count, format.n_keys, format.key_dim))
        store.append_nodes(2, torch.ones(n // 1024, format.d_model))
    records = sum(p.stat().st_size for p in (tmp_path / "s").glob("[LK]*/*.ctx"))
    assert 1 <= records / n / bytes_per_slot(format, 2) < 1.02


def test_the_sizing_table_is_the_arithmetic():
    page = (Path(__file__).resolve().parents[2] / "obsidian" / "ops" / "Storage.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert len(rows) >= 5
    for width, *told in rows:
        counted = [bytes_per_slot(StoreFormat(32, int(width), 4, 128, dtype), 2)
                   for dtype in (torch.float32, torch.bfloat16, torch.int8)]
        assert [float(x) for x in told] == [round(x, 2) for x in counted], width
