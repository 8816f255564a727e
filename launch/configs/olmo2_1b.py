"""ziggurat pretrain --config=olmo2_1b --config.data.corpus='texts/*.jsonl'

OLMo 2 1B (OLMo Team 2025): 1,484,916,736 parameters, norms of each branch's output, and of queries and keys over all
heads. The recipe is the published first stage (configs/official-0425/OLMo2-1B-stage1.yaml in allenai/OLMo), 2.1 million
tokens a step: planned for 5 trillion tokens, as here, and stopped at 4. There embeddings have no weight decay. Only its
shapes have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 16,
        "model_dim": 2048,
        "num_heads": 16,
        "feedforward_dim": 8192,
        "vocab_size": 100_352,
        "rope_base": 500_000.0,
        "qk_norm": True,
        "qk_norm_over": "all_heads",
        "norm_placement": "output",
        "norm_epsilon": 1e-6,
        "z_loss": 1e-5,
        "remat_policy": "full",
    }
    config.data = {"segment_length": 4096}
    config.tokenizer = {"vocab_size": 100_278}
    config.optimizer = {"learning_rate": 4e-4, "warmup_steps": 4000}
    config.train = {"run_dir": "runs/olmo2_1b", "num_steps": 2_384_000, "batch_size": 512}
    config.checkpoint = {"every_steps": 1000}
    return config
