"""`verify`: is a saved folder whole, and what is it?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longretriever.cli import options
from longretriever.console import show


def verify(
    path: Annotated[Path, typer.Argument(help="Folder of a store, model or index.")],
    as_json: options.Json = False,
) -> None:
    """Check every file of a saved folder against its SHA-256, and say what the folder is."""
    from longretriever.saved import kind_of, opening
    from longretriever.store.parts import check_parts

    manifest = opening(path, kind_of(path), verify=True)
    size = sum(file["bytes"] for file in manifest.files.values())
    size += check_parts(manifest) if manifest.kind == "partition" else 0
    facts = {
        "path": str(path),
        "kind": manifest.kind,
        "fingerprint": manifest.fingerprint,
        "made_from": manifest.made_from,
        "files": len(manifest.files),
        "bytes": size,
        "intact": True,
    }
    origins = ", ".join(f"{kind} {print_[:16]}" for kind, print_ in manifest.made_from.items())
    short = {"fingerprint": manifest.fingerprint[:16], "made_from": origins or "nothing saved"}
    show(facts, as_json, {**facts, **short})
