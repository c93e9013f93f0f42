// A small view layer: h() describes elements, render() makes the document so. Text is only ever text: nothing here, or
// in the pages, turns a string into markup. What stays the same is not touched, so focus and what was typed stay.

const SVG = "http://www.w3.org/2000/svg";
const AS_PROPERTY = new Set(["value", "checked", "disabled", "selected", "open", "scrollTop"]);

// h("a", {href: "#/"}, "text", [more]): null, false and undefined are nothing. A `key` keeps an element through moves.
export function h(tag, props, ...children) {
  const list = [];
  flatten(children, list);
  return {tag, props: props || {}, children: list, key: props?.key, node: null};
}

function flatten(children, into) {
  for (const child of children) {
    if (Array.isArray(child)) flatten(child, into);
    else if (child !== null && child !== undefined && child !== false && child !== true)
      into.push(typeof child === "object" ? child : {text: String(child), node: null});
  }
}

export function svg(tag, props, ...children) {
  return {...h(tag, props, ...children), svg: true};
}

// Make the content of `parent` what `vnodes` describe.
export function render(parent, ...vnodes) {
  const next = [];
  flatten(vnodes, next);
  children(parent, parent.rendered || [], next);
  parent.rendered = next;
}

function make(vnode) {
  if (vnode.text !== undefined) return (vnode.node = document.createTextNode(vnode.text));
  const node = vnode.svg ? document.createElementNS(SVG, vnode.tag) : document.createElement(vnode.tag);
  vnode.node = node;
  children(node, [], vnode.children);
  for (const name in vnode.props) set(node, name, vnode.props[name]);
  if (vnode.props.ref) vnode.props.ref(node);
  return node;
}

function same(a, b) {
  return a.tag === b.tag && a.key === b.key && (a.text === undefined) === (b.text === undefined);
}

function update(old, next) {
  const node = (next.node = old.node);
  if (next.text !== undefined) {
    if (old.text !== next.text) node.nodeValue = next.text;
    return;
  }
  children(node, old.children, next.children);
  for (const name in old.props) if (!(name in next.props)) set(node, name, null);
  for (const name in next.props) if (next.props[name] !== old.props[name]) set(node, name, next.props[name]);
  if (next.props.ref) next.props.ref(node);
}

// Children with a key are found by it, the others by their order among those without one.
function children(parent, old, next) {
  const keyed = new Map(old.filter((vnode) => vnode.key !== undefined).map((vnode) => [vnode.key, vnode]));
  const plain = old.filter((vnode) => vnode.key === undefined);
  const kept = new Set();
  for (const vnode of next) {
    const before = vnode.key === undefined ? plain.shift() : keyed.get(vnode.key);
    if (before && same(before, vnode) && !kept.has(before)) {
      kept.add(before);
      update(before, vnode);
    } else make(vnode);
  }
  for (const vnode of old) if (!kept.has(vnode)) vnode.node.remove();
  let at = parent.firstChild;
  for (const vnode of next) {
    if (vnode.node === at) at = at.nextSibling;
    else parent.insertBefore(vnode.node, at);
  }
}

function set(node, name, value) {
  if (name === "key" || name === "ref") return;
  if (name.startsWith("on")) node[name] = value;
  else if (name === "style") for (const key in value || {}) node.style.setProperty(key, value[key]);
  else if (AS_PROPERTY.has(name) && !node.namespaceURI.endsWith("svg")) {
    if (name !== "value") node[name] = value ?? false;
    else if (node.value !== String(value ?? "")) node.value = value ?? "";
  } else if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else node.setAttribute(name, value === true ? "" : value);
}

// A link that somebody else named may lead to the web, and nowhere else.
export function safeUrl(text) {
  try {
    const url = new URL(text);
    return ["http:", "https:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}
