"""A history on disk: fill it, look at it, change it, give room back. Each command ends with one line of JSON."""

import json
import logging
import re
import resource
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from mc.store.catalog import Catalog, Source, measure_variance, open_history
from mc.store.disk.store import DURABILITY, DiskStore
from mc.store.edits import edit_source
from mc.store.export import export
from mc.store.history import History
from mc.store.ingest import Ingest, find_files, texts_of
from mc.store.networks import Networks, default_checkpoint, load_networks, untrained_networks
from mc.store.pruning import least_useful, prune, restore
from mc.store.ram import DROPPED, ERASED, VOID, Store
from mc.store.rebuild import regist
from mc.store.sensitivity import measure_sensitivity
from nanochat.common import FlagParser, UserError, init_distributed, run_main, shown, whole_characters, whole_number
from nanochat.dataset import Progress
from nanochat.documents import is_shard, read_text
from nanochat.outputs import output_folder
from nanochat.redact import scrubbed
from nanochat.tokenizer import Tokenizer

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int8")}


# --- what the commands share -----------------------------------------------------------------------------------------


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A function to be called with what is done, of `total`: a bar on a terminal, else a line every few seconds."""
    if not sys.stderr.isatty():
        yield Progress(what, total, unit).update
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bars, TextColumn, TimeRemainingColumn

    with Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        task = bars.add_task(what, total=total)
        yield lambda done: bars.update(task, completed=done)


def networks_of(args: Namespace) -> Networks:
    """Those of --checkpoint_dir, else those that made the store, else those of the quickstart or any
    checkpoint, else untrained ones."""
    device = init_distributed(args.device).device
    checkpoint, step = args.checkpoint_dir, args.step
    if not checkpoint and (args.store / "manifest").exists():
        with DiskStore.open(args.store, "r", check=False) as store, Catalog(args.store, store.format.block_size,
                                                                            read_only=True) as catalog:
            made = catalog.origins(store.format.model)
        if made and not made[-1]:
            return untrained_networks(device)
        if made:
            checkpoint, step = Path(str(made[-1].get("checkpoint_dir"))), str(made[-1].get("step"))
            if not checkpoint.is_dir():
                raise UserError(f"the history was made with {checkpoint}, which is gone; name a copy with "
                                "--checkpoint_dir, or regist it")
    checkpoint = checkpoint or default_checkpoint()
    return load_networks(checkpoint, step, device) if checkpoint else untrained_networks(device)


@contextmanager
def stored_history(args: Namespace, networks: Networks, **options) -> Iterator[tuple[History, Catalog]]:
    """The history of --store, open for writing."""
    history, catalog = open_history(networks.gpt, networks.mc, "disk", args.store, **options)
    for note in catalog.notes:
        print(f"note: {note}")
    with catalog, history.store:
        yield history, catalog


@contextmanager
def reading(args: Namespace) -> Iterator[tuple[DiskStore, Catalog]]:
    """The store of --store without networks, open for reading beside a writer."""
    with DiskStore.open(args.store, "r") as store, Catalog(args.store, store.format.block_size,
                                                           read_only=True) as catalog:
        yield store, catalog


@contextmanager
def writing(args: Namespace) -> Iterator[tuple[DiskStore, Catalog]]:
    """The store of --store without networks, open for writing."""
    with DiskStore.open(args.store) as store, Catalog(args.store, store.format.block_size) as catalog:
        for note in [*store.repairs, *catalog.reconcile(store)]:
            print(f"note: {note}")
        yield store, catalog


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def finish(**values) -> None:
    print(json.dumps(values))


# --- the commands ----------------------------------------------------------------------------------------------------


def ingest_command(args: Namespace) -> None:
    networks = networks_of(args)
    print(networks.description)
    begin = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as scratch,
        stored_history(args, networks, dtype=DTYPES.get(args.dtype), durability=args.durability) as (history, catalog),
    ):
        stdin = not args.paths or args.paths == [Path("-")]
        paths = [_spool_stdin(Path(scratch))] if stdin else args.paths
        name = scrubbed(shown(args.uri)) if stdin else ""
        if stdin and name != shown(args.uri):
            print(f"note: --uri holds a user, password or query, which are not recorded: the source is called {name}")
        files = find_files(paths)
        done, skipped, total = 0, 0, sum(path.stat().st_size for path in files)
        catalog.add_version(networks.fingerprint, networks.origin)
        with progress("ingest", total, "bytes") as update:
            work = Ingest(
                history,
                catalog,
                networks.tokenizer,
                kind=args.kind and shown(args.kind),
                retrieval_score=args.retrieval_score,
                progress=lambda within: update(done + within),
            )
            for path in files:
                found = False
                for text in texts_of(path, args.text_column, named=path in paths, name=name):
                    work.add(replace(text, uri=name) if stdin else text)
                    found = True
                if not found and not is_shard(path):
                    if path in paths:
                        raise UserError(f"{name or shown(path)} holds no text; leave it out")
                    skipped += 1
                done += path.stat().st_size
                update(done)
        report = work.finish()
        history.store.sync()
        seconds = time.perf_counter() - begin
        print(
            f"{report.sources} sources, {report.tokens:,} tokens in {seconds:.1f} s ({report.tokens / seconds:,.0f} "
            "tokens/s); "
            f"{report.known} were there already, {skipped} files without text passed over"
        )
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
        finish(**asdict(report), skipped=skipped, seconds=round(seconds, 3), slots=history.n_tokens,
               resident_bytes=resident)


def _spool_stdin(folder: Path) -> Path:
    """Standard input as a file: its hash must be known before it is ingested, whatever its size."""
    path = folder / "stdin"
    with open(path, "wb") as f:
        shutil.copyfileobj(sys.stdin.buffer, f)
    return path


def state(store: DiskStore, catalog: Catalog) -> dict:
    """What `info` and `verify` say."""
    f, K = store.format, store.format.block_size
    tokens, sources = catalog.totals(store)
    nodes = {name: store.n_records(name) for name in store.levels if name != "L0"}
    detail = store.detail(torch.arange(store.n_tokens // K))
    return dict(
        tokens=tokens,
        slots=store.n_tokens,
        nodes={name[1:]: n for name, n in nodes.items() if name[0] == "L"},
        sources=sources,
        bytes=store.disk_bytes(),
        dtype=str(f.dtype).removeprefix("torch."),
        block_size=K,
        d_model=f.d_model,
        n_keys=f.n_keys,
        key_dim=f.key_dim,
        model=f.model,
        version=store.version,
        versions=store.versions(),
        pruned=int((detail == DROPPED).sum()),
        erased=int((detail == ERASED).sum()),
    )


def print_summary(values: dict, catalog: Catalog) -> None:
    slots = max(values["slots"], 1)
    print(
        f"{values['tokens']:,} tokens of {values['sources']:,} sources in {values['slots']:,} slots "
        f"({values['tokens'] / slots:.1%} used), blocks of {values['block_size']}"
    )
    print(
        "nodes: "
        + ", ".join(f"LOD{lod} {count:,}" for lod, count in values["nodes"].items())
        + f"; vectors of {values['d_model']} as {values['dtype']}, "
        f"{values['n_keys']} keys of {values['key_dim']} per block"
    )
    print(
        f"{megabytes(values['bytes'])} on disk, {values['bytes'] / slots:.2f} bytes per slot; "
        f"version {values['version']}, readable: {values['versions']}"
    )
    made = [origin.get("checkpoint_dir", "untrained networks") for origin in catalog.origins(values["model"])]
    print(f"gists of model {values['model']}" + (f", {made[-1]}" if made else ""))
    if values["pruned"] or values["erased"]:
        print(f"without raw tokens: {values['pruned']:,} blocks pruned (restorable), {values['erased']:,} compacted away")  # noqa: E501


def info_command(args: Namespace) -> None:
    with reading(args) as (store, catalog):
        values = state(store, catalog)
        print_summary(values, catalog)
        finish(**values, ok=True, dropped={})


def verify_command(args: Namespace) -> None:
    if args.repair:
        networks = networks_of(args)
    with DiskStore.open(args.store, "rw", check=False) as store, Catalog(args.store,
                                                                         store.format.block_size) as catalog:
        notes = [*store.repairs, *catalog.check()]
        total = sum(level.n * level.bytes for level in store.levels.values())
        with progress("verify", total, "bytes") as update:
            damage = store.verify(lambda done, _: update(done))
        for fault in damage:
            print(f"damaged: {fault}")
        if args.repair and damage:
            history = History(networks.gpt, networks.mc, store)
            left = store.repair(history.nodes)
            print(
                f"repaired {len(damage) - len(left)} of {len(damage)} damaged partitions; "
                "what is left are tokens, or gists of damaged tokens"
            )
            damage = left
        if not any(fault.level == "L0" for fault in damage):
            notes += catalog.reconcile(store)
        for note in notes:
            print(f"note: {note}")
        values = state(store, catalog)
        print_summary(values, catalog)
        finish(**values, ok=not damage, dropped=store.dropped, damage=[asdict(fault) for fault in damage])
    if damage:
        sys.exit(1)


def query_command(args: Namespace) -> None:
    if args.measure:
        with stored_history(args, networks_of(args)) as (history, catalog):
            print(f"gist variance of {measure_variance(history, catalog)} nodes measured, sensitivity of "
                  f"{measure_sensitivity(history, catalog)} blocks")
    with reading(args) as (store, catalog):
        if args.top_nodes:
            nodes = catalog.statistics(limit=args.top_nodes)
            for node in nodes:
                print(
                    f"{'detail of block' if node.lod == 0 else f'gist LOD{node.lod}'} {node.index}: {node.accesses} "
                    "accesses, "
                    f"sensitivity {_number(node.sensitivity)} nats, variance {_number(node.variance)}"
                )
            return finish(nodes=[asdict(node) for node in nodes])
        if args.span:
            start, stop = _span(args.span, store.n_tokens)
            found = catalog.sources_in(start, stop, store)
        elif args.source is not None:
            found = [catalog.source(args.source)]
        else:
            found = catalog.sources(
                uri=args.uri and shown(args.uri),
                kind=args.kind and shown(args.kind),
                tag=args.tag and shown(args.tag),
                since=_time(args.since, "--since"),
                until=_time(args.until, "--until"),
                min_score=args.min_score,
                limit=args.limit,
            )
        for s in found:
            when = datetime.fromtimestamp(s.time).isoformat(" ", "seconds")
            print(
                f"{s.id:6d}  slots {s.start}–{s.start + s.tokens}  {s.tokens:9,d} tokens  {when}  {s.kind or '-'}  "
                f"{s.uri}"
                + ("" if s.complete else "  (growing, or cut off)")
                + (f"  ({s.edits} edits)" if s.edits else "")
            )
            for start, stop, tag in catalog.tags(s.id) if args.tag else []:
                print(f"        {tag}: tokens {start}–{stop}")
        if args.show_text:
            tokenizer = networks_of(args).tokenizer
            for s in found:
                print(f"--- {s.uri}\n{source_text(store, tokenizer, s)[0]}")
        finish(sources=[asdict(s) for s in found])


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.4g}"


def _span(text: str, n: int) -> tuple[int, int]:
    start, stop = (whole_number(part) for part in (text.partition(":")[::2]))
    if start is None or stop is None or not start < stop <= n:
        raise UserError(f"--span={text}: START:STOP in slots, 0 ≤ START < STOP ≤ {n}")
    return start, stop


def _time(text: str | None, flag: str) -> float | None:
    try:
        return None if text is None else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise UserError(f"{flag}={text}: a date like 2026-01-31, or 2026-01-31T12:00") from None


def source_text(store: Store, tokenizer: Tokenizer, source: Source) -> tuple[str, torch.Tensor]:
    """Text of a source without bos, and its ids."""
    ids_N = store.tokens(torch.arange(source.start, source.start + source.tokens))
    if gone := int((ids_N == VOID).sum()):
        raise UserError(f"{gone} tokens of source {source.id} were pruned and compacted away")
    return tokenizer.decode(ids_N[int((ids_N[:1] == tokenizer.bos_id).sum()) :].tolist()), ids_N


def edit_command(args: Namespace) -> None:
    networks = networks_of(args)
    if (args.find is None) == (args.start is None):
        raise UserError("say where: --find=TEXT, or --start=N with --remove=N, in tokens of the source")
    if args.text is not None and args.text_file is not None:
        raise UserError("--text and --text_file: give one of them")
    text = read_text(args.text_file) if args.text_file is not None else whole_characters(args.text or "")
    with stored_history(args, networks, durability=args.durability) as (history, catalog):
        source = catalog.source(args.source)
        if args.find is not None:
            start, removed, text = locate(history.store, networks.tokenizer, source, args.find, text)
        else:
            start, removed = args.start, args.remove
        report = edit_source(history, catalog, source.id, start, removed,
                             torch.tensor(networks.tokenizer.encode(text), dtype=torch.long))
        made = ", ".join(f"{count} of LOD{lod}" for lod, count in report.recomputed.items() if count) or "none"
        print(
            f"tokens {start}–{start + removed} replaced; nodes made: {made}; blocks moved: {report.moved}; "
            f"{report.record_bytes:,} bytes of records "
            f"in {report.seconds:.3f} s; the version before stays readable until compact"
        )
        finish(**asdict(report))


MOST_PLACES = 5  # that an error names


def find_places(data: bytes, wanted: bytes) -> list[int]:
    """Where `wanted` begins in `data`, overlapping occurrences too: `aa` is twice in `aaa`,
    and none of them is the one."""
    return [m.start() for m in re.finditer(b"(?=" + re.escape(wanted) + b")", data)] if wanted else []


def locate(store: Store, tokenizer: Tokenizer, source: Source, find: str, text: str) -> tuple[int, int, str]:
    """The tokens that hold a text that occurs once in a source, and what they become when it is
    replaced: start, how many, new text."""
    whole, ids_N = source_text(store, tokenizer, source)
    data, wanted = whole.encode(), whole_characters(find).encode()
    places = find_places(data, wanted)
    if len(places) != 1:
        lines = [data[:at].count(b"\n") + 1 for at in places[:MOST_PLACES]]
        seen = "; ".join(f"line {line}, byte {at}"
                         for line, at in zip(lines, places)) + "; …" * (len(places) > MOST_PLACES)
        raise UserError(f"--find={find!r} occurs {len(places)} times in source {source.id}{seen and f' ({seen})'}; "
                        "give a text that occurs once")
    ends = np.cumsum(tokenizer.token_bytes()[ids_N.numpy()])
    if ends[-1] != len(data):
        raise UserError(f"source {source.id} holds bytes that are no UTF-8; edit it with --start and --remove")
    at = places[0]
    first = int(np.searchsorted(ends, at, "right"))
    last = int(np.searchsorted(ends, at + len(wanted), "left"))
    while True:  # whole characters: neighbours whose bytes share one with a token are taken along
        begin, end = int(ends[first - 1]) if first else 0, int(ends[last])
        try:
            return first, last + 1 - first, data[begin:at].decode() + text + data[at + len(wanted) : end].decode()
        except UnicodeDecodeError:
            first, last = max(first - 1, 0), min(last + 1, len(ends) - 1)


def regist_command(args: Namespace) -> None:
    if not args.checkpoint_dir:
        raise UserError("regist with which networks? give --checkpoint_dir")
    networks, begin = networks_of(args), time.perf_counter()
    with DiskStore.open(args.store) as store, Catalog(args.store, store.format.block_size) as catalog:
        catalog.reconcile(store)
        with progress("regist", store.n_tokens, "slots") as update:
            resumed = regist(store, catalog, networks, dtype=DTYPES.get(args.dtype),
                             progress=lambda done, _: update(done))
        print(
            f"version {store.version}: gists of {networks.description}" + (f"; {resumed:,} slots had been done before"
                                                                           if resumed else "")
        )
        finish(
            version=store.version,
            model=store.format.model,
            slots=store.n_tokens,
            resumed=resumed,
            seconds=round(time.perf_counter() - begin, 3),
        )


def prune_command(args: Namespace) -> None:
    with writing(args) as (store, catalog):
        blocks_N = least_useful(store, catalog, share=args.share, max_utility=args.max_utility,
                                keep_last=args.keep_last, source=args.source)
        if not catalog.count("nodes"):
            print("note: no access was ever counted, so all blocks are worth the same: the oldest go first")
        if args.dry_run:
            print(f"would prune {len(blocks_N):,} blocks")
            return finish(blocks=len(blocks_N), dry_run=True)
        report = prune(store, catalog, blocks_N)
        print(
            f"pruned {report.blocks:,} blocks ({report.slots:,} slots); {report.detailed:,} keep their detail. "
            "`restore` undoes it, "
            "`compact` gives the room back for good"
        )
        finish(**asdict(report))


def restore_command(args: Namespace) -> None:
    with writing(args) as (store, catalog):
        report = restore(store, catalog, args.source)
        print(
            f"restored {report.blocks:,} blocks"
            + (f"; {report.erased:,} were compacted away and stay without detail" if report.erased else "")
        )
        finish(**asdict(report))


def compact_command(args: Namespace) -> None:
    with writing(args) as (store, catalog):
        given = store.compact()
        catalog.vacuum()
        print(f"{megabytes(given)} given back, {megabytes(store.disk_bytes())} on disk")
        finish(given_back=given, bytes=store.disk_bytes(), version=store.version)


def export_command(args: Namespace) -> None:
    with reading(args) as (store, catalog):
        output_folder(args.out)
        total = sum(level.n for name, level in store.levels.items() if name[0] == "L")
        with progress("export", total, "records") as update:
            files = export(store, catalog, args.out, args.format, update)
        size = sum(path.stat().st_size for path in files)
        print(f"{megabytes(size)} in {args.out}: {', '.join(path.name for path in files)}")
        finish(files=[str(path) for path in files], bytes=size)


# --- flags -----------------------------------------------------------------------------------------------------------

COMMANDS = {
    "ingest": (ingest_command,
               "add files, folders, parquet, jsonl or standard input; what is there already is passed over"),
    "info": (info_command, "what the store holds"),
    "verify": (verify_command, "read everything and compare checksums; exit code 1 where there is damage"),
    "query": (query_command, "where spans come from; sources by address, kind, tag, time; what is used most"),
    "edit": (edit_command, "replace, delete or insert tokens of a source"),
    "regist": (regist_command, "make all gists again with another checkpoint, and switch to them"),
    "prune": (prune_command, "give up the raw tokens of blocks that are of little use; their gists stay"),
    "restore": (restore_command, "undo prune, as far as compact has not made it final"),
    "compact": (compact_command, "give back the room of older versions and of pruned tokens"),
    "export": (export_command, "write Arrow files or a safetensors file for other tools"),
}


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python -m scripts.mc_store", description=__doc__)
    kinds = parser.add_subparsers(dest="command", required=True, parser_class=FlagParser, metavar="command")
    sub = {name: kinds.add_parser(name, help=about, description=about) for name, (_, about) in COMMANDS.items()}
    for p in sub.values():
        p.add_argument("--store", type=Path, required=True, help="folder of the store")
    for name in ("ingest", "verify", "query", "edit", "regist"):
        p = sub[name]
        p.add_checkpoint("of a run with --mc_enabled=1; default: what made the store, the quickstart's, or untrained "
                         "networks", required=False)
        p.add_step()
        p.add_device("where gists are made")
    p = sub["ingest"]
    p.add_argument("paths", type=Path, nargs="*", default=[], help="files and folders; none, or -: standard input")
    p.add_argument("--text_column", default="text", help="column of parquet and jsonl files that holds the text")
    p.add_argument("--uri", default="stdin",
                   help="what standard input is called; of an address without user, password and query")
    p.add_argument("--kind", help="kind of all these sources; default: code for .py, what the corpus says, or text")
    p.add_argument("--retrieval_score", type=float, help="score of the retriever that chose these sources")
    p.add_argument(
        "--dtype", choices=tuple(DTYPES),
        help="of gists and keys of a new store; default: the model's; int8 has one scale per vector"
    )
    for name in ("ingest", "edit"):
        sub[name].add_argument(
            "--durability",
            default="batch",
            choices=DURABILITY,
            help="what a power cut may take: nothing, the last 2 s, or all since the start",
        )
    sub["verify"].add_switch("--repair", False, "1: remake damaged gists and keys from what is below them")
    p = sub["query"]
    p.add_argument("--uri", help="sources whose address matches this pattern, * and ? as in a shell")
    p.add_argument("--kind", help="sources of this kind")
    p.add_argument("--tag", help="sources with this layout tag")
    p.add_argument("--since", help="added at this date or later, e.g. 2026-01-31 or 2026-01-31T12:00")
    p.add_argument("--until", help="added at this date or earlier")
    p.add_argument("--min_score", type=float, help="retrieval score at least this")
    p.add_argument("--limit", type=int, default=20, help="at most so many sources; -1: all")
    p.add_argument("--source", type=int, help="the source with this id")
    p.add_argument("--span", help="where these slots come from: START:STOP")
    p.add_switch("--show_text", False, "1: print the text of what was found")
    p.add_argument("--top_nodes", type=int, default=0, help="instead: the nodes shown most often, so many")
    p.add_switch(
        "--measure",
        False,
        "1: first measure, and keep, the gist variance of counted nodes and the ΔNLL sensitivity of counted blocks (as "
        "a writer)",
    )
    p = sub["edit"]
    p.add_argument("--source", type=int, required=True, help="id of the source, see query")
    p.add_argument("--find", help="replace this text, which occurs once in the source, and what shares a token with it")
    p.add_argument("--start", type=int, help="instead: first token, counted from the source's first")
    p.add_argument("--remove", type=int, default=0, help="with --start: how many tokens go; 0: insert only")
    p.add_argument("--text", help="what comes in their place; without it they are deleted")
    p.add_argument("--text_file", type=Path, help="instead: a UTF-8 file that holds it")
    sub["regist"].add_argument("--dtype", choices=tuple(DTYPES), help="of the new gists and keys; default: as they are")
    p = sub["prune"]
    p.add_argument("--share", type=float,
                   help="share of all blocks to be without raw tokens afterwards, 0 to 1; those of least utility")
    p.add_argument("--max_utility", type=float,
                   help="only blocks worth at most this: accesses × mean sensitivity [nats]")
    p.add_argument("--keep_last", type=int, default=0, help="tokens at the end that keep their detail")
    p.add_argument("--source", type=int, help="only blocks of this source")
    p.add_switch("--dry_run", False, "1: only say how many")
    sub["restore"].add_argument("--source", type=int, help="only blocks of this source")
    p = sub["export"]
    p.add_out("folder to write, not there yet or empty")
    p.add_argument("--format", default="arrow", choices=("arrow", "safetensors"),
                   help="Arrow IPC files, or one safetensors file")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    logging.getLogger("mc").addHandler(logging.NullHandler())  # what the store mends is printed as a note
    COMMANDS[args.command][0](args)


if __name__ == "__main__":
    run_main(main)
