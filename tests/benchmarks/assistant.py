"""The stages of examples/assistant, each measured on the same held-out sums.

    python -m tests.benchmarks.assistant --to=FOLDER [--base=runs/tiny]

Runs examples/assistant/run.sh, whose runs are ordinary ones in FOLDER and go on where they stopped, and asks the model
of each stage the questions of held_out.jsonl by `ziggurat generate`, greedily. The base knows no conversations, and is
asked in plain text. The columns are shares: of answers that have one of the two forms; of those in JSON; of those with
the right number, in either form; of those whose reward is 1; of right numbers among as many
questions of prompts.jsonl, with which the last stage trains; and of the pairs of held_out_pairs.jsonl whose chosen
answer, as a whole, the model finds more probable than the rejected one. Seconds are those that a stage's run has taken,
over all its starts. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from data.conversations import open_template
from data.corpus import open_corpus
from train.config.objective_config import ObjectiveConfig
from train.devices.mesh import one_device_mesh
from train.evaluation.preferences import evaluate_pairs, make_pair_step
from train.run.events import read_events
from train.run.folder import HeldOutDocument
from train.run.goodput import DOWN, goodput
from train.weights.load import load_trained

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "assistant"
STAGES = ("answers", "preferred", "rewarded")
FORMS = {"json": re.compile(r'\{"answer": (\d+)\}'), "sentence": re.compile(r"The answer is (\d+)\.")}
COLUMNS = ("well_formed", "json", "right", "reward", "right_trained", "preference_accuracy")


def answers_of(model: str, lines: Sequence[dict]) -> list[str]:
    """A model's most likely answers to the questions."""
    command = ["generate", model, "--prompts=-", "--greedy", "--max_new_tokens=24", "--batch_size=32"]
    asked = "".join(json.dumps(line) + "\n" for line in lines)
    process = subprocess.run([sys.executable, "-m", "launch.cli", *command], input=asked, check=True, text=True,
                             stdout=subprocess.PIPE)  # fmt: skip
    return [json.loads(line)["text"] for line in process.stdout.splitlines()]


def preference_accuracy(model: str, pairs: Path) -> float:
    """The share of pairs whose chosen answer has the higher log-probability."""
    with jax.set_mesh(one_device_mesh()):
        trained = load_trained(model)
        changes = {
            "messages_field": "chosen", "rejected_field": "rejected", "segmentation": "pack", "num_streams": 1,
            "validation_fraction": 0.0, "chat_template": str(ROOT / "examples" / "chat_template.jinja"),
        }  # fmt: skip
        data = dataclasses.replace(trained.config.data, **changes)
        # Without a reference, the reward of dpo is β log p of the answer.
        config = dataclasses.replace(trained.config, data=data, objective=ObjectiveConfig(name="dpo"))
        corpus = open_corpus(str(pairs), data, template=open_template(data, trained.tokenizer))
        documents = [
            HeldOutDocument(d.text, d.prompt, answers=d.answers, rejected=d.rejected) for d in corpus.all_documents()
        ]
        step = make_pair_step(config)
        return evaluate_pairs(step, trained.weights, None, documents, trained.tokenizer, config)["accuracy"]


def right_numbers(answers: Sequence[str], sums: Sequence[int]) -> int:
    """How many answers have one of the forms, and the right number."""
    numbers = [next((int(m[1]) for form in FORMS.values() if (m := form.fullmatch(a))), None) for a in answers]
    return sum(number == s for number, s in zip(numbers, sums, strict=True))


def measure(model: str, data: Path, converses: bool) -> dict[str, float]:
    """The figures of one model, by `COLUMNS`."""
    right_sum = runpy.run_path(str(EXAMPLE / "rewards.py"))["right_sum"]
    held_out = [json.loads(line) for line in (data / "held_out.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["messages"] for line in (data / "prompts.jsonl").read_text().splitlines()]
    n = len(held_out)
    trained = [{"messages": turns[:1], "sum": json.loads(turns[1]["content"])["answer"]} for turns in prompts[:n]]
    lines = held_out + trained
    sums = [line["sum"] for line in lines]
    plain = [{"prompt": line["messages"][0]["content"] + "\n"} for line in lines]
    answers = answers_of(model, lines if converses else plain)
    print(*(f"  {model}: {answer!r}" for answer in answers[:3]), sep="\n", file=sys.stderr)
    counts = {
        "well_formed": sum(any(form.fullmatch(a) for form in FORMS.values()) for a in answers[:n]),
        "json": sum(FORMS["json"].fullmatch(a) is not None for a in answers[:n]),
        "right": right_numbers(answers[:n], sums[:n]),
        "right_trained": right_numbers(answers[n:], sums[n:]),
        "reward": sum(right_sum("", a, json.dumps({"answer": s})) for a, s in zip(answers[:n], sums[:n], strict=True)),
    }
    shares = {name: count / n for name, count in counts.items()}
    return shares | {"preference_accuracy": preference_accuracy(model, data / "held_out_pairs.jsonl")}


def run_seconds(run: Path) -> float:
    """The seconds that a run has taken, without those between its starts."""
    return sum(seconds for kind, seconds in goodput(read_events(run / "events.jsonl")).items() if kind != DOWN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the runs are, or will be")
    help = "the run of `make pretrain`, trained if it is missing [runs/tiny]"
    parser.add_argument("--base", type=Path, default=ROOT / "runs" / "tiny", metavar="RUN", help=help)
    arguments = parser.parse_args()
    to, base = arguments.to.resolve(), arguments.base.resolve()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)
    }  # fmt: skip
    # The names that run.sh has by itself, so that its runs are found again.
    names = [path.relative_to(ROOT) if path.is_relative_to(ROOT) else path for path in (to, base)]
    subprocess.run([EXAMPLE / "run.sh", *names], check=True, env=environment, stdout=sys.stderr)
    stages = {"base": base} | {stage: to / stage for stage in STAGES}
    measured = {
        stage: measure(str(run), to / "data", converses=stage != "base") | {"seconds": run_seconds(run)}
        for stage, run in stages.items()
    }
    print(f"{'':11}{''.join(f'{name:>21}' for name in (*COLUMNS, 'seconds'))}")
    for stage, of in measured.items():
        print(f"{stage:11}{''.join(f'{of[name]:21.1%}' for name in COLUMNS)}{of['seconds']:21.0f}")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
