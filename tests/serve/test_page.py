"""What a person finds on the page, in a real browser against a real server."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from longretriever.store.behaviors import Store
from tests.serve.running import Server, serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

DESK = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
HOSTILE = '<img src=x onerror="window.hacked = true">'


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as started:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if found is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("no Chromium is installed")
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shown(model, tmp_path_factory) -> Iterator[Server]:
    """A server of its own, since events are added."""
    with serving(model, tmp_path_factory.mktemp("page")) as running:
        yield running


@dataclass
class Visit:
    """A page that was opened, and what it did."""

    page: playwright.Page
    url: str
    problems: list[str] = field(default_factory=list)  # of the console, of scripts
    requests: list[playwright.Request] = field(default_factory=list)

    def asked(self) -> list[dict]:
        """The bodies of its requests for candidates."""
        return [json.loads(r.post_data) for r in self.requests if r.url.endswith("/v1/retrieve")]

    def settled(self) -> None:
        """Wait until nothing is asked any more."""
        self.page.wait_for_selector(".candidate")
        expect(self.page.locator("[aria-busy=true]")).to_have_count(0)

    def answered(self) -> list[dict]:
        """The candidates of its last request, asked for once more."""
        return httpx.post(f"{self.url}/v1/retrieve", json=self.asked()[-1]).json()["candidates"]

    def candidates(self) -> list[str]:
        return self.page.locator(".candidate").evaluate_all("all => all.map(one => one.dataset.item)")

    def contexts(self) -> list[str]:
        return self.page.locator("#contexts-table tbody .label").all_text_contents()

    def changed(self, do: Callable[[], object]) -> None:
        """Do this, and wait until it is answered."""
        with self.page.expect_response("**/v1/retrieve"):
            do()
        self.settled()


@pytest.fixture
def visit(browser, shown, busy) -> Iterator[Callable[..., Visit]]:
    """Opens the page in a browser of its own: `visit("#user=7", route=handler)`."""
    contexts = []

    def opened(
        hash: str = f"#user={busy}", route: Callable | None = None, wait: bool = True, **options
    ) -> Visit:
        context = browser.new_context(**{**DESK, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5_000)
        visit = Visit(page, shown.url)
        page.on("console", lambda message: visit.problems.append(message.text))
        page.on("pageerror", lambda error: visit.problems.append(str(error)))
        page.on("request", lambda request: visit.requests.append(request))
        if route is not None:
            page.route("**/v1/**", route)
        page.goto(f"{shown.url}/{hash}")
        if wait:
            visit.settled()
        return visit

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def another(model, busy) -> int:
    """A user who is not the busy one."""
    ids = Store.open(model.parent / "store").user_ids.take([5, 6])
    return next(one for one in ids if one != busy)


def test_it_loads_without_a_complaint_and_asks_no_other_host(visit, shown):
    found = visit("")  # nobody is named: somebody is shown
    assert found.problems == []
    assert {urlsplit(r.url).netloc for r in found.requests} == {urlsplit(shown.url).netloc}
    assert found.page.locator("#life-title").text_content().startswith("User ")
    assert "user=" in found.page.url
    assert found.page.locator("#model-facts dd").count() > 5
    assert found.page.locator("#times li").count() > 3
    found.page.set_content('<p style="color: red">x</p><script>window.hacked = true</script>')
    assert found.page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in problem for problem in found.problems)


def test_a_user_is_met_by_typing(visit, another, shown):
    found = visit()
    found.page.fill("#user", str(another))
    expect(found.page.locator("#user-options li").first).to_contain_text("behavior")
    found.changed(lambda: found.page.press("#user", "Enter"))
    life = shown.get(f"/v1/users/{another}").json()
    assert found.page.text_content("#life-title") == f"User {another}"
    assert found.page.text_content("#behaviors") == f"{life['behaviors']:,}"
    rows = found.page.locator(".timeline .row")
    assert rows.count() == min(12, len(life["categories"]))
    assert rows.first.locator(".label").text_content() == str(life["categories"][0]["category_id"])
    marks = sum(count > 0 for category in life["categories"][:12] for count in category["counts"])
    assert 0 < found.page.locator("rect.mark").count() <= 2 * marks
    assert len(found.contexts()) > 1
    assert "All items" in found.contexts()
    assert found.candidates()
    assert found.page.locator(".why li").count() > 0
    found.page.go_back()
    found.settled()
    assert found.page.text_content("#life-title") != f"User {another}"


def test_knobs_change_the_request_and_the_address_repeats_it(visit):
    found = visit()
    page = found.page
    found.changed(lambda: page.fill("#k", "37"))
    found.changed(lambda: page.get_by_label("random", exact=True).check())
    found.changed(lambda: page.fill("#n", "3"))
    found.changed(lambda: page.select_option("#merge", "quota"))
    found.changed(lambda: page.check("#seen"))
    found.changed(lambda: page.locator("#returns").press("ArrowLeft"))
    category = next(name for name in found.contexts() if name != "All items")
    found.changed(lambda: page.click(f"#contexts button[aria-label='Ask always about {category}']"))
    page.click(f"#contexts button[aria-label='Quota and boost of {category}']")
    found.changed(lambda: page.keyboard.type("2"))
    found.changed(lambda: page.fill(f"#rules input[aria-label='Factor on the share of {category}']", "1.5"))
    last = found.asked()[-1]
    assert last["k"] == 37
    assert (last["merge"], last["exclude_seen"], last["returns"]) == ("quota", True, 0.45)
    asked = {"select": "random", "n": 3, "include": [int(category)]}
    assert last["interests"] == {**asked, "quotas": {category: 2}, "boosts": {category: 1.5}}
    assert page.text_content("#candidates-facts").startswith(f"{len(found.answered())} candidate")
    again = visit(f"#{urlsplit(page.url).fragment}")
    assert again.asked()[0] == last
    assert again.candidates() == found.candidates()
    again.changed(lambda: again.page.click("#reset"))
    assert set(again.asked()[-1]) == {"user_id", "k", "seed", "explain"}


def test_drawing_again_changes_the_contexts(visit, busy):
    found = visit(f"#user={busy}&select=random&n=2&m=20")
    drawn = {tuple(found.contexts())}
    for seed in ("2", "3", "4"):
        found.changed(lambda: found.page.click("#draw"))
        assert found.page.input_value("#seed") == seed
        drawn.add(tuple(found.contexts()))
    assert len(drawn) > 1
    assert "drawn again" in found.page.text_content("#since")


def test_an_excluded_category_is_gone_until_the_rule_is(visit):
    found = visit()
    category = next(name for name in found.contexts() if name != "All items")
    button = f"#life button[aria-label='Exclude {category}']"
    found.changed(lambda: found.page.click(button))
    assert category not in found.contexts()
    assert " gone" in found.page.text_content("#since")
    assert found.page.get_attribute(button, "aria-pressed") == "true"
    expect(found.page.locator(button)).to_be_focused()
    assert all(str(c["category_id"]) != category for c in found.answered())
    found.changed(lambda: found.page.click(f"#rules button[aria-label='Remove the rule for {category}']"))
    assert category in found.contexts()


def test_a_candidate_says_why_and_what_is_like_it(visit, shown):
    found = visit()
    first = found.page.locator(".candidate").first
    one = next(c for c in found.answered() if str(c["item_id"]) == first.get_attribute("data-item"))
    assert first.locator(".why li").count() == len(one["reasons"])
    first.locator(".title").click()
    like = shown.get(f"/v1/items/{one['item_id']}/similar", params={"k": 8}).json()["similar"]
    expect(first.locator(".similar li")).to_have_count(len(like))
    assert like[0]["title"] in first.locator(".similar li").first.text_content()
    in_groups = len(found.candidates())
    found.page.get_by_label("One list").check()
    ranks = found.page.locator(".rank").evaluate_all("all => all.map(one => +one.childNodes[1].data)")
    assert ranks == list(range(1, len(ranks) + 1))
    assert len(ranks) == min(30, len(found.answered())) != in_groups


def test_an_event_counts_at_once(visit, another):
    found = visit(f"#user={another}")
    before, live = (int(found.page.text_content(one)) for one in ("#behaviors", "#live"))
    item = found.candidates()[0]
    found.changed(lambda: found.page.locator(f".candidate[data-item='{item}'] .act button").click())
    expect(found.page.locator("#behaviors")).to_have_text(str(before + 1))
    expect(found.page.locator("#live")).to_have_text(str(live + 1))
    assert "Since the list before (click" in found.page.text_content("#since")
    found.page.fill("#item", "0001")  # in the middle of a title
    found.page.locator("#item-options li").first.click()
    found.page.select_option("#kind", "buy")
    found.changed(lambda: found.page.click("#add"))
    expect(found.page.locator("#live")).to_have_text(str(live + 2))
    assert "Added: buy" in found.page.text_content("#event-note")
    assert any("buy" in one for one in found.page.locator("#recent-list li").all_text_contents()[:2])
    found.page.fill("#item", "99999999")
    found.page.click("#add")
    expect(found.page.locator("#event-note")).to_contain_text("not known here")


def test_curl_and_python_ask_the_same(visit, busy):
    knobs = f"#user={busy}&k=20&select=random&n=2&seed=5&seen=1&returns=0.25&merge=quota&view=list"
    found = visit(knobs)
    words = shlex.split(found.page.text_content("#curl").replace("\\\n", " "))
    assert words[0] == "curl"
    body = words[words.index("-d") + 1]
    headers = dict(words[i + 1].split(": ") for i, word in enumerate(words) if word == "-H")
    answer = httpx.post(words[1], content=body, headers=headers).json()
    assert [str(c["item_id"]) for c in answer["candidates"]] == found.candidates()
    names: dict = {}
    exec(found.page.text_content("#python"), names)
    assert names["answer"]["candidates"] == answer["candidates"]


def test_the_keyboard_is_enough(visit, another):
    found = visit()
    page = found.page

    def focused() -> str:
        return page.evaluate("document.activeElement.id || document.activeElement.className.baseVal || ''")

    page.keyboard.press("Tab")
    assert focused() == "skip"
    page.keyboard.press("Tab")
    assert focused() == "user"
    page.keyboard.press("Control+A")
    page.keyboard.type(str(another))
    found.changed(lambda: page.keyboard.press("Enter"))
    assert page.text_content("#life-title") == f"User {another}"
    for _ in range(3):
        page.keyboard.press("Tab")
    assert focused() == "mark"  # another user, colors, the first mark of the timeline
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    assert "behavior" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    expect(page.locator("#tip")).to_be_visible()
    page.focus("#user")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # to the candidates
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")  # as one list
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first candidate
    expect(page.locator(".candidate").first.locator(".similar")).to_be_visible()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


@pytest.mark.parametrize("view", ["contexts", "list"])
def test_a_phone_needs_no_sideways_scrolling(visit, busy, view):
    found = visit(f"#user={busy}&view={view}&include=1&quota=1:5", **PHONE)
    for summary in found.page.locator("summary").all():
        summary.click()
    found.page.locator(".title").first.click()
    assert found.page.evaluate("document.documentElement.scrollWidth") == 360


def test_dark_and_light(visit):
    found = visit(color_scheme="dark")

    def paper() -> int:
        color = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(color.split("(")[1].split(",")[0])

    assert paper() < 50
    found.page.click("#theme")
    assert paper() > 200
    found.page.reload()
    found.settled()
    assert paper() > 200  # it is remembered
    found.page.click("#theme")
    assert paper() < 50


def test_a_hostile_title_is_text(visit):
    def poisoned(route):
        answer = route.fetch()
        text = answer.text().replace('"title":"', '"title":' + json.dumps(HOSTILE)[:-1])
        route.fulfill(response=answer, body=text)

    found = visit(route=poisoned)
    found.page.locator(".title").first.click()
    found.page.click("#recent summary")
    found.page.fill("#item", "00")
    expect(found.page.locator("#item-options li").first).to_contain_text(HOSTILE)
    expect(found.page.locator(".candidate .title").first).to_contain_text(HOSTILE)
    expect(found.page.locator(".similar").first).to_contain_text(HOSTILE)
    assert found.page.locator("img").count() == 0
    assert found.page.evaluate("window.hacked") is None


def test_a_key_is_asked_for(visit):
    def locked(route):
        if route.request.headers.get("authorization") == "Bearer open sesame":
            return route.continue_()
        return route.fulfill(status=401, json={"detail": "this API key is not known."})

    found = visit(route=locked, wait=False)
    expect(found.page.get_by_label("Key", exact=True)).to_be_focused()
    found.page.keyboard.type("wrong")
    found.page.keyboard.press("Enter")
    expect(found.page.locator("#key-wrong")).to_have_text("this API key is not known.")
    found.page.keyboard.type("open sesame")
    found.page.keyboard.press("Enter")
    found.settled()
    assert "Bearer $LONGRETRIEVER_KEY" in found.page.text_content("#curl")
    assert "sesame" not in found.page.content()
    found.page.reload()
    found.settled()
    assert not found.page.locator("#key").is_visible()


def test_what_is_wrong_is_said(visit):
    found = visit("#user=987654321")
    assert "is not known" in found.page.get_by_role("alert").first.text_content()
    assert "popular" in found.page.text_content("#candidates-alert")
    found.page.fill("#k", "100000")
    expect(found.page.locator("#candidates-alert")).to_contain_text("expected at most 2,000")
    found.changed(lambda: found.page.fill("#k", "10"))
    expect(found.page.locator("#candidates-alert")).not_to_contain_text("expected")


def test_the_last_change_wins(visit):
    held = []

    def slow(route):
        if route.request.url.endswith("/retrieve") and json.loads(route.request.post_data)["k"] == 11:
            held.append(route)  # no answer yet
        else:
            route.continue_()

    found = visit(route=slow)
    with found.page.expect_request(lambda r: r.url.endswith("/retrieve")):
        found.page.fill("#k", "11")
    found.changed(lambda: found.page.fill("#k", "12"))
    assert len(held) == 1
    expect(found.page.locator("#candidates-facts")).to_contain_text("12 candidates")
    assert found.requests[-1].url.endswith("/retrieve")
