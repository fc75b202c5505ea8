"""A log of items that live for hours is learned from its newest hours, any other from all of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from longretriever.errors import InputError
from longretriever.model.batches import Batches, Sampling
from longretriever.model.config import EbrConfig, PginConfig, TrainConfig
from longretriever.model.exported import Model
from longretriever.model.fading import half_life, weight
from longretriever.model.pgin import Lessons
from longretriever.model.train import train
from tests.worlds import DAY, START, stored, table

DAYS, PER_DAY, USERS = 20, 60, 12
TINY = {"dim": 8, "layers": 1, "step_samples": 100, "epochs": 1}


def news(lives: float, seed=0):
    """Each day has its own 4 items in each of 2 categories; they are met for `lives` days."""
    rng = np.random.default_rng(seed)
    time = np.sort(rng.uniform(0, DAYS, DAYS * PER_DAY))
    born = np.floor(np.maximum(0, time - rng.uniform(0, lives, len(time))))
    category = rng.integers(0, 2, len(time))
    item = ((born * 2 + category) * 4 + rng.integers(0, 4, len(time))).astype(int)
    when = START + (time * DAY).astype(int)
    return table(rng.integers(0, USERS, len(time)), item, category, when)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return stored(news(0.5), tmp_path_factory.mktemp("news") / "store")


def test_items_of_a_day_fade_within_a_fraction_of_it(short):
    assert 0.05 < half_life(short) < 0.25


@pytest.mark.parametrize("lives", [5, 20])
def test_items_that_live_long_do_not_fade(lives, tmp_path):
    assert half_life(stored(news(lives), tmp_path / "store")) == 0


def test_items_that_occur_once_have_no_age(tmp_path):
    n = 1000
    when = list(range(START, START + n * DAY, DAY))
    log = table([i % 9 for i in range(n)], list(range(n)), [i % 2 for i in range(n)], when)
    assert half_life(stored(log, tmp_path / "once")) == 0
    twice = table([i % 9 for i in range(n)], [i // 2 for i in range(n)], [i // 2 % 2 for i in range(n)], when)
    assert half_life(stored(twice, tmp_path / "twice")) == pytest.approx((n - 1) / 200)  # the least


def test_the_weight_halves_with_every_half_life():
    now = START + 10 * DAY
    time = np.array([now + DAY, now, now - DAY, now - 2 * DAY, START])
    assert weight(time, now, 1.0).tolist() == [1, 1, 0.5, 0.25, 2.0**-10]
    assert weight(time, now, 0.0).tolist() == [1] * 5


@pytest.mark.parametrize("kind", [{}, {"along": "life", "mixed": True}, {"packed": False}], ids=str)
def test_an_epoch_draws_events_by_their_weight(short, kind):
    batches = Batches(
        short, Sampling(**kind, half_life=3.0, samples=50, context_length=4, overlap=1), short.last_time
    )
    drawn = np.zeros(2)
    for epoch in range(20):
        for step in batches.epoch(0, epoch):
            for rows in step:
                for first, stop in zip(rows.first, rows.stop, strict=True):
                    late = int((batches.lines[np.arange(first, stop)] > START + 17 * DAY).sum())
                    drawn += late / 20, (stop - first - late) / 20
    assert drawn.sum() == pytest.approx(batches.n_samples, rel=0.1)
    half = 3 * PER_DAY / np.log(2) / 2  # of the last half-life; and of all before, as many
    assert drawn == pytest.approx(half, rel=0.15)


def test_so_do_lessons_of_the_next_category(short):
    lessons = Lessons(short, PginConfig(half_life=3.0, most=None), short.last_time, held_out=False)
    position = np.concatenate([p for e in range(20) for p in lessons.epoch(0, e)])
    late = short.event_time[short.time_order[position]] > START + 17 * DAY
    assert len(position) / 20 == pytest.approx(lessons.n_samples, rel=0.1)
    assert 0.4 < late.mean() < 0.6


def test_training_says_how_fast_it_let_events_fade_and_holds_none_out(short, tmp_path):
    config = TrainConfig(
        **TINY, whole=EbrConfig(**TINY), interests=PginConfig(dim=8, step_samples=100, epochs=1)
    )
    at = train(short, tmp_path / "model", config)
    days = half_life(short)
    for part in (".", "whole"):
        assert Model.open(tmp_path / "model" / part).manifest.facts["config"]["half_life"] == days
    assert at.validation == []  # the newest hours are what there is to learn
    assert at.beside["whole"]["samples"] < short.n_events / 3
    still = train(short, tmp_path / "still", replace(config, half_life=0.0, interests=None, whole=None))
    assert len(still.validation) == 1
    assert still.samples > 3 * at.samples


def test_a_half_life_that_is_none_is_refused():
    for days in (-1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match=r"half_life=.*expected days, 0 where nothing fades"):
            TrainConfig(half_life=days)
