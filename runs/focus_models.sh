#!/usr/bin/env bash
# Models of obsidian/log/2026-11-22 Votes that fade with age.md: recall (recall_mc_SEED), from it two hops (hops_SEED), and from that gists and lens
# alone, a lens key for each pair (hops_lens_SEED; the base stays as it is, bit for bit). From recall also a base that has read working contexts of 512
# entries (recall_wide_SEED; obsidian/log/2026-11-22 Focus against the oracle.md). Then 128 blocks at an eighth, and two hops, put to sessions.
# SEEDS="1 2 3" bash runs/focus_models.sh; a second run goes on. About ten minutes a seed on one CPU core.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
CKPT="$NANOCHAT_BASE_DIR/checkpoints"

[ -f "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ] || python -m scripts.tok_train --data=stdlib

SHARED=(--max_seq_len=1088 --head_dim=32 --key_shift=1 --tie_qk=1 --rope_fraction=0.5 --depth=2 --aspect_ratio=64 --value_embeds=0 --smear=0
        --resid_scalars=0 --backout=0 --device_batch_size=4 --total_batch_size=4352 --eval_tokens=32640 --eval_every=0 --log_every=25
        --save_every=100 --resume=1 --keep_last=1 --mc_enabled=1 --mc_preset=recall)
TEACHER=(--mc_cuts=random:0.1,recency:0,lens:0.3,teacher:0.6)  # shown too little that helps, the base unlearns to read a working context

train() {  # tag, steps, flags…
  local tag="$1" steps="$2"; shift 2
  [ -f "$(printf '%s/%s/complete_%06d.json' "$CKPT" "$tag" "$steps")" ] && return
  python -m scripts.base_train --model_tag="$tag" --num_iterations="$steps" "${SHARED[@]}" "$@"
}

HOPS=() WIDE=()
for SEED in ${SEEDS:-1 2 3}; do
  train "recall_mc_$SEED" 400 --seed="$SEED" --data=recall --grad_clip=1 --recall_grow=0.75 --mc_row_stride=4 --mc_far_tokens=8388608
  train "hops_$SEED" 320 --seed="$SEED" --data=hops --mc_far_tokens=0 --init_from="$CKPT/recall_mc_$SEED" --grad_clip=1 --recall_grow=0.2 --mc_start=0.5 --mc_row_stride=2 \
    "${TEACHER[@]}"
  train "hops_lens_$SEED" 600 --seed="$SEED" --data=hops --mc_far_tokens=0 --init_from="$CKPT/hops_$SEED" --freeze_base=1 --recall_grow=0 --mc_start=0 --mc_row_stride=4 \
    --mc_lens_lr=0.01 --mc_lens_keys=16 --mc_lens_horizon=8 "${TEACHER[@]}"
  train "recall_wide_$SEED" 100 --seed="$SEED" --data=recall --init_from="$CKPT/recall_mc_$SEED" --grad_clip=1 --recall_grow=0 --mc_start=0 --mc_row_stride=4 \
    --mc_lens_lr=0.02 --mc_far_tokens=8388608 --mc_budget=512 --mc_recent=32
  HOPS+=("$CKPT/hops_lens_$SEED")
  WIDE+=("$CKPT/recall_wide_$SEED")
done
python -m scripts.mc_eval focus --recall_mc="$(IFS=,; echo "${WIDE[*]}")" --recall_sizes=128:8,128:16 --contexts=16 --candidates=4 --out="$NANOCHAT_BASE_DIR/recall_wide"
python -m scripts.mc_eval focus --hops_mc="$(IFS=,; echo "${HOPS[*]}")" --hops_budget=256 --contexts=32 --out="$NANOCHAT_BASE_DIR/hops"
