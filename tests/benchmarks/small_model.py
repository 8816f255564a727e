"""What each choice of the preset `small` is worth, on a twin that two CPU cores can train.

    python -m tests.benchmarks.small_model --to=FOLDER [VARIANT ...]

The twin has the preset's proportions at a quarter of its width, a third of its layers, a quarter of its segment and an
eighth of its vocabulary, and four times its learning rate. Each variant reads as many tokens of the default corpus.
`former` is the preset as it was up to 0.10.0, `second` from then to 0.22.0, `small` the preset as it is; after + is
the one change to any of them. All have the shuffle window of `small`.

Bits a byte are of held-out documents, at a run's end. A seed gives all variants the same tokenizer, data and order.
FLOPs are the model's for a token of training, of the twin and of `small` itself, next to the first variant's. The runs
are ordinary ones in FOLDER/VARIANT-SEED: the same command again goes on where it stopped. The last line is one JSON
object.
"""

import argparse
import json
import re
from pathlib import Path

from launch.presets import load_config
from model.parameters import count_parameters
from tests.benchmarks.learning import train
from train.run.step_log import held_out_figure
from train.step.flops import flops_per_token

STEPS, SCALE = 400, 4
TWIN = {
    "model.num_layers": "4", "model.model_dim": "192", "model.num_heads": "6", "model.num_kv_heads": "2",
    "model.remat_policy": "none", "tokenizer.vocab_size": "4096", "data.corpus": "stdlib", "data.segment_length": "256",
    "data.num_workers": "0", "optimizer.warmup_steps": "10", "train.num_steps": f"{STEPS}", "train.batch_size": "8",
    "train.accumulation_steps": "1", "checkpoint.every_steps": f"{STEPS}", "evaluation.every_steps": f"{STEPS}",
    "evaluation.max_bytes": "262144", "evaluation.loop_bytes": "32768", "evaluation.sample_tokens": "0",
}  # fmt: skip
# The choices of `small` from 0.10.0 to 0.22.0, and those up to 0.10.0. A field at its default is accepted with every
# choice of the others.
SECOND = {
    "data.segmentation": "concatenate", "data.shuffle_rows": "false", "optimizer.learning_rate": "1.5e-3",
    "optimizer.muon_momentum": "0.95", "optimizer.beta2": "0.95", "optimizer.weight_decay": "0.1",
    "optimizer.schedule": "cosine", "optimizer.decay_fraction": "0.2", "optimizer.final_fraction": "0.1",
}  # fmt: skip
FORMER = SECOND | {
    "model.qk_norm": "false", "model.scale_embeddings": "false", "optimizer.name": "adamw",
    "optimizer.learning_rate": "1e-3",
}  # fmt: skip
WINDOW = {"model.layer_pattern": "SSSF", "model.sliding_window": "256"}
VARIANTS: dict[str, dict[str, str]] = {
    "former": FORMER,
    "former + muon": FORMER | {"optimizer.name": "muon", "optimizer.learning_rate": "1.5e-3"},
    "former + qk_norm": FORMER | {"model.qk_norm": "true"},
    "former + scale_embeddings": FORMER | {"model.scale_embeddings": "true"},
    "former + wsd to 0.01": FORMER
    | {"optimizer.schedule": "wsd", "optimizer.decay_fraction": "0.65", "optimizer.final_fraction": "0.01"},
    "former + relu2 as gate": FORMER | {"model.activation": "relu2"},
    "former + window in 3 of 4": FORMER | WINDOW,
    "former + norms of OLMo 2": FORMER
    | {"model.norm_placement": "output", "model.qk_norm": "true", "model.qk_norm_over": "all_heads"},
    "former + z_loss": FORMER | {"model.z_loss": "1e-4"},
    "second": SECOND,
    "second + adamw": SECOND | {"optimizer.name": "adamw", "optimizer.learning_rate": "1e-3"},
    "second + window in 3 of 4": SECOND | WINDOW,
    "second + shuffled rows": SECOND | {"data.segmentation": "pack", "data.shuffle_rows": "true"},
    "small": {},
    **{f"small + rate of {rate}": {"optimizer.learning_rate": rate} for rate in ("1.5e-3", "2.25e-3", "4.5e-3")},
    "small + adamw": {
        "optimizer.name": "adamw", "optimizer.learning_rate": "1e-3", "optimizer.muon_momentum": "0.95",
    },
}  # fmt: skip
SEEDS = (0, 1, 2)


def seeds_of(name: str) -> tuple[int, ...]:
    """The presets and the rates next to that of `small` have three seeds, the other changes one."""
    return SEEDS if "+" not in name or "rate" in name else SEEDS[:1]


def twin_of(variant: dict[str, str]) -> dict[str, str]:
    """Returns the fields of the variant's twin: those of length grow with the segment, the learning rate with 1/D."""
    config = load_config("small", variant)
    fields = variant | TWIN | {"optimizer.learning_rate": f"{SCALE * config.optimizer.learning_rate:.6g}"}
    if config.model.sliding_window:
        fields["model.sliding_window"] = f"{config.model.sliding_window // SCALE}"
    return fields


def flops_of(fields: dict[str, str]) -> float:
    """Returns the model FLOPs of training on a token, without the optimizer's."""
    config = load_config("small", fields)
    model = config.model.resolved(config.tokenizer.vocab_size, config.data.segment_length)
    return flops_per_token(model, config.data.segment_length)


def folder_of(variant: str, seed: int) -> str:
    words = re.findall(r"\w+", variant)
    return f"{'_'.join(words)}-{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="VARIANT", default=[*VARIANTS])
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the runs are, or will be")
    arguments = parser.parse_args()
    twins = {name: twin_of(VARIANTS[name]) for name in arguments.names}
    bits = {
        name: {
            seed: held_out_figure(train(arguments.to / folder_of(name, seed), twin, seed, "small")[-1], "bits_per_byte")
            for seed in seeds_of(name)
        }
        for name, twin in twins.items()
    }
    print(f"{'held-out bits a byte':26} seed 0  seed 1  seed 2   parameters  FLOPs a token (small's)")
    first, first_twin = flops_of(FORMER), flops_of(twin_of(FORMER))
    figures = {}
    for name, of_seeds in bits.items():
        model = load_config("small", twins[name]).model.resolved(4096, 256)
        parameters = count_parameters(model)
        shares = flops_of(twins[name]) / first_twin, flops_of(VARIANTS[name]) / first
        columns = "".join(f"{of_seeds[seed]:8.3f}" if seed in of_seeds else " " * 8 for seed in SEEDS)
        print(f"{name:25}{columns}{parameters:13,}  {shares[0]:13.3f} ({shares[1]:.3f})")
        figures[name] = {"bits_per_byte": of_seeds, "parameters": parameters, "flops": shares}
    print(json.dumps({"tokens": STEPS * 8 * 256, "variants": figures}))


if __name__ == "__main__":
    main()
