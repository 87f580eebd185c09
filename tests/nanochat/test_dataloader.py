"""B5, traps 17-20: rows are a function of their global number, so ranks, micro-steps and restarts change nothing."""

import numpy as np
import pytest
import torch

from nanochat.common import UserError
from nanochat.dataloader import Loader, LongRows, NeedleSource, PackedRows, RandomSource, RecallSource, eval_rows, judged_rows, make_source, source_of  # noqa: E501
from nanochat.tasks.recall import CurriculumSchedule, RecallTask
from nanochat.token_cache import TokenCache
from nanochat.tokenizer import Reserved, Tokenizer

torch.set_num_threads(1)
BOS = 60_000


def cache_of(lengths, tmp_path) -> TokenCache:
    """Documents whose tokens after bos count up from 0 through all of them: a token tells where it came from."""
    docs = np.cumsum([0, *lengths])
    tokens = np.empty(docs[-1], dtype=np.uint16)
    tokens[:] = np.arange(docs[-1]) % BOS
    tokens[docs[:-1]] = BOS
    return TokenCache(tmp_path, tokens, docs, "val-test")


LENGTHS = [5, 33, 34, 700, 12, 65, 2, 31, 1, 129, 64, 400]


@pytest.fixture(params=["long", "packed", "recall", "curriculum", "random"])
def source(request, tmp_path):
    task = RecallTask(range(100, 132), range(132, 164), range(164, 170), block=8, blocks=8, announce=8, ask=8)
    return {
        "long": lambda: LongRows(cache_of(LENGTHS, tmp_path), 32, 7, "train"),
        "packed": lambda: PackedRows(cache_of(LENGTHS, tmp_path), 32, 7, "train"),
        "recall": lambda: RecallSource(task, 96, "train"),
        "curriculum": lambda: RecallSource(task, 96, "train", CurriculumSchedule(blocks=8), 60),
        "random": lambda: RandomSource(300, 32, 7, "train"),
    }[request.param]()


def take(loader, batches):
    return [loader.next() for _ in range(batches)]


def same(a, b):
    """Whether two lists of batches hold the same tensors."""
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p[:3], q[:3], strict=True))


def joined(batches):
    """One batch of many micro-batches."""
    return [torch.cat(tensors) for tensors in list(zip(*batches))[:3]]


def test_batches(source):
    loader = Loader(source, 4, 2, source.T)
    for i, batch in enumerate(take(loader, 8)):
        assert [t.dtype for t in batch[:3]] == [torch.int64] * 3 and batch.rows.tolist() == [2 * i, 2 * i + 1]
        assert batch.inputs.shape == batch.targets.shape == (2, source.T)
        counted = batch.targets[:, :-1] >= 0
        assert torch.equal(batch.targets[:, :-1][counted], batch.inputs[:, 1:][counted]), "targets are the next tokens"
        assert batch.num_targets == (batch.targets >= 0).sum(1).max()
        assert counted.any() and (batch.targets >= -1).all() and (batch.inputs >= 0).all()


@pytest.mark.parametrize("world_size, micro_batch", [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (6, 1)])
def test_any_ranks_and_micro_steps_see_the_same_rows(source, world_size, micro_batch):
    one = Loader(source, 6, 6, source.T)
    ranks = [Loader(source, 6, micro_batch, source.T, rank, world_size) for rank in range(world_size)]
    for step in range(8):  # beyond the first epoch of the small corpora
        whole = one.next()
        assert {loader.step for loader in ranks} == {step}
        parts = [loader.next() for _ in range(ranks[0].micro_steps) for loader in ranks]
        assert same([whole], [joined(parts)])


def test_resume_equals_uninterrupted(source):
    for done in range(0, 25, 3):
        loader = Loader(source, 4, 2, source.T)
        take(loader, done)
        state = loader.state_dict()
        resumed = Loader(source, 4, 2, source.T)
        take(resumed, 2)
        resumed.load_state_dict(state)
        assert resumed.step == done // 2 and same(take(loader, 5), take(resumed, 5))


def test_resume_on_other_ranks_at_a_steps_end(source):
    loader = Loader(source, 4, 2, source.T)
    take(loader, 6)
    halves = [Loader(source, 4, 1, source.T, rank, 2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(loader.state_dict())
    parts = [half.next() for _ in range(2) for half in halves]
    whole = take(loader, 2)
    assert same([joined(whole)], [joined(parts)])


def test_resume_from_something_else_is_refused(source, tmp_path):
    state = Loader(source, 4, 2, source.T).state_dict()
    for name, value in [("rows_per_step", 8), ("T", 16), ("source", "other")]:
        with pytest.raises(UserError, match=f"{name}={value}, this run"):
            Loader(source, 4, 2, source.T).load_state_dict(state | {name: value})
    with pytest.raises(UserError, match="row 2 lies inside a step"):
        Loader(source, 4, 4, source.T).load_state_dict(state | {"next_row": 2})


def test_held_batches_stay_different(source):
    """Trap 20: the loader must not hand out the same memory twice."""
    loader = Loader(source, 2, 2, source.T)
    first = loader.next()
    copy = [t.clone() for t in first[:3]]
    second = loader.next()
    second.inputs.zero_(), second.targets.zero_()
    assert same([first], [copy]) and not torch.equal(first.inputs, loader.next().inputs)
    first.inputs.zero_()
    assert torch.equal(first.targets, copy[1]), "inputs and targets share no memory"


# --- long rows


def test_long_documents_stay_whole(tmp_path):
    """Trap 19: in each epoch a document's windows follow one another, and leave out less than a window."""
    T, cache = 32, cache_of(LENGTHS, tmp_path)
    rows = LongRows(cache, T, 1, "train")
    assert rows.num_rows == sum((n - 1) // T for n in LENGTHS) and rows.count_rows(10**9) == rows.num_rows
    orders, phases = [], set()
    for epoch in range(4):
        starts = rows.starts(np.arange(epoch * rows.num_rows, (epoch + 1) * rows.num_rows))
        orders.append(tuple(starts))
        documents = np.searchsorted(cache.docs, starts, side="right") - 1
        assert (starts + T + 1 <= cache.docs[documents + 1]).all(), "a row lies in one document"
        for d in range(len(LENGTHS)):
            own = np.sort(starts[documents == d])
            assert len(own) == (LENGTHS[d] - 1) // T and (np.diff(own) == T).all()
            if LENGTHS[d] == 700:
                phases.add(own[0])
    assert len(set(orders)) == 4 and len(phases) > 1
    tokens, mask = rows.row_tokens(np.arange(3))
    assert mask is None and np.array_equal(tokens[1], cache.tokens[orders[0][1] :][: T + 1])
    assert f"{sum(n > T for n in LENGTHS)} of 12 documents" in rows.summary and f"of {sum(LENGTHS):,} tokens" in rows.summary  # noqa: E501


def test_rows_at_the_exact_length(tmp_path):
    rows = LongRows(cache_of([33, 32, 33], tmp_path), 32, 0, "train")
    assert sorted(rows.starts(np.arange(2))) == [0, 65]


# --- packed rows


def test_packed_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(PackedRows, "CHUNK", 40)
    lengths = np.random.default_rng(0).integers(2, 120, 200).tolist()
    cache, T = cache_of(lengths, tmp_path), 64
    rows = PackedRows(cache, T, 3, "train")
    epoch = rows.count_rows(10**9)
    assert 0.8 * sum(lengths) < epoch * (T + 1) < 1.1 * sum(lengths) and rows.count_rows(3) == 3
    tokens, _ = rows.row_tokens(np.arange(3 * epoch))
    assert tokens.shape == (3 * epoch, T + 1) and (tokens[:, 0] == BOS).all()
    for row in tokens[:epoch]:
        for piece in np.split(row, np.flatnonzero(row == BOS))[1:]:
            assert (np.diff(piece[1:]) == 1).all(), "each piece is contiguous text behind a bos"
    body = tokens[:epoch][tokens[:epoch] != BOS]
    assert len(np.unique(body)) == len(body), "no token twice in an epoch"
    assert len(body) > 0.9 * (sum(lengths) - len(lengths))
    assert not np.array_equal(tokens[:epoch], tokens[epoch : 2 * epoch])
    late = PackedRows(cache, T, 3, "train").row_tokens(np.array([2 * epoch + 5, 1]))[0]
    assert np.array_equal(late, tokens[[2 * epoch + 5, 1]]), "any order of asking"


def test_short_documents_are_cropped_only_to_fill(tmp_path):
    rows = PackedRows(cache_of([10, 10, 13, 33], tmp_path), 32, 0, "train")
    assert rows.count_rows(99) == 2
    pieces = sorted(len(p) for row in rows.row_tokens(np.arange(2))[0]
                    for p in np.split(row, np.flatnonzero(row == BOS))[1:])
    assert pieces == [10, 10, 13, 33]


# --- synthetic rows


def test_recall_source_follows_its_curriculum():
    task = RecallTask(range(100, 612), range(612, 1124), range(1124, 1156))
    source = RecallSource(task, 1088, "train", CurriculumSchedule(), total_rows=1000)
    blocks = source.num_blocks(np.arange(1200))
    assert blocks[0] == 2 and (np.diff(blocks[:500]) >= 0).all() and abs((blocks[500:] == 32).mean() - 0.5) < 0.07
    tokens, mask = source.row_tokens(np.array([0, 998]))
    assert mask[0].sum() == (1088 - 64) // 2 and mask[1].sum() == (1088 - 32 * blocks[998]) // 2
    assert RecallSource(task, 1088, "val").row_tokens(np.arange(3))[1].sum() == 3 * 32
    assert source.fingerprint != RecallSource(task, 1088, "train", CurriculumSchedule(), total_rows=2000).fingerprint


def test_random_rows_are_uniform():
    tokens, mask = RandomSource(50, 200, 0, "train").row_tokens(np.arange(100))
    counts = np.bincount(tokens.ravel(), minlength=50)
    assert mask is None and len(counts) == 50 and counts.min() > 0.75 * counts.mean()
    assert not np.array_equal(tokens, RandomSource(50, 200, 0, "val").row_tokens(np.arange(100))[0])


# --- what is refused


def test_impossible_batches_are_refused(source):
    for args in [(4, 3, source.T), (4, 2, source.T, 0, 4), (4, 0, source.T), (2, 4, source.T)]:
        with pytest.raises(UserError, match=f"{args[0]} rows per step do not divide into .*micro-batches of {args[1]}"):
            Loader(source, *args)


def test_too_little_data_is_refused(tmp_path):
    """Trap 18: the numbers at the start, never an endless loop."""
    few = cache_of([40, 70, 3], tmp_path)
    with pytest.raises(UserError, match="no val document has 129 tokens .the longest of 3 has 70"):
        LongRows(few, 128, 0, "val")
    with pytest.raises(UserError, match="has 113 tokens, a row needs 129"):
        PackedRows(few, 128, 0, "val")
    for source in (LongRows(few, 32, 0, "val"), PackedRows(few, 32, 0, "val")):
        with pytest.raises(UserError, match="a step takes 8 rows, the data has 3 rows of 32"):
            Loader(source, 8, 2, 32)
        assert eval_rows(source, 90) == 3 and eval_rows(source, 33, multiple=2) == 2
        with pytest.raises(UserError,
                           match="asks for 97 tokens, 4 rows of 32; the held-out split has 3 rows .96 tokens"):
            eval_rows(source, 97)
        with pytest.raises(UserError, match="0 eval tokens"):
            eval_rows(source, 0)


def test_impossible_recall_sources_are_refused():
    task = RecallTask(range(100, 612), range(612, 1124), range(1124, 1156))
    with pytest.raises(UserError, match="got T=512"):
        RecallSource(task, 512, "train")
    with pytest.raises(UserError, match="starts at 1 blocks"):
        RecallSource(task, 1088, "train", CurriculumSchedule(start=1), 100)


def test_make_source(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "d").mkdir()
    for i in range(4):
        (tmp_path / "d" / f"{i}.txt").write_text(f"{i} and some more words here " * 40)
    tokenizer = Tokenizer.train(["some words and more words here for a small tokenizer"], 260)
    common = dict(T=64, seed=0, tokenizer=tokenizer)
    data = str(tmp_path / "d")
    assert isinstance(make_source(data, "train", **common), LongRows)
    assert isinstance(make_source(data, "val", rows="packed", **common), PackedRows)
    assert isinstance(make_source("random", "train", **common), RandomSource)
    recall = make_source("recall", "train", **common | {"T": 1088})
    tokens, mask = recall.row_tokens(np.arange(2))
    assert isinstance(recall, RecallSource) and tokens.max() < tokenizer.vocab_size and mask.any()
    short = make_source("recall", "val", recall_blocks=4, **common | {"T": 192})
    assert short.num_blocks(np.arange(3)).tolist() == [4] * 3 and short.fingerprint != recall.fingerprint
    with pytest.raises(UserError, match="--rows=wide"):
        make_source(data, "train", rows="wide", **common)


def test_needle_source_hides_answerable_facts_in_text():
    """Issue (b): every asked value stands in the history behind its key; the filler is the split's own text."""
    task = RecallTask(range(100, 612), range(612, 1124), range(1124, 1156))
    filler = np.arange(50)
    for needles, T in ((1, 288), (3, 320)):
        source = NeedleSource(task, filler, T, "train", needles)
        tokens, mask = source.row_tokens(np.arange(3))
        assert tokens.shape == mask.shape == (3, T + 1)
        for row, counted in zip(tokens, mask):
            facts = {int(k): int(v) for k, v in zip(row[:-1], row[1:]) if k in task.keys}
            key_of_alias = {int(a): task.keys.start + i for i, a in enumerate(task.alias_of_key)}
            assert len(facts) == needles * task.pairs_per_block and counted.any()
            assert all(facts[key_of_alias[int(row[i - 1])]] == row[i] for i in np.flatnonzero(counted))
            assert (row[: T // 2] < 50).any()
    with pytest.raises(UserError, match="multiple of the block"):
        NeedleSource(task, filler, 300, "train", 3)


# -- from a checkpoint
# ----------------------------------------------------------------------------------------------------


def test_source_of_reads_what_the_training_read():
    tokenizer = Tokenizer.train(["some words and more words here for a small tokenizer"], 260, Reserved(512, 512, 32))
    flags = dict(data="recall", seed=3, rows="long", text_column="text", needles=2, recall_blocks=8)
    meta = {"flags": flags, "model_config": {"sequence_len": 512}}
    rows = np.arange(3)
    tokens, mask = make_source("recall", "train", T=512, seed=3, tokenizer=tokenizer, recall_blocks=8).row_tokens(rows)
    inputs, targets = judged_rows(source_of(meta, "train", tokenizer=tokenizer), rows)
    assert np.array_equal(inputs.numpy(), tokens[:, :-1]) and np.array_equal(targets.numpy(),
                                                                             np.where(mask[:, 1:], tokens[:, 1:], -1))
    assert (targets < 0).any() and (targets >= 0).any()
    other = source_of(meta, "val", tokenizer=tokenizer, data="random", T=64, seed=4)
    assert other.fingerprint == make_source("random", "val", T=64, seed=4, tokenizer=tokenizer).fingerprint
    with pytest.raises(UserError, match="names no --needles"):
        source_of(meta | {"flags": {k: v for k, v in flags.items() if k != "needles"}}, "train", tokenizer=tokenizer)
