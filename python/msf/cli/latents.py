"""What ``msf inspect`` and ``msf encode`` tell of a folder of latents."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import printable, quoted
from ..progress import follow
from . import tables

if TYPE_CHECKING:
    from ..data.latent_index import LatentIndex


def document(folder: Path) -> dict[str, Any]:
    """Read all of a folder of latents; what is not as it was is among the "problems"."""
    from ..data.latent_index import damage, read_index

    index = read_index(folder)
    shards = follow(index.shards, "checksums", len(index.shards), "shards")
    problems = [found for shard in shards if (found := damage(folder, shard))]
    if not index.is_complete:
        problems.append(f"shards not made yet: {index.shard_count - len(index.shards):,}")
    return {"problems": problems, **summary(folder, index)}


def summary(folder: Path, index: LatentIndex) -> dict[str, Any]:
    """Return what the ``index`` of a folder of latents says, but for its list of shards."""
    values = asdict(index)
    size = sum(shard.bytes for shard in index.shards)
    shards = {"shards": len(index.shards), "of_shards": index.shard_count, "bytes": size}
    return {"latents": str(folder), **values, **shards}


def text(document: dict[str, Any]) -> str:
    vae, names = document["vae"], document["class_names"]
    shards = f"{document['shards']:,} of {document['of_shards']:,}"
    facts = [
        ("latents", printable(document["latents"])),
        ("of", f"{printable(document['source'])}, {document['image_size']} pixels"),
        ("shape", tables.size(document["latent_shape"])),
        ("images", document["images"]),
        ("classes", len(names) or "none"),
        ("class names", ", ".join(map(quoted, names)) or "none"),
        ("shards", f"{shards}, {document['bytes'] / 1e9:,.3g} GB"),
        ("VAE", f"sha256 {vae['sha256']}"),
        ("scaling, shift", f"{vae['scaling_factor']:g}, {vae['shift_factor']:g}"),
        ("skipped", ", ".join(map(printable, document["skipped"])) or "none"),
    ]
    if "problems" in document:
        facts.append(("problems", "; ".join(document["problems"]) or "none"))
    return tables.pairs(facts)
