#!/bin/sh
# Makes the assistant in the folder $1 (runs/assistant), from the run $2 of `make pretrain` (runs/tiny), which is trained
# if it is not there. Stages that are finished are found and left alone, and one that was stopped goes on.
set -eu
cd "$(dirname "$0")/../.."
PATH=.venv/bin:$PATH
to=${1:-runs/assistant} base=${2:-runs/tiny} config=examples/assistant/assistant.py

[ -d "$base/checkpoints/900" ] || ziggurat pretrain --config=tiny --config.train.run_dir="$base"
[ -d "$to/data" ] || python examples/assistant/make_data.py "$to/data"

# 1. Conversations: it learns to answer, in the forms and with the mistakes that people have.
ziggurat pretrain --config=$config --config.train.run_dir="$to/answers" --config.train.init_from="$base@900" \
    --config.data.corpus="$to/data/conversations.jsonl" \
    --config.train.num_steps=400 --config.optimizer.learning_rate=4e-3

# 2. Preferences: of two answers with the same number it learns to give the one in JSON.
ziggurat pretrain --config=$config --config.train.run_dir="$to/preferred" --config.train.init_from="$to/answers@400" \
    --config.data.corpus="$to/data/preferences.jsonl" --config.data.messages_field=chosen \
    --config.data.rejected_field=rejected --config.objective.name=dpo \
    --config.train.num_steps=60 --config.optimizer.learning_rate=5e-4

# 3. A reward: it answers each prompt eight times, and learns from what rewards.py finds right.
ziggurat pretrain --config=$config --config.train.run_dir="$to/rewarded" --config.train.init_from="$to/preferred@60" \
    --config.data.corpus="$to/data/prompts.jsonl" --config.data.segmentation=document --config.objective.name=grpo \
    --config.objective.reward=examples/assistant/rewards.py:right_sum --config.objective.max_new_tokens=16 \
    --config.train.num_steps=100 --config.optimizer.learning_rate=5e-4
