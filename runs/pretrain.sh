# Sourced by the GPU recipes: data, tokenizer, then the same model twice, vanilla and with MegaContext, same seed and tokens.
# DEPTH, RANKS (GPUs), SHARDS (of nanochat's public data, about 100 MB each) and DEVICE_BATCH (rows) are set by the recipe.
#
# --dry_run prints both plans and stops: no GPU, no download, nothing written. All other arguments go to both trainings, whose
# names end in $NAME if it is set. A recipe that was interrupted goes on where it was.
VOCAB=32768
DATA="$NANOCHAT_BASE_DIR/fineweb-edu"

# Rows of 2,048 tokens within one document, whole history seen by every layer: what a working context needs. Both trainings get them.
SHARED=(--depth="$DEPTH" --data="$DATA" --max_seq_len=2048 --rows=long --window_pattern=L --key_shift=1 --device_batch_size="$DEVICE_BATCH"
        --eval_every=250 --eval_tokens=1048576 --save_every=500 --resume=1 --seed=42)
MC=(--mc_enabled=1 --mc_preset=prose --mc_budget=256 --mc_row_stride=2)

dry_run=0
arguments=()
for argument in "$@"; do
  case "$argument" in
    --dry_run | --dry-run | --dry_run=1 | --dry-run=1) dry_run=1 ;;
    *) arguments+=("$argument") ;;
  esac
done

train() { # kind, flags of it
  local kind="$1"
  shift
  local flags=("${SHARED[@]}" --model_tag="d${DEPTH}_$kind${NAME:-}" "$@" ${arguments[@]+"${arguments[@]}"})
  echo "== $kind d$DEPTH on $RANKS GPU(s)"
  if [ "$dry_run" = 1 ]; then # the tokenizer will have the BPE tokens, <|bos|> and 1,056 ids of the recall task
    RANK=0 WORLD_SIZE="$RANKS" python -m scripts.base_train "${flags[@]}" --vocab_size=$((VOCAB + 1057)) --dry_run=1
  else
    torchrun --standalone --nproc_per_node="$RANKS" scripts/base_train.py "${flags[@]}"
  fi
}

if [ "$dry_run" = 0 ]; then
  python -m nanochat.dataset --num_shards="$SHARDS" --dir="$DATA"
  [ -f "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ] || python -m scripts.tok_train --data="$DATA" --vocab_size="$VOCAB"
fi
train vanilla --mc_enabled=0
train mc "${MC[@]}"
