#!/bin/sh
# Makes an assistant in the folder $1 (runs/assistant) from the run $2 of `make pretrain` (runs/tiny); relative names are
# those of the project's folder. What is finished is found and left alone, and what was stopped goes on.
set -eu
cd "$(dirname "$0")/../.."
PATH=$PWD/.venv/bin:$PATH
to=${1:-runs/assistant} base=${2:-runs/tiny} config=examples/assistant/assistant.py

ziggurat pretrain --config=tiny --config.train.run_dir="$base"
python examples/assistant/make_data.py "$to/data"

# 1. Conversations: the model learns to answer, in the forms and with the mistakes of those who demonstrate it.
ziggurat pretrain --config=$config --config.train.run_dir="$to/answers" --config.train.init_from="$base@900" \
    --config.data.corpus="$to/data/conversations.jsonl" \
    --config.train.num_steps=400 --config.optimizer.learning_rate=6e-3

# 2. Preferences: of two answers with the same number, the model learns to prefer the one in JSON.
ziggurat pretrain --config=$config --config.train.run_dir="$to/preferred" --config.train.init_from="$to/answers@400" \
    --config.data.corpus="$to/data/preferences.jsonl" --config.data.messages_field=chosen \
    --config.data.rejected_field=rejected --config.objective.name=dpo \
    --config.train.num_steps=40 --config.optimizer.learning_rate=1e-3

# 3. A reward: the model answers each question eight times, and learns from what rewards.py finds right.
ziggurat pretrain --config=$config --config.train.run_dir="$to/rewarded" --config.train.init_from="$to/preferred@40" \
    --config.data.corpus="$to/data/prompts.jsonl" --config.data.segmentation=document --config.objective.name=grpo \
    --config.objective.reward=examples/assistant/rewards.py:right_sum --config.objective.max_new_tokens=16 \
    --config.objective.kl_weight=0.01 --config.train.batch_size=64 \
    --config.train.num_steps=150 --config.optimizer.learning_rate=2e-3
