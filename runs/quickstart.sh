#!/usr/bin/env bash
# The main job: corpus, tokenizer, two pairs of small models (recall and text, each with and without MegaContext, same seed and
# tokens), the comparison, and facts in a stream of 64 windows. At most 15 minutes on two CPU cores after the install. A second run reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
SEED="${SEED:-42}"

[ -f "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ] || python -m scripts.tok_train --data=stdlib

# Both tasks: rows of 1,088 tokens, history 1,056; MegaContext's defaults: budget 128 entries, 32 recent and 32 judged tokens, block size 32,
# far histories of millions of tokens.
SHARED=(--max_seq_len=1088 --head_dim=32 --key_shift=1 --tie_qk=1 --rope_fraction=0.5 --device_batch_size=4
        --total_batch_size=4352 --grad_clip=1 --eval_tokens=32640 --eval_every=100 --log_every=25 --save_every=50 --resume=1
        --seed="$SEED")
RECALL=(--data=recall --depth=2 --aspect_ratio=64 --value_embeds=0 --smear=0 --resid_scalars=0 --backout=0 --recall_grow=0.75)
TEXT=(--data=stdlib --depth=4 --aspect_ratio=32 --matrix_lr=0.04 --unembedding_lr=0.01 --dtype=bfloat16)
MC=(--mc_enabled=1 --mc_gist=transformer)
MC_RECALL=(--mc_start=0.25 --mc_row_stride=4 --mc_wc_weight=0.5 --mc_teacher=attention --mc_lens_horizon=1 --mc_lens_lr=0.04)
MC_TEXT=(--mc_start=0.4 --mc_row_stride=2 --mc_lens_row_stride=2 --mc_lens_queries=256)

train() {  # tag, steps, flags…
  local tag="$1" steps="$2" done_file; shift 2
  done_file="$(printf '%s/checkpoints/%s/complete_%06d.json' "$NANOCHAT_BASE_DIR" "$tag" "$steps")"
  if [ -f "$done_file" ]; then echo "== $tag: already trained"; return; fi
  echo "== $tag"
  torchrun --standalone --nproc_per_node=1 scripts/base_train.py --model_tag="$tag" --num_iterations="$steps" "${SHARED[@]}" "$@"
}

train "quickstart_recall_mc_$SEED" 400 "${RECALL[@]}" "${MC[@]}" "${MC_RECALL[@]}"
train "quickstart_recall_vanilla_$SEED" 400 "${RECALL[@]}" --mc_enabled=0
train "quickstart_text_mc_$SEED" 250 "${TEXT[@]}" "${MC[@]}" "${MC_TEXT[@]}"
train "quickstart_text_vanilla_$SEED" 250 "${TEXT[@]}" --mc_enabled=0

CKPT="$NANOCHAT_BASE_DIR/checkpoints"
python -m scripts.mc_eval compare --recall_mc="$CKPT/quickstart_recall_mc_$SEED" --recall_vanilla="$CKPT/quickstart_recall_vanilla_$SEED" \
  --text_mc="$CKPT/quickstart_text_mc_$SEED" --text_vanilla="$CKPT/quickstart_text_vanilla_$SEED" --out="$NANOCHAT_BASE_DIR/quickstart"
python -m scripts.mc_eval stream --checkpoint_dir="$CKPT/quickstart_recall_mc_$SEED" --streams=16 --filler=pairs --out="$NANOCHAT_BASE_DIR/stream"
