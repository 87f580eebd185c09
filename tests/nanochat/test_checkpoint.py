"""A checkpoint is whole or invisible, survives damage to its neighbours, and resumes bit for bit."""

import errno
import json
import os
import random
import resource

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from nanochat.checkpoint import (
    complete_steps, damage, find_step, load_checkpoint, load_mc_state, load_model_state, rng_state, save_checkpoint, set_rng_state,
)  # fmt: skip
from nanochat.common import UserError, seed_everything
from nanochat.optim import MuonAdamW

torch.set_num_threads(1)


def save(directory, step, **kwargs):
    content = {"model": {"w": torch.full((64, 64), float(step))}, "optimizer_shard": {"m": torch.arange(3) + step}, "meta": {"loss": 1.5}}
    save_checkpoint(directory, step, **{**content, **kwargs})


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def test_round_trip(tmp_path):
    save(tmp_path / "new" / "run", 7, mc={"lens": {"w": torch.ones(2)}}, loader={"shard": 3, "buffer": [torch.arange(4)], "note": None})
    directory = tmp_path / "new" / "run"
    assert names(directory) == ["complete_000007.json", "mc_000007.pt", "meta_000007.json", "model_000007.pt", "optim_000007_rank0.pt"]
    c = load_checkpoint(directory)
    assert c.step == 7 and c.meta == {"step": 7, "loss": 1.5} and c.loader["shard"] == 3 and c.loader["note"] is None
    assert torch.equal(c.model["w"], torch.full((64, 64), 7.0)) and torch.equal(c.optimizer["m"], torch.arange(3) + 7)
    assert torch.equal(c.mc["lens"]["w"], torch.ones(2)) and torch.equal(load_mc_state(directory, 7)["lens"]["w"], torch.ones(2))
    state, meta = load_model_state(directory, "7")
    assert torch.equal(state["w"], c.model["w"]) and meta == c.meta


def test_without_mc_state(tmp_path):
    save(tmp_path, 1)
    assert load_checkpoint(tmp_path).mc is None and load_mc_state(tmp_path, 1) is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def garble(path):
    path.write_text("{")


@pytest.mark.parametrize("victim, harm, reason", [
    ("model_000020.pt", truncate, "bytes instead of"),
    ("model_000020.pt", flip_a_bit, "checksum"),
    ("optim_000020_rank0.pt", flip_a_bit, "checksum"),
    ("meta_000020.json", flip_a_bit, "checksum"),
    ("optim_000020_rank0.pt", os.unlink, "optim_000020_rank0.pt is missing"),
    ("complete_000020.json", os.unlink, "never completed"),
    ("complete_000020.json", garble, "unreadable"),
])  # fmt: skip
def test_damaged_newest_falls_back(tmp_path, capsys, victim, harm, reason):
    save(tmp_path, 10)
    save(tmp_path, 20)
    harm(tmp_path / victim)
    assert load_checkpoint(tmp_path).step == 10
    warning = capsys.readouterr().err
    assert "step 20" in warning and reason in warning and len(warning.splitlines()) == 1
    with pytest.raises(UserError, match=f"step 20 .*{reason}.*other steps there: 10|never completed") as e:
        load_model_state(tmp_path, 20)
    assert "\n" not in str(e.value)


def test_everything_damaged(tmp_path):
    save(tmp_path, 10)
    truncate(tmp_path / "model_000010.pt")
    with pytest.raises(UserError, match="no intact checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("step, message", [("latest", "no checkpoint directory"), (3, "no checkpoint directory")])
def test_missing_directory(tmp_path, step, message):
    with pytest.raises(UserError, match=message):
        find_step(tmp_path / "nowhere", step)


@pytest.mark.parametrize("step, message", [("latest", "no intact checkpoint"), (3, "never completed"), ("new", "neither a number")])
def test_empty_directory(tmp_path, step, message):
    with pytest.raises(UserError, match=message):
        find_step(tmp_path, step)


@pytest.mark.parametrize("calls", range(5))
def test_killed_while_saving(tmp_path, monkeypatch, calls):
    """Die at the n-th rename: the step is either complete or not there, and a later save works."""
    save(tmp_path, 10)
    replace, seen = os.replace, []

    def dying(a, b):
        if len(seen) == calls:
            raise KeyboardInterrupt
        seen.append(b)
        replace(a, b)

    with monkeypatch.context() as m:
        m.setattr(os, "replace", dying)
        if calls < 4:
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, 20)
        else:
            save(tmp_path, 20)
    assert find_step(tmp_path) == (10 if calls < 4 else 20)
    save(tmp_path, 30, keep_last=1)
    assert complete_steps(tmp_path) == [30] and not [n for n in names(tmp_path) if "30" not in n]


def test_half_written_is_invisible(tmp_path, capsys):
    save(tmp_path, 10)
    (tmp_path / "model_000020.pt.tmp").write_bytes(b"half")
    assert find_step(tmp_path) == 10 and not capsys.readouterr().err


def test_full_disk_is_one_clear_line_and_harms_nothing(tmp_path):
    save(tmp_path, 10)
    before = names(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))  # the kernel then refuses to write on, as a full disk does
    try:
        with pytest.raises(UserError, match="cannot save the checkpoint of step 20") as e:
            save(tmp_path, 20, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(e.value) and names(tmp_path) == before and damage(tmp_path, 10) is None


def full_disk(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_failing_flush_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 20)
    assert names(tmp_path) == []


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot save"):
        save(tmp_path / "file" / "run", 1)


def test_keep_last(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, mc={"x": 1}, keep_last=2)
    assert complete_steps(tmp_path) == [30, 40] and len(names(tmp_path)) == 10
    save(tmp_path, 35, keep_last=1)  # resumed from 30: what lies ahead is not ours to remove
    assert complete_steps(tmp_path) == [35, 40]


def test_saving_a_step_again(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 10, model={"w": torch.zeros(3)})
    assert torch.equal(load_checkpoint(tmp_path).model["w"], torch.zeros(3))


@pytest.mark.parametrize("bad", [np.float64(1.0), {1, 2}, object()])
def test_unloadable_value_is_refused_before_writing(tmp_path, bad):
    with pytest.raises(TypeError, match=r"optim_000001_rank0.pt\['loader'\]\['a'\]\[0\]"):
        save(tmp_path / "run", 1, loader={"a": [bad]})
    assert not (tmp_path / "run").exists()


def test_pickled_code_is_never_run(tmp_path):
    save(tmp_path, 1)
    torch.save({"w": os.system}, tmp_path / "model_000001.pt")
    record = json.loads((tmp_path / "complete_000001.json").read_text())
    record["files"].pop("model_000001.pt")
    (tmp_path / "complete_000001.json").write_text(json.dumps(record))
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_model_state(tmp_path)


def draws():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]


def test_generators_continue(tmp_path):
    seed_everything(3)
    draws()  # leaves a spare Gaussian in Python and in NumPy
    save(tmp_path, 1)
    expected = draws()
    seed_everything(4)
    set_rng_state(load_checkpoint(tmp_path).rng)
    assert draws() == expected
    state = rng_state()
    again = draws()
    set_rng_state(state)
    assert draws() == again


def train(directory, resume: bool, steps=range(6)):
    """A noisy little run that checkpoints at step 3; returns its final weights."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4))
    optimizer = MuonAdamW([
        {"name": "m", "kind": "muon", "params": [model[0].weight], "lr": 0.02},
        {"name": "a", "kind": "adamw", "params": list(model[1].parameters()), "lr": 0.01},
    ])  # fmt: skip
    if resume:
        c = load_checkpoint(directory)
        model.load_state_dict(c.model)
        optimizer.load_state_dict(c.optimizer)
        set_rng_state(c.rng)
        steps = range(c.step, 6)
    for step in steps:
        if step == 3 and not resume:
            save_checkpoint(directory, step, model=model.state_dict(), optimizer_shard=optimizer.state_dict(), meta={})
        optimizer.zero_grad()
        (model(torch.randn(5, 8)) * np.random.rand()).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def test_resumed_equals_uninterrupted(tmp_path):
    seed_everything(0)
    straight = train(tmp_path, resume=False)
    seed_everything(99)
    resumed = train(tmp_path, resume=True)
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)


def two_ranks(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    here = f"{out}/run"
    kwargs = {"rank": rank, "world_size": 2}
    save(here, 10, optimizer_shard={"mine": torch.tensor(rank)}, loader={"rank": rank}, **kwargs)
    c = load_checkpoint(here, **kwargs)
    assert c.step == 10 and c.optimizer["mine"] == rank and c.loader == {"rank": rank}
    with pytest.MonkeyPatch.context() as m, pytest.raises(UserError, match="step 20.*No space left"):
        if rank == 1:  # one rank's full disk stops all of them, with the same words
            m.setattr(os, "fsync", full_disk)
        save(here, 20, **kwargs)
    assert load_checkpoint(here, **kwargs).step == 10
    with pytest.raises(UserError, match="never completed"):
        load_checkpoint(here, 20, **kwargs)
    dist.destroy_process_group()


def test_two_ranks(tmp_path):
    mp.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)
    assert [n for n in names(tmp_path / "run") if "20" in n] == []
    with pytest.raises(UserError, match=r"saved by 2 rank\(s\) and cannot resume on 1: run with 2"):
        load_checkpoint(tmp_path / "run")
    assert load_model_state(tmp_path / "run")[1]["step"] == 10
