"""The wheels that are released: building them, auditing them, proving them.

The programs need the tools of the dependency group ``wheels`` only, and neither Synapse nor the
module in their own environment: ``make wheels`` and ``make wheels-check`` make it.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parents[2]


class Platform(NamedTuple):
    """What a wheel is built for."""

    name: str
    triple: str
    """Rust's name of it."""
    policy: str
    """What maturin holds the wheel to."""
    tag: str
    """The end of the wheel's name."""


PLATFORMS = (
    Platform("manylinux-x86_64", "x86_64-unknown-linux-gnu", "manylinux2014", "manylinux_2_17"),
    Platform("manylinux-aarch64", "aarch64-unknown-linux-gnu", "manylinux2014", "manylinux_2_17"),
    Platform("musllinux-x86_64", "x86_64-unknown-linux-musl", "musllinux_1_2", "musllinux_1_2"),
    Platform("musllinux-aarch64", "aarch64-unknown-linux-musl", "musllinux_1_2", "musllinux_1_2"),
)


class StepError(Exception):
    """A step did not work, or something that it needs is not there; the message says which."""


class MissingError(StepError):
    """This machine lacks what a step needs, and the step can be left out."""


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path = PROJECT,
    timeout_s: float = 1800,
) -> str:
    """Runs a program to its end, and gives what it printed.

    Raises:
        StepError: it failed, or took too long; with the end of what it printed.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            check=False,
            cwd=cwd,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
    except FileNotFoundError:
        raise StepError(f"{words[0]} is not there") from None
    except subprocess.TimeoutExpired:
        raise StepError(f"{' '.join(words)} was not done within {timeout_s:.0f} s") from None
    if done.returncode:
        said = done.stdout.strip()[-3000:]
        raise StepError(f"{' '.join(words)} ended with {done.returncode}:\n{said}")
    return done.stdout


def needed(program: str, how: str) -> str:
    """The path of a program that must be there.

    Raises:
        StepError: it is not; the message says how to get it.
    """
    path = shutil.which(program)
    if path is None:
        raise StepError(f"{program} is not there: {how}")
    return path


def network_settings() -> dict[str, str]:
    """What tells pip and cargo of this machine's way to the registries, and nothing else."""
    kept = ("PIP_", "SSL_CERT_", "REQUESTS_CA_", "CURL_CA_")
    ends = ("_proxy", "_PROXY")
    return {k: v for k, v in os.environ.items() if k.startswith(kept) or k.endswith(ends)}
