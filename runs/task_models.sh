#!/usr/bin/env bash
# Models of the generated tasks, with MegaContext: first base, gists and lens together on all tasks (suite_SEED), then gists and lens
# alone on those whose answer stands somewhere (suite_lens_SEED; the base stays as it is, bit for bit).
# SEEDS="1 2 3" bash runs/task_models.sh; a second run goes on. About 15 minutes a seed on one CPU core.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
CKPT="$NANOCHAT_BASE_DIR/checkpoints"

[ -f "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ] || python -m scripts.tok_train --data=stdlib

ALL=tasks:mqar,alias=5,overwrite,passkey,niah_single,niah_multikey,niah_multivalue=2,niah_multiquery,vt1,vt2,frequent=3,common=3,copy,topic=2,topic_lm,qa1,qa2
LOOKUPS=tasks:mqar=4,alias=4,overwrite=2,passkey,niah_single,niah_multikey=2,niah_multivalue,niah_multiquery,vt1,vt2,copy,qa1,qa2
SHARED=(--max_seq_len=1088 --depth=2 --aspect_ratio=64 --head_dim=32 --value_embeds=0 --smear=0 --resid_scalars=0 --backout=0 --key_shift=1 --tie_qk=1
        --rope_fraction=0.5 --device_batch_size=4 --total_batch_size=4352 --dtype=bfloat16 --eval_tokens=34816 --eval_every=0 --log_every=25
        --save_every=100 --resume=1 --mc_enabled=1 --mc_budget=128 --mc_horizon=32 --mc_gist=transformer --mc_kl_weight=0.1 --mc_wc_weight=0.5
        --mc_teacher=attention --mc_lens_queries=128 --mc_lens_horizon=1 --mc_max_lod=3 --mc_far_tokens=131072)

train() {  # tag, steps, flags…
  local tag="$1" steps="$2"; shift 2
  [ -f "$(printf '%s/%s/complete_%06d.json' "$CKPT" "$tag" "$steps")" ] && return
  python -m scripts.base_train --model_tag="$tag" --num_iterations="$steps" "${SHARED[@]}" "$@"
}

for SEED in ${SEEDS:-1 2 3}; do
  train "suite_$SEED" 1100 --seed="$SEED" --data="$ALL" --recall_grow=0.5 --grad_clip=1 --mc_start=0.5 --mc_row_stride=2 --mc_lens_lr=0.04
  train "suite_lens_$SEED" 240 --seed="$SEED" --data="$LOOKUPS" --recall_grow=0 --init_from="$CKPT/suite_$SEED" --freeze_base=1 --mc_start=0 \
    --mc_row_stride=4 --mc_lens_lr=0.01
done
