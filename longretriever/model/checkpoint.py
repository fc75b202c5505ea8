"""Weights on disk: a checkpoint to go on from, and the model that serving opens.

Checkpoints are safetensors. A model is the user tower as ONNX, item and category vectors as plain arrays and
the ids they stand for, so that serving needs no torch (see `exported.py` for the reading side).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from longretriever.errors import Mismatch
from longretriever.model.pooling import pool
from longretriever.saved import opening, writing

if TYPE_CHECKING:
    from longretriever.model.train import Training


def save_state(run: Training, path: Path) -> None:
    """Write everything that `load_state` needs to go on exactly as if nothing had happened."""
    tensors = {f"learner.{k}": v for k, v in run.learner.state_dict().items()}
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
    run.learner.load_state_dict(_under("learner.", tensors))
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


def save_model(run: Training, out: Path, beside: Mapping[str, Path]) -> None:
    """Write what serving opens: the learner's own files, its weights, ids, and how they came about.

    `beside` are folders to become part of the model, by the names that they have there.
    """
    store, learner, at = run.store, run.learner, run.at
    with writing(out, learner.kind) as folder:
        shutil.copy(store.path / "categories.arrow", folder.path)
        for name, path in beside.items():
            shutil.copytree(path, folder.path / name)
        weights = {k: v.contiguous() for k, v in learner.state_dict().items()}
        save_file(weights, folder.path / "weights.safetensors")
        serving = learner.write(folder, run.rows)
        folder.made_from = {"store": store.fingerprint}
        folder.facts = {
            **serving,
            "store_path": str(store.path.resolve()),
            "config": asdict(run.config),
            "training": asdict(at),
            "samples_of_epoch": run.batches.n_samples,
            "parameters": {
                "dense": sum(v.numel() for v in weights.values()),
                "item_rows": len(run.rows.weight),
            },
            "behaviors": list(store.behaviors),
            "profile_fields": [asdict(field) for field in store.profile_fields],
            "trained_until": int(run.boundary),
        }
        weight = getattr(run.config, "factors", 0.0)
        if weight != 0:
            folder.facts["factors"] = pool(folder, store, run.boundary, weight, run.config.seed)
