// What is asked? Everything that decides the view, as the address holds it, as the request is sent, as code.

export const DEFAULTS = Object.freeze({
  user: "",
  now: null,
  k: 100,
  select: "model",
  n: null,
  m: null,
  seed: 1,
  seen: false,
  returns: null,
  merge: "",
  view: "contexts",
  rules: [], // {category, ask: "" | "always" | "never", quota: number | null, boost: number | null}
});

const NUMBERS = ["now", "k", "n", "m", "seed", "returns"];

/** The rule for a category, made if there is none. */
export function ruleFor(rules, category) {
  const known = rules.find((rule) => rule.category === category);
  if (known) return known;
  const rule = { category, ask: "", quota: null, boost: null };
  rules.push(rule);
  return rule;
}

export function fromHash(hash) {
  const said = new URLSearchParams(hash.replace(/^#/, ""));
  const state = { ...DEFAULTS, rules: [] };
  for (const name of ["user", "select", "merge", "view"]) if (said.has(name)) state[name] = said.get(name);
  for (const name of NUMBERS) {
    const value = Number(said.get(name) || NaN);
    if (Number.isFinite(value)) state[name] = value;
  }
  state.seen = said.has("seen");
  for (const category of said.getAll("include")) ruleFor(state.rules, category).ask = "always";
  for (const category of said.getAll("exclude")) ruleFor(state.rules, category).ask = "never";
  for (const name of ["quota", "boost"]) {
    for (const text of said.getAll(name)) {
      const at = text.lastIndexOf(":");
      const value = Number(text.slice(at + 1) || NaN);
      if (at > 0 && Number.isFinite(value)) ruleFor(state.rules, text.slice(0, at))[name] = value;
    }
  }
  return state;
}

export function toHash(state) {
  const said = new URLSearchParams();
  for (const name of ["user", "now", "k", "select", "n", "m", "seed", "returns", "merge", "view"]) {
    if (state[name] !== DEFAULTS[name]) said.set(name, state[name]);
  }
  if (state.seen) said.set("seen", "1");
  for (const { category, ask, quota, boost } of state.rules) {
    if (ask) said.append(ask === "always" ? "include" : "exclude", category);
    if (quota !== null) said.append("quota", `${category}:${quota}`);
    if (boost !== null) said.append("boost", `${category}:${boost}`);
  }
  return `#${said}`;
}

/** An id as the log has it, out of what was typed. */
export function asId(text, kind) {
  const trimmed = text.trim();
  return kind === "integer" && /^-?\d+$/.test(trimmed) ? Number(trimmed) : trimmed;
}

/** The body of POST /v1/retrieve: only what differs from the defaults. `ids`: of which type each id is. */
export function asked(state, ids) {
  const category = (text) => asId(text, ids.category_id);
  const { rules, select, n, m } = state;
  const where = (ask) => rules.filter((rule) => rule.ask === ask).map((rule) => category(rule.category));
  const of = (name) =>
    Object.fromEntries(rules.filter((rule) => rule[name] !== null).map((rule) => [rule.category, rule[name]]));
  const interests = given({
    select: select === "model" ? null : select,
    n,
    m: select === "top" || select === "pgin" ? null : m,
    include: where("always"),
    exclude: where("never"),
    quotas: of("quota"),
    boosts: of("boost"),
  });
  return given({
    user_id: asId(state.user, ids.user_id),
    k: state.k,
    now: state.now,
    seed: state.seed,
    interests,
    exclude_seen: state.seen || null,
    returns: state.returns,
    merge: state.merge || null,
    explain: true,
  });
}

const given = (fields) => Object.fromEntries(Object.entries(fields).filter(([, value]) => !isNothing(value)));
const isNothing = (value) => value === null || (typeof value === "object" && Object.keys(value).length === 0);

export function curl(root, body, withKey) {
  const lines = [`curl ${quoted(`${root}/v1/retrieve`)}`, `-H ${quoted("Content-Type: application/json")}`];
  if (withKey) lines.push('-H "Authorization: Bearer $LONGRETRIEVER_KEY"');
  lines.push(`-d ${quoted(JSON.stringify(body, null, 1).replaceAll(/\n */g, " "))}`); // has places to wrap at
  return lines.join(" \\\n  ");
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function python(root, body, withKey) {
  const { user_id: user, ...fields } = body;
  const client = `Client(${literal(root)}${withKey ? ', key=os.environ["LONGRETRIEVER_KEY"]' : ""})`;
  return [
    ...(withKey ? ["import os", ""] : []),
    "from longretriever import Client",
    "",
    `client = ${client}`,
    "answer = client.retrieve(",
    `    ${literal(user)},`,
    ...Object.entries(fields).map(([name, value]) => `    ${name}=${literal(value)},`),
    ")",
  ].join("\n");
}

function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value)
      .map(([name, x]) => `${literal(name)}: ${literal(x)}`)
      .join(", ")}}`;
  }
  return JSON.stringify(value); // a JSON string is a Python string too
}
