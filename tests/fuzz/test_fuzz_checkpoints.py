"""Checkpoints and tokenizers: damaged on the medium, which checksums tell, and written whole by
something else, which they do not."""

import hashlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from fuzzing import EDGES, Image, changes, command, dumped, fuzzed, image, json_changes, put_image, tried
from hypothesis import strategies as st

from mc.store.networks import load_networks
from nanochat.loading import load_model, load_nanochat_dir
from nanochat.telemetry import meter
from nanochat.tokenizer import Tokenizer
from scripts import base_eval, base_train, chat_cli
from scripts.eval.methods.registry import load_models

TRAIN = ["--depth=1", "--aspect_ratio=32", "--head_dim=16", "--max_seq_len=64", "--device_batch_size=2",
         "--total_batch_size=256", "--data=random",
         "--num_iterations=2", "--eval_every=0", "--eval_tokens=128", "--device=cpu", "--dtype=float32",
         "--model_tag=t", "--mc_enabled=1", "--mc_block_size=8",
         "--mc_budget=32", "--mc_horizon=8", "--mc_recent=8", "--mc_start=0", "--mc_ramp=1", "--mc_lens_queries=32",
         "--mc_lens_key_dim=8", "--mc_gist_width=16",
         "--mc_max_lod=1"]  # fmt: skip
STEP = "000002"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base directory with the tokenizer of single bytes and a MegaContext that was trained for two steps; its
    own while this module runs."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        patch.setattr(meter, "peak_flops", lambda device: 1e9)
        Tokenizer([bytes([i]) for i in range(256)]).save()
        patch.setattr(sys, "argv", ["base_train", *TRAIN])
        base_train.main()
        yield folder


@pytest.fixture(scope="module")
def files(base) -> Image:
    return image(base / "checkpoints" / "t")


def signed(files: dict[str, bytes]) -> dict[str, bytes]:
    """A commit record that fits."""
    record = json.loads(files[f"complete_{STEP}.json"])
    record["files"] = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                       for name, data in files.items() if not name.startswith("complete")}
    return {**files, f"complete_{STEP}.json": json.dumps(record).encode()}


def read_all(base: Path, files: dict[str, bytes], kind: str) -> None:
    """By every reader in turn; whatever they do, the files stay as they are."""
    directory = put_image(base / "checkpoints" / "t", files)
    for read in (load_model, load_networks, load_models):
        tried(kind, lambda: read(directory))
    assert image(directory) == files


NAMES = st.sampled_from(["model", "mc", "meta", "optim", "complete"])


@fuzzed(NAMES, st.one_of(changes(), st.none()), cost=2)
def test_a_file_damaged_on_the_medium(base, files, kind, change):
    name = next(name for name in files if name.startswith(f"{kind}_"))
    rest = {n: data for n, data in files.items() if n != name}
    read_all(base, rest if change is None else {**rest, name: change(files[name])}, "checkpoint, damaged")


@fuzzed(json_changes(), cost=2)
def test_a_commit_record_of_another_program(base, files, change):
    name = f"complete_{STEP}.json"
    read_all(base, {**files, name: dumped(change(json.loads(files[name])))}, "checkpoint, its record")


@fuzzed(json_changes(3), cost=2)
def test_a_description_of_another_program(base, files, change):
    name = f"meta_{STEP}.json"
    read_all(base, signed({**files, name: dumped(change(json.loads(files[name])))}), "checkpoint, its description")


def tensors_changed(draw, state: dict) -> None:
    """One entry of a state dict becomes something else, or is not there."""
    name = draw(st.sampled_from(sorted(state)))
    old = state.pop(name)
    changed = ["renamed", "shape", "empty", "integers", "half", "nan", "value", "scalar"]
    what = draw(st.sampled_from(["gone", *(changed if isinstance(old, torch.Tensor) else [])]))
    new = {"shape": lambda: torch.zeros(*old.shape, 2), "empty": lambda: torch.zeros(0),
           "integers": lambda: old.long(), "half": lambda: old.half(),
           "nan": lambda: old * torch.nan, "value": lambda: draw(st.sampled_from(EDGES)),
           "scalar": lambda: torch.tensor(1.0)}
    if what != "gone":
        state[name + "x" * (what == "renamed")] = new.get(what, lambda: old)()


@fuzzed(st.data(), st.sampled_from(["model", "mc"]), cost=2)
def test_tensors_of_another_program(base, files, data, kind):
    state = torch.load(io.BytesIO(files[f"{kind}_{STEP}.pt"]), weights_only=True)
    for _ in range(data.draw(st.integers(1, 2))):
        tensors_changed(data.draw, state)
    torch.save(state, written := io.BytesIO())
    read_all(base, signed({**files, f"{kind}_{STEP}.pt": written.getvalue()}), "checkpoint, its tensors")


@fuzzed(st.sampled_from(["model", "mc"]), changes(), cost=2)
def test_bytes_of_tensors_whose_checksum_fits(base, files, kind, change):
    read_all(base, signed({**files, f"{kind}_{STEP}.pt": change(files[f"{kind}_{STEP}.pt"])}),
             "checkpoint, bytes of its tensors")


@fuzzed(st.sampled_from(["model", "meta"]), changes(), json_changes(), st.booleans(), cost=2)
def test_a_reference_checkpoint(base, files, kind, change, values, bytewise):
    """karpathy/nanochat's has no checksums."""
    model, meta = (dict(torch.load(io.BytesIO(files[f"model_{STEP}.pt"]), weights_only=True)),
                   json.loads(files[f"meta_{STEP}.json"]))
    meta = {"model_config": {k: v for k, v in meta["model_config"].items()
                             if k in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd",
                                      "window_pattern")}}
    torch.save(model, written := io.BytesIO())
    made = {f"model_{STEP}.pt": written.getvalue(), f"meta_{STEP}.json": dumped(meta if bytewise else values(meta))}
    name = next(n for n in made if n.startswith(kind))
    directory = put_image(base / "reference", made | ({name: change(made[name])} if bytewise else {}))
    tried("checkpoint of nanochat", lambda: load_nanochat_dir(directory))


@fuzzed(st.sampled_from(["complete", "meta", "optim", "model", "mc"]), json_changes(), changes(), st.booleans(),
        cost=40)
def test_commands_on_what_is_damaged(base, files, kind, values, change, sign):
    """base_eval, chat_cli and a resumed training: refused in a line, or run; a refused one has written nothing."""
    name = next(n for n in files if n.startswith(f"{kind}_"))
    data = dumped(values(json.loads(files[name]))) if name.endswith("json") else change(files[name])
    made = {**files, name: data}
    made = signed(made) if sign and kind != "complete" else made
    directory, runs = put_image(base / "checkpoints" / "t", made), base / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    where = f"--checkpoint_dir={directory}"
    command("commands on checkpoints", base_eval.main, where, "--eval_tokens=128", "--micro_batch=2", "--device=cpu")
    command("commands on checkpoints", chat_cli.main, where, "--prompt=ab", "--max_tokens=2", "--device=cpu",
            "--mc_enabled=1")
    assert image(directory) == made
    if command("commands on checkpoints", base_train.main, *TRAIN, "--resume=1") is None:
        assert image(directory) == made and not runs.exists()


@fuzzed(st.sampled_from(["bytes", "values", "signed"]), changes(), json_changes())
def test_a_tokenizer(base, kind, change, values):
    path = base / "damaged" / "tokenizer.json"
    whole = (base / "tokenizer" / "tokenizer.json").read_bytes()
    made = values(json.loads(whole)) if kind != "bytes" else None
    if kind == "signed" and isinstance(made, dict):
        rest = {name: value for name, value in made.items() if name != "fingerprint"}
        made["fingerprint"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:12]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(change(whole) if kind == "bytes" else dumped(made))
    if (found := tried("tokenizer", lambda: Tokenizer.load(path.parent))) is not None:
        text = "a ż \U0001f4a9\0"  # another pattern may leave something out
        assert found.decode(found.encode(text)) == text or found._pattern != Tokenizer([bytes([i])
                                                                                        for i in range(256)])._pattern
