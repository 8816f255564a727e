"""Writes greetings.jsonl: conversations in which somebody gives a name, and asks for it later."""

import json
import random

NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon"]
NAMES += ["Kim", "Lea", "Max", "Nia", "Otto", "Pia", "Rosa", "Sam", "Tom", "Una"]
FACTS = {"a cat": "Meow.", "a dog": "Woof.", "a cow": "Moo.", "an owl": "Hoo.", "a duck": "Quack.", "a sheep": "Baa."}

draw = random.Random(0)
with open("greetings.jsonl", "w") as file:
    for _ in range(4000):
        name, turns = draw.choice(NAMES), []
        pairs = [(f"What does {animal} say?", says) for animal, says in draw.sample(sorted(FACTS.items()), 2)]
        hello = [(f"My name is {name}.", draw.choice(["Hello, {}.", "Hi, {}.", "Welcome, {}."]).format(name))]
        asks = [("What is my name?", f"Your name is {name}.")]
        for question, answer in [*pairs[: draw.randrange(2)], *hello, *pairs[1 : 1 + draw.randrange(2)], *asks]:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        print(json.dumps({"messages": turns}), file=file)
