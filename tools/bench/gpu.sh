#!/bin/bash
# tools/bench/gpu.sh: all GPU checks and measurements in one call, the first the most important.
#
#     OUT=results/gpu bash tools/bench/gpu.sh    # one GPU of 80 GB, 30 GB of disk, at most 26 minutes
#     STEPS="tests base train cudnn cudnn_padded" bash tools/bench/gpu.sh                # at most 10 minutes
#     STEPS="base padded eager encode paper_batch_22gib" bash tools/bench/gpu.sh         # 9 more; its own base
#     STEPS="base peer fp8_train fp8_encode small_base padding" bash tools/bench/gpu.sh  # 10 more
#     OUT=/tmp/dry bash tools/bench/gpu.sh --dry     # tiny sizes on a CPU: is the plumbing sound?
#
# Nothing is fetched: weights of Mistral-7B's shape are random, made in place. Needed: torch >= 2.11, numpy,
# tokenizers, safetensors, requests, pytest; for the step `peer` transformers, peft, sentence-transformers and
# datasets. What the machine lacks may lie in gpu-packages/ (pip install --no-deps --target).
# Each step has its own time limit and leaves $OUT/NAME.json or NAME.log; $OUT/summary.json tells exit codes
# and seconds (137: out of time; a milder signal would let train.py finish its step beside the next one).
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-results/gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d "${TMPDIR:-/tmp}/gpu-XXXXXX")
trap 'rm -rf "$WORK"' EXIT
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export PYTHONPATH="$PWD/gpu-packages${PYTHONPATH:+:$PYTHONPATH}"
BASE="$WORK/base"

if [ "${1:-}" = --dry ]; then
    DEVICE=cpu SHAPE=tiny SMALL=tiny DTYPE=float32 ROWS=24 BATCH=6 PAPER_BATCH=8 LENGTH=24 ENCODE=24
    CHUNKS="64 128" SMALL_CHUNK=64 TRAIN_STEPS=2 EMULATE=--emulate
    PEER="--rounds 1 --batch-size 4 --steps 2 --threads 1"
    DEVICES=cpu
elif [ $# -gt 0 ]; then
    echo "error: gpu.sh $1: takes --dry or nothing" >&2; exit 2
else
    DEVICE=cuda SHAPE=7b SMALL=small DTYPE=bfloat16 ROWS=4096 BATCH=256 PAPER_BATCH=2048 LENGTH=512
    ENCODE=1024 SMALL_CHUNK=1024 TRAIN_STEPS=3 EMULATE=
    CHUNKS="8192 16384"         # 16,384 needs more than 80 GB
    PEER="--rounds 1 --batch-size 64 --steps 4 --warmup 2"
    DEVICES="cpu cuda"
    if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
        echo "error: no CUDA device here: --dry tests the steps on a CPU" >&2; exit 2
    fi
fi

summary=""
failed=0
step() {    # NAME SECONDS COMMAND...: run it, keep its output, note how it ended
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    [ $DEVICE = cpu ] && limit=$((3 * limit))    # whoever runs it dry may have a busy machine
    case " ${STEPS:-$name} " in *" $name "*) ;; *) return ;; esac
    echo "==> $name: at most $limit s"
    timeout -s KILL "$limit" "$@" > "$OUT/$name.log" 2>&1
    code=$?
    [ $code -eq 0 ] || failed=1
    tail -n 4 "$OUT/$name.log"
    summary="$summary${summary:+,}
 \"$name\": {\"exit_code\": $code, \"seconds\": $((SECONDS - start))}"
    printf '{%s\n}\n' "$summary" > "$OUT/summary.json"
}

COMMON="--device $DEVICE --dtype $DTYPE --max-length $LENGTH"
export GPU_TESTS_ON=$DEVICE
step tests 130 "$PYTHON" -m pytest -q --noconftest -p no:cacheprovider -m gpu -rsP tests/gpu/test_gpu.py
step base 90 "$PYTHON" -m tools.bench.gpu base "$BASE" --shape $SHAPE --rows $ROWS $COMMON
TRAIN=("$PYTHON" -m tools.bench.gpu train "$BASE" $COMMON --batch-size $BATCH --steps $TRAIN_STEPS
    --tokens-per-chunk)
step train 140 "${TRAIN[@]}" $CHUNKS --json "$OUT/train.json"
# The same with cuDNN's attention, which builds a plan a shape; with few shapes; with few shapes and no cuDNN,
# which tells what padding costs; without the compiler.
step cudnn 120 "${TRAIN[@]}" ${CHUNKS%% *} --cudnn --json "$OUT/cudnn.json"
step cudnn_padded 90 "${TRAIN[@]}" ${CHUNKS%% *} --cudnn --pad 64 --json "$OUT/cudnn_padded.json"
step padded 70 "${TRAIN[@]}" ${CHUNKS%% *} --pad 64 --json "$OUT/padded.json"
step eager 70 "${TRAIN[@]}" ${CHUNKS%% *} --train-flags=--no-compile --json "$OUT/eager.json"
step encode 130 "$PYTHON" -m tools.bench.gpu encode "$BASE" $COMMON --batch-size $ENCODE \
    --tokens-per-chunk ${CHUNKS%% *} ${CHUNKS##* } --json "$OUT/encode.json"
step paper_batch_22gib 160 "$PYTHON" -m tools.bench.gpu train "$BASE" $COMMON --batch-size $PAPER_BATCH \
    --steps 1 --tokens-per-chunk $SMALL_CHUNK --memory-gib 22 --json "$OUT/paper_batch_22gib.json"
step peer 220 "$PYTHON" -m tools.bench.train "$BASE" --data "$BASE/examples.jsonl" $COMMON $PEER \
    --variants tokens --tokens-per-chunk ${CHUNKS%% *} --json "$OUT/peer.json"
step fp8_train 100 "${TRAIN[@]}" ${CHUNKS%% *} --fp8 --json "$OUT/fp8_train.json"
step fp8_encode 80 "$PYTHON" -m tools.bench.gpu encode "$BASE" $COMMON --batch-size $ENCODE \
    --tokens-per-chunk ${CHUNKS%% *} --fp8 --json "$OUT/fp8_encode.json"
step small_base 20 "$PYTHON" -m tools.bench.gpu base "$WORK/small" --shape $SMALL --rows 12 --dtype float32
step padding 60 "$PYTHON" -m tools.bench.padding "$WORK/small" --texts "$WORK/small/texts.txt" \
    --devices $DEVICES
step fp8_effect 60 "$PYTHON" -m tools.models.fp8 measure "$BASE" --data "$BASE/examples.jsonl" \
    --dtype $DTYPE --max-length $LENGTH --queries 16 $EMULATE
step memory 20 "$PYTHON" -m tools.bench.memory train --base "$BASE" --batch-size $BATCH \
    --measured "$OUT/train.json"
cat "$OUT/summary.json"
exit $failed
