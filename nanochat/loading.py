"""A model from a checkpoint directory, ours or karpathy/nanochat's, and the flags that name one."""

import pickle
import re
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch

from nanochat.base import Base
from nanochat.base_tokenizer import BaseTokenizer
from nanochat.checkpoint import load_model_state, load_weights, read_tensors
from nanochat.common import FlagParser, UserError, one_line, parse_json, whole_number
from nanochat.gpt import GPT, config_from_dict
from nanochat.tokenizer import Reserved, Tokenizer

Module = TypeVar("Module", bound=torch.nn.Module)


def load_model(checkpoint_dir: Path | str, step: int | str = "latest",
               device: torch.device | str = "cpu") -> tuple[GPT, dict]:
    """(model in evaluation mode, meta) of one step; the model is built from meta["model_config"] and loaded strictly.

    UserError when there is no intact step (`nanochat.checkpoint.find_step`) or weights and configuration disagree.
    """
    state, meta = load_model_state(checkpoint_dir, step, device)
    if not isinstance(meta.get("model_config"), dict):
        raise UserError(f"the checkpoint in {checkpoint_dir} names no model_config; a reference checkpoint? use "
                        "--nanochat_checkpoint")
    config, state = config_from_dict(meta["model_config"]), {str(name).removeprefix("_orig_mod."): t
                                                             for name, t in state.items()}
    where = f"{checkpoint_dir} do not fit its model_config"
    if config.n_layer > len(state):  # before a layer after the other is built
        raise UserError(f"weights in {where}: {len(state)} tensors, {config.n_layer} layers")
    return build(lambda: GPT(config), state, where, device, (config.padded_vocab * config.n_embd,)), meta


def build(make: Callable[[], Module], state: dict, where: str, device: torch.device | str,
          sizes: Iterable[int]) -> Module:
    """The module that `make` makes, with these weights, in evaluation mode. sizes: numbers of elements that it needs at
    least, which are compared with what is there before memory is taken. UserError where the weights are not its own."""
    elements = sum(x.numel() for x in state.values() if isinstance(x, torch.Tensor))
    if (most := max(sizes)) > elements:
        raise UserError(f"weights in {where}: {elements} numbers, where one part needs {most}")
    try:
        module = make().to(device)
    except (RuntimeError, OverflowError, ZeroDivisionError) as e:
        raise UserError(f"weights in {where}: {one_line(e, 400)}") from None
    load_weights(module, state, where)
    return module.eval()


def load_nanochat_dir(directory: Path | str, step: int | str = "latest") -> GPT:
    """A karpathy/nanochat checkpoint directory (`model_{step:06d}.pt`,
    `meta_{step:06d}.json`) as a float32 GPT on the CPU.

    UserError when files are missing or unreadable, or hold something else.
    """
    directory = Path(directory)
    steps = {int(m[1]) for p in directory.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)\.pt", p.name))}
    if not steps:
        raise UserError(f"no model_<step>.pt in {directory}")
    if step == "latest":
        step = max(steps)
    elif whole_number(str(step)) not in steps:
        raise UserError(f"no step {step} in {directory}; there: {', '.join(map(str, sorted(steps)))}")
    weights, meta = (directory / f"{kind}_{int(step):06d}.{ext}" for kind, ext in (("model", "pt"), ("meta", "json")))
    try:
        config = parse_json(meta.read_bytes())["model_config"]
        if not isinstance(config, dict):
            raise ValueError("model_config is no mapping")
    except OSError as e:
        raise UserError(f"cannot read {e.filename}: {e.strerror}") from None
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{weights.name} and {meta} are no nanochat checkpoint ({type(e).__name__}: {one_line(e)})") from None
    try:
        state = read_tensors(weights, "cpu")
    except UserError as e:
        raise UserError(f"no nanochat checkpoint: {e}") from None
    if "rope_fraction" in config:  # a field the reference does not know, and from_nanochat would not read
        raise UserError(f"{directory} holds a checkpoint of ours: use --checkpoint_dir")
    return GPT.from_nanochat(config, state)


def load_nanochat_tokenizer(path: Path | str) -> Tokenizer:
    """A reference `tokenizer.pkl` as our Tokenizer. Unpickling runs code of the file: for files you trust only.

    The reference's special tokens other than bos become reserved ids. UserError if it is not such a file.
    """
    try:
        with open(path, "rb") as f:
            encoding = pickle.load(f)
        ranks, specials = encoding._mergeable_ranks, encoding._special_tokens
        tokens = sorted(ranks, key=ranks.__getitem__)
        if specials["<|bos|>"] != len(tokens) or sorted(specials.values()) != list(range(len(tokens),
                                                                                         len(tokens) + len(specials))):
            raise ValueError("special ids do not follow the others, bos first")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, ValueError) as e:
        raise UserError(f"{path} is no pickled tokenizer of nanochat ({type(e).__name__}: {e})") from None
    return Tokenizer(tokens, encoding._pat_str, Reserved(keys=len(specials) - 1, aliases=0, values=0))


def add_model_flags(parser: FlagParser, pretrained: bool = False) -> None:
    """The flags that `model_from_flags` reads. pretrained: the command takes --base as well."""
    parser.add_checkpoint(required=False)
    parser.add_step()
    parser.add_argument("--nanochat_checkpoint", help="instead: checkpoint directory of karpathy/nanochat")
    parser.add_argument("--nanochat_tokenizer",
                        help="its tokenizer.pkl; loading it runs code of that file, so only if you trust it")
    if pretrained:
        parser.add_argument("--base", help="instead: a pretrained base: a Hugging Face directory, a GGUF file, a "
                                           "checkpoint folder of nanochat, or smollm2 (see scripts.get_base)")
        parser.add_argument("--base_dtype", default="float32", choices=("float32", "bfloat16"),
                            help="precision of a pretrained base")
    parser.add_device()


def model_from_flags(args: Namespace, device: torch.device) -> tuple[Base, Tokenizer | BaseTokenizer, dict]:
    """(model, its tokenizer, meta); UserError unless exactly one checkpoint is named and the vocabularies agree."""
    named = {name: getattr(args, name, None) for name in ("checkpoint_dir", "nanochat_checkpoint", "base")}
    if sum(x is not None for x in named.values()) != 1:
        raise UserError("name one checkpoint: --checkpoint_dir=DIR or --nanochat_checkpoint=DIR"
                        + (" or --base=…" if hasattr(args, "base") else ""))
    if args.nanochat_tokenizer and args.checkpoint_dir:
        raise UserError("--nanochat_tokenizer goes with --nanochat_checkpoint only")
    if named["base"] is not None:
        return load_base(args.base, args.base_dtype, device, args.nanochat_tokenizer)
    if args.nanochat_checkpoint:
        model, meta = load_nanochat_dir(args.nanochat_checkpoint, args.step).to(device), {}
    else:
        model, meta = load_model(args.checkpoint_dir, args.step, device)
    tokenizer = load_nanochat_tokenizer(args.nanochat_tokenizer) if args.nanochat_tokenizer else Tokenizer.load()
    check_vocabulary(model, tokenizer, meta)
    return model, tokenizer, meta


def load_base(name: str, dtype: str = "float32", device: torch.device | str = "cpu",
              nanochat_tokenizer: Path | str | None = None) -> tuple[Base, Tokenizer | BaseTokenizer, dict]:
    """(model in evaluation mode, its tokenizer, meta) of the base that `--base` names: a Hugging Face directory, a GGUF
    file, smollm2, or a checkpoint folder of nanochat, the reference's or ours, which goes with the tokenizer of the
    base directory (the reference's with nanochat_tokenizer, if given: `load_nanochat_tokenizer`). meta: of a checkpoint
    of ours, else empty. dtype: float32, or bfloat16 of a pretrained one.

    UserError, one line, for what is not there, damaged, incomplete or not supported.
    """
    from nanochat import pretrained  # and its libraries only where they are asked for

    path = pretrained.find_base(name)
    reference = not any(path.glob("complete_*.json")) and any(path.glob("model_*.pt"))
    if nanochat_tokenizer and not reference:
        raise UserError(f"--nanochat_tokenizer goes with a checkpoint of karpathy/nanochat, which {path} is not")
    if path.is_file() or (path / "config.json").exists():
        return *pretrained.load_pretrained(path, dtype, device), {}
    if dtype != "float32":
        raise UserError(f"--base_dtype={dtype}: {path} is a checkpoint of nanochat, which is loaded in float32")
    if reference:
        model, meta = load_nanochat_dir(path).to(device), {}
    elif any(path.glob("complete_*.json")):
        model, meta = load_model(path, device=device)
    else:
        raise UserError(f"{path} has neither config.json (a Hugging Face directory) nor model_<step>.pt (a checkpoint "
                        "of nanochat)")
    tokenizer = load_nanochat_tokenizer(nanochat_tokenizer) if nanochat_tokenizer else Tokenizer.load()
    check_vocabulary(model, tokenizer, meta)
    return model, tokenizer, meta


def check_vocabulary(model: Base, tokenizer: Tokenizer, meta: dict) -> None:
    """UserError unless a checkpoint of nanochat, ours or the reference's, and a tokenizer belong together."""
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}: they do "
                        "not belong together; "
                        "a reference checkpoint needs --nanochat_tokenizer, ours the tokenizer it was trained with")
    if "tokenizer" in meta:
        check_tokenizer(meta, tokenizer)


def check_tokenizer(meta: dict, tokenizer: Tokenizer, what: Path | str = "the model") -> None:
    """UserError unless the checkpoint of that `meta` was trained with this tokenizer."""
    if meta.get("tokenizer") != tokenizer.fingerprint:
        raise UserError(f"{what} was trained with tokenizer {meta.get('tokenizer')}, here is {tokenizer.fingerprint}; "
                        "restore that one")
