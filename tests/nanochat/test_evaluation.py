import math
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_gpt import random_tokens, tiny_gpt

from nanochat.common import UserError
from nanochat.evaluation import evaluate

torch.set_num_threads(1)


class Rows(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor


def batches(count: int, rows: int = 2, T: int = 9) -> list[Rows]:
    """Some targets are ignored, differently many in each batch."""
    made = []
    for i in range(count):
        tokens = random_tokens(rows, T + 1, seed=i)
        targets = tokens[:, 1:].clone()
        targets[:, : i % 4] = -1
        made.append(Rows(tokens[:, :-1], targets, torch.arange(rows) + i * rows))
    return made


SIZES = (torch.arange(50) + 1) % 5  # ids 4, 9, 14 … stand for no bytes


def test_loss_and_bits_per_byte_by_hand():
    model, data = tiny_gpt(), batches(5)
    nats, byte_nats, num_bytes, targets = 0.0, 0.0, 0, 0
    for batch in data:
        log_p = model(batch.inputs).detach().log_softmax(-1)
        for b in range(2):
            for t in range(9):
                if (target := int(batch.targets[b, t])) >= 0:
                    nll = -float(log_p[b, t, target])
                    nats, targets = nats + nll, targets + 1
                    if size := int(SIZES[target]):
                        byte_nats, num_bytes = byte_nats + nll, num_bytes + size
    result = evaluate(model, data, 5, SIZES)
    assert result.targets == targets < 90 and result.bytes == num_bytes
    assert result.loss == pytest.approx(nats / targets, abs=1e-9)
    assert result.bpb == pytest.approx(byte_nats / math.log(2) / num_bytes, abs=1e-9)
    assert evaluate(model, data, 5).bpb is None


def test_same_text_same_information_in_two_vocabularies():
    """Uniform over 16 one-byte ids, or over 256 ids of two bytes each: 4 bits per byte."""
    for vocab, size in ((16, 1), (256, 2)):
        model = tiny_gpt(vocab_size=vocab)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        tokens = random_tokens(2, 9, vocab=vocab)
        sizes = torch.full((vocab,), size)
        assert evaluate(model, [Rows(tokens, tokens, torch.arange(2))], 1, sizes).bpb == pytest.approx(4.0)


def test_only_the_asked_number_of_batches_is_taken():
    model, source = tiny_gpt(), iter(batches(4))
    assert evaluate(model, source, 3).loss == pytest.approx(evaluate(model, batches(3), 3).loss)
    assert len(list(source)) == 1
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("steps, sizes, change, message", [
    (0, None, None, "0 batches"), (4, None, None, "asks for 4 batches a rank, 1 were missing"),
    (3, torch.zeros(50), None, "stand for 0 bytes"), (3, SIZES, -1, "no target among the 3"),
    (3, SIZES[:49], None, "49 .* 50")])
def test_nothing_to_divide_by_is_refused_with_the_numbers(steps, sizes, change, message):
    data = [b if change is None else b._replace(targets=torch.full_like(b.targets, change)) for b in batches(3)]
    with pytest.raises(UserError, match=message):
        evaluate(tiny_gpt(), data, steps, sizes)


def _one_of_two(rank: int, store: str, found) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found[rank] = tuple(evaluate(tiny_gpt(), batches(4)[rank::2], 2, SIZES))
    try:
        evaluate(tiny_gpt(), batches(4)[rank::2][: 2 - rank], 2)  # only rank 1 lacks data; neither may hang
    except UserError as e:
        found[2 + rank] = str(e)
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(_one_of_two, (str(tmp_path / "store"), found), nprocs=2)
        alone = evaluate(tiny_gpt(), batches(4), 4, SIZES)
        assert found[0] == found[1] == pytest.approx(tuple(alone), abs=1e-12)
        assert found[2] == found[3] and "1 were missing" in found[2]
