// Who did what, the latest first.

import {h} from "./dom.js";
import {get, query} from "./api.js";
import {badge, button, card, empty, exact, failed, field, input, loading, page} from "./parts.js";
import {calmly, host, redraw} from "./state.js";

const PAGE = 100;

export function audit() {
  const filters = {org: "", plugin: "", actor: "", action: ""};
  let items = null;
  let next = null;
  let error = null;

  async function load(before) {
    try {
      const found = await get("/audit" + query({...filters, before, limit: PAGE}));
      items = before ? [...items, ...found.items] : found.items;
      next = found.next;
      error = null;
    } catch (problem) {
      error = problem;
    }
    redraw();
  }
  const again = calmly(() => load(), 500);

  const names = [["org", "Organisation"], ["plugin", "Plugin"], ["actor", "Actor"], ["action", "Action"]].filter(([key]) => key !== "org" || !host.org);
  const details = (one) => Object.entries(one).map(([key, value]) => `${key}: ${Array.isArray(value) ? value.join(", ") : typeof value === "object" ? JSON.stringify(value) : value}`).join(" · ");
  const row = (one) => h("tr", {key: one.id},
    h("td", {class: "nowrap"}, exact(one.at)), h("td", {}, h("b", {}, one.action), one.outcome !== "ok" && h("span", {}, " ", badge(one.outcome, "bad"))),
    h("td", {}, [one.org, one.plugin].filter(Boolean).join(" / ") || "–"), h("td", {class: "mono small"}, one.actor), h("td", {class: "muted small wide"}, details(one.details)));

  const view = () => page("Audit log", {about: "Only ever added to, and without any value of a setting."},
    h("section", {class: "card", "aria-label": "Audit log"},
      h("div", {class: "card-head"}, h("div", {class: "filters"}, names.map(([key, text]) => field(`audit-${key}`, text, {}, input(filters[key], (value) => ((filters[key] = value.trim()), again()), {type: "search"}))))),
      error ? failed(error) : !items ? loading()
        : !items.length ? empty("Nothing is here", "What is changed, by whomever, is listed here; filters must match exactly.")
          : h("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": "Entries"}, h("table", {},
            h("thead", {}, h("tr", {}, ["When", "What", "To what", "By whom"].map((text) => h("th", {scope: "col"}, text)), h("th", {scope: "col", class: "wide"}, "Details"))),
            h("tbody", {}, items.map(row)))),
      next && h("div", {class: "card-body"}, h("div", {class: "row"}, button("Older", () => load(next), {redraw})))));

  load();
  return {title: "Audit log", view, event: (kind) => kind === "installation" && items && items.length <= PAGE && again()};
}
