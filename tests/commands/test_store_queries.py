"""`mc_store` in this process: what a store holds after a writer that was killed, and what an address may not tell."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from mc.store.catalog import Catalog
from mc.store.disk.store import DiskStore
from mc.store.ram import StoreFormat
from nanochat.tokenizer import Tokenizer
from scripts import mc_store

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])


def test_the_text_of_a_source_without_tokens(tmp_path, monkeypatch, capsys):
    """As a chat leaves it that was killed before its first token."""
    with DiskStore.create(tmp_path / "s", StoreFormat(4, 6, 1, 3)), Catalog(tmp_path / "s", 4) as catalog:
        catalog.add_source("chat", 0)
    monkeypatch.setattr(mc_store, "networks_of", lambda args: SimpleNamespace(tokenizer=TOKENIZER))
    monkeypatch.setattr(sys, "argv", ["mc_store", "query", f"--store={tmp_path / 's'}", "--show_text=1"])
    mc_store.main()
    *_, head, text, last = capsys.readouterr().out.splitlines()
    assert (head, text) == ("--- chat", "") and json.loads(last)["sources"][0]["tokens"] == 0


@pytest.mark.parametrize("uri", ["http://user:s3cretpw@host/a", "https://host/a?api_key=s3cretpw"])
def test_an_address_is_recorded_without_its_secret(uri, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    TOKENIZER.save()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a text, piped\n")))
    monkeypatch.setattr(sys, "argv", ["mc_store", "ingest", f"--store={tmp_path / 's'}", f"--uri={uri}"])
    mc_store.main()
    out = capsys.readouterr()
    assert "note: --uri" in out.out and "s3cretpw" not in out.out + out.err
    files = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert files and not any(b"s3cretpw" in path.read_bytes() for path in files)
