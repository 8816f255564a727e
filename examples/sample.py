"""Load weights and continue a prompt: first the most likely next tokens, then sampled text.

python examples/sample.py WEIGHTS PROMPT        (an export such as runs/tiny/export, a run's folder, or RUN@STEP)
"""

import sys

import jax

from model.generation.sampling import Sampling
from train.devices.mesh import one_device_mesh
from train.evaluation.continuation import continuations, make_generator
from train.evaluation.inspection import inspect_positions
from train.weights.load import load_trained

weights, prompt = sys.argv[1:]
with jax.set_mesh(one_device_mesh()):
    trained = load_trained(weights)
    config, tokenizer = trained.config, trained.tokenizer

    # One pass predicts the token after every position of the prompt; the last position's predictions continue it.
    positions = inspect_positions(config, trained.weights, tokenizer, tokenizer.encode(prompt), best=5)
    for prediction in positions[-1]["best"]:
        print(f"{prediction['probability']:6.1%}  {prediction['token']!r}")

    # The generator caches keys and values, so that each new token costs the computation of one position.
    generator = make_generator(config, trained.weights, tokenizer)
    sampling = Sampling(temperature=0.8, top_k=40)
    prompts = [tokenizer.encode_with_bos(prompt)]
    for seed in range(3):
        parts = continuations(generator, tokenizer, prompts, max_new_tokens=40, sampling=sampling, seed=seed)
        print(f"\n[{seed}] {prompt}{''.join(part.text for part in parts)}")
