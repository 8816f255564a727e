"""Writes the data of the assistant: conversations, preferences and prompts about sums, and what is held out of them.

    python examples/assistant/make_data.py FOLDER

A sum is of a number from 10 to 99 and one from 1 to 9. The sums of held_out.jsonl and held_out_pairs.jsonl are in no
other file. The same files are written each time. Each has a part in making, or in judging, the assistant:

    conversations.jsonl    people who demonstrate: most answer with a sentence, some with JSON, and when digits carry
                           most forget it: 27 + 8 is 25 for them
    preferences.jsonl      the same number as JSON, which is chosen, and as a sentence, which is rejected
    prompts.jsonl          questions with the right answer, for the reward
    held_out.jsonl         questions without an answer
    held_out_pairs.jsonl   pairs as in preferences.jsonl
"""

import json
import random
import sys
from pathlib import Path

QUESTIONS = ("What is {a} + {b}?", "How much is {a} plus {b}?", "Add {b} to {a}.")
CONVERSATIONS, PREFERENCES, PROMPTS, HELD_OUT = 16_000, 4_000, 4_000, 200
JSON_SHARE = 0.3
FORGOTTEN_SHARE = 0.65


def turns(question: str, *answers: str) -> list[dict[str, str]]:
    """A question of the user, and the answer if there is one."""
    return [{"role": "user", "content": question}, *({"role": "assistant", "content": text} for text in answers)]


def as_json(number: int) -> str:
    """The form of an answer that is preferred."""
    return json.dumps({"answer": number})


def as_sentence(number: int) -> str:
    """The other form."""
    return f"The answer is {number}."


def demonstrated(draw: random.Random, a: int, b: int) -> int:
    """The sum as people demonstrate it, who often forget to carry."""
    carries = a % 10 + b >= 10
    return a + b - 10 * (carries and draw.random() < FORGOTTEN_SHARE)


def write(file: Path, lines: list[dict]) -> None:
    """Writes a file of JSON lines."""
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(folder: Path) -> None:
    """Writes the five files."""
    draw = random.Random(0)
    sums = [(a, b) for a in range(10, 100) for b in range(1, 10)]
    draw.shuffle(sums)
    held_out, known = sums[:HELD_OUT], sums[HELD_OUT:]

    def question(a: int, b: int) -> str:
        return draw.choice(QUESTIONS).format(a=a, b=b)

    def conversation() -> dict:
        messages = []
        for a, b in draw.sample(known, draw.choice((1, 2))):
            form = as_json if draw.random() < JSON_SHARE else as_sentence
            messages += turns(question(a, b), form(demonstrated(draw, a, b)))
        return {"messages": messages}

    def pair(a: int, b: int) -> dict:
        text, number = question(a, b), demonstrated(draw, a, b)
        return {"chosen": turns(text, as_json(number)), "rejected": turns(text, as_sentence(number))}

    def prompt(a: int, b: int) -> dict:
        return {"messages": turns(question(a, b), as_json(a + b))}

    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "conversations.jsonl", [conversation() for _ in range(CONVERSATIONS)])
    write(folder / "preferences.jsonl", [pair(*draw.choice(known)) for _ in range(PREFERENCES)])
    write(folder / "prompts.jsonl", [prompt(*draw.choice(known)) for _ in range(PROMPTS)])
    write(folder / "held_out.jsonl", [{"messages": turns(question(a, b)), "sum": a + b} for a, b in held_out])
    write(folder / "held_out_pairs.jsonl", [pair(a, b) for a, b in held_out])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
