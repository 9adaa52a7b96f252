"""Published files by name: `hub:OWNER/NAME[@REVISION]` is fetched through huggingface_hub, into its cache; anything else is a path.

Nothing is fetched that was not asked for by such a name, and nothing that could hold code: configs, tokenizers and safetensors alone.
"""

import pathlib
from collections.abc import Sequence

PREFIX = "hub:"
# At the root a network's own weights alone, and no single file that holds again what the folders do.
FILES = (
    *("*.json", "*.txt", "*.model"),
    *("*/*.safetensors", "model*.safetensors", "diffusion_pytorch_model*.safetensors"),
)
# Copies of the same weights for other libraries or precisions, and a network that no picture depends on.
LEFT_OUT = ("*.fp16*", "*non_ema*", "flax_*", "openvino_*", "safety_checker/*.safetensors")


def resolve(path: str | pathlib.Path, patterns: Sequence[str] = FILES) -> pathlib.Path:
    """The local path of `path`, fetched if it is named `hub:OWNER/NAME[@REVISION]`. `wanted`: patterns of the files to fetch.

    Raises ValueError for a name that is none, and for one that cannot be fetched.
    """
    name = str(path)
    if not name.startswith(PREFIX):
        return pathlib.Path(path)
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"{name}: expected {PREFIX}OWNER/NAME, with @REVISION where one is wanted")
    import huggingface_hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=list(patterns), ignore_patterns=list(LEFT_OUT)
            )
        )
    except Exception as error:  # no network, no such name, no permission: each has exceptions of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name}: cannot be fetched ({reason})") from None
