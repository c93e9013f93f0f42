// What pages are put together from: badges, times, sizes, sparklines, dialogs, forms' fields.

import {h, svg} from "./dom.js";

const TONES = {
  ready: "good", valid: "good", enabled: "good", ok: "good", running: "good",
  degraded: "warn", warning: "warn", unknown: "", loading: "info", starting: "info", draining: "info", notice: "info",
  error: "bad", invalid: "bad", failed: "bad",
};

export function badge(text, tone) {
  return h("span", {class: `badge ${tone ?? TONES[text] ?? ""}`}, text);
}

export const tag = (text) => h("span", {class: "badge plain"}, text);

// ---- numbers and times

const WHOLE = new Intl.NumberFormat("en");
export const number = (value) => (value === null || value === undefined ? "–" : WHOLE.format(value));

export function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB"];
  let at = 0;
  while (bytes >= 1024 && at < units.length - 1) (bytes /= 1024), at++;
  return `${at && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[at]}`;
}

export function span(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export const ms = (value) =>
  value === null || value === undefined ? "–" : value < 10 ? `${value.toFixed(1)} ms` : value < 9_950 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`;

const moment = (at) => new Date(typeof at === "number" ? at * 1000 : at);
const EXACT = new Intl.DateTimeFormat("en-GB", {dateStyle: "medium", timeStyle: "medium"});

export function ago(at) {
  if (at === null || at === undefined) return "–";
  const date = moment(at);
  return h("time", {datetime: date.toISOString(), title: EXACT.format(date)}, `${span((Date.now() - date) / 1000)} ago`);
}

export const exact = (at) => h("time", {datetime: moment(at).toISOString()}, EXACT.format(moment(at)));

// ---- blocks

export function page(title, {crumbs = [], about, actions = []}, ...content) {
  return h("div", {class: "page"},
    h("div", {class: "head"},
      h("div", {},
        crumbs.length > 0 && h("ol", {class: "crumbs", "aria-label": "Where this is"}, crumbs.map(([text, href]) => h("li", {}, h("a", {href}, text)))),
        h("h1", {id: "title", tabindex: -1}, title),
        about && h("div", {class: "muted row"}, about)),
      h("div", {class: "row"}, actions)),
    content);
}

export function card(title, {actions, flush = false, id} = {}, ...content) {
  return h("section", {class: "card", "aria-labelledby": title ? (id ||= "card-" + title.toLowerCase().replace(/[^a-z]+/g, "-")) : null, key: id},
    title && h("div", {class: "card-head"}, h("h2", {id}, title), actions && h("div", {class: "row"}, actions)),
    flush ? content : h("div", {class: "card-body"}, content));
}

export const empty = (title, text, action) => h("div", {class: "empty"}, h("p", {class: "title"}, title), h("p", {}, text), action);
export const loading = () => h("div", {class: "empty", "aria-busy": "true"}, h("p", {}, "Loading…"));
export const failed = (error) => h("div", {class: "empty", role: "alert"}, h("p", {class: "title"}, "This could not be loaded"), h("p", {}, error.message));
export const facts = (entries) => h("dl", {class: "facts"}, entries.filter(Boolean).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
export const block = (text, label) => h("pre", {class: "block", tabindex: 0, role: "region", "aria-label": label}, text);

// Latency over time: two lines in one box, from the oldest to the latest.
export function sparkline(history) {
  const points = (history || []).filter((one) => one.p99_ms !== null && one.p99_ms !== undefined);
  if (points.length < 2) return null;
  const most = Math.max(...points.map((one) => one.p99_ms), 0.001);
  const line = (key) => points.map((one, i) => `${((i / (points.length - 1)) * 72).toFixed(1)},${(21 - (Math.min(one[key] ?? 0, most) / most) * 20).toFixed(1)}`).join(" ");
  return svg("svg", {viewBox: "0 0 72 22", "aria-hidden": "true", preserveAspectRatio: "none"},
    svg("polyline", {class: "p50", points: line("p50_ms")}), svg("polyline", {class: "p99", points: line("p99_ms")}));
}

export function latency(worker, wide) {
  const known = worker.latency;
  if (!known || known.p50_ms === null || known.p50_ms === undefined) return "–";
  const text = wide ? `${ms(known.p50_ms)} / ${ms(known.p99_ms)}` : ms(known.p99_ms);
  return h("span", {class: "spark", title: `p50 ${ms(known.p50_ms)}, p99 ${ms(known.p99_ms)}`}, sparkline(known.history), text);
}

export const tick = () => svg("svg", {viewBox: "0 0 24 24", "aria-hidden": "true"},
  svg("path", {d: "M4 12.5l5 5L20 6.5", fill: "none", stroke: "currentColor", "stroke-width": "2.5", "stroke-linecap": "round", "stroke-linejoin": "round"}));

// ---- what is said

let clear;
export function announce(text) {
  const live = document.getElementById("live");
  live.textContent = "";
  clearTimeout(clear);
  clear = setTimeout(() => (live.textContent = text), 30);
}

export function toast(text, tone = "") {
  announce(text);
  const node = document.createElement("div");
  node.className = `toast ${tone}`;
  node.textContent = text;
  document.getElementById("toasts").append(node);
  setTimeout(() => node.remove(), tone ? 9000 : 4000);
}

// A button that does something that takes time: it says so, and what went wrong.
const busy = new Set();
export function button(text, work, {key = text, kind = "", redraw, ...props} = {}) {
  const working = busy.has(key);
  return h("button", {
    type: "button", class: kind, "aria-busy": working ? "true" : null, disabled: working || props.disabled, ...props,
    onclick: async () => {
      busy.add(key);
      redraw?.();
      try {
        await work();
      } catch (error) {
        toast(error.message, "bad");
      }
      busy.delete(key);
      redraw?.();
    },
  }, text);
}

// Ask in a dialog; whether it was agreed to. Escape, and a click on "Cancel", say no.
export function confirm(title, text, action, kind = "main") {
  return new Promise((done) => {
    const dialog = document.createElement("dialog");
    const make = (name, content, props) => Object.assign(document.createElement(name), {textContent: content, ...props});
    const heading = make("h2", title, {id: "dialog-title"});
    const no = make("button", "Cancel", {type: "button", onclick: () => dialog.close("no")});
    const yes = make("button", action, {type: "button", className: kind, onclick: () => dialog.close("yes")});
    const row = make("div", "", {className: "row"});
    row.append(no, yes);
    const form = make("div", "", {className: "form"});
    form.append(heading, make("p", text), row);
    dialog.setAttribute("aria-labelledby", "dialog-title");
    dialog.append(form);
    dialog.onclose = () => (dialog.remove(), done(dialog.returnValue === "yes"));
    document.body.append(dialog);
    dialog.showModal();
    no.focus();
  });
}

// ---- forms

// A control with its label, hint and what is wrong with it. `control(props)` makes it.
export function field(id, label, {hint, wrong, required}, control) {
  if (hint?.length === 0) hint = null;
  const about = [hint && `${id}-hint`, wrong && `${id}-wrong`].filter(Boolean).join(" ");
  return h("div", {class: "field", key: id},
    h("label", {for: id}, label, required && h("span", {class: "muted"}, " (required)")),
    control({id, name: id, "aria-describedby": about || null, "aria-invalid": wrong ? "true" : null, "aria-required": required ? "true" : null}),
    hint && h("span", {class: "hint", id: `${id}-hint`}, hint),
    wrong && h("span", {class: "wrong", id: `${id}-wrong`}, wrong));
}

export function focusFirstWrong() {
  requestAnimationFrame(() => document.querySelector("main [aria-invalid=true]")?.focus());
}

export const input = (value, change, more) => (props) =>
  h("input", {type: "text", autocomplete: "off", spellcheck: "false", ...props, ...more, value, oninput: (e) => change(e.target.value)});

export const area = (value, change, more) => (props) =>
  h("textarea", {spellcheck: "false", autocomplete: "off", rows: 4, ...props, ...more, value, oninput: (e) => change(e.target.value)});

export const choice = (value, options, change) => (props) =>
  h("select", {...props, value, onchange: (e) => change(e.target.value)}, options.map(([key, text]) => h("option", {value: key}, text)));
