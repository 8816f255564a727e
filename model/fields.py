"""The fields of the decoder's settings, floor by floor, with their defaults and bounds."""

from dataclasses import dataclass

from settings import setting

# Classes of Transformers by model_type, in the order in which they are tried.
EXPORT_CLASSES = (
    *("gemma", "llama", "mistral", "qwen3", "gpt2", "openai-gpt", "qwen2", "ministral", "smollm3", "phi3", "granite"),
    *("glm4", "olmo2", "olmo3", "gemma2", "gemma3_text", "gpt_neox", "stablelm", "starcoder2", "cohere2"),
    *("deepseek_v3", "deepseek_v2", "mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "glm4_moe", "gpt_oss"),
)


@dataclass(frozen=True)
class ModelFields:
    """The shape and numerics of the decoder."""

    # ── Size ───────────────────────────────────────────────────────────────────────────────────────────────────────
    num_layers: int = setting(4, "decoder blocks (L)", at_least=1, at_most=10_000)
    model_dim: int = setting(256, "width of the residual stream (D)", at_least=1, at_most=2**20)
    num_heads: int = setting(4, "query heads (H)", at_least=1, at_most=2**16)
    num_kv_heads: int | None = setting(
        None,
        "key/value heads (K), each shared by H/K query heads: H is MHA, 1 is MQA",
        unset="num_heads",
        at_least=1,
        at_most=2**16,
    )
    head_dim: int | None = setting(
        None, "width of a head (C)", unset="model_dim / num_heads", at_least=1, at_most=2**16
    )
    feedforward_dim: int | None = setting(
        None,
        "inner width of the feed-forward (F)",
        unset="4 model_dim, or 8/3 of it up to a multiple of 64 if gated",
        at_least=1,
        at_most=2**24,
    )
    vocab_size: int | None = setting(
        None, "number of token ids", unset="those of the tokenizer", at_least=1, at_most=2**24
    )
    parametrization: str = setting(
        "standard",
        "what the size changes: standard, no learning rate; mup, initial values and rates of each parameter, so that "
        "the best learning rate is that of base_dim and base_layers (Yang et al. 2022; CompleteP, Dey et al. 2025)",
        choices=("standard", "mup"),
    )
    base_dim: int | None = setting(
        None, "model_dim for which mup's learning rate is given", unset="not set", at_least=1, at_most=2**20
    )
    base_layers: int | None = setting(
        None, "num_layers for which it is given", unset="num_layers", at_least=1, at_most=10_000
    )

    # ── Floor 1: token embedding ───────────────────────────────────────────────────────────────────────────────────
    tie_embeddings: bool = setting(False, "use the transposed embedding as the unembedding")
    scale_embeddings: bool = setting(False, "multiply embeddings by √model_dim (Vaswani et al. 2017, section 3.4)")
    embedding_multiplier: float = setting(1.0, "factor of the embeddings (Granite; muP, Yang et al. 2022)", above=0)
    smear: bool = setting(
        False, "add to a token's embedding a gated part of that of the token before it in its document (modded-nanogpt)"
    )
    embedding_dropout: float = setting(
        0.0, "share of the embeddings that is dropped, after positions are added", resume="warn", at_least=0, below=1
    )

    # ── Floor 2: position ──────────────────────────────────────────────────────────────────────────────────────────
    position: str = setting("rope", "how attention learns positions", choices=("rope", "sinusoidal", "learned", "none"))
    max_positions: int | None = setting(
        None, "rows of the table of learned positions", unset="data.segment_length", at_least=1, at_most=2**24
    )
    rope_base: float = setting(10_000.0, "base of the rotary frequencies", above=1)
    rope_dim: int | None = setting(
        None, "first components of a head that are rotated (GPT-NeoX)", unset="head_dim", at_least=2, at_most=2**16
    )
    rope_scaling: str = setting(
        "none",
        "scaling of rotary frequencies for a longer context",
        choices=("none", "linear", "llama3", "yarn", "longrope"),
    )
    rope_factor: float = setting(1.0, "factor by which the context exceeds rope_original_context", at_least=1)
    rope_original_context: int | None = setting(
        None,
        "positions that the unscaled frequencies were trained for (llama3, yarn, longrope)",
        unset="not set",
        at_least=1,
    )
    rope_low_turns: float = setting(
        1.0, "rotary pairs with fewer turns over the original context are slowed by the whole factor", above=0
    )
    rope_high_turns: float | None = setting(
        None, "rotary pairs with more turns keep their frequency", unset="4 for llama3, 32 for yarn", above=0
    )
    rope_truncate: bool = setting(True, "yarn's interpolation begins and ends at whole pairs; gpt-oss's does not")
    rope_length: float | None = setting(
        None,
        "length of rotated vectors of length 1 with yarn or longrope",
        unset="0.1 ln(rope_factor) + 1 for yarn, √(1 + ln(rope_factor)/ln(rope_original_context)) for longrope",
        above=0,
    )
    rope_short_divisors: str | None = setting(
        None, "longrope's divisors of the frequencies of all pairs, with commas between them", unset="not set"
    )
    rope_long_divisors: str | None = setting(
        None, "those in rows that are longer than rope_original_context", unset="not set"
    )
    rope_long: bool | None = setting(None, "use rope_long_divisors", unset="by the length of a row", resume="warn")
    window_rope_base: float | None = setting(
        None, "base of the rotary frequencies in layers with the sliding window", unset="rope_base", above=1
    )
    window_rope_scaling: bool = setting(True, "rope_scaling holds for layers with the sliding window, too")

    # ── Floor 3: attention ─────────────────────────────────────────────────────────────────────────────────────────
    kv_latent_dim: int | None = setting(
        None,
        "width of the latent that keys and values are made of (multi-head latent attention, DeepSeek-V2 2024)",
        unset="no latent",
        at_least=1,
        at_most=2**20,
    )
    query_latent_dim: int | None = setting(
        None, "width of a latent that queries are made of", unset="no latent", at_least=1, at_most=2**20
    )
    value_dim: int | None = setting(
        None, "width of a head's values in latent attention", unset="head_dim", at_least=1, at_most=2**16
    )
    attention_bias: bool = setting(False, "biases of queries, keys and values")
    attention_output_bias: bool | None = setting(None, "bias of attention's output", unset="attention_bias")
    qk_norm: bool = setting(False, "RMSNorm of queries and keys (Dehghani et al. 2023)")
    qk_norm_over: str = setting(
        "head",
        "what qk_norm takes the mean square over: each head, or all heads (OLMo 2)",
        choices=("head", "all_heads"),
    )
    attention_scale: float | None = setting(None, "factor of the product q·k", unset="1/√head_dim", above=0)
    sliding_window: int | None = setting(
        None,
        "newest positions that each position attends to, itself included (Beltagy et al. 2020)",
        unset="all",
        at_least=1,
    )
    attention_softcap: float | None = setting(
        None, "c in scores c·tanh(score/c) (Gemma 2, Riviere et al. 2024)", unset="no cap", above=0
    )
    attention_sinks: bool = setting(
        False, "a learned score in each head's softmax, without a value (gpt-oss; Xiao et al. 2023)"
    )
    attention_gate: bool = setting(
        False, "a learned factor between 0 and 1 of each head's output, by the layer's input (Qiu et al. 2025)"
    )
    value_embedding_every: int | None = setting(
        None,
        "every n-th layer, counted back from the last, adds to attention's values a learned vector of the token, times "
        "a learned gate (modded-nanogpt; nanochat has 2)",
        unset="no layer",
        at_least=1,
        at_most=10_000,
    )
    attention_dropout: float = setting(
        0.0, "share of the attention weights that is dropped", resume="warn", at_least=0, below=1
    )
    attention_kernel: str = setting(
        "auto",
        "attention kernel; auto is splash on TPU, cudnn on GPU where it applies, and otherwise plain",
        resume="warn",
        choices=("auto", "plain", "splash", "cudnn"),
    )
    context_attention: str = setting(
        "auto",
        "how the devices of mesh.context get the keys of a row: all_gather them, or send them around a ring (Liu et "
        "al. 2023); auto is ring where rows are so long that products hide what is sent",
        resume="warn",
        choices=("auto", "all_gather", "ring"),
    )

    # ── Floor 4: feed-forward ──────────────────────────────────────────────────────────────────────────────────────
    activation: str = setting(
        "silu",
        "activation; gelu is exact, gelu_tanh is GPT-2's, relu2 is relu's square (So et al. 2021); clamped_swiglu is "
        "gpt-oss's, and gated",
        choices=("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"),
    )
    gated: bool = setting(
        True, "gate a second product with the activation (Shazeer 2020): SwiGLU with silu, GeGLU with gelu"
    )
    feedforward_bias: bool = setting(False, "biases of the feed-forward's products, in each expert, too")

    # ── Floor 4 as a mixture of experts ────────────────────────────────────────────────────────────────────────────
    num_experts: int | None = setting(
        None,
        "experts (E) among which a router chooses for each token (Shazeer et al. 2017)",
        unset="no experts",
        at_least=2,
        at_most=2**14,
    )
    experts_per_token: int = setting(2, "experts that compute a token", at_least=1, at_most=2**10)
    expert_dim: int | None = setting(
        None, "inner width of an expert", unset="feedforward_dim", at_least=1, at_most=2**24
    )
    dense_layers: int = setting(0, "first layers, whose feed-forward is dense (DeepSeek)", at_least=0, at_most=10_000)
    shared_expert_dim: int | None = setting(
        None, "inner width of an expert that computes every token", unset="no such expert", at_least=1, at_most=2**24
    )
    shared_expert_gate: bool = setting(False, "a learned factor between 0 and 1 of the shared expert (Qwen2-MoE)")
    router_score: str = setting(
        "softmax",
        "how a token's affinities to experts become scores: softmax, sigmoid (DeepSeek-V3), or softmax_of_chosen, over "
        "the chosen experts alone (gpt-oss)",
        choices=("softmax", "sigmoid", "softmax_of_chosen"),
    )
    router_normalize: bool = setting(True, "divide the scores of a token's experts by their sum")
    router_scale: float = setting(1.0, "factor of the scores of a token's experts", above=0)
    router_bias: bool = setting(False, "bias of the affinities (gpt-oss)")
    router_groups: int = setting(
        1, "groups of experts, of which the best are searched (DeepSeek-V2)", at_least=1, at_most=2**14
    )
    router_groups_per_token: int = setting(1, "groups in which a token's experts are", at_least=1, at_most=2**14)
    balance_bias: bool = setting(
        False, "a bias for each expert, added to the scores only to choose, balances the load (Wang et al. 2024)"
    )
    balance_rate: float = setting(
        0.001, "change of balance_bias in each step, up where an expert has too few tokens", resume="warn", at_least=0
    )
    balance_loss: float = setting(
        0.01,
        "weight of the loss E Σ fₑ pₑ of an expert's share of the tokens and mean score (Switch, Fedus et al. 2021)",
        resume="warn",
        at_least=0,
    )
    balance_over: str = setting(
        "batch",
        "what the balance loss takes shares of: the global batch, or each row (DeepSeek-V3)",
        resume="warn",
        choices=("batch", "row"),
    )
    router_z_loss: float = setting(
        0.0,
        "weight of log² of the sum of exponentials of the affinities (ST-MoE, Zoph et al. 2022)",
        resume="warn",
        at_least=0,
    )

    # ── The stack ──────────────────────────────────────────────────────────────────────────────────────────────────
    layer_pattern: str | None = setting(
        None,
        "kinds of layers from the first on, repeated (SSSF: every fourth layer is full): F full attention, S the "
        "sliding window, N full attention without positions; small letters have a dense feed-forward among experts",
        unset="F, or S with a sliding window",
    )
    norm: str = setting(
        "rmsnorm",
        "normalization: rmsnorm (Zhang and Sennrich 2019) or layernorm (Ba et al. 2016)",
        choices=("rmsnorm", "layernorm"),
    )
    norm_bias: bool = setting(True, "layernorm's bias")
    norm_offset: bool = setting(False, "a norm multiplies by 1 + its weight, which starts at 0 (Gemma)")
    norm_placement: str = setting(
        "pre",
        "pre: before attention and feed-forward; output: of their outputs, before the sum (OLMo 2); both (Gemma 2); "
        "post: after each sum, and no last norm (Vaswani et al. 2017)",
        choices=("pre", "post", "output", "both"),
    )
    block: str = setting(
        "sequential",
        "sequential: feed-forward reads the sum with attention; parallel: both read the block's input "
        "(GPT-NeoX), parallel_one_norm: through one norm (GPT-J, PaLM)",
        choices=("sequential", "parallel", "parallel_one_norm"),
    )
    residual_multiplier: float = setting(1.0, "factor of the outputs of attention and feed-forward (Granite)", above=0)
    residual_scalars: bool = setting(
        False,
        "a layer's input is r times the residual stream plus s times the first layer's input, with its own learned r "
        "and s, which start at 1 and 0 (modded-nanogpt)",
    )
    zero_init_outputs: bool = setting(
        False, "the matrices that write to the residual stream start at zero (modded-nanogpt; nanochat)"
    )
    norm_epsilon: float = setting(1e-5, "added to the mean square under the root of a norm", above=0)
    residual_dropout: float = setting(
        0.0, "share of the outputs of attention and feed-forward that is dropped", resume="warn", at_least=0, below=1
    )

    # ── Floor 5: linear + softmax, and the loss ────────────────────────────────────────────────────────────────────
    logit_multiplier: float = setting(1.0, "factor of the logits (Cohere, Granite; muP)", above=0)
    logit_softcap: float | None = setting(
        None, "c in logits c·tanh(logit/c) (Gemma 2, Riviere et al. 2024)", unset="no cap", above=0
    )
    label_smoothing: float = setting(
        0.0, "share of the target spread over all tokens (Szegedy et al. 2016)", resume="warn", at_least=0, below=1
    )
    z_loss: float = setting(
        0.0, "weight of log² of the softmax's denominator in the minimized loss (PaLM, 2022)", resume="warn", at_least=0
    )
    loss_chunk: int | None = setting(
        None,
        "positions on a device whose logits exist at once in the loss",
        unset="2²⁸ logits",
        resume="free",
        at_least=1,
    )

    reward_head: bool = setting(
        False,
        "a linear map of each position's vector to one score takes the place of the unembedding, for objective.name = "
        "reward",
    )

    # ── Export ─────────────────────────────────────────────────────────────────────────────────────────────────────
    export_as: str | None = setting(
        None,
        "model_type of the class in Transformers that exports take",
        unset="the first that has all choices",
        resume="free",
        choices=EXPORT_CLASSES,
    )

    # ── Numerics ───────────────────────────────────────────────────────────────────────────────────────────────────
    compute_dtype: str = setting(
        "bfloat16",
        "dtype of activations and products; weights, softmax and loss are float32",
        resume="warn",
        choices=("bfloat16", "float32"),
    )
    matmul_dtype: str | None = setting(
        None,
        "dtype of the products with the weights of attention and feed-forward, forward and for the gradients of "
        "activations; float8 and int8 have a scale for each row and column",
        unset="compute_dtype",
        resume="warn",
        choices=("float8", "int8"),
    )
    remat_policy: str = setting(
        "none",
        "what the forward pass keeps for the backward pass: none (no remat) keeps all, products the outputs of matrix "
        "products and attention, projections those of the attention floor, attention that of its heads, full each "
        "layer's input alone; offload_products and offload keep products, or the inputs, in the host's memory",
        resume="free",
        choices=("none", "products", "projections", "attention", "full", "offload_products", "offload"),
    )
