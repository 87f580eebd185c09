"""Our models under EleutherAI's lm-evaluation-harness: its three questions, answered by a GPT with its own window.

A context longer than the model's training window keeps its last tokens, as the harness expects of a model with a bounded context,
and how many requests that cut is counted. Names of special ids in a task's text are those ids, so that our generated tasks can be
asked as well. Needs the package lm_eval, so it is imported only by `scripts.run_lm_eval`.
"""

from typing import Sequence

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from nanochat.common import UserError
from nanochat.dataset import Progress
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer

GENERATION_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature"}


class HarnessLM(LM):
    """What every model of ours has in common under the harness; subclasses say how tokens are scored and continued."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0):
        super().__init__()
        self.tokenizer, self.seed = tokenizer, seed

    def score(self, context: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """[N, V] logits of `tokens`, each given the context and those before it. context: int ids from bos on."""
        raise NotImplementedError

    def continuation(self, context: Sequence[int], max_tokens: int, temperature: float):
        """The next tokens, one by one, at most max_tokens."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special=True)

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both from one encoding of the whole text, cut where the context's ids end; its trailing space goes to the continuation."""
        spaces = len(context) - len(context.rstrip(" "))
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.encode(context)
        after = self.encode(context + continuation)[len(before) :]
        if not after:
            raise UserError(f"the continuation {continuation!r} adds no token to its context: there is nothing to score")
        return [self.tokenizer.bos_id, *before], after

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        progress, found = Progress("log-likelihoods", len(requests), "requests"), []
        for done, request in enumerate(requests, 1):
            context, tokens = self.split(*request.args)
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

    def generate_until(self, requests: list[Instance]) -> list[str]:
        progress, found = Progress("answers", len(requests), "requests"), []
        for done, request in enumerate(requests, 1):
            context, options = request.args
            found.append(self.answer(context, dict(options)))
            progress.update(done)
        return found

    def answer(self, context: str, options: dict) -> str:
        """Generated text up to the first of options["until"], or to bos."""
        if unknown := sorted(set(options) - GENERATION_OPTIONS):
            raise UserError(
                f"generation_kwargs with {unknown[0]}={options[unknown[0]]!r}: this adapter knows {', '.join(sorted(GENERATION_OPTIONS))}"
            )
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
        made, text = [], ""
        for token in self.continuation([self.tokenizer.bos_id, *self.encode(context)], int(options.get("max_gen_toks", 64)), temperature):
            if token == self.tokenizer.bos_id:
                break
            text = self.tokenizer.decode([*made, token])
            made.append(token)
            if any(stop in text for stop in until):
                break
        return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]


def log_likelihood(logits_NV: Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
    """Nats of the tokens together, and whether each is the likeliest one."""
    wanted_N = torch.as_tensor(tokens, device=logits_NV.device)
    nats_N = logits_NV.double().log_softmax(-1).gather(1, wanted_N[:, None])[:, 0]
    return float(nats_N.sum()), bool((logits_NV.argmax(-1) == wanted_N).all())


class PlainLM(HarnessLM):
    """A GPT with a window of `max_length` tokens (its training length unless more is asked for)."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, max_length: int = 0, seed: int = 0):
        super().__init__(tokenizer, seed)
        self.model, self.engine, self.max_length, self.cut = model, Engine(model, tokenizer), max_length or model.config.sequence_len, 0
        if self.max_length < 2:
            raise UserError(f"--max_length={max_length}: at least 2 tokens")

    @torch.inference_mode()
    def score(self, context: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """As `HarnessLM.score`; of context and tokens the last max_length + 1 count. UserError when the tokens alone are more."""
        if len(tokens) > self.max_length:
            raise UserError(
                f"a continuation of {len(tokens)} tokens does not fit the window of {self.max_length}; "
                "raise --max_length or use --mc_enabled=1"
            )
        row = [*context, *tokens]
        self.cut += len(row) - 1 > self.max_length
        ids = torch.tensor([row[:-1][-self.max_length :]], device=self.engine.device)
        return self.model.logits(self.model.hidden(ids, lift_windows=True)[0, -len(tokens) :])

    def document(self, tokens: Sequence[int]) -> float:
        """A long document in windows of max_length, each token with as much before it as fits."""
        windows = get_rolling_token_windows(list(tokens), self.tokenizer.bos_id, self.max_length, 1)
        return sum(log_likelihood(self.score(before, after), after)[0] for before, after in map(make_disjoint_window, windows))

    def continuation(self, context: Sequence[int], max_tokens: int, temperature: float):
        room = self.max_length - max_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks={max_tokens} leaves nothing of the window of {self.max_length}; raise --max_length or use --mc_enabled=1"
            )
        self.cut += len(context) > room
        for (token,) in self.engine.generate([list(context[-room:])], max_tokens, temperature=temperature, seed=self.seed):
            yield token
