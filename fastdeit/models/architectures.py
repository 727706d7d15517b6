"""The model names and what they stand for."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What a model name stands for. `deit3`: LayerScale, position embedding on patches only, constant drop path."""

    width: int
    depth: int
    heads: int
    patch_size: int
    img_size: int
    distilled: bool = False
    deit3: bool = False


def _architectures() -> dict[str, Architecture]:
    table = {}
    for size, (width, heads) in {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}.items():
        for pixels in (224, 384):
            table[f"deit_{size}_patch16_{pixels}"] = Architecture(width, 12, heads, 16, pixels)
            table[f"deit_{size}_distilled_patch16_{pixels}"] = Architecture(width, 12, heads, 16, pixels, True)
    # DeiT III; timm and the paper have no medium or huge at 384.
    for size, (width, depth, heads, patch, sizes) in {
        "small": (384, 12, 6, 16, (224, 384)),
        "medium": (512, 12, 8, 16, (224,)),
        "base": (768, 12, 12, 16, (224, 384)),
        "large": (1024, 24, 16, 16, (224, 384)),
        "huge": (1280, 32, 16, 14, (224,)),
    }.items():
        for pixels in sizes:
            table[f"deit3_{size}_patch{patch}_{pixels}"] = Architecture(width, depth, heads, patch, pixels, deit3=True)
    # Small enough to learn handwritten digits on a laptop.
    table["deit_nano_patch4_16"] = Architecture(128, 6, 4, 4, 16)
    table["deit_nano_distilled_patch4_16"] = Architecture(128, 6, 4, 4, 16, True)
    return table


ARCHITECTURES = _architectures()


def model_names() -> list[str]:
    """The names `fastdeit.models.deit.create_model` takes; in timm they have the prefix `fastdeit_`."""
    return list(ARCHITECTURES)


def own_name(name: str) -> str:
    """Our name of a model, without the prefix it has in timm and the tag of its weights; other names unchanged."""
    own = name.removeprefix("fastdeit_").partition(".")[0]
    return own if own in ARCHITECTURES else name


def unknown_model_message(name: str, others: Iterable[str] = ()) -> str:
    """One sentence for an unknown name, with similar ones. `others`: timm's, where these are accepted too."""
    if near := similar(name, others):
        return f"unknown model {name!r}{near}"
    return f"unknown model {name!r}: see fastdeit.models.deit.model_names()" + (
        " and timm.list_models()" if others else ""
    )


def similar(name: str, others: Iterable[str] = ()) -> str:
    """The end of a sentence about an unknown name: which were meant, perhaps; empty where none is similar."""
    near = difflib.get_close_matches(name, dict.fromkeys([*ARCHITECTURES, *others]), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
