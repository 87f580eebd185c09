#!/usr/bin/env bash
# Base models for the studies on real text: code (the standard library) and prose (six novels of Jane Austen from a Debian package,
# Persuasion held out), 4 layers x 128, vanilla. SEEDS="1 2 3" bash runs/text_bases.sh; a second run goes on. Needs apt and dpkg, for
# fetching only. About 12 minutes a seed on one CPU core.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
TEXT="$NANOCHAT_BASE_DIR/text"

if [ ! -d "$TEXT/novels" ]; then
  mkdir -p "$TEXT/fetched"
  (cd "$TEXT/fetched" && apt-get -q download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb .)
  python -c 'import rdata' 2> /dev/null || python -m pip install --quiet rdata
  python - "$TEXT/fetched/usr/lib/R/site-library/janeaustenr/data" "$TEXT/novels" << 'PYTHON'
# R's lazy-load database: an index of (offset, length), and compressed objects behind their size and a letter for the method.
import bz2, lzma, sys, zlib
from pathlib import Path

import rdata

source, out = map(Path, sys.argv[1:])
parse = lambda data: rdata.conversion.convert(rdata.parser.parse_data(data, extension=".rds"))
index, database = parse((source / "Rdata.rdx").read_bytes()), (source / "Rdata.rdb").read_bytes()
out.mkdir()
for name, (offset, length) in index["variables"].items():
    body = database[offset + 4:offset + length]
    if body[:1] == b"2":
        body = bz2.decompress(body[1:])
    elif body[:1] == b"Z":
        body = lzma.decompress(body[1:], format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
    else:
        body = zlib.decompress(body)
    (out / f"{name}.txt").write_text("\n".join(map(str, parse(body))) + "\n")
PYTHON
fi
[ -d "$TEXT/mix" ] || python -m scripts.make_data corpus --prose="$TEXT/novels" --held_out=persuasion.txt --out="$TEXT"
[ -f "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ] || python -m scripts.tok_train --data="$TEXT/mix"

for SEED in ${SEEDS:-1 2 3}; do
  [ -f "$NANOCHAT_BASE_DIR/checkpoints/text_base_$SEED/complete_000600.json" ] && continue
  python -m scripts.base_train --model_tag="text_base_$SEED" --data="$TEXT/mix" --num_iterations=600 --seed="$SEED" --mc_enabled=0 \
    --max_seq_len=1088 --head_dim=32 --key_shift=1 --tie_qk=1 --rope_fraction=0.5 --device_batch_size=4 --total_batch_size=4352 \
    --depth=4 --aspect_ratio=32 --matrix_lr=0.04 --unembedding_lr=0.01 --dtype=bfloat16 --grad_clip=1 \
    --eval_tokens=65280 --eval_every=100 --log_every=25 --save_every=100 --keep_last=1 --resume=1
done
