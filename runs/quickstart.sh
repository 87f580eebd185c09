#!/usr/bin/env bash
# The main job: corpus, tokenizer, three small models (recall with and without MegaContext, same seed and tokens; then facts that stand in
# real code and prose), the comparison, and facts in a stream of 64 windows. At most 10 minutes on two CPU cores after the install. A second
# run reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
SEED="${SEED:-42}"

[ -f "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ] || python -m scripts.tok_train --data=stdlib

# Rows of 1,088 tokens, history 1,056. MegaContext's defaults: budget 128 entries, 32 recent and 32 judged tokens, block size 32, far
# histories of millions of tokens. Facts in text: the model that has learned recall learns text, and to find the facts in it; rows end with a
# question whose 12 last tokens are judged.
SHARED=(--depth=2 --aspect_ratio=64 --head_dim=32 --value_embeds=0 --smear=0 --resid_scalars=0 --backout=0 --key_shift=1 --tie_qk=1
        --rope_fraction=0.5 --device_batch_size=4 --grad_clip=1 --eval_every=100 --log_every=25 --save_every=50 --resume=1 --seed="$SEED")
RECALL=(--data=recall --recall_grow=0.75 --max_seq_len=1088 --total_batch_size=4352 --eval_tokens=32640)
FACTS=(--data=facts --needles=12 --max_seq_len=1068 --total_batch_size=4272 --eval_tokens=34176)
MC=(--mc_enabled=1 --mc_row_stride=4)

train() {  # tag, steps, flags…
  local tag="$1" steps="$2" done_file; shift 2
  done_file="$(printf '%s/checkpoints/%s/complete_%06d.json' "$NANOCHAT_BASE_DIR" "$tag" "$steps")"
  if [ -f "$done_file" ]; then echo "== $tag: already trained"; return; fi
  echo "== $tag"
  torchrun --standalone --nproc_per_node=1 scripts/base_train.py --model_tag="$tag" --num_iterations="$steps" "${SHARED[@]}" "$@"
}

CKPT="$NANOCHAT_BASE_DIR/checkpoints"
train "quickstart_recall_mc_$SEED" 400 "${RECALL[@]}" "${MC[@]}" --mc_preset=recall
train "quickstart_recall_vanilla_$SEED" 400 "${RECALL[@]}" --mc_enabled=0
train "quickstart_facts_mc_$SEED" 200 "${FACTS[@]}" "${MC[@]}" --mc_preset=chat --mc_horizon=12 --mc_start=0 \
  --init_from="$CKPT/quickstart_recall_mc_$SEED"

python -m scripts.mc_eval compare --recall_mc="$CKPT/quickstart_recall_mc_$SEED" --recall_vanilla="$CKPT/quickstart_recall_vanilla_$SEED" \
  --facts_mc="$CKPT/quickstart_facts_mc_$SEED" --out="$NANOCHAT_BASE_DIR/quickstart"
python -m scripts.mc_eval stream --checkpoint_dir="$CKPT/quickstart_recall_mc_$SEED" --streams=16 --filler=pairs --out="$NANOCHAT_BASE_DIR/stream"
