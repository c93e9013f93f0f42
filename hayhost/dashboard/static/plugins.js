// Plugins: what they are, how their loads went, and back to the version before.

import {h} from "./dom.js";
import {call, get, path} from "./api.js";
import {ago, badge, block, button, card, confirm, empty, facts, failed, loading, ms, number, page, size, tag, toast} from "./parts.js";
import {calmly, host, redraw, resource} from "./state.js";

export function plugins() {
  const list = resource(() => get("/plugins"));
  const again = calmly(list.load);
  const row = (plugin) => h("li", {key: plugin.name},
    h("div", {},
      h("div", {class: "row"}, h("a", {class: "title", href: `#/plugins/${plugin.name}`}, plugin.displayName), badge(plugin.state), plugin.error && plugin.state === "ready" && badge("new version does not load", "warn")),
      h("div", {class: "muted small"}, `${plugin.name} · ${plugin.category}`)),
    h("div", {class: "row muted small"},
      plugin.current && h("span", {}, "version ", h("b", {}, plugin.current.version)),
      plugin.current && h("code", {}, plugin.current.digest.slice(0, 12)),
      plugin.current && h("span", {}, "loaded ", ago(plugin.current.loadedAt)),
      !host.org && h("span", {}, `${number(plugin.workers)} workers`)));
  const view = () => page("Plugins", {about: "Every folder with a manifest is served; a saved file is loaded at once."},
    h("section", {class: "card", "aria-label": "Plugins"},
      list.error ? failed(list.error)
        : !list.value ? loading()
          : list.value.items.length ? h("ul", {class: "list"}, list.value.items.map(row))
            : empty("No plugins yet", "“hayhost new my-plugin” makes one that runs. Put it into the folder that this host serves.")));
  return {title: "Plugins", view, event: (kind) => (kind === "plugin" || kind === "lost") && again()};
}

const PERMISSIONS = {network: "Network", subprocess: "Programs", memory: "Memory", cpu_seconds: "Processor time", processes: "Processes", files: "Open files"};

function permission(name, value) {
  if (name === "network") return value === true ? "any public host" : value === false || value.length === 0 ? "none" : value.join(", ");
  if (name === "memory") return size(value);
  if (name === "cpu_seconds") return `${value} s`;
  return Array.isArray(value) ? value.join(", ") || "none" : String(value);
}

export function plugin(name) {
  const shown = resource(() => get(path("plugins", name)));
  const again = calmly(shown.load);

  async function rollback() {
    const {current, previous} = shown.value;
    if (!(await confirm("Roll back?", `All organisations of ${name} go back to version ${previous.version} (${previous.digest.slice(0, 12)}), loaded before. The next saved file is served again.`, "Roll back"))) return;
    shown.value = await call("POST", path("plugins", name, "rollback"), {});
    toast(`${name} serves ${shown.value.current.digest.slice(0, 12)} again, in place of ${current.digest.slice(0, 12)}`);
  }

  const version = (one) => one ? h("span", {}, h("b", {}, one.version), " ", h("code", {title: one.digest}, one.digest.slice(0, 12)), " loaded ", ago(one.loadedAt)) : "none";

  function history(items) {
    if (!items.length) return empty("Nothing yet", "Each load, reload and rollback is listed here.");
    return h("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of loads"}, h("table", {},
      h("thead", {}, h("tr", {}, ["When", "What", "Version", "Took", "Came of it"].map((text) => h("th", {scope: "col"}, text)))),
      h("tbody", {}, items.map((one) => h("tr", {key: `${one.at}`},
        h("td", {class: "nowrap"}, ago(one.at)), h("td", {}, one.action), h("td", {class: "nowrap"}, one.version, " ", h("code", {}, one.digest.slice(0, 8))),
        h("td", {class: "nowrap"}, ms(one.ms)),
        h("td", {}, one.error ? h("div", {}, badge("failed"), h("div", {class: "small mono"}, one.error.split("\n")[0])) : h("div", {class: "row"}, badge("ok"), h("span", {class: "muted small"}, one.changes.join(", ")))))))));
  }

  const view = () => {
    const crumbs = [["Plugins", "#/plugins"]];
    if (shown.error) return page(name, {crumbs}, failed(shown.error));
    const it = shown.value;
    if (!it) return page(name, {crumbs}, loading());
    const meta = it.metadata;
    return page(it.displayName, {
      crumbs, about: [badge(it.state), tag(it.name), tag(it.category), it.capabilities.map((one) => tag(one))],
      actions: [!host.org && button("Roll back", rollback, {redraw, disabled: !it.previous, title: it.previous ? null : "There is no version before this one"})],
    },
      it.error && card(it.current ? "What is on the disk does not load" : "It does not load", {id: "load-error"},
        h("p", {class: "muted"}, it.current ? "The version before it serves on. Correct it and save: it is loaded again at once." : "Correct it and save: it is loaded again at once."),
        block(it.traceback || it.error, "Why"), it.traceback && h("p", {class: "wrong"}, it.error)),
      h("div", {class: "columns"},
        card("What serves", {id: "serves"}, facts([
          ["Version", version(it.current)], ["Before it", version(it.previous)],
          !host.org && ["Workers", h("a", {href: `#/workers?q=${encodeURIComponent(name)}`}, number(it.workers))],
          ["Permissions", Object.keys(it.permissions).length ? h("ul", {}, Object.entries(it.permissions).map(([key, value]) => h("li", {}, `${PERMISSIONS[key] || key}: `, h("span", {class: "mono"}, permission(key, value))))) : "none"],
          it.env.length > 0 && ["May read", h("span", {class: "mono"}, it.env.join(", "))],
          it.warnings.length > 0 && ["Warnings", h("ul", {}, it.warnings.map((one) => h("li", {}, one)))],
        ])),
        card("What it has", {id: "has"}, meta ? facts([
          ["Routes", meta.routes.length ? h("ul", {}, meta.routes.map((one) => h("li", {class: "mono"}, `${one.method} ${one.path}`))) : "none"],
          ["Settings", Object.keys(meta.configSchema).length ? h("ul", {}, Object.entries(meta.configSchema).map(([key, one]) => h("li", {}, h("span", {class: "mono"}, key), h("span", {class: "muted"}, ` ${one.type}${one.required ? ", required" : ""}${one.sensitive ? ", secret" : ""}`)))) : "none"],
          ["Accounts", meta.authMethods.map((one) => `${one.label} (${one.type === "oauth2" ? "OAuth 2" : "API key"})`).join(", ") || "none"],
          ["Pages", meta.pages.map((one) => `${one.title} (${one.slot || "standalone"})`).join(", ") || "none"],
        ]) : h("p", {class: "muted"}, "It has never loaded, so nobody knows."))),
      !host.org && card("Loads and reloads", {flush: true, id: "history"}, history(it.history)));
  };
  return {title: name, view, event: (kind, data) => (kind === "lost" || data.plugin === name) && again(), tick: redraw};
}
