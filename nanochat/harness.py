"""Our models under EleutherAI's lm-evaluation-harness: its three questions, answered by a GPT with its own window.

A context longer than the model's training window keeps its last tokens, as the harness expects of a model with a
bounded context, and how many requests that cut is counted. Names of special ids in a task's text are those ids, so
that our generated tasks can be asked as well. Requests mean what they mean to the harness's own Hugging Face model:
where a context ends and its continuation begins, which options of generation are the same, how long an answer is when
nothing says so. An option that would change an answer in a way that we do not offer is refused, before anything is
generated; one that changes nothing is passed over. Needs the package lm_eval, so it is imported only by
`scripts.run_lm_eval`.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Iterator, NoReturn, Sequence

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from nanochat.common import UserError, key_seed
from nanochat.dataset import Progress
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer

ANSWER_TOKENS = 256  # of an answer whose task names no length: the harness's own default
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one thing
RANGES = {"temperature": (0, None), "top_p": (0, 1), "top_k": (-1, None)}
RANGES |= dict.fromkeys(("max_length", *LENGTHS), (1, None))
WHOLE = {"top_k", "max_length", *LENGTHS}
OPTIONS = {"until", "do_sample", *RANGES}
INERT = {  # what else the harness's models take, and where it changes nothing
    **{"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "use_cache": True, "typical_p": 1, "min_p": 0},
    **{"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "no_repeat_ngram_size": 0},
}
OF_BEAMS = {"length_penalty", "early_stopping"}  # change nothing without


@dataclass(frozen=True)
class Wanted:
    """What a request's generation_kwargs ask for. temperature 0: the likeliest token. max_length: of prompt and answer
    together, in the place of max_tokens."""

    until: tuple[str, ...]
    max_tokens: int
    max_length: int | None
    temperature: float
    top_k: int | None
    top_p: float


def _refuse(name: str, value: object, why: str) -> NoReturn:
    raise UserError(f"generation_kwargs with {name}={value!r}: {why}")


def _number(name: str, value: object) -> float:
    least, most = RANGES[name]
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    if not least <= number <= (float("inf") if most is None else most) or number == float("inf"):
        _refuse(name, value, f"a number from {least}" + ("" if most is None else f" to {most}"))
    if name in WHOLE and not number.is_integer():
        _refuse(name, value, "a whole number")
    return int(number) if name in WHOLE else number


def read_options(options: dict, default_tokens: int) -> Wanted:
    """generation_kwargs as the harness's own models read them. UserError, with its name, for one that cannot be
    honoured."""
    given = {name: value for name, value in options.items() if value is not None and name not in OF_BEAMS}
    given = {name: value for name, value in given.items() if not (name in INERT and INERT[name] == value)}
    if unknown := sorted(set(given) - OPTIONS):
        _refuse(unknown[0], given[unknown[0]], f"this adapter knows {', '.join(sorted(OPTIONS))}")
    stops = [given.get("until", [])] if isinstance(given.get("until"), str) else given.get("until", [])
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) for stop in stops):
        _refuse("until", stops, "a text, or a list of texts, at which an answer ends")
    if given.get("do_sample", False) not in (False, True):
        _refuse("do_sample", given["do_sample"], "true or false")
    numbers = {name: _number(name, value) for name, value in given.items() if name in RANGES}
    top_k, top_p = max(numbers.get("top_k", 0), 0) or None, numbers.get("top_p", 1.0)
    if (top_k or top_p < 1) and not {"do_sample", "temperature"} & set(given):
        name = "top_k" if top_k else "top_p"
        _refuse(name, given[name], "it says how to draw, and nothing says to draw: give do_sample and temperature")
    sampled = {"do_sample": bool(given["do_sample"])} if "do_sample" in given else {}
    plain = normalize_gen_kwargs(numbers | sampled, default_tokens)
    temperature = plain.get("temperature", 0.0) if plain["do_sample"] else 0.0
    if not temperature:
        top_k, top_p = None, 1.0
    if top_p == 0:
        _refuse("top_p", given["top_p"], "above 0")
    stops = tuple(filter(None, stops))
    return Wanted(stops, plain["max_gen_toks"], numbers.get("max_length"), temperature, top_k, top_p)


class HarnessLM(LM):
    """What every model of ours has in common under the harness; subclasses say how tokens are scored and continued."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0):
        super().__init__()
        self.tokenizer, self.seed = tokenizer, seed
        self.apart = 0  # continuations that were encoded apart from their context

    def score(self, context: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """[N, V] logits of `tokens`, each given the context and those before it. context: int ids from bos on."""
        raise NotImplementedError

    def continuation(self, context: Sequence[int], max_tokens: int, seed: int, **sampling) -> Iterator[int]:
        """The next tokens, one by one, at most max_tokens, drawn as `nanochat.engine.sample` says."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special=True)

    def history(self, text: str) -> list[int]:
        """Ids of a text that is read from its beginning: bos, once, and the text."""
        ids = self.encode(text)
        return ids if ids[:1] == [self.tokenizer.bos_id] else [self.tokenizer.bos_id, *ids]

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, as the harness cuts them: from one encoding of the whole text, where the context's ids end;
        white space at the end of a context goes to its continuation. A continuation that only completes the context's
        last token has no ids of its own there (the harness fails on it); it is encoded apart. UserError for an empty
        one."""
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        after = self.encode(context + continuation)[len(self.encode(context)) :]
        if continuation and not after:
            self.apart += 1
            after = self.encode(continuation)
        if not context and after[:1] == [self.tokenizer.bos_id]:
            after = after[1:]
        if not after:
            raise UserError(
                f"the continuation {continuation!r} of {context[-40:]!r} adds no token to its context: "
                "there is nothing to score"
            )
        return self.history(context), after

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = [self.split(*request.args) for request in requests]  # all before any is scored: a bad one costs nothing
        progress, found = Progress("log-likelihoods", len(requests), "requests"), []
        for done, (context, tokens) in enumerate(pairs, 1):
            found.append(log_likelihood(self.score(context, tokens), tokens))
            progress.update(done)
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        progress, found = Progress("documents", len(requests), "documents"), []
        for done, request in enumerate(requests, 1):
            found.append(self.document(self.encode(request.args[0])))
            progress.update(done)
        return found

    def document(self, tokens: Sequence[int]) -> float:
        """Nats of a whole document, from bos on."""
        return log_likelihood(self.score([self.tokenizer.bos_id], tokens), tokens)[0] if tokens else 0.0

    def wanted(self, options: dict) -> Wanted:
        return read_options(options, ANSWER_TOKENS)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        wanted = [self.wanted(request.args[1]) for request in requests]
        progress, found, asked = Progress("answers", len(requests), "requests"), [], Counter()
        for done, (request, options) in enumerate(zip(requests, wanted), 1):
            context = request.args[0]
            asked[context, options] += 1  # a task that repeats a question wants another draw each time
            found.append(self.answer(context, options, key_seed(self.seed, "answer", context, asked[context, options])))
            progress.update(done)
        return found

    def answer(self, context: str, wanted: Wanted, seed: int) -> str:
        """Generated text up to the first of wanted.until, or to bos."""
        prompt = self.history(context)
        most = wanted.max_tokens if wanted.max_length is None else wanted.max_length - len(prompt)
        if most < 1:
            why = f"the prompt alone has {len(prompt)} tokens; max_gen_toks counts the answer"
            _refuse("max_length", wanted.max_length, why)
        made, text = [], ""
        sampling = {"temperature": wanted.temperature, "top_k": wanted.top_k, "top_p": wanted.top_p}
        for token in self.continuation(prompt, most, seed, **sampling):
            if token == self.tokenizer.bos_id:
                break
            made.append(token)
            text = self.tokenizer.decode(made)
            if any(stop in text for stop in wanted.until):
                break
        return postprocess_generated_text(text, list(wanted.until), None)


def log_likelihood(logits_NV: Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
    """Nats of the tokens together, and whether each is the likeliest one."""
    wanted_N = torch.as_tensor(tokens, device=logits_NV.device)
    nats_N = logits_NV.double().log_softmax(-1).gather(1, wanted_N[:, None])[:, 0]
    return float(nats_N.sum()), bool((logits_NV.argmax(-1) == wanted_N).all())


class PlainLM(HarnessLM):
    """A GPT with a window of `max_length` tokens (its training length unless more is asked for)."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, max_length: int = 0, seed: int = 0):
        super().__init__(tokenizer, seed)
        self.model, self.engine, self.max_length, self.cut = model, Engine(model,
                                                                           tokenizer), max_length or model.config.sequence_len, 0  # noqa: E501
        self.shortened = False
        if self.max_length < 2:
            raise UserError(f"--max_length={max_length}: at least 2 tokens")

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As `HarnessLM.split`; UserError when the continuation alone is longer than the window."""
        before, after = super().split(context, continuation)
        if len(after) > self.max_length:
            raise UserError(
                f"a continuation of {len(after)} tokens does not fit the window of {self.max_length}; "
                "raise --max_length or use --mc_enabled=1"
            )
        return before, after

    @torch.inference_mode()
    def score(self, context: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """As `HarnessLM.score`; of context and tokens the last max_length + 1 count."""
        row = [*context, *tokens]
        self.cut += len(row) - 1 > self.max_length
        ids = torch.tensor([row[:-1][-self.max_length :]], device=self.engine.device)
        return self.model.logits(self.model.hidden(ids, lift_windows=True)[0, -len(tokens) :])

    def document(self, tokens: Sequence[int]) -> float:
        """A long document in windows of max_length, each token with as much before it as fits."""
        windows = get_rolling_token_windows(list(tokens), self.tokenizer.bos_id, self.max_length, 1)
        pairs = map(make_disjoint_window, windows)
        return sum((log_likelihood(self.score(before, after), after)[0] for before, after in pairs), 0.0)

    def wanted(self, options: dict) -> Wanted:
        """As `HarnessLM.wanted`; a length must leave room in the window, but the harness's default (which it also
        writes into tasks that say nothing) is cut to half of a smaller one."""
        wanted, most = super().wanted(options), self.max_length // 2
        if wanted.max_tokens == ANSWER_TOKENS and wanted.max_length is None and most < ANSWER_TOKENS:
            if not self.shortened:
                print(
                    f"note: the harness's default of max_gen_toks={ANSWER_TOKENS} does not fit the window of "
                    f"{self.max_length}: answers end after {most} tokens; raise --max_length for longer ones"
                )
            self.shortened = True
            wanted = replace(wanted, max_tokens=most)
        self.room(wanted.max_tokens if wanted.max_length is None else 1)
        return wanted

    def room(self, max_tokens: int) -> int:
        """Tokens of a prompt that an answer leaves place for. UserError for none."""
        if max_tokens >= self.max_length:
            raise UserError(
                f"max_gen_toks={max_tokens} leaves nothing of the window of {self.max_length}; raise --max_length or "
                "use --mc_enabled=1"
            )
        return self.max_length - max_tokens

    def continuation(self, context: Sequence[int], max_tokens: int, seed: int, **sampling) -> Iterator[int]:
        room = self.room(max_tokens)
        self.cut += len(context) > room
        for (token,) in self.engine.generate([list(context[-room:])], max_tokens, seed=seed, **sampling):
            yield token
