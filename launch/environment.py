"""Variables of the environment that keep JAX from starting: checked before a command, or after one has failed."""

import functools
import os
import re
import subprocess
import sys

from data.errors import InputError
from launch.program_cache import LEAST_SECONDS

# Flags that need no check, since this project sets them.
OUR_XLA_FLAGS = "--xla_force_host_platform_device_count="
# Those that this project makes in its own processes.
OUR_JAX_SETTINGS = f"JAX_(ENABLE_X64|COMPILATION_CACHE_DIR|PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS={LEAST_SECONDS}$)"
START_XLA = "from jaxlib import xla_client; xla_client.make_cpu_client()"


def check_environment() -> None:
    """Raises InputError for flags with which XLA would end the process of a command."""
    flags = os.environ.get("XLA_FLAGS", "")
    if problem := _problem_of_flags(flags):
        raise InputError(f"XLA_FLAGS={flags}: {problem}; correct it, or unset it")


# XLA reads its flags once a process, so the answer stays for all commands that Python code runs in one.
@functools.cache
def _problem_of_flags(flags: str) -> str:
    if all(flag.startswith(OUR_XLA_FLAGS) for flag in flags.split()):
        return ""
    # XLA ends its process where it does not know a flag.
    done = subprocess.run([sys.executable, "-P", "-c", START_XLA], capture_output=True)
    fatal = [line.partition("] ")[2] for line in done.stderr.decode(errors="replace").splitlines() if line[:1] == "F"]
    return fatal[0] if done.returncode and fatal else ""


def environment_problem(failure: BaseException) -> tuple[int, str]:
    """Returns the exit status and text of a failure if JAX cannot start; (1, "") where it can."""
    given = [f"{name}={value}" for name, value in os.environ.items()]
    given = [setting for setting in given if re.match("JAX_", setting) and not re.match(OUR_JAX_SETTINGS, setting)]
    error = failure if "Unable to initialize backend" in str(failure) else _failure_of_jax()
    if error is None:
        return 1, ""
    # The first failure says why: an import that has failed fails in another way when it is repeated.
    reason = (f"{failure}\n{error}".strip().splitlines() or ["a library of that platform is missing"])[0]
    text = f"JAX cannot start with {' '.join(given) or 'the devices of this machine'}: {reason}"
    if isinstance(error, RuntimeError) and "known backends" not in reason:
        return 1, f"{text}; start again once its devices answer"
    return 2, f"{text}; give the variable another value, or unset it"


def _failure_of_jax() -> Exception | None:
    # Where JAX has found one of several platforms, it fails only the first time.
    try:
        import jax

        jax.devices()
    except Exception as error:  # a plugin may fail in any way
        return error
    return None
