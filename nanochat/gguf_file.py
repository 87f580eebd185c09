"""A GGUF file (llama.cpp's) in Hugging Face's words: configuration, tensors, tokenizer.

Weights come out in float32, whatever they were quantized to, by the package `gguf`; it is imported here only. Rows of
q and k of the architecture `llama` are stored in another order (pairs that are rotated together stand side by side) and
are put back; those of Qwen are not touched. Rope scaling of Llama 3 stands in a tensor of divisors,
`rope_freqs.weight`.
"""

import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanochat.base_tokenizer import TokenizerFiles, package
from nanochat.common import UserError, one_line

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files say llama
LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_GPT4 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
# tokenizer.ggml.pre -> how a text is split before merging; "": as GPT-2 does
SPLITS = {"gpt-2": "", "gpt2": "", "smollm": "", "qwen2": _GPT4 % "", "llama-bpe": _GPT4 % "{1,3}",
          "llama3": _GPT4 % "{1,3}", "llama-v3": _GPT4 % "{1,3}"}
SINGLE_DIGITS = ("smollm",)
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # tokenizer.ggml.token_type

Tensors = Callable[[], Iterator[tuple[str, Tensor]]]


def read_gguf(path: Path) -> tuple[dict[str, object], Tensors, TokenizerFiles | None]:
    """(configuration as in a config.json, tensors under Hugging Face's names, tokenizer); no tokenizer where its kind
    is not supported. UserError for a damaged file, a part of a split one, or an architecture that is not supported."""
    gguf = package("gguf")
    try:
        reader = gguf.GGUFReader(path)
        head = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or one_line(e)}") from None
    except DAMAGE as e:
        raise UserError(f"{path} is no GGUF file that can be read ({type(e).__name__}: {one_line(e)})") from None
    kind = head.get("general.architecture")
    if kind not in ARCHITECTURES or head.get(f"{kind}.expert_count"):
        named = f"{kind} with experts" if kind in ARCHITECTURES else one_line(kind)
        raise UserError(f"{path}: architecture {named} is not supported; {', '.join(ARCHITECTURES)} are")
    if head.get("split.count", 1) != 1:
        raise UserError(f"{path} is one of {head['split.count']} parts: merge them with llama-gguf-split --merge")
    stored = {t.name: t for t in reader.tensors}
    config = _config(path, kind, head, stored, gguf)
    return config, lambda: _tensors(path, kind, config, stored, gguf), _tokenizer(head)


# what the reader raises at bytes that are no GGUF, or not all of one
DAMAGE = (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, AttributeError, struct.error)


def _config(path: Path, kind: str, head: dict[str, object], stored: dict, gguf) -> dict[str, object]:
    """The fields of a config.json that `nanochat.pretrained.llama_config` reads, which looks at their types."""
    def field(name: str, default: object = None) -> object:
        if (value := head.get(f"{kind}.{name}", default)) is None:
            raise UserError(f"{path} lacks {kind}.{name}")
        return value

    heads, width = field("attention.head_count"), field("embedding_length")
    if not (type(heads) is int and type(width) is int and heads > 0):
        raise UserError(f"{path}: {one_line(heads)} heads of a width of {one_line(width)} are not supported")
    head_dim = field("attention.key_length", width // heads)
    if "token_embd.weight" not in stored:
        raise UserError(f"{path} lacks the tensor token_embd.weight")
    if field("rope.dimension_count", head_dim) != head_dim or field("attention.value_length", head_dim) != head_dim:
        raise UserError(f"{path}: only heads are supported whose every dimension is rotated, and whose values are as "
                        "wide as their keys")
    return {
        "model_type": kind, "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
                                               "qwen3": "Qwen3ForCausalLM"}[kind]],
        "vocab_size": int(stored["token_embd.weight"].shape[1]), "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads), "head_dim": head_dim,
        "num_hidden_layers": field("block_count"), "intermediate_size": field("feed_forward_length"),
        "max_position_embeddings": field("context_length"), "hidden_act": "silu",
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"), "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": kind == "llama" and "blk.0.attn_q.bias" in stored, "torch_dtype": "float32",
        "rope_theta": field("rope.freq_base", 10_000.0), "rope_scaling": _rope(path, kind, head, stored, gguf),
    }  # fmt: skip


def _rope(path: Path, kind: str, head: dict[str, object], stored: dict, gguf) -> dict[str, object] | None:
    scaling = head.get(f"{kind}.rope.scaling.type", "none")
    if "rope_freqs.weight" in stored:
        divisors = _dequantized(path, stored["rope_freqs.weight"], gguf).flatten().tolist()
        # how plain divisors are said in a config.json
        return {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "factor": 1.0,
                "attention_factor": 1.0,
                "original_max_position_embeddings": head.get(f"{kind}.context_length", 1)}
    if scaling == "none":
        return None
    return {"rope_type": scaling, "factor": head.get(f"{kind}.rope.scaling.factor", 1.0)}


def _tensors(path: Path, kind: str, config: dict[str, object], stored: dict, gguf) -> Iterator[tuple[str, Tensor]]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, tensor in stored.items():
        if name == "rope_freqs.weight":
            continue
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        theirs = match and (LAYER if match[1] else OUTSIDE).get(match[2])
        if theirs is None:
            raise UserError(f"{path}: tensor {one_line(name)} is none of the architecture {kind}")
        array = _dequantized(path, tensor, gguf)
        if kind == "llama" and match[2] in heads:
            array = unpermuted(array, heads[match[2]], path)
        prefix = f"model.layers.{match[1]}." if match[1] else ""
        yield f"{prefix}{theirs}.{match[3]}", torch.from_numpy(np.array(array, dtype=np.float32))


def _dequantized(path: Path, tensor, gguf) -> np.ndarray:
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, *DAMAGE) as e:
        raise UserError(f"{path}: tensor {one_line(tensor.name)} of type {tensor.tensor_type.name} cannot be read "
                        f"({type(e).__name__}: {one_line(e)})") from None


def unpermuted(rows: np.ndarray, heads: int, where: Path | str) -> np.ndarray:
    """Rows of q or k (or entries of their bias) as Hugging Face has them: of each head first the first halves of all
    rotated pairs, then the second."""
    if heads < 1 or len(rows) % (2 * heads):
        raise UserError(f"{where}: {len(rows)} rows of q or k do not divide into {heads} heads of even width")
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(head: dict[str, object]) -> TokenizerFiles | None:
    """Of byte-level BPE with a known split; None for others."""
    tokens, merges, kinds = (head.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type"))
    split = SPLITS.get(head.get("tokenizer.ggml.pre"))
    if head.get("tokenizer.ggml.model") != "gpt2" or split is None or not (isinstance(tokens, list)
                                                                         and isinstance(merges, list)):
        return None
    kinds = kinds if isinstance(kinds, list) and len(kinds) == len(tokens) else [NORMAL] * len(tokens)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not split}
    before = [{"type": "Digits", "individual_digits": True}] if head["tokenizer.ggml.pre"] in SINGLE_DIGITS else []
    if split:
        before.append({"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False})
    ids = {name: head.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    names = {f"{ {'unknown': 'unk', 'padding': 'pad'}.get(name, name) }_token": tokens[i] for name, i in ids.items()
             if type(i) is int and 0 <= i < len(tokens)}
    bos = names.get("bos_token") if head.get("tokenizer.ggml.add_bos_token") else None
    text = json.dumps({
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(i, token, kind) for i, (token, kind) in enumerate(zip(tokens, kinds))
                         if kind in (CONTROL, USER_DEFINED)],
        "normalizer": {"type": "NFC"} if head["tokenizer.ggml.pre"] == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*before, byte_level]},
        "post_processor": _begins_with(bos, ids["bos"]) if bos else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": head["tokenizer.ggml.pre"].startswith("llama"),
                  "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": [merge.split(" ", 1) for merge in merges]},
    }, ensure_ascii=False)  # fmt: skip
    stops = [head.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    template = head.get("tokenizer.chat_template")
    return TokenizerFiles(text, template if isinstance(template, str) else None, tuple(names.items()),
                          tuple(dict.fromkeys(i for i in stops if type(i) is int)))


def _added(token_id: int, content: str, kind: int) -> dict[str, object]:
    return {"id": token_id, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind == CONTROL}


def _begins_with(token: str, token_id: int) -> dict[str, object]:
    """A post-processor that puts this token first."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}}}
