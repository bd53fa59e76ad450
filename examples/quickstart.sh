#!/usr/bin/env bash
# From nothing to a chat that answers what it has never seen, on a CPU: data, pretraining, fine-tuning, marks.
#
#   bash examples/quickstart.sh
#
# A MiniMind of 1.7M parameters (minimind3_tiny) learns two tasks: addition ("17+25=?", answer "42") and lookup
# ("Table: KD=37, QX=52. What is QX?", answer "52"). It is pretrained on bare sums and tables, fine-tuned on
# dialogues, and asked 400 questions about pairs of numbers (in either order) and keys that occur in no text and no
# dialogue. That is what a model of this size learns in minutes: it shows that every stage works, not that it knows
# anything. Ends with 1 if fewer than LEAST of the sums are right. The same command again skips what is finished.
#
# QUICKSTART_PRETRAIN_ITERS QUICKSTART_SFT_ITERS   iterations of the stages, over 50, each number in a directory of its own
# LEAST            share of the sums that must be right (default 0.8)
# OUTPUT_DIR       default outputs/quickstart; delete it to begin anew
# DATA_DIR         default data/quickstart
# common.sh has the settings of device and processes; here DEVICE is cpu unless it is given.
export DEVICE=${DEVICE:-cpu}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export DATA_DIR=${DATA_DIR:-$(dirname "$HERE")/data/quickstart}
source "$HERE/mcore/minimind/common.sh"

export PYTHON NPUS_PER_NODE MODEL=minimind3_tiny TP=1 TOKENIZER_PATH=$DATA_DIR/tokenizer
PRETRAIN_ITERS=${QUICKSTART_PRETRAIN_ITERS:-2000}
SFT_ITERS=${QUICKSTART_SFT_ITERS:-1000}
OUTPUT=$(absolute "${OUTPUT_DIR:-$ROOT/outputs/quickstart}")
PRETRAINED=$OUTPUT/pretrain-$PRETRAIN_ITERS
TUNED=$OUTPUT/sft-$SFT_ITERS
TEXT=$DATA_DIR/drills.jsonl
DIALOGUES=$DATA_DIR/dialogues.jsonl
QUESTIONS=$DATA_DIR/questions.jsonl
# Eight sequences of 256 tokens an update, in one micro-batch of each process.
BATCH=(--lr-warmup-iters 50 --adam-beta2 0.99)
export SEQ_LENGTH=256 GBS=8 MBS=$((8 / NPUS_PER_NODE)) LOG_INTERVAL=50 EVAL_INTERVAL=200
[ $((MBS * NPUS_PER_NODE)) = "$GBS" ] || fail "NPUS_PER_NODE=$NPUS_PER_NODE: expected 1, 2, 4 or 8"

TIMES=()
# stage NAME COMMAND...: run a stage, say how long it took.
stage() {
    local name=$1 began=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@"
    TIMES+=("$(printf '%-12s %4d s' "$name" $((SECONDS - began)))")
}

make() { # make FILE COMMAND...: unless it is there
    [ -e "$1" ] || "${@:2}"
}

data() {
    local corpus=("$PYTHON" -m minimind_mcore.preprocess.corpus --seed 42)
    make "$DATA_DIR/sample.jsonl" "${corpus[@]}" --output "$DATA_DIR/sample.jsonl"
    make "$TEXT" "${corpus[@]}" --kind drills --output "$TEXT"
    make "$QUESTIONS" "${corpus[@]}" --kind sft --output "$DIALOGUES" --held-out "$QUESTIONS"
    # A token for each digit: the sum of two numbers is then a matter of few rules.
    make "$TOKENIZER_PATH" "$PYTHON" -m minimind_mcore.preprocess.train_tokenizer \
        --input "$DATA_DIR/sample.jsonl" --output "$TOKENIZER_PATH" --split-digits
    # In the form in which the chat template asks: without system prompt, with the empty thought.
    DATA_PATH=$DIALOGUES OUTPUT_PREFIX=$DATA_DIR/dialogues \
        bash "$HERE/mcore/minimind/data_convert_minimind_instruction.sh" \
        --pack --neat-pack --system-ratio 0 --empty-think-ratio 1
}

is_finished() { # is_finished CHECKPOINTS ITERATIONS
    [ "$(cat "$1/latest_checkpointed_iteration.txt" 2> /dev/null)" = "$2" ] && echo "finished before: $1"
}

pretrain() {
    is_finished "$PRETRAINED/checkpoints" "$PRETRAIN_ITERS" ||
        DATA_PATH=$TEXT OUTPUT_DIR=$PRETRAINED TRAIN_ITERS=$PRETRAIN_ITERS LR=3e-3 \
            bash "$HERE/mcore/minimind/pretrain_minimind_ptd.sh" "${BATCH[@]}"
}

tune() {
    is_finished "$TUNED/checkpoints" "$SFT_ITERS" ||
        DATA_PATH=$DATA_DIR/dialogues PACK=1 OUTPUT_DIR=$TUNED TRAIN_ITERS=$SFT_ITERS LR=3e-3 \
            CKPT_LOAD_DIR=$PRETRAINED/checkpoints \
            bash "$HERE/mcore/minimind/tune_minimind_full_ptd.sh" "${BATCH[@]}"
}

chat() { # the first unseen sum and the first unseen lookup, as typed into a chat
    "$PYTHON" - "$QUESTIONS" << 'END' | LOAD_DIR=$TUNED/checkpoints TOP_K=1 HISTORY_TURNS=0 \
        bash "$HERE/mcore/minimind/chat_minimind_ptd.sh"
import json, sys
first = {}
for line in open(sys.argv[1], encoding="utf-8"):
    record = json.loads(line)
    first.setdefault(record["task"], record["conversations"][0]["content"])
print(*first.values(), sep="\n")
END
}

marks() {
    LOAD_DIR=$TUNED/checkpoints TASK=exact_match OUTPUT_DIR=$TUNED BATCH=100 \
        bash "$HERE/mcore/minimind/evaluate_minimind_ptd.sh" --task-data-path "$QUESTIONS"
}

stage data data
stage pretraining pretrain
stage fine-tuning tune
stage chat chat
stage marks marks

printf '\n'
printf '%s\n' "${TIMES[@]}"
"$PYTHON" - "$PRETRAINED" "$TUNED" "${LEAST:-0.8}" << 'END'
import json, sys
pretrained, tuned, least = sys.argv[1:]
tasks = json.load(open(f"{tuned}/scores.json", encoding="utf-8"))["accuracy"]["exact_match"]["subjects"]
found = tasks["addition"]["accuracy"]
print(f"""
losses      {pretrained}/loss.png  {tuned}/loss.png
marks       {tuned}/scores.png  {tuned}/answers.jsonl
the model   {tuned}/checkpoints
unseen sums {found:.1%} right, expected {float(least):.0%} or more""")
sys.exit(found < float(least))
END
