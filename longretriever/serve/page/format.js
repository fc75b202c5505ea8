// How are numbers and times written? The same everywhere: English, UTC.

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const parts = (seconds) => {
  const at = new Date(1e3 * seconds);
  return {
    year: at.getUTCFullYear(),
    month: MONTHS[at.getUTCMonth()],
    day: at.getUTCDate(),
    time: at.toISOString().slice(11, 16),
  };
};

export const count = (n) => n?.toLocaleString("en") ?? "unknown";
export const counted = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

export function day(seconds) {
  const { year, month, day } = parts(seconds);
  return `${day} ${month} ${year}`;
}

export const moment = (seconds) => `${day(seconds)}, ${parts(seconds).time} UTC`;

/** "3 Mar 2025 – 9 Mar 2025", or the one day that both are. */
export function days(from, to) {
  const [a, b] = [day(from), day(to)];
  return a === b ? a : `${a} – ${b}`;
}

export function percent(share) {
  if (share > 0 && share < 0.0005) return "<0.1%";
  return `${(100 * share).toFixed(1)}%`;
}

/** A number with a true minus sign, and as many digits as tell. */
export function decimal(x, digits = 2) {
  const text = Math.abs(x) >= 1000 ? Math.round(x).toLocaleString("en") : x.toFixed(digits);
  return text.replace("-", "−");
}

/** A similarity: two digits without the zero that all have in common. */
export const cosine = (x) => (Math.abs(x) < 0.005 ? ".00" : decimal(x).replace(/^(−?)0\./, "$1."));

export const milliseconds = (ms) => `${ms.toFixed(ms < 10 ? 2 : ms < 100 ? 1 : 0)} ms`;

/** Seconds as the text of a datetime-local field, and back. */
export const toField = (seconds) => new Date(1e3 * seconds).toISOString().slice(0, 16);
export const fromField = (text) => (text ? Date.parse(`${text}Z`) / 1e3 : null);

const SECONDS = 86_400;
const STEPS = [
  ...[1, 2, 7, 14].map((n) => ({ days: n })),
  ...[1, 2, 3, 6].map((n) => ({ months: n })),
  ...[1, 2, 5, 10, 20].map((n) => ({ months: 12 * n })),
];

/** Round moments between two others, at most `most`, with what to write there: {time, label}. */
export function ticks(from, to, most) {
  let times = [];
  for (const step of STEPS) {
    times = step.days ? eachDays(from, to, step.days) : eachMonths(from, to, step.months);
    if (times.length <= most) {
      const year = (time) => parts(time).year;
      return times.map((time, i) => ({ time, label: tick(time, step, i === 0 || year(times[i - 1]) !== year(time)) }));
    }
  }
  return [];
}

function tick(time, step, first) {
  const { year, month, day } = parts(time);
  if (step.months >= 12) return String(year);
  return `${step.days ? `${day} ` : ""}${month}${first ? ` ${year}` : ""}`;
}

function eachDays(from, to, step) {
  const first = Math.ceil(from / SECONDS) * SECONDS;
  const found = Math.max(0, Math.floor((to - first) / (step * SECONDS)) + 1);
  return found > 40 ? Array(found) : Array.from({ length: found }, (_, i) => first + i * step * SECONDS);
}

function eachMonths(from, to, step) {
  const start = new Date(1e3 * from);
  let month = 12 * start.getUTCFullYear() + start.getUTCMonth();
  month = Math.ceil(month / step) * step;
  const times = [];
  for (; times.length < 100; month += step) {
    const time = Date.UTC(Math.floor(month / 12), month % 12, 1) / 1e3;
    if (time > to) break;
    if (time >= from) times.push(time);
  }
  return times;
}
