"""Memory of training steps on CPUs: settings of the C library, which reads them only as a process starts.

XLA allocates temporary memory again in each step, and Linux zeroes each page that comes back to a process. Here freed
memory stays in the process, in large pages, as far as glibc can keep it: the heaps of threads have at most 64 MiB, and
only the one of the main thread has any size. Where all threads share that one, steps are 5 to 15% faster, but the
threads of the compiler wait for each other, and the first step of `tiny` comes after 15 s instead of 10.
"""

import os
import sys
from collections.abc import Sequence

from train.config.config import Config

# Values of GLIBC_TUNABLES.
SHORT_RUN = ":".join(f"glibc.malloc.{setting}" for setting in ("hugetlb=1", "mmap_max=0", f"trim_threshold={2**34}"))
LONG_RUN = f"{SHORT_RUN}:glibc.malloc.arena_max=1"
# Products of the matrices with one token, summed over the run's tokens: about three minutes on two cores.
LONG_PRODUCTS = 2**42


def start_again(tunables: str | None, options: Sequence[str] = ()) -> None:
    """Replaces this process by one with the same command, with options of Python and glibc's tunables."""
    if tunables:
        os.environ["GLIBC_TUNABLES"] = tunables
    os.execv(sys.executable, [sys.executable, *options, *sys.orig_argv[1:]])


def memory_for(config: Config) -> str:
    """Returns the tunables of a run: LONG_RUN or SHORT_RUN."""
    model, train = config.model, config.train
    tokens = train.num_steps * train.batch_size * config.data.segment_length
    return LONG_RUN if 12 * model.num_layers * model.model_dim**2 * tokens > LONG_PRODUCTS else SHORT_RUN
