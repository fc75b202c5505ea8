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
from uuid import uuid4

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from longretriever.errors import Mismatch
from longretriever.model.learner import ItemRows
from longretriever.model.pooling import pool
from longretriever.model.sharding import Plan
from longretriever.saved import MANIFEST, Manifest, opening, writing

if TYPE_CHECKING:
    from longretriever.model.train import Training

_ROWS = "rows-"  # what the names of folders of a shard's rows begin with


def save_state(run: Training, path: Path) -> None:
    """Write everything that `load_state` needs to go on exactly as if nothing had happened.

    Where item rows are shared out, each process writes those of its shards to a folder each beside `path`;
    only when all are on the disk does the first process put `path` into place, which names them.
    """
    tensors = {f"learner.{k}": v for k, v in run.learner.state_dict().items()}
    for i, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    rows: dict[str, str] = {}
    if run.plan is None:
        tensors |= {"rows.weight": run.rows.weight, "rows.sum_of_squares": run.rows.sum_of_squares}
    else:
        rows = _save_rows(run, run.plan, path.parent)
    if run.wire.first:
        with writing(path, "checkpoint") as folder:
            save_file({k: v.contiguous() for k, v in tensors.items()}, folder.path / "state.safetensors")
            folder.facts = {"config": asdict(run.config), "position": asdict(run.at)}
            folder.made_from = {"store": run.store.fingerprint, **rows}
            if run.plan is not None:
                folder.facts["plan"] = run.plan.digest
        sweep_rows(path.parent)
    run.wire.meet()


def _save_rows(run: Training, plan: Plan, work: Path) -> dict[str, str]:
    """Names of the folders of all shards, in their order, and their fingerprints.

    The best checkpoint is mostly the latest as well: both name the same folders then.
    """
    if run.saved_rows[0] == run.at.steps:
        return run.saved_rows[1]
    token = run.wire.from_first(uuid4().hex[:8])  # not the names of a run that was killed at the same step
    at, made = 0, {}
    for shard in plan.mine:
        size = sum(part.stop - part.start for part in plan.ranges(shard))
        part, at = slice(at, at + size), at + size
        path = work / f"{_ROWS}{run.at.steps}-{token}-{shard}"
        with writing(path, "checkpoint") as folder:
            rows = {"weight": run.rows.weight[part], "sum_of_squares": run.rows.sum_of_squares[part]}
            save_file({k: v.contiguous() for k, v in rows.items()}, folder.path / "rows.safetensors")
            folder.made_from = {"store": run.store.fingerprint}
        made[path.name] = opening(path, "checkpoint").fingerprint
    every = {name: mark for each in run.wire.together(made) for name, mark in each.items()}
    run.saved_rows = run.at.steps, every
    return every


def sweep_rows(work: Path) -> None:
    """Remove rows of shards that no checkpoint in `work` names: of older ones, or of one never finished."""
    named: set[str] = set()
    for manifest in work.glob(f"*/{MANIFEST}"):
        if manifest.parent.name in ("latest", "best"):
            named |= opening(manifest.parent, "checkpoint").made_from.keys()
    for path in work.glob(f"{_ROWS}*"):
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)


def shards_of(path: Path) -> int:
    """How many shards an unfinished training has."""
    return opening(path, "checkpoint").facts["config"].get("shards") or 1


def load_state(path: Path, run: Training) -> None:
    """Put a checkpoint into `run`. Raises `Mismatch` when it belongs to another store or configuration."""
    manifest = opening(path, "checkpoint", verify=True)
    config = asdict(run.config)
    differing = [k for k in config if manifest.facts["config"].get(k) != config[k]]
    if run.plan is not None and not differing and manifest.facts.get("plan") != run.plan.digest:
        differing = ["plan of the shards"]  # made by another version
    if differing or manifest.made_from["store"] != run.store.fingerprint:
        what = f"other settings ({', '.join(differing)})" if differing else "another store"
        raise Mismatch(
            f"{path} is an unfinished training with {what}. "
            "Go on with the old ones, or start anew with --fresh (fresh=True), which discards it."
        )
    tensors = load_file(path / "state.safetensors")
    run.learner.load_state_dict(_under("learner.", tensors))
    if run.plan is None:
        run.rows.weight, run.rows.sum_of_squares = tensors["rows.weight"], tensors["rows.sum_of_squares"]
    else:
        parts = [_load_rows(path.parent, manifest, shard) for shard in run.plan.mine]
        empty = {"weight": torch.empty(0, run.config.dim), "sum_of_squares": torch.empty(0)}
        run.rows.weight = torch.cat([empty["weight"], *(part["weight"] for part in parts)])
        run.rows.sum_of_squares = torch.cat(
            [empty["sum_of_squares"], *(part["sum_of_squares"] for part in parts)]
        )
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in _under("optimizer.", tensors).items():
        i, name = key.split(".")
        state.setdefault(int(i), {})[name] = value
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": state, "param_groups": groups})
    run.at = type(run.at)(**manifest.facts["position"])


def _load_rows(work: Path, manifest: Manifest, shard: int) -> dict[str, torch.Tensor]:
    name = next(name for name in manifest.made_from if name.endswith(f"-{shard}"))
    found = opening(work / name, "checkpoint", verify=True)
    if found.fingerprint != manifest.made_from[name]:
        raise Mismatch(
            f"{found.path} is not of the same moment as {manifest.path}. "
            "Restore both from a copy, or start anew with --fresh (fresh=True), which discards them."
        )
    return dict(load_file(found.path / "rows.safetensors"))


def _all_rows(run: Training, plan: Plan, state: Path) -> ItemRows:
    """The item rows of all shards of a checkpoint, in a file beside it: they may exceed the memory."""
    shape = (int(plan.start[-1]), run.config.dim)
    file, manifest = state.parent / "rows.npy", opening(state, "checkpoint")
    whole = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    for shard in range(plan.shards):
        weight, at = _load_rows(state.parent, manifest, shard)["weight"], 0
        for part in plan.ranges(shard) if len(weight) else []:
            size = part.stop - part.start
            whole[part], at = weight[at : at + size].numpy(), at + size
    return ItemRows(torch.from_numpy(whole), run.config.row_lr)


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def save_model(
    run: Training, out: Path, beside: Mapping[str, Path], state: Path, threads: int | None = None
) -> None:
    """Write what serving opens: the learner's own files, its weights, ids, and how they came about.

    `beside` are folders to become part of the model, by the names that they have there. Where item rows are
    shared out, those of all processes are read from the checkpoint `state`.
    """
    rows = run.rows if run.plan is None else _all_rows(run, run.plan, state)
    store, learner, at = run.store, run.learner, run.at
    with writing(out, learner.kind) as folder:
        shutil.copy(store.path / "categories.arrow", folder.path)
        for name, path in beside.items():
            shutil.copytree(path, folder.path / name)
        weights = {k: v.contiguous() for k, v in learner.state_dict().items()}
        save_file(weights, folder.path / "weights.safetensors")
        serving = learner.write(folder, rows)
        folder.made_from = {"store": store.fingerprint}
        folder.facts = {
            **serving,
            "store_path": str(store.path.resolve()),
            "config": asdict(run.config),
            "training": asdict(at),
            "samples_of_epoch": run.n_samples,
            "parameters": {
                "dense": sum(v.numel() for v in weights.values()),
                "item_rows": len(rows.weight),
            },
            "behaviors": list(store.behaviors),
            "profile_fields": [asdict(field) for field in store.profile_fields],
            "trained_until": int(run.boundary),
        }
        weight = getattr(run.config, "factors", 0.0)
        if weight != 0:
            folder.facts["factors"] = pool(folder, store, run.boundary, weight, run.config.seed, threads)
