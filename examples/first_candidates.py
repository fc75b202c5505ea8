"""From a log to one user's candidates, with reasons, in half a minute: `python examples/first_candidates.py`.

The log is a simulated one; put your own files in place of `market` (see docs/ingest.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

from longretriever import (
    Market,
    MarketConfig,
    Retriever,
    Rules,
    Store,
    TrainConfig,
    index_model,
    ingest,
    train,
)


def main(folder: Path, events: int = 30_000, seconds: float = 20) -> None:
    Market(MarketConfig.of_size(events, seed=3)).write(folder / "market")

    report = ingest(
        folder / "market" / "events.parquet",
        folder / "store",
        items=folder / "market" / "items.parquet",
        users=folder / "market" / "users.parquet",
    )
    print(f"{report.kept:,} events of {report.users:,} users, {report.items:,} items")

    store = Store.open(folder / "store")
    trained = train(store, folder / "model", TrainConfig(minutes=seconds / 60))
    print(f"learned from {trained.samples:,} samples; {trained.finished}")
    index_model(folder / "model")

    retriever = Retriever.load(folder / "model")
    user_id = store.user_ids.take([7])[0]
    answer = retriever.retrieve(user_id, k=100, rules=Rules(exclude_seen=True))
    print(f"\nUser {user_id} is asked about in {len(answer.contexts)} categories:")
    for context in answer.contexts:
        print(f"  category {context.category_id}: {context.share:.0%} of the interest")

    print(f"\nThe first of {len(answer)} candidates, none of them met before:")
    for candidate in answer.candidates[:5]:
        print(f"  {candidate.rank}. {candidate.title} (category {candidate.category_id})")
        for reason in candidate.reasons[:2]:
            print(f"       {reason.behavior} {reason.title}, {reason.similarity:.0%} alike")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "first-candidates"))
