from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever.errors import Damaged, InputError, Mismatch, NotSaved, UnknownCategory
from longretriever.index import CORPUS, ExactIndex, Index, build
from longretriever.saved import writing

D = 64
SIZES = np.array([0, 1, 3, 40, 0, 200, 1500, 0])
START = np.concatenate([[0], np.cumsum(SIZES)])
SAMPLE = 100  # large: over 800 items, so only category 6, and the corpus
EVERY = np.array([CORPUS, *range(len(SIZES))])  # contexts


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def random_vectors(n: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((n, D)))


def clustered(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Items around centres of which few are popular, and one user near each of 30 of them."""
    centre = unit(rng.standard_normal((int(np.sqrt(n)), D)))
    popular = 1 / np.arange(1, len(centre) + 1)
    drawn = rng.choice(len(centre), n + 30, p=popular / popular.sum())
    near = unit(centre[drawn] + 0.8 * rng.standard_normal((n + 30, D)) / np.sqrt(D))
    return near[:n], near[n:]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return random_vectors(START[-1])


@pytest.fixture(scope="module")
def folder(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "index"
    build(vectors, START, path, made_from={"store": "s", "model": "m"}, sample=SAMPLE)
    return path


@pytest.fixture(scope="module")
def index(folder: Path) -> Index:
    return Index.open(folder, verify=True)


@pytest.fixture(scope="module")
def exact(vectors: np.ndarray) -> ExactIndex:
    return ExactIndex(vectors, START)


# -- search


def test_items_left_out_are_found_by_nobody(vectors: np.ndarray, tmp_path: Path) -> None:
    """And probabilities are over the others, as though they had never been."""
    rng = np.random.default_rng(3)
    without = np.sort(rng.choice(len(vectors), len(vectors) // 3, replace=False))
    build(vectors, START, tmp_path / "some", made_from={}, sample=SAMPLE, without=without)
    some, exact = Index.open(tmp_path / "some", verify=True), ExactIndex(vectors, START, without)
    left = np.setdiff1d(np.arange(len(vectors)), without)
    start = np.searchsorted(left, START)
    bare = ExactIndex(vectors[left], start)
    build(vectors[left], start, tmp_path / "bare", made_from={}, sample=SAMPLE)
    users, contexts = random_vectors(len(EVERY) + 1, seed=4), np.append(EVERY, CORPUS)
    truth, true_cosine = bare.search(users, contexts, 100)
    for index in (some, exact):
        item, cosine = index.search(users, contexts, 100)
        assert not np.isin(item, without).any()
        np.testing.assert_allclose(cosine, true_cosine, atol=1e-3)
        said = index.log_normaliser(users, contexts, 10.0, item, cosine)
        alone = bare if index is exact else Index.open(tmp_path / "bare")
        wanted = alone.log_normaliser(users, contexts, 10.0, *alone.search(users, contexts, 100))
        np.testing.assert_allclose(said, wanted, atol=1e-3)
    item, _ = exact.search(users, contexts, 100)
    assert np.array_equal(item, np.where(truth >= 0, left[truth], -1))


def test_a_large_corpus_of_which_all_is_left_out_has_no_sum(tmp_path: Path) -> None:
    build(random_vectors(40), np.array([0, 30, 40]), tmp_path / "index", made_from={}, sample=2)
    index, users, whole = Index.open(tmp_path / "index"), random_vectors(1), np.array([CORPUS])
    item, cosine = index.search(users, whole, 5, without=(0, 1))
    assert (item < 0).all()
    assert index.log_normaliser(users, whole, 20.0, item, cosine).tolist() == [-np.inf]


def test_items_left_out_must_be_there(vectors: np.ndarray, tmp_path: Path) -> None:
    for wrong in (-1, len(vectors)):
        with pytest.raises(InputError, match=r"without=\[.*\]: expected item numbers from 0 to"):
            build(vectors, START, tmp_path / "index", made_from={}, without=np.array([wrong]))


def test_search_finds_what_brute_force_finds(index: Index, exact: ExactIndex) -> None:
    users, contexts = random_vectors(405, seed=1), np.tile(EVERY, 45)
    item, cosine = index.search(users, contexts, 100)
    true_item, true_cosine = exact.search(users, contexts, 100)
    hits = sum(len(np.intersect1d(a[a >= 0], b)) for a, b in zip(item, true_item, strict=True))
    assert hits / (true_item >= 0).sum() >= 0.999
    np.testing.assert_allclose(cosine, true_cosine, atol=1e-3)
    assert (item.dtype, cosine.dtype) == (np.int64, np.float32)


def test_a_row_holds_only_items_of_its_context_best_first(index: Index) -> None:
    users = random_vectors(len(EVERY), seed=2)
    item, cosine = index.search(users, EVERY, 50)
    for row, c in enumerate(EVERY):
        low, high = (0, START[-1]) if c == CORPUS else START[c : c + 2]
        n = min(high - low, 50)
        assert ((item[row, :n] >= low) & (item[row, :n] < high)).all()
        assert len(set(item[row, :n])) == n
        assert (item[row, n:] == -1).all()
        assert (cosine[row, n:] == -np.inf).all()
        assert (np.diff(cosine[row, :n]) <= 0).all()


def test_a_row_does_not_change_with_the_others_of_its_call(index: Index) -> None:
    """Whatever contexts they ask, all items among them, and in whatever order."""
    users = random_vectors(len(EVERY), seed=11)
    item, cosine = index.search(users, EVERY, 2000)
    for order in (np.arange(len(EVERY))[::-1], np.array([0]), np.array([3, 0, 7, 0]), np.array([6, 2])):
        again, at = index.search(users[order], EVERY[order], 2000)
        np.testing.assert_array_equal(again, item[order])
        np.testing.assert_array_equal(at, cosine[order])


def test_the_corpus_is_all_categories_together(index: Index) -> None:
    users = random_vectors(5, seed=12)
    item, cosine = index.search(users, np.full(5, CORPUS), 2000)
    for row, user in enumerate(users):
        parts = index.search(np.tile(user, (len(SIZES), 1)), np.arange(len(SIZES)), 2000)
        flat_item, flat_cosine = (part[parts[0] >= 0] for part in parts)
        best = np.lexsort((flat_item, -flat_cosine))
        np.testing.assert_array_equal(item[row, : START[-1]], flat_item[best])
        np.testing.assert_array_equal(cosine[row, : START[-1]], flat_cosine[best])
        assert (item[row, START[-1] :] == -1).all()


def test_the_corpus_without_some_categories(index: Index, exact: ExactIndex) -> None:
    users, contexts = random_vectors(3, seed=12), np.array([CORPUS, 5, CORPUS])
    for either in (index, exact):
        item, cosine = either.search(users, contexts, 2000)
        left, at = either.search(users, contexts, 2000, without=(5, 6))
        np.testing.assert_array_equal(left[1], item[1])  # it asks for one of them by name
        for row in (0, 2):
            kept = (item[row] >= 0) & ~((START[5] <= item[row]) & (item[row] < START[7]))
            np.testing.assert_array_equal(left[row, : kept.sum()], item[row][kept])
            np.testing.assert_array_equal(at[row, : kept.sum()], cosine[row][kept])
            assert (left[row, kept.sum() :] == -1).all()
        none, _ = either.search(users, contexts, 10, without=range(len(SIZES)))
        assert (none[[0, 2]] == -1).all()


def test_contexts_may_repeat_and_there_may_be_none(index: Index, exact: ExactIndex) -> None:
    users = random_vectors(3, seed=3)
    item, _ = index.search(users, np.array([5, 5, 5]), 10)
    np.testing.assert_array_equal(item, exact.search(users, np.array([5, 5, 5]), 10)[0])
    for either in (index, exact):
        item, cosine = either.search(np.empty((0, D)), np.empty(0, int), 10)
        assert item.shape == cosine.shape == (0, 10)
        assert either.log_normaliser(np.empty((0, D)), np.empty(0, int), 1.0, item, cosine).shape == (0,)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_of_equal_cosines_the_lower_number_comes_first(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], k: int, seed: int
) -> None:
    """Vectors of eight entries, each +-sqrt(1/8) rounded to 16 bits, so that most cosines are equal."""
    rng = np.random.default_rng(seed)
    start = np.concatenate([[0], np.cumsum(sizes)])
    entry = np.float32(np.float16(np.sqrt(1 / 8)))
    corners = rng.choice([-entry, entry], (start[-1], 8)).astype(np.float32)
    path = tmp_path_factory.mktemp("ties") / "index"
    build(corners, start, path, made_from={})
    users, contexts = rng.choice([-1.0, 1.0], (4, 8)), rng.integers(CORPUS, len(sizes), size=4)
    item, cosine = Index.open(path).search(users, contexts, k)
    true_item, true_cosine = ExactIndex(corners, start).search(users, contexts, k)
    np.testing.assert_allclose(cosine, true_cosine, rtol=1e-6)
    for row, c in enumerate(contexts):
        size = start[-1] if c == CORPUS else sizes[c]
        n = min(k, size)
        if n == 0:
            continue
        got = np.round(cosine[row, :n] / entry)  # small integers
        inside = got > got[-1] if size > k else got < np.inf  # a tie for the last place is anyone's
        np.testing.assert_array_equal(item[row, :n][inside], true_item[row, :n][inside])
        assert (np.diff(item[row, :n])[np.diff(got) == 0] > 0).all()


def test_threads_share_an_index(index: Index) -> None:
    users, contexts = random_vectors(64, seed=4), np.resize(EVERY, 64)
    alone = [index.search(u[None], np.array([c]), 20)[0] for u, c in zip(users, contexts, strict=True)]
    barrier = threading.Barrier(4)

    def ask(part: int) -> list[np.ndarray]:
        barrier.wait()
        return [index.search(users[i][None], contexts[i : i + 1], 20)[0] for i in range(part, 64, 4)]

    with ThreadPoolExecutor(4) as pool:
        for part, answers in enumerate(pool.map(ask, range(4))):
            for i, answer in zip(range(part, 64, 4), answers, strict=True):
                np.testing.assert_array_equal(answer, alone[i])


# -- the sum over a whole category


@pytest.mark.parametrize("k", [1, 30, 2000])
@pytest.mark.parametrize("scale", [1.0, 20.0, 60.0])
def test_log_normaliser_is_exact_in_categories_that_are_not_large(
    index: Index, exact: ExactIndex, k: int, scale: float
) -> None:
    contexts = np.array([c for c in range(len(SIZES)) if c != 6] * 5)  # the corpus is large, too
    users = random_vectors(len(contexts), seed=5)
    found = index.search(users, contexts, k)
    estimate = index.log_normaliser(users, contexts, scale, *found)
    truth = exact.log_normaliser(users, contexts, scale, *found)
    empty = SIZES[contexts] == 0
    assert (estimate[empty] == -np.inf).all()
    assert (truth[empty] == -np.inf).all()
    np.testing.assert_allclose(estimate[~empty], truth[~empty], atol=1e-3 * scale)


def test_log_normaliser_of_a_corpus_that_is_not_large_is_exact(
    vectors: np.ndarray, exact: ExactIndex, tmp_path: Path
) -> None:
    build(vectors, START, tmp_path / "index", made_from={})  # of 1,024 items and not of 100 is the sample
    index, users = Index.open(tmp_path / "index"), random_vectors(len(EVERY), seed=13)
    assert len(index.sample_item) == 0
    for k in (1, 30, 2000):
        found = index.search(users, EVERY, k)
        estimate = index.log_normaliser(users, EVERY, 20.0, *found)
        truth = exact.log_normaliser(users, EVERY, 20.0, *found)
        filled = np.isfinite(truth)
        assert filled.sum() == 6
        np.testing.assert_array_equal(filled, np.isfinite(estimate))
        np.testing.assert_allclose(estimate[filled], truth[filled], atol=0.02)


def test_probabilities_of_a_category_sum_to_one(index: Index) -> None:
    users, contexts = random_vectors(3, seed=6), np.array([5, 6, CORPUS])
    item, cosine = index.search(users, contexts, 1744)
    log_prob = 20 * cosine - index.log_normaliser(users, contexts, 20.0, item, cosine)[:, None]
    np.testing.assert_allclose(np.exp(log_prob).sum(axis=1), 1, rtol=1e-6)


def test_log_normaliser_of_a_large_category_is_unbiased_over_samples(tmp_path: Path) -> None:
    """The same 600 items are each of 200 categories: one answer, 200 samples."""
    items, contexts = random_vectors(600, seed=7), np.arange(200)
    users = np.repeat(random_vectors(1, seed=8), 200, axis=0)
    build(np.tile(items, (200, 1)), 600 * np.arange(201), tmp_path / "index", made_from={}, sample=20)
    index, exact = Index.open(tmp_path / "index"), ExactIndex(items, np.array([0, 600]))
    estimates = np.exp(index.log_normaliser(users, contexts, 10.0, *index.search(users, contexts, 50)))
    found = exact.search(users[:1], contexts[:1], 50)
    truth = np.exp(exact.log_normaliser(users[:1], contexts[:1], 10.0, *found))
    standard_error = np.std(estimates) / np.sqrt(200)
    assert 0 < standard_error < 0.01 * truth
    assert abs(np.mean(estimates) - truth) < 4 * standard_error + 1e-3 * truth  # 16-bit vectors


def test_log_normaliser_of_a_large_corpus_is_unbiased_over_samples(tmp_path: Path) -> None:
    """Of categories of which none is large: the corpus has a sample of its own."""
    items, users = random_vectors(600, seed=14), random_vectors(15, seed=15)
    start, contexts = np.array([0, 0, 150, 300, 440, 599, 600]), np.full(15, CORPUS)
    exact = ExactIndex(items, start)
    ratios = []
    for seed in range(60):
        build(items, start, tmp_path / "index", made_from={}, sample=20, seed=seed)
        index = Index.open(tmp_path / "index")
        assert len(index.sample_item) == 20
        found = index.search(users, contexts, 50)
        estimate = index.log_normaliser(users, contexts, 10.0, *found)
        ratios.append(np.exp(estimate - exact.log_normaliser(users, contexts, 10.0, *found)))
    standard_error = np.std(ratios, axis=0) / np.sqrt(60)
    assert (standard_error > 1e-3).all(), "it is an estimate, made from other items each time"
    assert (standard_error < 0.03).all()
    assert (abs(np.mean(ratios, axis=0) - 1) < 4 * standard_error + 1e-3).all()  # 16-bit vectors


def test_a_corpus_and_a_category_have_samples_of_their_own(index: Index, exact: ExactIndex) -> None:
    assert np.diff(index.sample_start).tolist() == [0, 0, 0, 0, 0, 0, SAMPLE, 0, SAMPLE]
    of_category, of_corpus = index.sample_item[:SAMPLE], index.sample_item[SAMPLE:]
    assert ((of_category >= START[6]) & (of_category < START[7])).all()
    assert (of_corpus < START[6]).any()
    np.testing.assert_array_equal(index.sample_vector, exact.item_vectors_ID[index.sample_item])
    users, contexts = random_vectors(40, seed=16), np.resize([CORPUS, 5, 6], 40)
    found = index.search(users, contexts, 100)
    estimate = index.log_normaliser(users, contexts, 10.0, *found)
    error = estimate - exact.log_normaliser(users, contexts, 10.0, *found)
    assert abs(error[contexts == 5]).max() < 0.01
    assert 0.001 < np.sqrt(np.mean(error[contexts != 5] ** 2)) < 0.1


def test_log_normaliser_is_close_where_scores_are_peaked(tmp_path: Path) -> None:
    items, users = clustered(20_000, np.random.default_rng(9))
    start, contexts = np.array([0, 20_000]), np.zeros(len(users), int)
    build(items, start, tmp_path / "index", made_from={})
    index, exact = Index.open(tmp_path / "index"), ExactIndex(items, start)
    found = index.search(users, contexts, 500)
    error = index.log_normaliser(users, contexts, 20.0, *found) - exact.log_normaliser(
        users, contexts, 20.0, *found
    )
    assert 0.001 < np.sqrt(np.mean(error**2)) < 0.1


# -- building


def test_chunks_a_mapped_file_and_an_array_give_the_same_folder(
    vectors: np.ndarray, index: Index, tmp_path: Path
) -> None:
    np.save(tmp_path / "vectors.npy", vectors)
    cuts = np.array_split(vectors, [0, 7, 7, 900, 1200])
    sources = (np.load(tmp_path / "vectors.npy", mmap_mode="r"), iter(cuts), vectors.astype(np.float64))
    for source in sources:
        build(source, START, tmp_path / "again", made_from={}, sample=SAMPLE)
        assert Index.open(tmp_path / "again").fingerprint == index.fingerprint


def test_what_it_was_made_from_is_kept_and_progress_told(vectors: np.ndarray, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    chunks = iter(np.array_split(vectors, [1000]))
    build(chunks, START, tmp_path / "i", made_from={"model": "m"}, progress=lambda *now: told.append(now))
    assert told == [(1000, 1744), (1744, 1744)]
    index = Index.open(tmp_path / "i")
    assert index.manifest.made_from == {"model": "m"}
    assert (index.n_items, index.n_categories, index.dimension) == (1744, 8, D)


def test_a_catalogue_without_items(tmp_path: Path) -> None:
    build(np.empty((0, D)), np.array([0, 0]), tmp_path / "index", made_from={})
    item, cosine = Index.open(tmp_path / "index").search(random_vectors(1), np.array([0]), 3)
    assert item.tolist() == [[-1, -1, -1]]
    assert (cosine == -np.inf).all()


@pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="the system lists no memory maps")
def test_opening_maps_the_vectors_and_reads_none(tmp_path: Path) -> None:
    def resident() -> int:
        maps = psutil.Process().memory_maps()
        return sum(m.rss for m in maps if m.path == str(tmp_path / "index" / "lists.faiss"))

    build(random_vectors(100_000), np.array([0, 99_000, 100_000]), tmp_path / "index", made_from={})
    index = Index.open(tmp_path / "index")
    assert resident() < 1e6  # of 13.6 MB
    index.search(random_vectors(1), np.array([1]), 10)
    assert 0 < resident() < 2e6
    index.search(random_vectors(1), np.array([0]), 10)
    assert resident() > 13e6


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda v: v[:-1], r"1,743 item vectors, expected 1,744 by the last entry of category_start"),
        (lambda v: np.concatenate([v, v]), r"More than 1,744 item vectors, expected 1,744"),
        (lambda v: v * np.where(np.arange(len(v)) == 17, 3, 1)[:, None], r"item 17 has length 3, expected 1"),
        (lambda v: np.where(np.arange(len(v)) == 5, np.nan, 1)[:, None] * v, r"item 5 has length nan"),
        (lambda v: v[:, 0], r"shape \(1744,\) after 0 items, expected \[n, D\]"),
        (lambda v: [v[:10], v[10:, :8]], r"shape \(1734, 8\) after 10 items, expected \[n, 64\]"),
        (lambda v: [], r"0 item vectors, expected 1,744"),
    ],
)
def test_vectors_that_cannot_be_indexed_leave_the_old_index(
    vectors: np.ndarray, index: Index, tmp_path: Path, bad, message: str
) -> None:
    build(vectors, START, tmp_path / "index", made_from={}, sample=SAMPLE)
    with pytest.raises(InputError, match=message):
        build(bad(vectors), START, tmp_path / "index", made_from={})
    assert Index.open(tmp_path / "index").fingerprint == index.fingerprint
    assert [f.name for f in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize("starts", [[1, 5], [0, 5, 3], [0], [[0, 1]]])
def test_category_start_must_ascend_from_zero(starts: list, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"category_start is .*, expected \[C\+1\] ascending item numbers"):
        build(random_vectors(5), np.array(starts), tmp_path / "index", made_from={})
    with pytest.raises(InputError, match=r"category_start is "):
        ExactIndex(random_vectors(5), np.array(starts))


def test_other_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sample=0, expected at least 1"):
        build(random_vectors(5), np.array([0, 5]), tmp_path / "index", made_from={}, sample=0)
    with pytest.raises(InputError, match=r"No item vectors, so there is nothing to index"):
        build([], np.array([0, 0]), tmp_path / "index", made_from={})
    with pytest.raises(InputError, match=r"shape \(4, 64\), expected \[5, D\]"):
        ExactIndex(random_vectors(4), np.array([0, 5]))


# -- asking wrongly


@pytest.mark.parametrize(
    ("users", "contexts", "k", "kind", "message"),
    [
        (np.ones((2, 7)), [0, 1], 5, InputError, r"shape \(2, 7\), expected \[N, 64\]"),
        (np.ones(64), [0], 5, InputError, r"shape \(64,\), expected \[N, 64\]"),
        (np.ones((2, 64)), [0], 5, InputError, r"\(1,\) contexts for 2 user vectors"),
        (np.ones((1, 64)), [8], 5, UnknownCategory, r"context 8 is .* categories 0 to 7 \(and -1: all\)"),
        (np.ones((2, 64)), [-1, -2], 5, UnknownCategory, r"context -2 is not in the index"),
        (np.full((1, 64), np.nan), [1], 5, InputError, r"NaN or infinity"),
        (np.ones((1, 64)), [1], 0, InputError, r"k=0, expected at least 1"),
    ],
)
def test_bad_questions_are_refused_alike(
    index: Index, exact: ExactIndex, users, contexts, k: int, kind: type, message: str
) -> None:
    for either in (index, exact):
        with pytest.raises(kind, match=message):
            either.search(users, np.array(contexts), k)


# -- damaged and foreign folders


def test_a_cut_altered_or_missing_file_is_named(vectors: np.ndarray, tmp_path: Path) -> None:
    def fresh() -> Path:
        build(vectors, START, tmp_path / "index", made_from={})
        return tmp_path / "index" / "lists.faiss"

    file = fresh()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Damaged, match=r"lists\.faiss: .* bytes, expected .* `longretriever index`"):
        Index.open(tmp_path / "index")
    file = fresh()
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(Damaged, match=r"lists\.faiss: its SHA-256 is not the one written down"):
        Index.open(tmp_path / "index")
    fresh().unlink()
    with pytest.raises(Damaged, match=r"lists\.faiss: missing"):
        Index.open(tmp_path / "index")


def write_folder(path: Path, lists: Path | bytes, like: Index) -> None:
    with writing(path, "index") as folder:
        content = lists if isinstance(lists, bytes) else lists.read_bytes()
        (folder.path / "lists.faiss").write_bytes(content)
        for name in ("category_start", "sample_start", "sample_item", "sample_vector"):
            folder.save_array(name, getattr(like, name))
        folder.facts.update(like.manifest.facts)


def test_lists_of_another_index_are_noticed(index: Index, tmp_path: Path) -> None:
    build(unit(np.ones((1744, 8))), START, tmp_path / "narrow", made_from={})
    write_folder(tmp_path / "mixed", tmp_path / "narrow" / "lists.faiss", index)
    with pytest.raises(Damaged, match=r"'dimension': 8, .*expected an IndexIVFScalarQuantizer of .*: 64"):
        Index.open(tmp_path / "mixed")
    faiss.write_index(faiss.IndexFlatIP(D), str(tmp_path / "flat"))
    write_folder(tmp_path / "mixed", tmp_path / "flat", index)
    with pytest.raises(Damaged, match=r"a IndexFlatIP of"):
        Index.open(tmp_path / "mixed")
    write_folder(tmp_path / "mixed", b"not an index at all", index)
    with pytest.raises(Damaged, match=r"lists\.faiss: not a FAISS file"):
        Index.open(tmp_path / "mixed")


def test_folders_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(NotSaved, match=r"no such folder"):
        Index.open(tmp_path / "nothing")
    with writing(tmp_path / "model", "model"):
        pass
    with pytest.raises(Mismatch, match=r"holds a saved model, expected: index"):
        Index.open(tmp_path / "model")
