// Which contexts were asked about, and what came of each?

import { bar, byId, h, moreButton, named, refill } from "./dom.js";
import { count, counted, percent } from "./format.js";

const FIRST = 8; // contexts shown at first

/** "All items", or the category's id. */
export const nameOf = (context) => (context.category_id === null ? "All items" : String(context.category_id));

/** The contexts of an answer with their place in it, the largest part of the answer first. */
export const byShare = (answer) =>
  answer.contexts
    .map((context, index) => ({ ...context, index }))
    .sort((a, b) => b.share - a.share || a.index - b.index);

export function contextsView({ paint, buttons }) {
  const root = byId("contexts-table");
  let answer = null;
  let all = false;

  function show(given) {
    all &&= given.user_id === answer?.user_id;
    answer = given;
    const contexts = byShare(answer);
    if (!contexts.length) return refill(root, h("p", { class: "empty" }, "No context was asked about."));
    const widest = Math.max(...contexts.map((context) => context.share), 1e-9);
    const shown = all ? contexts : contexts.slice(0, FIRST);
    const table = h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", { scope: "col" }, "Category"),
          h(
            "th",
            { scope: "col", class: "part", title: "of the answer's probability; all together are 100%" },
            "Part of the answer",
          ),
          h(
            "th",
            { scope: "col", class: "n p", title: "P(category | user), as foreseen or by Equation 3" },
            "P(category)",
          ),
          h("th", { scope: "col", class: "n", title: "that the user vector was made from" }, "Behaviors"),
          h("th", { scope: "col", class: "n" }, "Candidates"),
          h("th", { scope: "col" }, h("span", { class: "hidden" }, "Rules")),
        ),
      ),
      h(
        "tbody",
        {},
        shown.map((context) => row(context, widest)),
      ),
    );
    refill(root, table, more(contexts));
  }

  function row(context, widest) {
    const name = nameOf(context);
    const color = paint(context.category_id);
    return h(
      "tr",
      { "data-row": "as-chosen" },
      h("th", { scope: "row" }, named(name, color)),
      h(
        "td",
        {},
        h("span", { class: "value" }, bar(context.share / widest, color), h("span", {}, percent(context.share))),
      ),
      h("td", { class: "n p" }, context.category_id === null ? "–" : percent(context.score)),
      h("td", { class: "n" }, count(context.behaviors)),
      h("td", { class: context.candidates ? "n" : "n quiet" }, found(context)),
      h("td", { class: "acting" }, context.category_id === null ? null : buttons(name, "context")),
    );
  }

  function more(contexts) {
    const rest = contexts.slice(FIRST);
    if (!rest.length) return "";
    const [share, found] = [
      rest.reduce((sum, one) => sum + one.share, 0),
      rest.reduce((sum, one) => sum + one.candidates, 0),
    ];
    const text = all
      ? "Show fewer"
      : `Show ${count(rest.length)} more: ${percent(share)} of the answer, ${counted(found, "candidate")}`;
    return moreButton("contexts", text, () => ((all = !all), show(answer)), String(all));
  }

  return { show };
}

/** How many candidates, or that the shard is away which would have found some. */
function found({ candidates, unsearched }) {
  if (unsearched === 1) return "away";
  return unsearched ? `${count(candidates)}, in part` : count(candidates);
}
