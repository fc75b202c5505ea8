// What was found, and why is each there? By context or as one list; and what changed since the list before.

import { bar, byId, h, moreButton, named, refill } from "./dom.js";
import { byShare, nameOf } from "./contexts.js";
import { cosine, count, counted, day, decimal, percent } from "./format.js";

const OF_GROUP = 4; // candidates of a context shown at first
const OF_LIST = 30; // of one list, and at each "more"
const SAME = 0.9995; // an item is so similar only to itself

/** What moved from one list to the next: {changes: item -> "new" | places gained, added, left, up, down}. */
export function compared(before, candidates) {
  const changes = new Map();
  const said = { changes, added: 0, left: 0, up: 0, down: 0 };
  for (const { item_id: item, rank } of candidates) {
    const was = before.get(item);
    const change = was === undefined ? "new" : was - rank;
    changes.set(item, change);
    if (change === "new") said.added += 1;
    else if (change > 0) said.up += 1;
    else if (change < 0) said.down += 1;
  }
  said.left = before.size - (candidates.length - said.added);
  return said;
}

export const inWords = ({ added, left, up, down }) =>
  [
    [added, "new"],
    [left, "gone"],
    [up, "up"],
    [down, "down"],
  ]
    .filter(([n]) => n)
    .map(([n, what]) => `${count(n)} ${what}`)
    .join(", ") || "nothing changed";

/**
 * @param kind     () -> the kind of behavior that the button beside a candidate adds
 * @param add      called with a candidate to add an event of
 * @param similar  item_id -> promise of the items like it
 */
export function candidatesView({ paint, kind, add, similar }) {
  const root = byId("candidates-list");
  let answer = null;
  let changes = new Map();
  let view = "contexts";
  let shown = new Map(); // of each group, how many are shown
  let open = new Set(); // items whose similar items are shown

  function show(given, since, how) {
    if (given.user_id !== answer?.user_id) [shown, open] = [new Map(), new Set()];
    [answer, changes, view] = [given, since?.changes ?? new Map(), how];
    draw();
  }

  function draw() {
    if (!answer.candidates.length) return refill(root, h("p", { class: "empty" }, "Nothing was found."));
    const heads = ["rank", "item", "score", "because the user met (similarity)"].map((head) => h("span", {}, head));
    refill(root, h("div", { class: "heads", "aria-hidden": "true" }, heads), ...(view === "list" ? list() : groups()));
  }

  function list() {
    const most = shown.get("list") ?? OF_LIST;
    const { candidates } = answer;
    return [
      h(
        "ol",
        { class: "found" },
        candidates.slice(0, most).map((one) => candidate(one, true)),
      ),
      more("list", most, OF_LIST, candidates.length),
    ];
  }

  function groups() {
    const of = Map.groupBy ? Map.groupBy(answer.candidates, (one) => one.context) : grouped(answer.candidates);
    return byShare(answer)
      .filter((context) => of.has(context.index))
      .map((context) => group(context, of.get(context.index)));
  }

  function group(context, candidates) {
    const name = nameOf(context);
    const most = shown.get(name) ?? OF_GROUP;
    const whole = context.category_id === null;
    const found = counted(candidates.length, "candidate");
    const from = counted(context.behaviors, "behavior");
    const facts = `${percent(context.share)} of the answer · ${found} · from ${from}`;
    return h(
      "section",
      { class: "group", "aria-label": whole ? name : `Context ${name}` },
      h("h3", {}, named(name, paint(context.category_id)), h("span", { class: "quiet" }, facts)),
      h(
        "ol",
        { class: "found" },
        candidates.slice(0, most).map((one) => candidate(one, whole)),
      ),
      more(name, most, most === OF_GROUP ? 20 : 50, candidates.length),
    );
  }

  function more(name, most, step, all) {
    const hidden = all - most;
    if (hidden <= 0) return "";
    const text = hidden <= step ? `Show ${count(hidden)} more` : `Show ${count(step)} of ${count(hidden)} more`;
    return moreButton(name, text, () => (shown.set(name, most + step), draw()));
  }

  function candidate(one, withCategory) {
    const title = one.title ?? `item ${one.item_id}`;
    const id = `like-${one.rank}`;
    const of = h(
      "span",
      { class: "in" },
      h("span", { class: `dot ${paint(one.category_id)}` }),
      String(one.category_id),
    );
    const about = h("div", { class: "about", id, hidden: true });
    const button = h(
      "button",
      {
        type: "button",
        class: "title",
        "aria-expanded": "false",
        "aria-controls": id,
        "data-key": `title-${one.item_id}`,
        on: { click: () => unfold(one, button, about, button.getAttribute("aria-expanded") === "false") },
      },
      title,
    );
    if (open.has(one.item_id)) unfold(one, button, about, true);
    return h(
      "li",
      { class: "candidate", "data-item": String(one.item_id) },
      h(
        "span",
        { class: "rank" },
        h("span", { class: "hidden" }, "rank "),
        count(one.rank),
        mark(changes.get(one.item_id)),
      ),
      h(
        "span",
        { class: "what" },
        button,
        h("span", { class: "quiet" }, withCategory ? [of, " · "] : "", String(one.item_id)),
      ),
      h(
        "span",
        { class: "score", title: "what the merge ordered by" },
        h("span", { class: "hidden" }, "score "),
        decimal(one.score),
      ),
      reasons(one),
      h(
        "span",
        { class: "act" },
        h(
          "button",
          {
            type: "button",
            class: "small",
            "data-key": `add-${one.item_id}`,
            "aria-label": `Add an event: ${kind() || "met"} ${title}`,
            on: { click: () => add(one) },
          },
          `+ ${kind() || "met"}`,
        ),
      ),
      about,
    );
  }

  function mark(change) {
    if (change === undefined || change === 0) return null;
    if (change === "new") return h("span", { class: "moved new" }, "new");
    const up = change > 0;
    const places = count(Math.abs(change));
    return h(
      "span",
      { class: `moved ${up ? "up" : "down"}` },
      h("span", { class: "hidden" }, up ? "up " : "down "),
      h("span", { "aria-hidden": "true" }, up ? "▲" : "▼"),
      places,
    );
  }

  function reasons(one) {
    if (!one.reasons?.length) return h("span", { class: "why quiet" }, "no behavior spoke for it");
    return h(
      "ul",
      { class: "why", "aria-label": "because the user met" },
      one.reasons.map((reason) =>
        h(
          "li",
          { title: reason.title },
          bar(reason.similarity, paint(one.category_id)),
          h("span", { class: "cosine" }, cosine(reason.similarity)),
          h(
            "span",
            { class: "label" },
            String(reason.item_id) === String(one.item_id) && reason.similarity > SAME
              ? h("em", {}, "this very item")
              : (reason.title ?? `item ${reason.item_id}`),
          ),
          h("span", { class: "quiet" }, [reason.behavior, day(reason.timestamp)].filter(Boolean).join(" · ")),
        ),
      ),
    );
  }

  async function unfold(one, button, about, wanted) {
    button.setAttribute("aria-expanded", String(wanted));
    about.hidden = !wanted;
    if (!wanted) return void open.delete(one.item_id);
    open.add(one.item_id);
    about.replaceChildren(h("p", { class: "quiet" }, "Looking for similar items …"));
    try {
      about.replaceChildren(...likes(one, await similar(one.item_id)));
    } catch (error) {
      about.replaceChildren(h("p", { class: "wrong", role: "alert" }, error.message));
    }
  }

  function likes(one, { similar: items }) {
    const facts = [
      one.cosine !== undefined && `cosine with the user ${decimal(one.cosine, 3)}`,
      one.log_prob !== undefined && `log P(item | user, context) ${decimal(one.log_prob)}`,
    ]
      .filter(Boolean)
      .join(" · ");
    return [
      h("p", { class: "quiet" }, facts),
      h("h4", {}, `Similar items in ${one.category_id}`),
      items.length
        ? h(
            "ol",
            { class: "similar" },
            items.map((item) =>
              h(
                "li",
                {},
                bar(item.similarity, paint(one.category_id)),
                h("span", { class: "cosine" }, cosine(item.similarity)),
                h(
                  "span",
                  { class: "label" },
                  item.title ?? `item ${item.item_id}`,
                  h("span", { class: "quiet" }, ` ${item.item_id}`),
                ),
              ),
            ),
          )
        : h("p", { class: "quiet" }, "No other item is in this category."),
    ];
  }

  return { show, draw: () => answer && draw() };
}

function grouped(candidates) {
  const groups = new Map();
  for (const one of candidates) groups.set(one.context, [...(groups.get(one.context) ?? []), one]);
  return groups;
}
