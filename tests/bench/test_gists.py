"""Arms of GistNet side by side on one base: each as it would train alone, on the next token, and judged
on as many entries as it has."""

import pytest
import torch

from mc.focus_allocator import check_feasible
from mc.losses import row_mean
from mc.model import MegaContext
from nanochat.common import UserError
from nanochat.dataloader import make_source
from nanochat.gpt import token_losses
from scripts.bench import gists as gist_benchmark
from tiny_mc import VOCAB, planted, randomize, tiny_base, tiny_batch

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def arms_alone_and_together():
    base = tiny_base(dtype=torch.float32, sequence_len=64).requires_grad_(False)
    settings = ["gist=transformer,block_size=4,gist_width=16",
                "gist=slots,block_size=8,gists_per_block=2,gist_width=16,frozen=1",
                "gist=mean,block_size=4,kl_weight=0", "window=19"]
    source = make_source("random", "train", T=40, seed=0, tokenizer=type("Tokens", (), {"vocab_size": VOCAB})())

    def train(texts: list[str]) -> list[gist_benchmark.Student]:
        arms = [gist_benchmark.gist_arm(text, base, 0, 8, 8, 32) for text in texts]
        gist_benchmark.train_arms(arms, base, source, 3, 2, 40, 32, 8)
        return arms

    return base, train(settings), [train([text])[0] for text in settings]


def test_arms_trained_together_are_the_arms_trained_alone(arms_alone_and_together):
    base, together, alone = arms_alone_and_together
    for a, b in zip(together, alone):
        for (name, x), y in zip([*a.mc.named_parameters(), *a.gpt.named_parameters()],
                                [*b.mc.parameters(), *b.gpt.parameters()]):
            assert torch.equal(x, y), (a.name, name)
    assert together[1].gpt is base and together[0].gpt is not base
    moved = [name for name, p in together[0].gpt.named_parameters()
             if not torch.equal(p, dict(base.named_parameters())[name])]
    assert moved and not any("wte" in name or "lm_head" in name for name in moved)


@pytest.mark.parametrize("window", [8, 13, 32])
def test_a_window_arm_is_trained_on_what_follows_its_last_raw_tokens_alone(window):
    base = tiny_base(dtype=torch.float32, sequence_len=40)
    arm = gist_benchmark.gist_arm(f"window={window},kl_weight=0", base, 0, 8, 8, 32)
    batch = tiny_batch(T=40)
    tokens, targets = batch.inputs, batch.targets
    loss = lambda rows: gist_benchmark.loss_of(arm, rows, targets, None, None, 32)
    # 8 recent tokens, and the continuation but its last
    alone = arm.gpt.hidden(tokens[:, 32 - window:], positions=torch.arange(32 - window, 40))[:, -16:-1]
    wanted = row_mean(token_losses(arm.gpt.logits(alone), targets[:, 24:39]), targets[:, 24:39] >= 0).mean()
    torch.testing.assert_close(loss(tokens), wanted)
    other = tokens.clone()
    other[:, :32 - window] = (other[:, :32 - window] + 1) % VOCAB
    assert torch.equal(loss(other), loss(tokens))
    other[:, 32 - window] = (other[:, 32 - window] + 1) % VOCAB
    assert not torch.equal(loss(other), loss(tokens))


@pytest.mark.parametrize("text", ["gist=slots,depth=3", "gist=slots,block_size=x", "gist=slots,block_size=4,lod=2",
                                  "gist=slots,block_size=4,bands=1", "window=7", "window=33", "window=16,frozen=1",
                                  "window=16,block_size=4"])
def test_arms_that_cannot_be_are_refused(text):
    with pytest.raises(UserError, match="--arms"):
        gist_benchmark.parse(text, 8, 8, 32)


@pytest.mark.parametrize("text", ["gist=mean,block_size=8,max_lod=2", "gist=mean,block_size=32,max_lod=2",
                                  "gist=slots,block_size=16,max_lod=2,gists_per_block=2", "gist=mean,block_size=8"])
def test_an_arm_has_the_entries_that_its_judge_asks_for(text):
    config, _, _ = gist_benchmark.parse(text, 32, 64, 1024)
    check_feasible(1024, MegaContext(config, 16).focus_config())


def test_an_arm_is_trained_on_the_next_token():
    """A base that says the next of a counting row: no loss on targets that follow, a large one on the
    tokens themselves (trap 1)."""
    tokens = (torch.arange(41) + 3 * torch.arange(4)[:, None]) % 40
    losses = []
    for shift in (1, 0):
        arm = gist_benchmark.gist_arm("gist=mean,block_size=4,kl_weight=0,frozen=1", planted(shift), 0, 8, 8, 32)
        arm.mc.double()
        losses.append(gist_benchmark.loss_of(arm, tokens[:, :-1], tokens[:, 1:], None, None, 32).item())
    assert losses[0] < 0.01 and losses[1] > 10


@pytest.mark.parametrize("term", ["wc_weight", "kl_weight", "contrast_weight"])
def test_every_term_of_an_arm_teaches_gistnet(term):
    base, batch, found = tiny_base(dtype=torch.float32, sequence_len=40), tiny_batch(T=40), []
    with torch.no_grad():
        teacher = base.logits(base.hidden(batch.inputs)[:, 24:-1])
    for weight in (1, 2):
        arm = gist_benchmark.gist_arm(f"gist=slots,block_size=4,gist_width=16,{term}={weight}", base, 0, 8, 8, 32)
        randomize(arm.mc.gistnet)
        gist_benchmark.loss_of(arm, batch.inputs, batch.targets, teacher, None, 32).backward()
        found.append([p.grad for p in arm.mc.gistnet.parameters()])
    assert not any(torch.equal(a, b) for a, b in zip(*found))


def test_an_arms_optimizer_has_gistnet_and_the_bases_body():
    arm = gist_benchmark.gist_arm("gist=slots,block_size=4,gist_width=16",
                                  tiny_base(dtype=torch.float32, sequence_len=40), 0, 8, 8, 32)
    have = [id(p) for group in arm.optimizer.param_groups for p in group["params"]]
    body = (p for name, p in arm.gpt.named_parameters()
            if not name.startswith(("transformer.wte", "lm_head", "value_embeds")))
    assert sorted(have) == sorted(map(id, [*arm.mc.gistnet.parameters(), arm.mc.gist_bias, *body]))
