"""Fused attention kernels of libraries, which never hold a score for every pair of positions.

Each computes `model.attention.attend` under `causal_mask`. `choose_kernel` reads the platform of the ambient mesh, so
that a plan for another platform chooses as that platform would.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from model.attention import Attend, attend, causal_mask
from model.backend import on_one_cpu, platform
from model.collectives import gather_keys
from model.config import ResolvedModelConfig
from model.context_parallel import all_positions, zigzag_order
from model.cpu_attention import attend_in_blocks
from model.dropout import DropoutKeys
from model.halo_attention import halo_attention, plain_halo, splash_halo
from model.ring_attention import Keys, PieceKernel, PlainPieces, Queries, Ring, SplashPieces, ring_attention
from model.sharding import Layout, as_tuple

# Side lengths of splash attention's blocks of scores, of which the largest that divides a piece of a row is taken, up
# to a quarter of the row: larger blocks have less to start and to write, but more masked pairs.
BLOCKS = (1024, 512, 256, 128)
# The largest for heads of more than 128: the 16 MiB of vector memory that a kernel has by default hold no more.
WIDE_BLOCK = 512
# The most keys of a block that are multiplied at once: the scores of more would not fit the vector memory.
KEYS_AT_ONCE = 512
PLATFORM_KERNELS = {"tpu": "splash", "gpu": "cudnn"}
# The fewest FLOPs for each byte sent for which keys go around a ring unless the config asks for it. With 8,192 the
# merging of results made a step with a ring 4% slower than with gathered keys, with 32,768 it was 3% faster.
RING_FLOPS_A_BYTE = 16_384
_patching_jax = threading.Lock()


class KernelChoice(NamedTuple):
    """A kernel (plain, splash or cudnn), and the reason for it.

    Attributes:
        is_ring: keys of other devices' positions arrive by ring attention; else they are all-gathered.
        ring_reason: the reason for that, or nothing where devices share no positions.
    """

    kernel: str
    reason: str
    is_ring: bool = False
    ring_reason: str = ""

    def __str__(self) -> str:
        text = f"{self.kernel} ({self.reason})"
        if self.ring_reason:
            text += f", {'ring' if self.is_ring else 'all-gather'} of keys ({self.ring_reason})"
        return text


def choose_kernel(config: ResolvedModelConfig, layout: Layout, T: int) -> KernelChoice:
    """Returns the kernel for segments of T positions on the ambient mesh.

    Raises:
        ValueError: `model.attention_kernel` or `model.context_attention` asks for what cannot compute this model's
            attention.
    """
    kernel, reason = _choose_kernel(config, layout, T)
    return KernelChoice(kernel, reason, *_choose_ring(kernel, config, layout, T))


def _choose_kernel(config: ResolvedModelConfig, layout: Layout, T: int) -> tuple[str, str]:
    name = platform()
    wanted = config.attention_kernel
    kernel = PLATFORM_KERNELS.get(name, "plain") if wanted == "auto" else wanted
    obstacle = _obstacle(kernel, config, layout, T)
    if wanted != "auto":
        if obstacle:
            raise ValueError(f"model.attention_kernel = {wanted}: {obstacle}; leave it at auto")
        interpreted = ", interpreted here" if kernel == "splash" and name != "tpu" else ""
        return kernel, f"model.attention_kernel asks for it{interpreted}"
    if kernel == "plain":
        return "plain", f"there is no kernel for {name}"
    if obstacle:
        return "plain", f"not {kernel}: {obstacle}"
    return kernel, f"on {name}"


def _choose_ring(kernel: str, config: ResolvedModelConfig, layout: Layout, T: int) -> tuple[bool, str]:
    """Returns whether devices that share positions use ring attention, and the reason."""
    n, wanted = layout.size("time"), config.context_attention
    if n == 1:
        return False, "" if wanted == "auto" else f"model.context_attention = {wanted} needs mesh.context above 1"
    piece = T // n // 2
    window = 0 if config.sliding_window is None else _halo(kernel, piece, config.sliding_window, has_wide_heads(config))
    obstacles = {
        "cuDNN's gradients take no sum of exponentials of other keys": kernel == "cudnn",
        "model.attention_dropout is done by an all-gather alone": config.attention_dropout,
        f"model.sliding_window = {config.sliding_window} is longer than pieces of {piece} positions": window > piece,
        f"pieces of {piece} positions are not a multiple of {BLOCKS[-1]}": kernel == "splash" and piece % BLOCKS[-1],
    }
    obstacle = next((reason for reason, is_met in obstacles.items() if is_met), None)
    if wanted == "ring" and obstacle:
        raise ValueError(f"model.context_attention = ring: {obstacle}; leave it at auto")
    if wanted != "auto":
        return wanted == "ring", "model.context_attention asks for it"
    if obstacle:
        return False, f"no ring: {obstacle}"
    # A step multiplies two pairs of pieces twice, forward, and sends keys and values of two pieces.
    intensity = piece * config.num_heads // config.num_kv_heads
    if intensity < RING_FLOPS_A_BYTE:
        return False, f"no ring: it would have {intensity:,} FLOPs a byte sent, below {RING_FLOPS_A_BYTE:,}"
    return True, f"{intensity:,} FLOPs a byte sent"


def _obstacle(kernel: str, config: ResolvedModelConfig, layout: Layout, T: int) -> str | None:
    """Returns the reason why a kernel cannot compute this model's attention, or None."""
    n, head_dim = layout.size("time"), config.head_dim
    shard, evens = T // n, 2 if n == 1 else 4
    dropout = (config.attention_dropout, "model.attention_dropout is done by plain attention alone")
    obstacles = {
        "plain": [],
        "splash": [dropout, (shard % BLOCKS[-1], f"{shard} positions a device are not a multiple of {BLOCKS[-1]}")],
        "cudnn": [
            (platform() != "gpu", f"there is none for {platform()}"),
            dropout,
            (config.compute_dtype != "bfloat16", f"it takes bfloat16, model.compute_dtype is {config.compute_dtype}"),
            (config.attention_softcap is not None, "it has no model.attention_softcap"),
            (config.attention_sinks, "it gives no sum of exponentials, which model.attention_sinks add to"),
            (config.kv_latent_dim is not None, "keys and values of latent attention differ in their width"),
            (head_dim > 128 or head_dim % 8, f"model.head_dim = {head_dim} is not a multiple of 8 up to 128"),
            (shard % evens, f"{shard} positions a device are not a multiple of {evens}"),
        ],
    }
    return next((reason for is_met, reason in obstacles[kernel] if is_met), None)


def visited_pairs(
    kernel: str, T: int, window: int | None, shards: int, is_ring: bool = False, is_wide: bool = False
) -> int:
    """Returns the pairs of positions whose scores a device computes for a head of a row, masked ones included.

    Splash attention skips blocks that are all later keys, or all before the window. cuDNN is counted as if it skipped
    single pairs; with shared positions it skips only the later half of a row for the earlier. Where devices share
    positions it is their mean.

    Args:
        kernel: plain, splash or cudnn.
        T: positions of a row.
        window: number of keys that a query sees at most, or None.
        shards: number of devices that share the positions.
        is_ring: they use ring attention.
        is_wide: heads are wide (`has_wide_heads`).
    """
    piece = T // shards // 2
    if is_ring and window is not None:
        block = _block(piece, 1, is_wide) if kernel == "splash" else piece
        return 2 * piece * (_halo(kernel, piece, window, is_wide) + block)
    if is_ring:
        return visited_pairs(kernel, T // shards, None, 1, is_wide=is_wide) + 2 * (shards - 1) * piece**2
    if kernel == "plain":
        return T * T // shards
    if kernel == "cudnn" and shards > 1:
        return T * T * 3 // 4 // shards
    block = _block(T, shards, is_wide) if kernel == "splash" else 1
    blocks = T // block
    seen = blocks if window is None else min(blocks, -(-(window - 1) // block) + 1)
    return (blocks * seen - seen * (seen - 1) // 2) * block**2 // shards


def has_wide_heads(config: ResolvedModelConfig) -> bool:
    """Returns True where queries or keys have more than 128 numbers a head, as those of latent attention do."""
    return config.head_dim > 128 or config.kv_latent_dim is not None


def has_one_backward_kernel(T: int, window: int | None, shards: int, is_wide: bool = False) -> bool:
    """Returns True where one kernel of splash attention gives all gradients, and no second one the queries'."""
    return window is None and T // _block(T, shards, is_wide) <= 8


def _block(T: int, shards: int, is_wide: bool) -> int:
    """Returns the side of splash attention's blocks. They lie in one piece of a row, or little is skipped."""
    piece = T if shards == 1 else T // shards // 2
    most = min(T // 4, WIDE_BLOCK if is_wide else BLOCKS[0])
    return next((size for size in BLOCKS if piece % size == 0 and size <= most), BLOCKS[-1])


def _halo(kernel: str, piece: int, window: int, is_wide: bool) -> int:
    """Returns the number of keys before a piece that its queries get for a window, in whole blocks of a kernel."""
    block = _block(piece, 1, is_wide) if kernel == "splash" else 1
    return -(-(window - 1) // block) * block


def attention_over(
    config: ResolvedModelConfig, layout: Layout, segment_ids_BT: jax.Array, window: int | None
) -> Attend:
    """Returns causal attention within documents, to the newest `window` positions or to all.

    It is computed by the kernel for the ambient mesh; T is in `zigzag_order`.
    """
    T = segment_ids_BT.shape[1]
    kernel, _, is_ring, _ = choose_kernel(config, layout, T)
    if is_ring:
        return lambda q, k, v, keys_B, *sinks: _ring(config, layout, kernel, segment_ids_BT, window, sinks, q, k, v)
    # The only way to tell a reader of the compiled program how much of its scores a kernel computes.
    name = f"attention_pairs_{visited_pairs(kernel, T, window, layout.size('time'), is_wide=has_wide_heads(config))}"
    if kernel == "splash":
        splash = lambda q, k, v, keys_B, *sinks: _splash(config, layout, segment_ids_BT, window, sinks, q, k, v)
        return jax.named_scope(name)(splash)
    if kernel == "cudnn":
        cudnn = lambda q, k, v, keys_B: _cudnn(layout, segment_ids_BT, window, q, k, v)
        # With shared positions it computes every score of its two calls.
        return jax.named_scope(name)(cudnn) if layout.size("time") == 1 else cudnn
    mask_B1TS = causal_mask(segment_ids_BT, window, layout)

    def plain(
        q_BHTC: jax.Array, k_BKTC: jax.Array, v_BKTC: jax.Array, keys_B: DropoutKeys, *sinks: jax.Array
    ) -> jax.Array:
        k_BKSC, v_BKSC = gather_keys(k_BKTC, layout), gather_keys(v_BKTC, layout)
        softcap, dropout_rate = config.attention_softcap, config.attention_dropout
        if on_one_cpu() and not dropout_rate and not sinks:
            return attend_in_blocks(q_BHTC, k_BKSC, v_BKSC, mask_B1TS, softcap)
        return attend(q_BHTC, k_BKSC, v_BKSC, mask_B1TS, softcap, dropout_rate, keys_B, *sinks)

    return plain


def _on_each_device(
    function: Callable[..., jax.Array], layout: Layout, specs: tuple[Any, ...], others: tuple[Any, ...], *qkv: jax.Array
) -> jax.Array:
    """Runs the function on each device's shards of other arrays, which have these specs, and of q, k and v."""
    if not layout.rules:
        return function(*others, *qkv)
    q, kv = layout.spec("batch", "heads", "time", None), layout.spec("batch", "kv_heads", "time", None)
    # The Pallas and cuDNN calls state no varying-manual-axes (vma) types (tests/model/test_workarounds.py).
    return jax.shard_map(function, in_specs=(*specs, q, kv, kv), out_specs=q, check_vma=False)(*others, *qkv)


def _splash(
    config: ResolvedModelConfig,
    layout: Layout,
    segment_ids_BT: jax.Array,
    window: int | None,
    sinks: tuple[jax.Array, ...],
    *qkv: jax.Array,
) -> jax.Array:
    """Runs Pallas splash attention (TPU), which skips blocks of scores that the mask leaves empty."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, n = segment_ids_BT.shape[1], layout.size("time")
    mask: Any = masks.CausalMask((T, T), shard_count=n)
    if window is not None:
        mask = masks.LocalMask((T, T), (window - 1, 0), offset=0, shard_count=n)
    mask.q_sequence = zigzag_order(T, layout)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * (config.num_heads // layout.size("heads"))),
        block_sizes=_block_sizes(T, n, window, has_wide_heads(config)),
        attn_logits_soft_cap=config.attention_softcap,
        head_shards=1,
        q_seq_shards=n,
        residual_checkpoint_name="attention",
        interpret=platform() != "tpu",
    )
    kernel_specs = None
    if layout.rules:
        sharding = NamedSharding(jax.sharding.get_abstract_mesh(), layout.spec(None, "time"))
        kernel_specs = kernel.manual_sharding_spec(sharding)
        kernel = jax.tree.map(jax.reshard, kernel, kernel_specs)

    def on_device(
        kernel: Any, ids_BT: jax.Array, sinks: tuple[jax.Array, ...], q: jax.Array, k: jax.Array, v: jax.Array
    ) -> jax.Array:
        q = _scaled(q)
        k, v = all_positions(k, layout, 2), all_positions(v, layout, 2)
        ids = kernels.SegmentIds(ids_BT, all_positions(ids_BT, layout, 1))
        return jax.vmap(lambda *arrays: kernel(*arrays, *(sink.astype(jnp.float32) for sink in sinks)))(q, k, v, ids)

    specs = (kernel_specs, layout.spec("batch", "time"), tuple(layout.spec("heads") for _ in sinks))
    return _on_each_device(on_device, layout, specs, (kernel, segment_ids_BT, sinks), *qkv)


def _block_sizes(T: int, shards: int = 1, window: int | None = None, is_wide: bool = False) -> Any:
    """Returns the blocks of splash attention's kernels.

    A fused kernel gives all gradients, where two would compute the scores twice. It leaves sums of the queries'
    gradients to be added, one array for each block of keys, and visits what a window hides.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import BlockSizes

    block = _block(T, shards, is_wide)
    is_fused = has_one_backward_kernel(T, window, shards, is_wide)
    block_of_queries = None if is_fused else block
    return BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=min(block, KEYS_AT_ONCE),
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=min(block, KEYS_AT_ONCE),
        block_q_dq=block_of_queries,
        block_kv_dq=block_of_queries,
        use_fused_bwd_kernel=is_fused,
    )


def _scaled(q: jax.Array) -> jax.Array:
    """Returns the queries as splash attention expects them."""
    return (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype)


def _ring(
    config: ResolvedModelConfig,
    layout: Layout,
    name: str,
    segment_ids_BT: jax.Array,
    window: int | None,
    sinks: tuple[jax.Array, ...],
    *qkv: jax.Array,
) -> jax.Array:
    """Runs ring attention, or sends the halos of a window, with a kernel's attention to pieces."""
    ring = Ring(as_tuple(layout.rules["time"]), layout.size("time"))
    softcap, interpret = config.attention_softcap, platform() != "tpu"
    own = segment_ids_BT.shape[1] // ring.size
    is_wide = has_wide_heads(config)
    block_sizes = partial(_block_sizes, is_wide=is_wide)
    kernel: PieceKernel = PlainPieces(softcap)
    if name == "splash":
        kernel = SplashPieces(softcap, block_sizes, visited_pairs(name, own, None, 1, is_wide=is_wide), interpret)

    def on_device(
        ids_BT: jax.Array, sinks: tuple[jax.Array, ...], q: jax.Array, k: jax.Array, v: jax.Array
    ) -> jax.Array:
        q = _scaled(q) if name == "splash" else q
        if window is None:
            return ring_attention(kernel, ring, q, k, v, ids_BT, sinks[0] if sinks else None)
        in_halo = plain_halo(window, softcap)
        if name == "splash":
            pairs = visited_pairs(name, own * ring.size, window, ring.size, True, is_wide) // 2
            in_halo = splash_halo(window, softcap, block_sizes(own // 2, 1, window), pairs, interpret)
        halo = _halo(name, own // 2, window, is_wide)
        return halo_attention(in_halo, ring, halo, Queries(q, ids_BT), Keys(k, v, ids_BT), *sinks)

    specs = (layout.spec("batch", "time"), tuple(layout.spec("heads") for _ in sinks))
    return _on_each_device(on_device, layout, specs, (segment_ids_BT, sinks), *qkv)


def _cudnn(layout: Layout, segment_ids_BT: jax.Array, window: int | None, *qkv: jax.Array) -> jax.Array:
    """Runs cuDNN's flash attention (GPU), whose mask costs a number for each pair of positions, shared by all heads.

    The documents' offsets would cost more (docs/gpus.md). Each layer computes the mask, so that none outlives a layer.
    """
    # In the order of the row cuDNN itself skips later keys and those before the window. In zigzag order the mask does.
    n = layout.size("time")
    mask_B1TS = causal_mask(segment_ids_BT, None if n == 1 else window, layout)
    own_window = (window - 1, 0) if n == 1 and window is not None else None
    attend_to = partial(
        jax.nn.dot_product_attention, is_causal=n == 1, local_window_size=own_window, implementation="cudnn"
    )

    def on_device(mask: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if n > 1:
            k, v = (jax.lax.all_gather(x, as_tuple(layout.rules["time"]), axis=2, tiled=True) for x in (k, v))
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        with _without_gradient_of_mask():
            if n == 1:
                y = attend_to(q, k, v, mask=mask)
            else:
                # The front pieces of all devices are the row's earlier half, and see no key of a back piece.
                front, back = jnp.split(q, 2, axis=1)
                of_front, of_back = jnp.split(mask, 2, axis=2)
                fronts = lambda x, axis: jnp.concatenate(jnp.split(x, 2 * n, axis)[::2], axis)
                y_of_front = attend_to(front, fronts(k, 1), fronts(v, 1), mask=fronts(of_front, 3))
                y = jnp.concatenate([y_of_front, attend_to(back, k, v, mask=of_back)], axis=1)
        return y.swapaxes(1, 2)

    return _on_each_device(on_device, layout, (layout.spec("batch", None, "time", None),), (mask_B1TS,), *qkv)


@contextmanager
def _without_gradient_of_mask() -> Iterator[None]:
    """Stops JAX before 0.12 from asking cuDNN for the mask's gradient, which nobody uses.

    It costs a number for each head and pair of positions (https://github.com/jax-ml/jax/pull/39512).
    """
    if jax.__version_info__ >= (0, 12):
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo

    # Two threads may trace at once.
    with _patching_jax:
        real = fused_attention_stablehlo.should_export_dbias
        fused_attention_stablehlo.should_export_dbias = lambda *_: False
        try:
            yield
        finally:
            fused_attention_stablehlo.should_export_dbias = real
