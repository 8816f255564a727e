"""What all tests share: eight virtual CPU devices, compiled programs, and the same examples each time."""

import gc
import os
import signal
import sys
from pathlib import Path

import hypothesis
import jaxlib.version
import pytest

CACHE = Path(__file__).parent.parent / ".pytest_cache"
if sys.dont_write_bytecode:
    # Each process that a test starts would compile the source of all libraries, which takes twice as long as to run it.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(CACHE / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time would be the same programs compiled again, in this process and in those that tests start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# The same programs, but compiled in a sixth of the time. Newer compilers have fusion emitters alone.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
flags = ["--xla_force_host_platform_device_count=8", "--xla_cpu_parallel_codegen_split_count=1"]
# Eight devices on few busy cores may wait for each other for more than 40 seconds, after which XLA ends the process.
flags.append("--xla_cpu_collective_call_terminate_timeout_seconds=600")
if jaxlib.version.__version_info__ < (0, 11):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()

# Tracing makes many objects that stay; collecting them as often as Python does is a twelfth of the suite's time.
gc.set_threshold(50_000, 20, 100)

# A shell ignores Ctrl-C in what it starts in the background, and so would all processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")

# Each file runs in one process. Those that take longest start first, so that none is left to run alone at the end.
LONGEST = {"test_compiled_step.py", "test_local.py", "test_processes.py", "test_pretrain.py", "test_chaos.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
