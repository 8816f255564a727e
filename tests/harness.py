"""Small tasks for lm-evaluation-harness about the small run's corpus, one of each kind of request."""

import json
import textwrap
from pathlib import Path

DOCUMENTS = [
    {"begin": f"{subject} {verb}", "choices": [" the cat.", " a dog.", " my bird."], "answer": (i + j) % 3}
    for i, subject in enumerate(["the cat", "a dog", "my bird", "one fish"])
    for j, verb in enumerate(["eats", "sees", "likes", "hears"])
]
TASKS = {
    "choices": """
        output_type: multiple_choice
        doc_to_text: "{{begin}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{answer}}"
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """,
    "words": """
        output_type: loglikelihood
        doc_to_text: "{{begin}}"
        doc_to_target: "{{choices[answer]}}"
        metric_list: [{metric: perplexity}, {metric: acc}]
        """,
    "texts": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{begin}} {{choices | join(' ')}} {{(begin ~ ' so ') * 12}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
        """,
    "endings": """
        output_type: generate_until
        doc_to_text: "{{begin}}"
        doc_to_target: "{{choices[answer][:-1]}}"
        generation_kwargs: {until: ["."], max_gen_toks: 8}
        metric_list: [{metric: exact_match}]
        """,
}


def write_tasks(folder: Path) -> Path:
    """A folder with the tasks, and the documents that they share."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = folder / "documents.jsonl"
    documents.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {documents}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{textwrap.dedent(text)}")
    return folder
