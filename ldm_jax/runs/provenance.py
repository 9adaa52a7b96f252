"""What made a figure: the revision of the code and the machine."""

import pathlib
import platform
import subprocess

import jax

import ldm_jax


def commit() -> str:
    """The revision of the code, with '+' when there are changes to it; its version where there is no repository."""
    here = pathlib.Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie in a repository of something else.
        git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ldm_jax.__version__


def machine() -> str:
    """The processor's architecture and the devices, such as 'x86_64 cpu x1'."""
    return f"{platform.machine()} {jax.devices()[0].platform} x{jax.device_count()}"
