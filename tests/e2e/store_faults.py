"""What the crash tests share: a script of random changes that a store and a plain model follow alike,
and a medium that loses power."""

import random
import shutil
from pathlib import Path

import torch

from mc.store.disk.files import FileSystem
from mc.store.ram import DROPPED, ERASED, KEPT, VOID, StoreFormat

K, D, P, C, LODS = 4, 4, 1, 2, 3
FORMAT = StoreFormat(K, D, P, C, torch.float64)
MIX = torch.tensor([[3, 5, 7, 11], [13, 17, 19, 23], [29, 31, 37, 41], [43, 47, 53, 59]], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Nodes, a script of changes, and what must come of it


def nodes_of(children_NKx: torch.Tensor, lod: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gists [N, D] and keys [N, P, C] that depend on every child: whole numbers, so that equal means equal."""
    x_NK = children_NKx.double() if lod == 1 else children_NKx.sum(-1)
    gists_ND = (x_NK @ MIX + lod) % 65521
    return gists_ND, gists_ND[:, None, :C].clone() if lod == 1 else None


def nodes_in(store, lod: int, index_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `mc.store.history.History.nodes`."""
    child_NK = index_N[:, None] * K + torch.arange(K)
    below = store.tokens(child_NK.flatten()) if lod == 1 else store.gists(lod - 1, child_NK.flatten())
    return nodes_of(below.unflatten(0, child_NK.shape), lod)


def grow(store) -> None:
    for lod in range(1, LODS + 1):
        start, end = store.n_nodes(lod), store.n_tokens // K**lod
        if start < end:
            store.append_nodes(lod, *nodes_in(store, lod, torch.arange(start, end)))


class Model:
    """The tokens, those given up included, and the state of each block. Its gists are rebuilt from them."""

    def __init__(self, tokens=(), states=()):
        self.tokens, self.states = list(tokens), list(states)

    def copy(self) -> "Model":
        return Model(self.tokens, self.states)

    def differs(self, store) -> str | None:
        """Where a store is not what a rebuild of these tokens is."""
        n, K_states = len(self.tokens), torch.tensor(self.states, dtype=torch.uint8)
        if store.n_tokens != n:
            return f"{store.n_tokens} tokens, {n} expected"
        if not torch.equal(store.detail(torch.arange(len(self.states))), K_states):
            return "states of blocks differ"
        level = torch.tensor(self.tokens, dtype=torch.int64)
        shown = level.clone()
        shown[:len(self.states) * K].view(-1, K)[K_states == ERASED] = VOID
        if n and not torch.equal(store.tokens(torch.arange(n)), shown):
            return "tokens differ"
        for lod in range(1, LODS + 1):
            count = n // K**lod
            if store.n_nodes(lod) != count:
                return f"{store.n_nodes(lod)} nodes of LOD{lod}, {count} expected"
            if not count:
                return None
            level, keys = nodes_of(level[:count * K].unflatten(0, (count, K)), lod)
            if not torch.equal(store.gists(lod, torch.arange(count)), level):
                return f"gists of LOD{lod} differ"
            if keys is not None and not torch.equal(store.keys(torch.arange(count)), keys):
                return "keys differ"
        return None


class Script:
    """Transactions drawn from a seed, on a model, and on a store where one is given. `kinds`:
    append, edit, cut, prune, compact."""

    WEIGHTS = {"append": 12, "edit": 2, "cut": 1, "prune": 1, "compact": 1}

    def __init__(self, seed: int, model: Model, weights: dict[str, int] = WEIGHTS, largest: int = 60):
        self.random, self.model, self.weights, self.largest = random.Random(seed), model, weights, largest

    def ids(self, count: int) -> list[int]:
        return [self.random.randrange(2**31) for _ in range(count)]

    def step(self, store=None) -> None:
        """One transaction; the caller commits."""
        kind = self.random.choices(list(self.weights), list(self.weights.values()))[0]
        getattr(self, f"_{kind}")(store)

    def _append(self, store, n_pieces: int | None = None) -> None:
        for _ in range(n_pieces or self.random.randint(1, 3)):
            ids = self.ids(self.random.randint(1, self.largest))
            self.model.tokens += ids
            self.model.states += [KEPT] * (len(self.model.tokens) // K - len(self.model.states))
            if store:
                store.append_tokens(torch.tensor(ids))
                grow(store)

    def _edit(self, store) -> None:
        m = self.model
        start = self.random.randrange(len(m.tokens) + 1)
        count = min(self.random.randint(1, 30), len(m.tokens) - start)
        if not count or ERASED in m.states[start // K:-(-(start + count) // K)]:
            return self._append(store)
        ids = self.ids(count)
        m.tokens[start:start + count] = ids
        if store:
            store.rewrite_tokens(start, torch.tensor(ids))
            for lod in range(1, LODS + 1):
                first, end = start // K**lod, min((start + count - 1) // K**lod + 1, store.n_nodes(lod))
                if first < end:
                    store.rewrite_nodes(lod, first, *nodes_in(store, lod, torch.arange(first, end)))

    def _cut(self, store) -> None:
        m = self.model
        keep = self.random.randrange(len(m.tokens) + 1)
        if keep % K and keep // K < len(m.states) and m.states[keep // K] == ERASED:
            keep -= keep % K
        del m.tokens[keep:], m.states[keep // K:]
        if store:
            store.truncate(0, keep)
        self._append(store, 1)

    def _prune(self, store) -> None:
        m = self.model
        blocks = [b for b, state in enumerate(m.states) if state != ERASED and self.random.random() < 0.2]
        states = [self.random.choice([DROPPED, KEPT]) for _ in blocks]
        for block, state in zip(blocks, states):
            m.states[block] = state
        if store:
            store.set_detail(torch.tensor(blocks, dtype=torch.int64), torch.tensor(states, dtype=torch.uint8))

    def _compact(self, store) -> None:
        self.model.states = [ERASED if state else KEPT for state in self.model.states]
        if store:
            store.compact()


# ---------------------------------------------------------------------------------------------------------------------
# A medium that loses power


class PowerCut(BaseException):
    pass


class _Inode:
    """A file's content on the medium, and the writes that no fsync has made safe."""

    def __init__(self):
        self.safe, self.pending = b"", []  # of ("write", offset, data) and ("size", bytes)

    def sync(self) -> None:
        self.safe, self.pending = _applied(self.safe, self.pending), []


def _applied(content: bytes, operations: list[tuple]) -> bytes:
    data = bytearray(content)
    for kind, at, *rest in operations:
        if kind == "size":
            data[at:] = bytes(max(at - len(data), 0))
        else:
            data.extend(bytes(max(at - len(data), 0)))
            data[at:at + len(rest[0])] = rest[0]
    return bytes(data)


class FailingPower(FileSystem):
    """The file system of this machine, and a record of what a power cut at any moment may leave.

    cut_at: the change of the medium at which the power fails. forget: an fsync, by what it is for, that is left out.
    Un-fsynced writes are kept or lost one by one, or torn at a sector; un-fsynced names (create, rename, unlink, link,
    mkdir) too, in the order of their folder.
    """

    def __init__(self, root: Path, cut_at: int | None = None, forget: str | None = None):
        self.root, self.cut_at, self.forget = root, cut_at, forget
        self.changes = 0
        self.now: dict[Path, _Inode | None] = {root: None}  # None: a folder
        self.safe: dict[Path, _Inode | None] = {root: None}
        self.names: dict[Path, list[dict]] = {}  # folder -> changes of its names, each {path: inode, or "gone"}
        self.fds: dict[int, _Inode] = {}

    def _change(self) -> None:
        if self.cut_at is not None and self.changes >= self.cut_at:
            raise PowerCut
        self.changes += 1

    def _name(self, folder: Path, change: dict) -> None:
        self.names.setdefault(folder, []).append(change)
        self.now = _renamed(self.now, change)

    def create(self, path):
        self._change()
        fd = super().create(path)
        inode = self.now.get(path)
        if inode is None:
            inode = _Inode()
            self._name(path.parent, {path: inode})
        else:
            inode.pending.append(("size", 0))
        self.fds[fd] = inode
        return fd

    def open(self, path):
        fd = super().open(path)
        self.fds[fd] = self.now[path]
        return fd

    def write(self, fd, data, offset):
        self._change()
        super().write(fd, data, offset)
        self.fds[fd].pending.append(("write", offset, bytes(memoryview(data).cast("B"))))

    def truncate(self, fd, size):
        self._change()
        super().truncate(fd, size)
        self.fds[fd].pending.append(("size", size))

    def fsync(self, fd, what):
        self._change()
        if what != self.forget:
            self.fds[fd].sync()

    def fsync_folder(self, folder, what):
        self._change()
        if what != self.forget:
            for change in self.names.pop(folder, []):
                self.safe = _renamed(self.safe, change)

    def mkdir(self, path):
        self._change()
        super().mkdir(path)
        self._name(path.parent, {path: None})

    def rename(self, path, target):
        self._change()
        super().rename(path, target)
        self._name(path.parent, {target: self.now[path], path: "gone"})

    def link(self, path, target):
        self._change()
        super().link(path, target)
        self._name(target.parent, {target: self.now[path]})

    def unlink(self, path):
        self._change()
        super().unlink(path)
        if path in self.now:
            self._name(path.parent, {path: "gone"})

    def image(self, target: Path, rng: random.Random) -> None:
        """Write to another folder what the medium may hold now."""
        names = dict(self.safe)
        keep = rng.choice([0.0, 0.3, 0.7, 1.0])
        for changes in self.names.values():
            for change in changes[:sum(rng.random() < keep for _ in changes)]:
                names = _renamed(names, change)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for path, inode in sorted(names.items()):
            place = target / path.relative_to(self.root)
            if path == self.root or path.parent not in names or names[path.parent] is not None:
                continue
            if inode is None:
                place.mkdir()
            elif place.parent.is_dir():
                place.write_bytes(_applied(inode.safe, _survivors(inode.pending, keep, rng)))


def _renamed(names: dict, change: dict) -> dict:
    names = {**names, **change}
    return {path: inode for path, inode in names.items() if inode != "gone"}


def _survivors(operations: list[tuple], keep: float, rng: random.Random) -> list[tuple]:
    """Those that reached the medium, some in part: up to a sector, or from one on."""
    left = []
    for operation in operations:
        if rng.random() >= keep:
            continue
        if operation[0] == "write" and rng.random() < 0.2:
            _, at, data = operation
            sectors = [s - at for s in range((at // 512 + 1) * 512, at + len(data), 512)]
            cut = rng.choice([0, *sectors])
            operation = ("write", at, data[:cut]) if rng.random() < 0.5 else ("write", at + cut, data[cut:])
        left.append(operation)
    return left
