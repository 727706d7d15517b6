"""Weights by a name or an address, made into files on this machine by the downloads and caches of huggingface_hub, timm
and torch.hub.

    hf-hub:ORG/NAME[@REVISION]    a repository of timm, transformers or fastdeit: its folder in the hub's cache
    https://HOST/FILE             a file in torch.hub's cache
    file:///FILE                  that file
    NAME[.TAG]                    what timm publishes for the model of this name

Where a file is neither here nor to be had, one sentence says which to fetch and where it will be found.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlparse

from fastdeit.errors import UserError

HUB = "hf-hub:"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "open_clip_model.safetensors")


def is_remote(source: object) -> bool:
    """Whether `source` is an address, which `local` takes, and not a path."""
    return str(source).startswith((HUB, "http://", "https://", "file://"))


def local(source: str) -> Path:
    """The folder or file that an address means, downloaded where it is not here yet. Raises UserError if it cannot
    be."""
    if source.startswith(HUB):
        return _folder(source)
    if source.startswith("file://"):
        return Path(unquote(urlparse(source).path))
    return _file(source)


class Published(NamedTuple):
    """What timm publishes for a name. config: as config.json of timm's hub has it."""

    weights: Path
    config: dict


def of_model(name: str) -> Published:
    """The published weights of a model by timm's name, with or without its tag. Raises UserError where timm publishes
    none, or they cannot be had."""
    config = config_of_model(name)
    if config is None:
        raise UserError(
            f"timm publishes no weights of {name}: give a file or folder of weights, or start from random ones by "
            "--no-pretrained"
        )
    said = config["pretrained_cfg"]
    if said.get("hf_hub_id"):
        names = (said["hf_hub_filename"],) if said.get("hf_hub_filename") else (WEIGHTS[0], "pytorch_model.bin")
        return Published(_Repository(said["hf_hub_id"], f"{name}").files([names])[0], config)
    return Published(_file(said["url"], shared=True), config)


def config_of_model(name: str) -> dict | None:
    """What timm says of the published weights of a name, without a download; None where there are none."""
    import timm

    name = name.removeprefix("fastdeit_")
    try:
        said = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError as error:
        architecture, _, tag = name.partition(".")
        tags = ", ".join(known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*"))
        raise UserError(
            f"{name}: timm publishes no weights {tag!r} of {architecture}; it has {tags or 'none'}"
        ) from error
    if said is None or not said.has_weights:
        return None
    said = said.to_dict()
    return {"architecture": said["architecture"], "num_classes": said["num_classes"], "pretrained_cfg": said}


# ---------------------------------------------------------------------------------------------------------------------
# The hub


def _folder(source: str) -> Path:
    repository = _Repository(source.removeprefix(HUB), source)
    config, weights = repository.files([("config.json",), WEIGHTS])
    if weights.suffix == ".json":
        try:
            parts = sorted(set(json.loads(weights.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{weights} is not a readable index of weights ({error}): remove it") from error
        repository.files([(part,) for part in parts])
    if "model_type" in config.read_text():  # transformers': how it prepares images
        repository.files([("preprocessor_config.json",)], required=False)
    return config.parent


class _Repository:
    """ORG/NAME[@REVISION] on the hub. what: for whom it is."""

    def __init__(self, name: str, what: str):
        self.name, _, revision = name.partition("@")
        self.revision, self.what = revision or "main", what

    def files(self, wanted: Sequence[Sequence[str]], *, required: bool = True) -> list[Path]:
        """A file of each group of names: the first that the repository has."""
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        found: list[Path] = []
        try:
            for names in wanted:
                found.append(self._first(names))
            return found
        except HFValidationError as error:
            raise UserError(f"{self.what}: {str(error).splitlines()[0]}; write hf-hub:ORG/NAME") from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise UserError(
                f"{self.what}: the hub has no {self.name} at {self.revision} for you: check the name, or log in by "
                "`hf auth login` if it is private or gated"
            ) from error
        except EntryNotFoundError as error:
            if not required:
                return []
            if not isinstance(error, LocalEntryNotFoundError):
                files = " or ".join(wanted[len(found)])
                raise UserError(f"{self.what} has no {files}: it is no model that can be read here") from error
            self._refuse(wanted, error)
        except Exception as error:  # a download fails in as many ways as there are libraries below it
            self._refuse(wanted, error)

    def _first(self, names: Sequence[str]) -> Path:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        for name in names:
            if (placed := self.place / name).is_file():
                return placed
        for name in names:
            try:
                return Path(hf_hub_download(self.name, name, revision=self.revision))
            except LocalEntryNotFoundError:  # no network: any of them will do
                for other in names:
                    if isinstance(found := try_to_load_from_cache(self.name, other, revision=self.revision), str):
                        return Path(found)
                raise
            except EntryNotFoundError:
                if name == names[-1]:
                    raise
        raise AssertionError("no names")

    @property
    def place(self) -> Path:
        """Where a file that was fetched by hand is found, by us and by the hub's own library."""
        from huggingface_hub import constants

        folder = f"models--{self.name.replace('/', '--')}"
        return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / self.revision

    def _refuse(self, wanted: Sequence[Sequence[str]], error: Exception):
        from huggingface_hub import hf_hub_url

        links = " and ".join(hf_hub_url(self.name, names[0], revision=self.revision) for names in wanted)
        them = "them" if len(wanted) > 1 else "it"
        raise UserError(
            f"the weights of {self.what} are not on this machine and cannot be downloaded ({_cause(error)}): fetch "
            f"{links} where there is a network, and put {them} into {self.place}"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Other addresses


def _file(url: str, *, shared: bool = False) -> Path:
    """The file of a URL, in torch.hub's cache; checked where its name ends in a part of its checksum. shared: by its
    bare name in any case, as timm has it."""
    from torch.hub import HASH_REGEX, download_url_to_file, get_dir

    folder, name = Path(get_dir()) / "checkpoints", os.path.basename(urlparse(url).path)
    if not name:
        raise UserError(f"{url} names no file of weights")
    checksum = HASH_REGEX.search(name)
    if not checksum and not shared:  # checkpoint.pth of one address is not that of another
        folder = folder / hashlib.sha256(url.encode()).hexdigest()[:8]
    file = folder / name
    try:
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            download_url_to_file(url, str(file), checksum and checksum[1], progress=sys.stderr.isatty())
    except (OSError, RuntimeError, ValueError) as error:  # no network, another checksum, no address
        raise UserError(
            f"{url} cannot be downloaded ({_cause(error)}): fetch it where there is a network, and put it at {file}"
        ) from error
    return file


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"
