// Forms made from a description: a plugin's config schema, or the JSON Schema of a tool's arguments. What is typed is
// kept as text, and becomes a value only when it is sent.

import {h} from "./dom.js";
import {area, choice, field, input} from "./parts.js";

export const MASK = "********";

// What a control shows for a value of `type`.
export function shown(type, value) {
  if (value === undefined || value === null) return "";
  if (type === "json") return JSON.stringify(value, null, 2);
  return typeof value === "string" ? value : JSON.stringify(value);
}

// The value that `text` means: undefined if it is empty. What is not of the type is left as it is, for the host to
// say what is wrong with it; but what is not JSON cannot be sent, and throws.
export function parsed(type, text) {
  const trimmed = text.trim();
  if (type === "string") return text === "" ? undefined : text;
  if (trimmed === "") return undefined;
  if (type === "boolean") return trimmed === "true" ? true : trimmed === "false" ? false : text;
  if (type === "number" || type === "integer") return Number.isFinite(Number(trimmed)) ? Number(trimmed) : text;
  try {
    return JSON.parse(trimmed);
  } catch (error) {
    throw new SyntaxError(`is not valid JSON: ${error.message}`);
  }
}

// A field of a config schema. `state` is {text, stored, remove}: stored says that there is a secret.
export function configField(name, schema, {state, wrong, fromEnv, required}, change) {
  const hints = [schema.description];
  if (schema.env) hints.push(fromEnv ? `If left empty, the host's environment gives it (${schema.env}, which is set).` : `If left empty, the host's environment may give it (${schema.env}, which is not set).`);
  if (schema.default !== undefined && !schema.sensitive && !fromEnv) hints.push(`If left empty, it is ${shown(schema.type, schema.default)}.`);
  if (state.stored) hints.push(state.remove ? "It will be removed." : "One is stored. It is never shown; what is typed here replaces it.");
  const more = {placeholder: state.stored && !state.remove ? "•••••••• stored" : schema.placeholder || ""};
  let control;
  if (schema.sensitive) control = input(state.text, change, {...more, type: "password", autocomplete: "new-password"});
  else if (schema.type === "boolean") control = choice(state.text, [["", schema.default === undefined ? "Not set" : `Default (${schema.default ? "yes" : "no"})`], ["true", "Yes"], ["false", "No"]], change);
  else if (schema.type === "json") control = area(state.text, change, {placeholder: schema.placeholder || "{}"});
  else control = input(state.text, change, {...more, inputmode: schema.type === "number" ? "decimal" : null});
  return field(`config-${name}`, schema.label || name, {hint: hints.filter(Boolean).map((one) => h("span", {}, one)), wrong, required}, control);
}

const plain = (schema) => schema && typeof schema === "object" && !Array.isArray(schema);

// The properties of a tool's input schema that have a form: [name, schema, type, required].
export function properties(schema) {
  if (!plain(schema) || !plain(schema.properties)) return [];
  const required = Array.isArray(schema.required) ? schema.required : [];
  return Object.entries(schema.properties).filter(([, one]) => plain(one)).map(([name, one]) => {
    const type = Array.isArray(one.type) ? one.type.find((kind) => kind !== "null") : one.type;
    return [name, one, ["string", "number", "integer", "boolean"].includes(type) ? type : "json", required.includes(name)];
  });
}

export function argumentField(id, [name, schema, type, required], text, wrong, change) {
  const hint = typeof schema.description === "string" ? schema.description : null;
  const range = [schema.minimum !== undefined && `at least ${schema.minimum}`, schema.maximum !== undefined && `at most ${schema.maximum}`].filter(Boolean).join(", ");
  const options = Array.isArray(schema.enum) && schema.enum.every((one) => typeof one === "string") && schema.enum;
  const control = options ? choice(text, [["", "Not given"], ...options.map((one) => [one, one])], change)
    : type === "boolean" ? choice(text, [["", "Not given"], ["true", "Yes"], ["false", "No"]], change)
      : type === "json" ? area(text, change, {rows: 3}) : input(text, change, {inputmode: type === "string" ? null : "decimal"});
  return field(id, name, {hint: [hint, range].filter(Boolean).join(" · ") || null, wrong, required}, control);
}
