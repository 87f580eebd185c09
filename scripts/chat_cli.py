"""Continue a text: `python -m scripts.chat_cli --checkpoint_dir=DIR --prompt="def main("`;
without --prompt, line after line.

    … --base=smollm2                       a pretrained base instead, by its chat template
    … --mc_enabled=1 --history=FILE        a conversation that never ends: reads a file of any
                                           length first, and forgets nothing

With MegaContext all prompts and answers are one history, and a status line follows each answer; without it every prompt
stands alone. Ctrl-C ends an answer, what there is of it being history; at the prompt, or
pressed again, it ends the command.
"""

import os
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from itertools import count
from pathlib import Path
from typing import BinaryIO

from nanochat.base import Base
from nanochat.base_tokenizer import BaseTokenizer
from nanochat.common import FlagParser, UserError, import_optional, init_distributed, parse_optional, run_main, shown
from nanochat.documents import decoded
from nanochat.engine import Engine, decode_stream
from nanochat.loading import add_model_flags, model_from_flags
from nanochat.streams import interrupt_noted
from nanochat.telemetry.opening import open_recorder
from nanochat.tokenizer import Tokenizer, cut


def typed_prompts() -> Iterator[str]:
    """Lines of stdin until its end or an empty line. UserError for one that is no text in stdin's encoding."""
    for number in count(1):
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield checked(line, f"line {number} of standard input", sys.stdin.encoding)


def checked(text: str, what: str, encoding: str = "UTF-8") -> str:
    """A text from outside; UserError where bytes of it could not be decoded."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{what} is not {encoding} text (byte 0x{ord(text[e.start]) & 0xff:02x} after {e.start} "
                        "characters); convert it") from None
    return text


def make_parser(with_mc: bool = True) -> FlagParser:
    parser = FlagParser(prog="python -m scripts.chat_cli", description=__doc__.split("\n\n")[0])
    add_model_flags(parser, pretrained=True)
    parser.add_argument("--prompt", help="text to continue; without it, each line of stdin, until an empty one")
    parser.add_argument("--max_tokens", type=int, default=128, help="tokens to generate per prompt")
    parser.add_argument("--temperature", type=float, default=0.8,
                        help="0 takes the likeliest token; 1 draws as the model predicts")
    parser.add_argument("--top_k", type=int, default=50, help="draw from the k likeliest tokens; 0: from all")
    parser.add_seed("the draws")
    parser.add_switch("--mc_enabled", False, "1: a session with MegaContext, whose context never ends")
    parser.add_argument("--history", type=Path,
                        help="text file of any length that is read before the first prompt (needs --mc_enabled=1)")
    if with_mc:
        parser.add_argument("--mc_tree", choices=("ram", "disk"), default="ram",
                            help="where the history is kept: gone at the end, or in --mc_store")
        parser.add_argument("--mc_store", type=Path, help="folder of --mc_tree=disk; a history that is there goes on")
        parser.add_argument("--log_dir", type=Path,
                            help="folder of metrics.jsonl; by OTLP too, where OTEL_EXPORTER_OTLP_ENDPOINT is set")
        parser.add_switch("--mc_explain", False, "1: after each answer, what the working context shows and why")
        import_optional("mc", "session.config").add_flags(parser)
    return parser


def open_text(path: Path, prompted: bool) -> BinaryIO:
    """The file of --history at its beginning, all of it seen to be text. What can be read only once, a
    pipe, is kept in a file meanwhile.

    prompted: a prompt is given, none is to come from stdin.
    """
    try:
        if not prompted and os.path.samestat(os.stat(path), os.fstat(0)):
            raise UserError(f"--history={shown(path)} takes all of standard input, from where the prompts would come: "
                            "give one with --prompt")
        f = open(path, "rb")
        if not f.seekable():
            pipe, f = f, tempfile.TemporaryFile()
            shutil.copyfileobj(pipe, f)
            f.seek(0)
    except OSError as e:
        raise UserError(f"cannot read --history={shown(path)}: {e.strerror}") from None
    for _ in history_pieces(f, path):
        pass
    f.seek(0)
    return f


def history_pieces(f: BinaryIO, path: Path) -> Iterator[str]:
    """Its text, cut where its tokens are those of the whole."""
    return cut(decoded(f, f"--history={shown(path)}"))


def say(prompt: str, answer: Iterable[str]) -> None:
    """Print a prompt and its answer as it comes."""
    print(prompt, end="", flush=True)
    for piece in answer:
        print(piece, end="", flush=True)
    print(flush=True)


def go_on(args: Namespace, interrupted: Callable[[], bool]) -> None:
    """After Ctrl-C in an answer there is a next prompt only where somebody types it."""
    if interrupted() and (args.prompt is not None or not sys.stdin.isatty()):
        raise KeyboardInterrupt


def until(interrupted: Callable[[], bool], items: Iterable) -> Iterator:
    """Items up to the one during which Ctrl-C came."""
    for item in items:
        yield item
        if interrupted():
            return


def chat_plain(args: Namespace, prompts: Iterator[str], model: Base, tokenizer: Tokenizer | BaseTokenizer) -> None:
    engine = Engine(model, tokenizer)
    for prompt in prompts:
        length = len(tokenizer.prompt_ids(prompt))
        if length + args.max_tokens > engine.reach:
            print(f"note: {length} prompt tokens and {args.max_tokens} new ones exceed the model's window of "
                  f"{engine.reach}: "
                  "it no longer sees the beginning; --mc_enabled=1 does", file=sys.stderr, flush=True)
        with interrupt_noted() as interrupted:
            answer = engine.complete(prompt, args.max_tokens, temperature=args.temperature, top_k=args.top_k or None,
                                     seed=args.seed)
            # an answer begins its own line, a continuation goes on
            say(prompt + "\n" if tokenizer.chats else prompt, until(interrupted, answer))
        go_on(args, interrupted)


def chat_mc(args: Namespace, prompts: Iterator[str], model: Base, tokenizer: Tokenizer, meta: dict) -> None:
    if not meta.get("mc"):
        raise UserError("--mc_enabled=1 needs a checkpoint that was trained with --mc_enabled=1")
    sessions = import_optional("mc", "session.session")
    text = open_text(args.history, args.prompt is not None) if args.history else None
    recorder = open_recorder(args.log_dir, config=vars(args), total_steps=0,
                             labels={"mc.stage": "session", "mc.variant": "mc"}) if args.log_dir else None
    with text or nullcontext(), recorder or nullcontext():
        pool = sessions.open_pool(model, meta, args.checkpoint_dir,
                                  import_optional("mc", "session.config").from_flags(args), recorder=recorder)
        if pool.untrained:
            print(f"note: gists of LOD {', '.join(map(str, pool.untrained))} were not trained "
                  f"(--mc_untrained={args.mc_untrained})", file=sys.stderr, flush=True)
        history, catalog = import_optional("mc", "store.catalog").open_history(model, pool.mc, args.mc_tree,
                                                                               args.mc_store)
        for note in catalog.notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
        with catalog, closing(history.store):
            session = pool.open(history.store, seed=args.seed, catalog=catalog)
            try:
                converse(args, prompts, session, tokenizer, text)
            finally:
                # a second one may come in the middle of a step; at a prompt nothing waits
                if not isinstance(sys.exception(), KeyboardInterrupt):
                    session.flush()


def converse(args: Namespace, prompts: Iterator[str], session, tokenizer: Tokenizer, text: BinaryIO | None) -> None:
    def begin_source(uri: str) -> None:
        if session.n_tokens:
            session.end_source()
        session.catalog.add_source(uri, session.n_tokens)
        session.append([tokenizer.bos_id])

    if text:
        begin_source(shown(args.history))
        begin = told = time.monotonic()
        before = session.n_tokens
        with interrupt_noted() as interrupted:
            for piece in until(interrupted, history_pieces(text, args.history)):
                session.append(tokenizer.encode(piece))
                if (now := time.monotonic()) - told > 5:
                    told = now
                    print(f"read {session.n_tokens - before:,} tokens, "
                          f"{(session.n_tokens - before) / (now - begin):,.0f} tokens/s", file=sys.stderr, flush=True)
        print(f"read {session.n_tokens - before:,} tokens of {args.history} in {time.monotonic() - begin:.1f} s",
              file=sys.stderr, flush=True)
        if interrupted():
            raise KeyboardInterrupt
    else:
        begin_source("chat")
    for prompt in prompts:
        with interrupt_noted() as interrupted:
            session.append(tokenizer.encode(prompt))
            begin, before = time.monotonic(), session.n_tokens
            tokens = session.generate(args.max_tokens, temperature=args.temperature, top_k=args.top_k or None,
                                      stop_ids=[tokenizer.bos_id])
            say(prompt,
                decode_stream(tokenizer, (token for token in until(interrupted, tokens) if token != tokenizer.bos_id)))
            seconds = time.monotonic() - begin
            session.flush()
        print(status_line(session.status(), (session.n_tokens - before) / seconds), file=sys.stderr, flush=True)
        if args.mc_explain:
            for line in session.explain():
                score = "" if line.score is None else f"{line.score:+.2f}"
                level = "left out" if line.lod is None else f"LOD{line.lod}"
                print(f"  {line.start:>10,} + {line.tokens:<8,} {level:<8} {line.entries:>4} entries {score:>6}  "
                      f"{line.why}", file=sys.stderr)
        go_on(args, interrupted)


def status_line(status, rate: float) -> str:
    entries = ", ".join(f"{count} LOD{lod}" for lod, count in status.entries_by_lod.items())
    edits, omitted = status.last_edits, f" | {status.omitted_tokens:,} tokens left out" if status.omitted_tokens else ""
    return (f"[history {status.history_tokens:,} tokens | entries {sum(status.entries_by_lod.values())}: "
            f"{entries}{omitted} | last refocus at {status.refocused_at:,}: "
            f"{edits.expands} expanded, {edits.collapses} collapsed, {edits.forced} forced | {rate:,.0f} tokens/s]")


def main() -> None:
    parser, args = parse_optional(make_parser, "mc")
    if args.history and not args.mc_enabled:
        parser.error(f"--history={args.history}: a history of any length needs --mc_enabled=1")
    ranks = init_distributed(args.device)
    model, tokenizer, meta = model_from_flags(args, ranks.device)
    prompts = typed_prompts() if args.prompt is None else iter([checked(args.prompt, "--prompt",
                                                                        sys.getfilesystemencoding())])
    if args.mc_enabled:
        chat_mc(args, prompts, model, tokenizer, meta)
    else:
        chat_plain(args, prompts, model, tokenizer)


if __name__ == "__main__":
    run_main(main)
