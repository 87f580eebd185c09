"""Three corpora, one set of held-out documents."""

import pyarrow.parquet as pq
from e2e_commands import run, write_texts

from nanochat import dataset
from nanochat.dataset import open_corpus


def test_the_same_documents_are_held_out(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    dataset.build_stdlib(write_texts(tmp_path / "modules"))
    novels = tmp_path / "novels"
    novels.mkdir()
    for name in ("a", "b", "c"):
        (novels / f"{name}.txt").write_text(f"novel {name} " * 50)
    out = tmp_path / "text"
    run(tmp_path / "base", "make_data", "corpus", f"--prose={novels}", "--held_out=b.txt", f"--out={out}").ok()
    held_out = {name: [d.text for d in open_corpus(str(out / name)).documents("val")]
                for name in ("code", "prose", "mix")}
    assert held_out["prose"] == [(novels / "b.txt").read_text()]
    assert held_out["code"] and held_out["mix"] == held_out["code"] + held_out["prose"]
    trained = [d.text for d in open_corpus(str(out / "mix")).documents("train")]
    assert not set(trained) & set(held_out["mix"]) and len(trained) == len(set(trained)) >= 3
    assert set(pq.read_table(out / "mix" / "train-00000.parquet")["kind"].to_pylist()) == {"code", "prose"}
    refused = run(tmp_path / "base", "make_data", "corpus", f"--prose={novels}", "--held_out=d.txt",
                  f"--out={out}").error
    assert "--held_out=d.txt" in refused and "a.txt, b.txt, c.txt" in refused
