"""Published files by name: huggingface_hub fetches `hub:OWNER/NAME[@REVISION]` into its cache. Any other name is a path.

Only files of such a name are fetched, and no files that could hold code: only configs, tokenizers and safetensors.
"""

import pathlib
from collections.abc import Sequence

PREFIX = "hub:"
# Patterns of the files to fetch. At the root these are the weights of a network, but no single files, which repeat a whole pipeline.
FILES = (
    *("*.json", "*.txt", "*.model"),
    *("*/*.safetensors", "model*.safetensors", "diffusion_pytorch_model*.safetensors"),
)
# Patterns of files that are not fetched: copies of weights for other libraries or precisions, and a network that changes no picture.
LEFT_OUT = ("*.fp16*", "*non_ema*", "flax_*", "openvino_*", "safety_checker/*.safetensors")


def resolve(path: str | pathlib.Path, patterns: Sequence[str] = FILES) -> pathlib.Path:
    """The local path of `path`, which is fetched if it is `hub:OWNER/NAME[@REVISION]`. `patterns` are those of the files to fetch.

    Raises ValueError for a name of another form, and for files that cannot be fetched.
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
    except Exception as error:  # no network, no such name, no permission: each raises other exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name}: cannot be fetched ({reason})") from None
