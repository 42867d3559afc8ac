// The page at /docs: /openapi.json for people. Must not know any route: all that it says stands there.

import { toggleTheme } from "./theme.js";

const said = document.getElementById("said");

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function resolve(schema, schemas) {
  if (!schema.$ref) return schema;
  const { $ref, ...beside } = schema;
  return { ...schemas[$ref.split("/").at(-1)], ...beside };
}

// What a value may be, in a few words: "integer, 1 to 511".
function kindOf(given, schemas) {
  const schema = resolve(given, schemas);
  if (schema.enum || "const" in schema) return (schema.enum ?? [schema.const]).map((one) => JSON.stringify(one)).join(" | ");
  if (schema.title && !schema.properties) return schema.title;
  if (schema.anyOf) return schema.anyOf.filter((one) => one.type !== "null").map((one) => kindOf(one, schemas)).join(", or ");
  if (schema.type === "array") return `list${schema.maxItems ? ` (at most ${schema.maxItems})` : ""} of ${kindOf(schema.items, schemas)}`;
  const [low, high, unit] = schema.type === "string"
    ? [schema.minLength, schema.maxLength, " characters"] : [schema.minimum, schema.maximum, ""];
  const range = high !== undefined ? `, ${low ?? 0} to ${high}${unit}` : low !== undefined ? `, at least ${low}${unit}` : "";
  return (schema.format === "binary" ? "file" : schema.type ?? "anything") + range;
}

function rowsOf(schema, schemas, prefix = "") {
  return Object.entries(schema.properties ?? {}).flatMap(([name, given]) => {
    const field = resolve(given, schemas);
    const inner = [field, ...(field.anyOf ?? [])].map((one) => resolve(one, schemas)).find((one) => one.properties);
    const notes = [
      schema.required?.includes(name) ? "required" : "",
      field.default !== undefined && !inner ? `default ${JSON.stringify(field.default)}` : "",
      field.description ?? "",
    ].filter(Boolean);
    const row = element("tr", {},
      element("td", {}, element("code", {}, prefix + name)),
      element("td", {}, inner ? "object" : kindOf(field, schemas)),
      element("td", {}, notes.join("; ")));
    return [row, ...(inner ? rowsOf(inner, schemas, `${prefix}${name}.`) : [])];
  });
}

function table(title, rows) {
  if (!rows.length) return [];
  const head = element("tr", {}, ...["name", "what it may be", ""].map((text) => element("th", { scope: "col" }, text)));
  return [element("h3", {}, title),
    element("table", { class: "fields" }, element("thead", {}, head), element("tbody", {}, ...rows))];
}

function exampleOf(schema, schemas) {
  const names = schema.required ?? [];
  return Object.fromEntries(names.map((name) => {
    const field = resolve(schema.properties[name], schemas);
    return [name, field.examples?.[0] ?? field.enum?.[0] ?? field.const ?? (field.type === "string" ? "..." : field.minimum ?? {})];
  }));
}

function curl(path, method, operation, schemas) {
  const lines = [`curl ${method === "get" ? "" : `-X ${method.toUpperCase()} `}${location.origin}${path}`];
  if (operation.security.length) lines.push(`-H "Authorization: Bearer $API_KEY"`);
  for (const [media, { schema: given }] of Object.entries(operation.requestBody?.content ?? {})) {
    const schema = resolve(given, schemas);
    if (media === "application/json") {
      lines.push(`-H "Content-Type: application/json"`, `-d '${JSON.stringify(exampleOf(schema, schemas))}'`);
    } else {
      for (const [name, field] of Object.entries(schema.properties))
        lines.push(`-F ${name}=${field.format === "binary" ? "@requests.jsonl" : field.const ?? "..."}`);
    }
  }
  return lines.join(" \\\n  ");
}

function routeOf(path, method, operation, schemas) {
  const parameters = (operation.parameters ?? []).map(({ name, required, schema, in: place }) => element("tr", {},
    element("td", {}, element("code", {}, name)), element("td", {}, kindOf(schema, schemas)),
    element("td", {}, [place, required ? "required" : "", schema.default !== undefined ? `default ${schema.default}` : "",
      schema.description ?? ""].filter(Boolean).join("; "))));
  const bodies = Object.entries(operation.requestBody?.content ?? {}).flatMap(([media, { schema }]) =>
    table(`Body (${media})`, rowsOf(resolve(schema, schemas), schemas)));
  const answered = Object.entries(operation.responses).filter(([, { content }]) => content).slice(0, 1);
  const answers = answered.flatMap(([status, { content }]) => Object.entries(content).flatMap(([media, { schema }]) => {
    const rows = rowsOf(resolve(schema, schemas), schemas);
    return rows.length ? table(`Answer (${status}, ${media})`, rows)
      : [element("h3", {}, `Answer (${status}, ${media})`), schema.description ?? ""];
  }));
  const statuses = element("dl", { class: "statuses" }, ...Object.entries(operation.responses).flatMap(([status, { description }]) =>
    [element("dt", {}, element("code", {}, status)), element("dd", {}, description)]));
  return element("details", { class: "route", id: operation.operationId },
    element("summary", {}, element("span", { class: "method" }, method.toUpperCase()), element("code", {}, path), operation.summary),
    ...table("Parameters", parameters), ...bodies,
    element("h3", {}, "Example"), element("pre", { tabindex: "0" }, curl(path, method, operation, schemas)),
    ...answers, element("h3", {}, "Statuses"), statuses);
}

function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  if (target?.matches("details")) target.open = true;
  target?.scrollIntoView();
}

document.getElementById("theme").addEventListener("click", toggleTheme);
addEventListener("hashchange", openTarget);
const response = await fetch("/openapi.json");
if (response.ok) {
  const { info, paths, components: { schemas } } = await response.json();
  const groups = new Map();
  for (const [path, methods] of Object.entries(paths))
    for (const [method, operation] of Object.entries(methods)) {
      const [tag] = operation.tags;
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(routeOf(path, method, operation, schemas));
    }
  document.getElementById("about").textContent = info.description.replaceAll("`", "");
  for (const [tag, routes] of groups) {
    document.getElementById("contents").append(element("a", { href: `#${tag}` }, tag));
    document.getElementById("routes").append(element("h2", { id: tag }, tag), ...routes);
  }
  said.textContent = "";
  openTarget();
} else {
  said.textContent = `/openapi.json: ${response.status} ${response.statusText}`;
  said.classList.add("wrong");
}
