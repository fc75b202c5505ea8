"""The figures of similarity, for vectors that are known."""

from __future__ import annotations

import numpy as np

from longretriever.model.baselines.collapse import interest_similarity
from longretriever.model.exported import UserVectors


class Vectors:
    """A model that says these vectors, one user after the other."""

    def __init__(self, users):
        self.users = users

    def user_vectors(self, requests):
        users = [self.users[r] for r in requests]
        most = max(len(u) for u in users)
        padded = np.zeros((len(users), most, 2), np.float32)
        for row, user in zip(padded, users, strict=True):
            row[: len(user)] = user
        return UserVectors(padded, np.array([len(u) for u in users]), None)


def similarity(*users):
    return interest_similarity(Vectors([np.array(u, np.float32) for u in users]), list(range(len(users))))


EAST, NORTH, NEARLY_EAST = (1, 0), (0, 1), (0.96, 0.28)


def test_one_interest_three_times():
    assert similarity([EAST, EAST, EAST]) == (1, 1, 1, 3)


def test_a_pair_that_differs_is_no_collapse():
    found = similarity([EAST, NEARLY_EAST, NORTH])
    np.testing.assert_allclose(found.mean, (0.96 + 0 + 0.28) / 3, atol=1e-6)
    assert found.collapsed == 0


def test_users_count_evenly_and_those_of_one_interest_not_at_all():
    found = similarity([EAST], [EAST, NORTH], [EAST, NEARLY_EAST], [NORTH])
    np.testing.assert_allclose(found.mean, 0.48, atol=1e-6)
    assert (found.collapsed, found.users, found.interests) == (0.5, 2, 1.5)


def test_nobody_has_two():
    found = similarity([EAST])
    assert np.isnan(found.mean)
    assert np.isnan(found.collapsed)
    assert found.users == 0


def test_many_requests_are_asked_in_parts():
    assert similarity(*[[EAST, NORTH]] * 300, *[[EAST, EAST]] * 300) == (0.5, 0.5, 600, 2)
