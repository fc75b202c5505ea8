"""Weights on disk: a checkpoint to go on from, and the model that serving opens.

Checkpoints are safetensors. A model is the user tower as ONNX, item and category vectors as plain arrays and
the ids they stand for, so that serving needs no torch (see `exported.py` for the reading side).
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from longretriever.errors import Mismatch
from longretriever.model.exported import INPUTS
from longretriever.model.towers import Towers
from longretriever.saved import Folder, opening, writing

if TYPE_CHECKING:
    from longretriever.model.train import Training

_CHUNK = 1 << 16  # items whose vectors are computed at once


def save_state(run: Training, path: Path) -> None:
    """Write everything that `load_state` needs to go on exactly as if nothing had happened."""
    tensors = {f"towers.{k}": v for k, v in run.towers.state_dict().items()}
    tensors |= {"rows.weight": run.rows.weight, "rows.sum_of_squares": run.rows.sum_of_squares}
    for i, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    with writing(path, "checkpoint") as folder:
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder.path / "state.safetensors")
        folder.facts = {"config": asdict(run.config), "position": asdict(run.at)}
        folder.made_from = {"store": run.store.fingerprint}


def load_state(path: Path, run: Training) -> None:
    """Put a checkpoint into `run`. Raises `Mismatch` when it belongs to another store or configuration."""
    manifest = opening(path, "checkpoint", verify=True)
    config = asdict(run.config)
    differing = [k for k in config if manifest.facts["config"].get(k) != config[k]]
    if differing or manifest.made_from["store"] != run.store.fingerprint:
        what = f"other settings ({', '.join(differing)})" if differing else "another store"
        raise Mismatch(
            f"{path} is an unfinished training with {what}. "
            "Go on with the old ones, or start anew with --fresh (fresh=True), which discards it."
        )
    tensors = load_file(path / "state.safetensors")
    run.towers.load_state_dict(_under("towers.", tensors))
    run.rows.weight, run.rows.sum_of_squares = tensors["rows.weight"], tensors["rows.sum_of_squares"]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in _under("optimizer.", tensors).items():
        i, name = key.split(".")
        state.setdefault(int(i), {})[name] = value
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": state, "param_groups": groups})
    run.at = type(run.at)(**manifest.facts["position"])


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def save_model(run: Training, out: Path) -> None:
    """Write what `exported.Model` opens: see its docstring for the files."""
    store, towers, at = run.store, run.towers, run.at
    with writing(out, "model") as folder:
        shutil.copy(store.path / "categories.arrow", folder.path)
        shutil.copy(store.path / "items.arrow", folder.path)
        folder.save_array("category_start", np.asarray(store.category_start))
        folder.save_array("item_feature", np.asarray(store.item_feature))
        _save_item_tokens(run, folder)
        folder.save_array("category_token", towers.item.category.weight.detach().numpy())
        save_file(
            {k: v.contiguous() for k, v in towers.state_dict().items()}, folder.path / "towers.safetensors"
        )
        export_user_tower(towers, run.config.dim, folder.path / "user_tower.onnx")
        folder.made_from = {"store": store.fingerprint}
        folder.facts = {
            "store_path": str(store.path.resolve()),
            "config": asdict(run.config),
            "training": asdict(at),
            "scale": towers.item.scale.item(),
            "behaviors": list(store.behaviors),
            "profile_fields": [asdict(field) for field in store.profile_fields],
            "trained_until": int(run.boundary),
        }


@torch.no_grad()
def _save_item_tokens(run: Training, folder: Folder) -> None:
    store, dim = run.store, run.config.dim
    tokens = np.lib.format.open_memmap(
        folder.path / "item_token.npy", mode="w+", dtype=np.float32, shape=(store.n_items, dim)
    )
    for at in range(0, store.n_items, _CHUNK):
        part = slice(at, at + _CHUNK)
        tokens[part] = run.towers.item.embed(
            run.rows.weight[part],
            torch.from_numpy(store.item_category[part]).long(),
            torch.from_numpy(np.array(store.item_feature[part])).long(),
        ).numpy()
    tokens.flush()


def export_user_tower(towers: Towers, dim: int, file: Path) -> None:
    """Write the user tower as ONNX, any number of rows, any length up to the context length."""
    user = towers.user
    rows, behaviors, recent = 2, min(3, user.position.shape[0] - user.prefix), user.recent_position.shape[0]
    example = (
        torch.zeros(rows, behaviors, dim),
        torch.zeros(rows, behaviors, dtype=torch.long),
        torch.full((rows,), behaviors),
        torch.zeros(rows, len(user.profile), dtype=torch.long),
        torch.zeros(rows, dim),
        torch.zeros(rows, recent, dim),
        torch.full((rows,), recent),
    )
    axes = {name: {0: "row"} for name in INPUTS}
    axes["behavior"][1] = axes["kind"][1] = "behavior"
    with warnings.catch_warnings():
        # The tracing exporter is called old, but writes this graph in 0.7 s where the new one takes 8.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            user,
            example,
            file,
            input_names=list(INPUTS),
            output_names=["user"],
            dynamic_axes=axes,
            dynamo=False,
        )
