// All workers in one table. Only the rows that can be seen are in the document, so three thousand are as quick as ten.

import {h} from "./dom.js";
import {all, get, query} from "./api.js";
import {ago, badge, card, choice, empty, failed, field, input, latency, loading, number, page, size} from "./parts.js";
import {calmly, redraw} from "./state.js";

const enc = encodeURIComponent;
const MARGIN = 8;
// The list is asked for again so often; what processes take, which costs the host more, every so many times.
const EVERY = 5_000;
const MEMORY_EVERY = 6;

const COLUMNS = [
  ["name", "Worker", (one) => `${one.plugin}/${one.org}`, ""],
  ["state", "State", (one) => ["error", "degraded", "starting", "draining", "ready", "stopped"].indexOf(one.state), ""],
  ["age", "Since", (one) => -(one.since || 0), "wide"],
  ["requests", "Requests", (one) => one.requests, "wide number"],
  ["p99", "p99", (one) => one.latency?.p99_ms ?? -1, "wide"],
  ["memory", "Memory", (one) => one.pss ?? one.rss ?? -1, "number"],
  ["restarts", "Restarts", (one) => one.restarts, "wide number"],
];
const STATES = [["", "All states"], ["trouble", "In trouble"], ["ready", "Ready"], ["degraded", "Degraded"], ["error", "Error"], ["starting", "Starting"], ["stopped", "Stopped"]];

export function workers(given = new URLSearchParams()) {
  const rows = new Map();
  const asked = given.get("q") || "";
  let filter = asked === "error" ? "" : asked;
  let state = asked === "error" ? "trouble" : "";
  let sort = ["name", 1];
  let shown = [];
  let stale = true;
  let error = null;
  let loaded = false;
  let node = null;
  let top = 0;
  let active = 0;
  let closed = false;

  const key = (one) => `${one.plugin}/${one.org}`;
  const height = () => (window.innerWidth <= 860 ? 52 : 44);

  let turn = 0;
  async function load() {
    try {
      const memory = turn++ % MEMORY_EVERY === 0;
      const found = await all("/workers" + query({memory}));
      if (closed) return;
      const before = new Map(rows);
      rows.clear();
      for (const one of found) {
        const old = memory ? null : before.get(key(one));
        rows.set(key(one), old && old.pid === one.pid ? {...one, pss: old.pss, rss: old.rss} : one);
      }
      error = null;
    } catch (problem) {
      error = problem;
    }
    loaded = true;
    changed();
  }

  function changed() {
    stale = true;
    redraw();
  }

  // Another choice is looked at from its beginning.
  function chosen() {
    active = 0;
    if (node) node.scrollTop = 0;
    changed();
  }

  function choose() {
    const [by, direction] = sort;
    const value = COLUMNS.find(([id]) => id === by)[2];
    const text = filter.toLowerCase();
    shown = [...rows.values()].filter((one) =>
      (!text || key(one).toLowerCase().includes(text)) &&
      (!state || (state === "trouble" ? ["error", "degraded"].includes(one.state) || one.lastError : one.state === state)));
    const names = new Map(shown.map((one) => [one, value(one)]));
    shown.sort((a, b) => {
      const [x, y] = [names.get(a), names.get(b)];
      return (x < y ? -1 : x > y ? 1 : key(a) < key(b) ? -1 : 1) * (x === y ? 1 : direction);
    });
    active = Math.max(0, Math.min(active, shown.length - 1));
    stale = false;
  }

  // A worker that events tell of is asked about soon, together with the others of that moment.
  const touched = new Map();
  const ask = calmly(async () => {
    const some = [...touched.values()];
    touched.clear();
    if (some.length > 20) return load();
    await Promise.all(some.map(async ({plugin, org}) => {
      const {items} = await get("/workers" + query({plugin, org, limit: 1})).catch(() => ({items: []}));
      items.length ? rows.set(`${plugin}/${org}`, items[0]) : rows.delete(`${plugin}/${org}`);
    }));
    if (some.length) changed();
  }, 700);

  function event(kind, data) {
    if (kind === "lost") return load();
    if (kind !== "worker") return;
    const known = rows.get(key(data));
    if (known) rows.set(key(data), {...known, state: data.state, pid: data.pid, lastError: data.error});
    touched.set(key(data), data);
    changed();
    ask();
  }

  const go = (one) => one && (location.hash = `#/workers/${enc(one.plugin)}/${enc(one.org)}`);

  function keydown(event) {
    const page = Math.max(1, Math.floor((node.clientHeight - 38) / height()) - 1);
    const to = {ArrowDown: active + 1, ArrowUp: active - 1, PageDown: active + page, PageUp: active - page, Home: 0, End: shown.length - 1}[event.key];
    if (event.key === "Enter" && event.target === node) return go(shown[active]);
    if (to === undefined || event.target !== node) return;
    event.preventDefault();
    active = Math.max(0, Math.min(shown.length - 1, to));
    const at = active * height();
    const room = node.clientHeight - 38;
    if (at < node.scrollTop) node.scrollTop = at;
    else if (at + height() > node.scrollTop + room) node.scrollTop = at + height() - room;
    redraw();
  }

  function sortBy(id) {
    sort = sort[0] === id ? [id, -sort[1]] : [id, id === "name" || id === "state" || id === "age" ? 1 : -1];
    chosen();
  }

  const cell = (column, kind, ...content) => h("span", {role: "gridcell", class: kind, "aria-colindex": column}, content);

  function row(one, index) {
    return h("div", {
      role: "row", key: key(one), id: `row-${index}`, "aria-rowindex": index + 2, "aria-selected": index === active ? "true" : "false",
      class: index === active ? "active" : "", style: {top: `${index * height()}px`}, onclick: () => go(one),
    },
      cell(1, "", h("b", {}, one.org), h("span", {class: "muted"}, ` ${one.plugin}`)), cell(2, "", badge(one.state)),
      cell(3, "wide muted", one.since ? ago(one.since) : "–"), cell(4, "wide number", number(one.requests)), cell(5, "wide", latency(one)),
      cell(6, "number", size(one.pss ?? one.rss)), cell(7, "wide number", number(one.restarts)));
  }

  function grid() {
    const tall = height();
    const room = node ? node.clientHeight : 760;
    const first = Math.max(0, Math.floor(top / tall) - MARGIN);
    const last = Math.min(shown.length, Math.ceil((top + room) / tall) + MARGIN);
    return h("div", {
      class: "grid", role: "grid", tabindex: 0, "aria-label": "Workers", "aria-rowcount": shown.length + 1, "aria-colcount": COLUMNS.length,
      "aria-activedescendant": active >= first && active < last ? `row-${active}` : null, ref: (made) => (node = made), onkeydown: keydown,
      onscroll: () => {
        top = node.scrollTop;
        redraw();
      },
    },
      h("div", {role: "row", class: "heads", "aria-rowindex": 1}, COLUMNS.map(([id, text, , kind], index) =>
        h("span", {role: "columnheader", class: kind, "aria-colindex": index + 1, "aria-sort": sort[0] === id ? (sort[1] > 0 ? "ascending" : "descending") : "none"}, h("button", {type: "button", onclick: () => sortBy(id)}, text)))),
      h("div", {class: "rows", role: "rowgroup", style: {height: `${shown.length * tall}px`}}, shown.slice(first, last).map((one, index) => row(one, first + index))));
  }

  const view = () => {
    if (stale) choose();
    return page("Workers", {about: "One process for each organisation's plugin. Enter, or a click, opens one."},
      error ? failed(error)
        : h("section", {class: "card", "aria-label": "Workers"},
          h("div", {class: "card-head"},
            h("div", {class: "filters"},
              field("find", "Find", {}, input(filter, (value) => ((filter = value), chosen()), {type: "search", placeholder: "Organisation or plugin"})),
              field("state", "State", {}, choice(state, STATES, (value) => ((state = value), chosen())))),
            h("span", {class: "muted"}, shown.length === rows.size ? `${number(rows.size)} in all` : `${number(shown.length)} of ${number(rows.size)}`)),
          !loaded ? loading()
            : !rows.size ? empty("No worker runs", "The first request to an organisation's plugin starts its worker, within milliseconds.")
              : !shown.length ? empty("None is like this", "Clear the filters to see all.") : grid()));
  };

  load();
  const timer = setInterval(() => document.visibilityState === "visible" && load(), EVERY);
  return {title: "Workers", view, event, close: () => ((closed = true), clearInterval(timer)), tick: redraw};
}
