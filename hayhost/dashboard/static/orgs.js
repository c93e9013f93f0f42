// Organisations, and what each has installed.

import {h} from "./dom.js";
import {all, call, get, path} from "./api.js";
import {ago, badge, button, card, confirm, empty, exact, failed, field, focusFirstWrong, input, loading, page, toast} from "./parts.js";
import {calmly, host, redraw, resource} from "./state.js";

const enc = encodeURIComponent;
const SHOWN = 200;

export function orgs() {
  let filter = "";
  let given = {id: "", name: ""};
  let wrong = {};
  const list = resource(() => all("/orgs"));

  async function create() {
    wrong = {};
    try {
      const made = await call("POST", "/orgs", {id: given.id.trim(), ...(given.name.trim() ? {name: given.name.trim()} : {})});
      toast(`${made.name} was made`);
      location.hash = `#/orgs/${enc(made.id)}`;
    } catch (error) {
      wrong = Object.keys(error.fields || {}).length ? error.fields : {id: error.message};
      focusFirstWrong();
    }
  }

  const view = () => {
    const found = (list.value || []).filter((one) => (one.id + " " + one.name).toLowerCase().includes(filter.toLowerCase()));
    return page("Organisations", {about: "Each has its own settings, credentials and workers."},
      h("div", {class: "columns"},
        h("section", {class: "card", "aria-label": "Organisations"},
          h("div", {class: "card-head"}, field("filter", "Find", {}, input(filter, (value) => ((filter = value), redraw()), {type: "search", placeholder: "Name or id"}))),
          list.error ? failed(list.error) : !list.value ? loading()
            : !list.value.length ? empty("No organisations yet", "Make the first one in the form beside this.")
              : !found.length ? empty("None of this name", "Clear the field to see all.")
                : h("ul", {class: "list"}, found.slice(0, SHOWN).map((one) => h("li", {key: one.id},
                  h("div", {}, h("a", {class: "title", href: `#/orgs/${enc(one.id)}`}, one.name), h("div", {class: "muted small mono"}, one.id)), h("span", {class: "muted small"}, ago(one.created)))),
                found.length > SHOWN && h("li", {class: "muted"}, `${found.length - SHOWN} more: narrow it down`))),
        card("New organisation", {id: "new-org"}, h("form", {class: "form", onsubmit: (event) => (event.preventDefault(), create().then(redraw))},
          field("org-id", "Id", {required: true, wrong: wrong.id, hint: "In its URLs: letters, digits and _ . -, and never changed"}, input(given.id, (value) => (given.id = value), {placeholder: "acme"})),
          field("org-name", "Name", {wrong: wrong.name, hint: "For people"}, input(given.name, (value) => (given.name = value), {placeholder: "Acme Ltd"})),
          h("div", {class: "row"}, h("button", {type: "submit", class: "main"}, "Create"))))));
  };
  return {title: "Organisations", view};
}

export function org(id) {
  const it = resource(async () => {
    const [shown, installed, known] = await Promise.all([get(path("orgs", id)), all(path("orgs", id, "plugins")), get("/plugins")]);
    return {org: shown, installed, plugins: known.items};
  });
  const again = calmly(it.load);
  const change = (name, action) => async () => {
    const after = await call("POST", path("orgs", id, "plugins", name, action), {});
    const failures = Object.entries(after.hooks || {});
    toast(failures.length ? `${name}: ${failures.map(([hook, why]) => `${hook}: ${why}`).join("; ")}` : `${name} is ${after.enabled ? "enabled" : "disabled"}`, failures.length ? "bad" : "");
    await it.load();
  };

  async function uninstall(name) {
    if (!(await confirm(`Uninstall ${name}?`, `Its settings and credentials of ${id} are removed for good, and its worker stops.`, "Uninstall", "danger"))) return;
    await call("DELETE", path("orgs", id, "plugins", name));
    toast(`${name} was uninstalled`);
    await it.load();
  }

  async function remove() {
    if (!(await confirm(`Remove ${id}?`, "Everything that it has is uninstalled, and its settings, credentials and tokens are removed for good.", "Remove", "danger"))) return;
    await call("DELETE", path("orgs", id));
    toast(`${id} was removed`);
    location.hash = "#/orgs";
  }

  const title = (name) => it.value.plugins.find((one) => one.name === name)?.displayName || name;
  const row = (one) => h("li", {key: one.plugin},
    h("div", {},
      h("div", {class: "row"}, h("a", {class: "title", href: `#/orgs/${enc(id)}/${enc(one.plugin)}`}, title(one.plugin)), badge(one.enabled ? one.state : "disabled"), one.authValidity === "invalid" && badge("credentials invalid", "bad")),
      h("div", {class: "muted small"}, one.plugin, " · changed ", ago(one.updated)), one.error && h("div", {class: "wrong"}, one.error)),
    h("div", {class: "row"},
      h("a", {class: "button", href: `#/orgs/${enc(id)}/${enc(one.plugin)}`, "aria-label": `Settings of ${one.plugin}`}, "Settings"),
      h("a", {class: "button", href: `#/workers/${enc(one.plugin)}/${enc(id)}`, "aria-label": `Worker of ${one.plugin}`}, "Worker"),
      one.enabled ? button("Disable", change(one.plugin, "disable"), {key: "d" + one.plugin, redraw, "aria-label": `Disable ${one.plugin}`}) : button("Enable", change(one.plugin, "enable"), {key: "e" + one.plugin, redraw, "aria-label": `Enable ${one.plugin}`}),
      button("Uninstall", () => uninstall(one.plugin), {key: "u" + one.plugin, redraw, kind: "quiet", "aria-label": `Uninstall ${one.plugin}`})));

  const view = () => {
    const crumbs = host.org ? [] : [["Organisations", "#/orgs"]];
    if (it.error) return page(id, {crumbs}, failed(it.error));
    if (!it.value) return page(id, {crumbs}, loading());
    const {installed, plugins} = it.value;
    const others = plugins.filter((one) => !installed.some((has) => has.plugin === one.name));
    return page(it.value.org.name, {crumbs, about: [h("span", {class: "mono"}, id), h("span", {}, "since "), exact(it.value.org.created)], actions: [!host.org && button("Remove", remove, {redraw, kind: "danger"})]},
      card("Installed plugins", {flush: true, id: "installed"},
        installed.length ? h("ul", {class: "list"}, installed.map(row)) : empty("Nothing is installed", "Choose a plugin below: its settings come next.")),
      card("Not installed", {flush: true, id: "others"},
        others.length ? h("ul", {class: "list"}, others.map((one) => h("li", {key: one.name},
          h("div", {}, h("div", {class: "row"}, h("b", {}, one.displayName), badge(one.state)), h("div", {class: "muted small"}, `${one.name} · ${one.category}`)),
          h("a", {class: "button", href: `#/orgs/${enc(id)}/${enc(one.name)}`, "aria-label": `Install ${one.name}`}, "Install…"))))
          : empty("Every plugin is installed", "A new one in the folder of plugins appears here.")));
  };
  return {title: id, view, event: (kind, data) => (kind === "lost" || kind === "plugin" || data.org === id) && again()};
}
