"""A history on disk survives: a killed writer, damage anywhere, a power cut at any moment, readers at any moment.

`STORE_CRASHES=1000` runs each test that many times (a small share of it by default),
`STORE_SECONDS=60` is for the readers.
"""

import os
import random
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from store_faults import FORMAT, LODS, FailingPower, K, Model, PowerCut, Script, nodes_in, nodes_of

import mc
from mc.store.disk.files import HEADER_BYTES, partition_files
from mc.store.disk.store import DiskStore
from mc.store.ram import ERASED
from nanochat.common import UserError

CRASHES = int(os.environ.get("STORE_CRASHES", 0))
SECONDS = float(os.environ.get("STORE_SECONDS", 3))
SOURCES = "".join(path.read_text() for path in sorted((Path(mc.__file__).parent / "store" / "disk").glob("*.py")))
FSYNCS = sorted(set(re.findall(r'fsync(?:_folder)?\([^"\n]*"([^"]+)"\)', SOURCES)))  # every call, by what it is for


@pytest.fixture
def folder():
    """In memory where possible: what is tested is what the store does, not the disk."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield path
    shutil.rmtree(path)


def forked(work) -> int:
    """A process that does work() and ends; its id."""
    if pid := os.fork():
        return pid
    try:
        torch.set_num_threads(1)
        work()
    except BaseException as e:
        os.write(2, f"{type(e).__name__}: {e}\n".encode())
        os._exit(1)
    os._exit(0)


# ---------------------------------------------------------------------------------------------------------------------
# Killed


@pytest.mark.parametrize("durability", ["block", "batch", "none"])
def test_a_killed_writer_loses_nothing_acknowledged(folder, durability):
    """SIGKILL at random moments: the store is as some commit left it, at or after the last
    acknowledged one, and equals a rebuild."""
    rng, kills, acknowledged, dropped = random.Random(1), CRASHES or 25, 0, 0
    path, model = folder / "store", Model()
    DiskStore.create(path, FORMAT, partition_bytes=256, durability=durability).close()
    for kill in range(kills):
        read, write = os.pipe()

        def work():
            store, script = DiskStore.open(path, durability=durability), Script(kill, model)
            os.write(write, b"o")
            while True:
                script.step(store)
                store.commit()
                os.write(write, b"c")

        pid = forked(work)
        os.close(write)
        assert os.read(read, 1) == b"o"
        commits = 0
        while commits < kill % 4:  # on a busy machine too
            commits += len(os.read(read, 4096))
        time.sleep(rng.expovariate(1 / 0.01))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        while piece := os.read(read, 4096):
            commits += len(piece)
        os.close(read)
        script = Script(kill, model)
        for _ in range(commits):
            script.step()
        acknowledged += commits
        with DiskStore.open(path, durability=durability) as store:
            dropped += bool(store.dropped)
            if script.model.differs(store):  # the commit after the last acknowledged one may have happened
                before = script.model.copy()
                script.step()
                assert script.model.differs(store) is None, (kill, before.differs(store), script.model.differs(store))
            assert store.verify() == []
        model = script.model
        if len(model.tokens) > 20_000:
            shutil.rmtree(path)
            model = Model()
            DiskStore.create(path, FORMAT, partition_bytes=256, durability=durability).close()
    print(f"{kills} kills, {acknowledged} commits acknowledged, {dropped} reopenings dropped a tail")
    assert acknowledged > kills


# ---------------------------------------------------------------------------------------------------------------------
# Damaged


CHANGES = {"append": 8, "edit": 2, "cut": 1, "prune": 1}


def some_store(path: Path, seed: int, steps: int = 12) -> Model:
    """A closed store after some commits."""
    model = Model()
    script = Script(seed, model, CHANGES, largest=120)
    with DiskStore.create(path, FORMAT, partition_bytes=256) as store:
        for _ in range(steps):
            script.step(store)
            store.commit()
    return model


def scribble(path: Path, start: int, end: int, rng: random.Random) -> str:
    """Damage bytes [start, end) of a file: flipped bits, overwritten bytes, or the file cut off there."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(start, end)
    kind = rng.choice(["bit", "bytes", "cut"])
    if kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        stop = min(at + rng.randint(1, 64), end)
        data[at:stop] = bytes(b ^ rng.randrange(1, 256) for b in data[at:stop])
    else:
        del data[at:]
    path.write_bytes(data)
    return kind


def test_damage_beyond_the_last_commit_is_dropped(folder):
    """Partial records, garbage, half-written slots: the store is as committed, and says what it dropped."""
    rng, said = random.Random(2), 0
    for trial in range(CRASHES or 30):
        path = folder / "store"
        model = some_store(path, trial % 7)
        committed = {p: p.stat().st_size for p in partition_files(path)}
        store = DiskStore.open(path)
        Script(trial, model.copy(), CHANGES).step(store)
        store._let_go()  # as a killed process leaves it
        for file in partition_files(path):
            size, first = file.stat().st_size, committed.get(file, 0)
            if rng.random() < 0.3:
                file.write_bytes(file.read_bytes() + rng.randbytes(rng.randint(1, 90)))
            elif size > first and rng.random() < 0.7:
                scribble(file, first, size, rng)
        if rng.random() < 0.3:
            (path / "L1" / f"{rng.randrange(900, 999):06d}.v0000.ctx").write_bytes(rng.randbytes(rng.randrange(300)))
        if rng.random() < 0.3:  # the next commit was being written
            with open(path / "manifest", "r+b") as f:
                f.seek(4096 * rng.randrange(2))
                f.write(rng.randbytes(rng.randint(1, 4096)))
        with DiskStore.open(path) as store:
            assert model.differs(store) is None
            assert store.verify() == []
            said += bool(store.repairs)
        with DiskStore.open(path) as store:
            assert not store.repairs, "repaired once and for all"
        shutil.rmtree(path)
    assert said > trial // 2


def test_damage_before_the_last_commit_is_found_and_mended(folder):
    """Named to the partition; gists and keys are made again from the tokens, damaged tokens are named and left."""
    rng, found = random.Random(3), {"L0": 0, "gists": 0, "notes": 0}
    for trial in range(CRASHES or 30):
        path = folder / "store"
        model = some_store(path, trial % 7)
        with DiskStore.open(path, "r") as store:
            ends = {}
            for level in store.levels.values():
                for p in range(len(level.versions)):
                    ends[level.path(p)] = (level.kind.name, p, HEADER_BYTES + level.count(p) * level.bytes,
                                           level.count(p) == level.R)
        hurt = set()
        for file in rng.sample(sorted(ends), min(rng.choice([0, 1, 1, 3]), len(ends))):
            name, p, end, full = ends[file]
            if rng.random() < 0.1:
                file.unlink()
            elif full or rng.random() < 0.7:
                scribble(file, HEADER_BYTES if not full else 0, end, rng)
            else:
                scribble(file, 0, 56, rng)
            hurt.add((name, p))
        if rng.random() < 0.3:
            found["notes"] += 1
            note = path / "manifest" if rng.random() < 0.5 else rng.choice(sorted(path.glob("versions/*.ctx")))
            half, data = note.stat().st_size // 2, bytearray(note.read_bytes())
            at = rng.randrange(2) * half
            length = data[at:half + at].rstrip(b"\0")
            data[at + rng.randrange(len(length))] ^= 1 << rng.randrange(8)
            note.write_bytes(data)
        try:
            DiskStore.open(path).close()
        except UserError as e:
            assert hurt and "damaged" in str(e)
        with DiskStore.open(path, check=False) as store:
            damage = store.verify()
            assert {(d.level, d.partition) for d in damage} == hurt
            for d in damage:
                R = store.levels[d.level].R
                assert (d.start, d.end) == (d.partition * R, min((d.partition + 1) * R, store.n_records(d.level)))
                assert d.first_token == d.start * K ** int(d.level[1:])
            left = store.repair(lambda lod, index_N: nodes_in(store, lod, index_N))
            found["L0"] += sum(d.level == "L0" for d in damage)
            found["gists"] += len(damage) - len(left)
            tokens = [d for d in damage if d.level == "L0"]
            assert [d for d in left if d.level == "L0"] == tokens, "damaged tokens stay named"
            for d in left:
                assert d.level == "L0" or any(t.first_token < d.last_token and d.first_token < t.last_token
                                              for t in tokens) or \
                    d.level == "L1" or ERASED in model.states or any(e.level < d.level for e in left)
            assert store.verify() == [d for d in store.verify()
                                      if (d.level, d.partition) in {(e.level, e.partition) for e in left}]
            if not left:
                assert model.differs(store) is None
        if not hurt:
            with DiskStore.open(path) as store:
                assert model.differs(store) is None and not store.repairs
        shutil.rmtree(path)
    print(f"{CRASHES or 30} damaged stores: {found}")
    assert all(found.values()), found


# ---------------------------------------------------------------------------------------------------------------------
# Out of power


def run_until_cut(live: Path, seed: int, cut_at: int, forget: str | None, durability: str):
    """A store made and changed until the power fails. The medium, what each commit left, and the
    number of the last promised one.

    Number 0 is the empty store; −1: not even its making was acknowledged.
    """
    fs, store = FailingPower(live, cut_at, forget), None
    weights = {"append": 8, "edit": 2, "cut": 1, "prune": 2, "compact": 2} if seed % 2 else {"append": 2, "prune": 2}
    ahead, script = (Script(seed, Model(), weights, largest=40) for _ in range(2))
    models, promised = [Model()], -1
    try:
        store = DiskStore.create(live / "new" / "store", FORMAT, partition_bytes=128, durability=durability, fs=fs)
        promised = 0
        while True:
            if script.random.random() < 0.3:  # a process that dies in the middle of an append, and the next one
                store.append_tokens(torch.arange(30))
                store._let_go()
                store = None
                store = DiskStore.open(live / "new" / "store", durability=durability, fs=fs)
            ahead.random.setstate(script.random.getstate())
            ahead.step()
            models.append(ahead.model.copy())
            script.step(store)
            store.commit()
            if store._commits.last["durable"]:
                promised = len(models) - 1
    except PowerCut:
        if store:
            store._let_go()
    return fs, models, promised


def loss(path: Path, models: list[Model], promised: int) -> str | None:
    """What a store lost that was promised, or shows that never was."""
    try:
        store = DiskStore.open(path)
    except UserError as e:
        return str(e) if promised >= 0 else None
    with store:
        if all(model.differs(store) for model in models[max(promised, 0):]):
            return f"not as a commit left it: {models[promised].differs(store)}"
        if damage := store.verify():
            return str(damage[0])
        for version in store.versions()[:-1]:
            try:
                with DiskStore.open(path, "r", version=version) as older:
                    if all(model.differs(older) for model in models) or older.verify():
                        return f"version {version} is not as a commit left it"
            except UserError as e:
                return str(e)
    return None


def first_loss(folder: Path, trials: int, forget: str | None, durability: str) -> tuple[int, str | None]:
    """(number of the trial, what was lost) of power cuts at random moments; (trials, None) where nothing ever was."""
    rng, moments = random.Random(4), set()
    for trial in range(trials):
        live = folder / "live"
        live.mkdir()
        fs, models, promised = run_until_cut(live, trial // 4, int(rng.expovariate(1 / 100)), forget, durability)
        moments.add((trial // 4, fs.changes))
        for _ in range(3):
            fs.image(folder / "image", rng)
            if lost := loss(folder / "image" / "new" / "store", models, promised):
                shutil.rmtree(live)
                return trial, lost
        shutil.rmtree(live)
    assert len(moments) > trials // 2
    return trials, None


@pytest.mark.parametrize("durability", ["block", "batch", "none"])
def test_a_power_cut_loses_nothing_promised(folder, durability):
    """Un-fsynced writes and names are dropped, torn and reordered: what remains is a commit, no
    older than the last synced one."""
    assert first_loss(folder, CRASHES or 25, None, durability) == (CRASHES or 25, None)


@pytest.mark.parametrize("forget", FSYNCS)
def test_every_fsync_is_needed(folder, forget):
    """Without any one of them a power cut loses something, and the test above sees it."""
    for durability in ("batch", "block"):
        trial, lost = first_loss(folder, 300, forget, durability)
        if lost:
            break
    print(f"without the fsync of {forget}: trial {trial}, {durability}: {lost}")
    assert lost


def test_every_fsync_is_named():
    """The test above leaves out each call in the code: as many names as calls."""
    assert len(re.findall(r"\.fsync(?:_folder)?\(", SOURCES)) - SOURCES.count("os.fsync(") == len(FSYNCS) > 5


# ---------------------------------------------------------------------------------------------------------------------
# Read


def consistent(store: DiskStore) -> str | None:
    """Whether all nodes are those of the tokens, and as many as these complete."""
    below = store.tokens(torch.arange(store.n_tokens))
    for lod in range(1, LODS + 1):
        count = len(below) // K
        if store.n_nodes(lod) != count:
            return f"{store.n_nodes(lod)} nodes of LOD{lod} over {len(below)}"
        if not count:
            return None
        made, keys = nodes_of(below[:count * K].unflatten(0, (count, K)), lod)
        below = store.gists(lod, torch.arange(count))
        if not torch.equal(below, made) or (keys is not None and not torch.equal(store.keys(torch.arange(count)),
                                                                                 keys)):
            return f"nodes of LOD{lod} are not those of what is below them"
    return None


@pytest.mark.parametrize("durability", ["block", "batch"])
def test_readers_never_see_a_partial_block(folder, durability):
    """Two readers and one writer that appends, edits, cuts and compacts: whatever a reader sees is one whole commit."""
    path, end = folder / "store", time.monotonic() + SECONDS
    DiskStore.create(path, FORMAT, partition_bytes=512).close()
    read, write = os.pipe()

    def writing():
        with DiskStore.open(path, durability=durability) as store:
            script = Script(0, Model(), {"append": 12, "edit": 2, "cut": 1, "compact": 1}, largest=40)
            while time.monotonic() < end:
                script.step(store)
                store.commit()
            os.write(write, f"{store.sequence} commits\n".encode())

    def reading():
        checks, compacted, seen = 0, 0, set()
        with DiskStore.open(path, "r") as store:
            while time.monotonic() < end:
                try:
                    store.refresh()
                    fault = consistent(store)
                except UserError as e:
                    assert "compaction" in str(e), e
                    compacted += 1
                    continue
                assert not fault, f"commit {store.sequence}: {fault}"
                checks += 1
                seen.add(store.sequence)
        os.write(write, f"{checks} checks of {len(seen)} commits, {compacted} met a compaction\n".encode())
        assert len(seen) > 5

    pids = [forked(writing), forked(reading), forked(reading)]
    os.close(write)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    print(os.read(read, 4096).decode())
    os.close(read)
    assert statuses == [0, 0, 0]
