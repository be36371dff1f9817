// The one component of the dashboard: a header, a table, findings, a tree or a chart, told apart by data.kind.
//
// Everything that a training job named reaches the page by textContent only. A chart wraps Plotly.react and keeps its
// frame and arrays: a message carries what changed of the frame, and of each array only the columns after the first
// `keep` ones, on top of message `base`. If `base` is not what this browser has, it asks for the whole chart by the
// trigger "resync". The rest is drawn anew where its message differs from the one before, and keeps focus and fold.

const states = new WeakMap();

// Called for each message; the answer is what to do when the component goes away.
export async function mount(component, assets) {
  const { data, parentElement } = component;
  warmUp(assets["plotly.js"]);
  await style(assets["panel.css"]);
  let state = states.get(parentElement);
  if (!state) {
    const root = document.createElement("div");
    root.className = "fs";
    parentElement.appendChild(root);
    states.set(parentElement, (state = { root }));
  }
  state.assets = assets;
  state.send = component.setTriggerValue;
  state.palette = paletteOf(state.root, PALETTES);
  for (const name of ["muted", "line"]) state.root.style.setProperty(`--fs-${name}`, state.palette[name]);
  if (data.kind === "chart") renderChart(state, data);
  else renderParts(state, data);
  return () => {
    if (!parentElement.isConnected && state.plot) {
      state.observer.disconnect();  // and no Plotly.purge: it breaks a chart that is still being drawn, and frees no more
      states.delete(parentElement);
      state.root.remove();
    }
  };
}

// Drawn anew only if something changed, never below somebody who is typing; the focus stays on the same link.
function renderParts(state, data) {
  const drawn = JSON.stringify([data, state.palette.name]);
  if (drawn === state.shown || state.root.querySelector(":is(input, textarea):focus")) return;
  state.shown = drawn;
  const focused = state.root.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  const parts = { header: headerParts, table: tableParts, findings: findingsParts, tree: treeParts }[data.kind];
  state.root.replaceChildren(...parts(state, data));
  if (focused !== null) [...state.root.querySelectorAll("a")].find((a) => a.getAttribute("href") === focused)?.focus();
}

// ---------------------------------------------------------------- header

function headerParts(state, data) {
  const crumbs = element("nav", "fs-crumbs");
  data.crumbs.forEach((crumb, i) => {
    if (i) crumbs.append(element("span", "fs-sep", "▸"));
    const style = i === 0 ? "fs-brand" : i === data.crumbs.length - 1 ? "fs-here" : "";
    crumbs.append(crumb.to !== null && crumb.to !== undefined ? link(state, crumb.to, crumb.text, style) : element("span", style, crumb.text));
  });
  const tabs = element("nav", "fs-tabs");
  for (const tab of data.tabs || []) {
    const item = link(state, tab.to, tab.text, tab.here ? "fs-here" : "");
    if (tab.here) item.setAttribute("aria-current", "page");
    if (tab.count) item.append(element("span", "fs-count", grouped(tab.count)));
    tabs.append(item);
  }
  const nav = element("div", "fs-nav");
  for (const item of data.nav || []) nav.append(link(state, item.to, item.text));
  const status = element("div", "fs-status");
  (data.status || []).forEach((part, i) => {
    if (i) status.append(element("span", "fs-sep", "·"));
    const item = element("span", "");
    if (part.color) item.append(dot(state, part.color));
    item.append(part.text);
    if (part.title) item.title = part.when ? `${part.title} ${longTime(part.when)}` : part.title;
    status.append(item);
  });
  const bar = element("div", "fs-header");
  bar.append(crumbs, tabs, nav, status);
  return [bar];
}

function titleParts(state, data) {
  if (!data.title) return [];
  const title = element("div", "fs-title");
  title.append(element("b", "", data.title));
  for (const action of data.actions || []) {
    title.append(action.to ? link(state, action.to, action.text, action.main ? "fs-button" : "fs-link") : element("span", "", action.text));
  }
  title.append(element("span", "fs-end", data.subtitle || ""));
  return [title];
}

// ---------------------------------------------------------------- table

function tableParts(state, data) {
  const parts = titleParts(state, data);
  if (!data.rows.length) {
    if (data.empty) parts.push(element("div", "fs-empty", data.empty));
    return parts;
  }
  const table = element("table", `fs-table ${data.style || ""}`);
  if (data.columns) {
    const head = table.createTHead().insertRow();
    for (const column of data.columns) {
      const cell = element("th", column.right ? "fs-right" : "");
      if (column.sorted) cell.setAttribute("aria-sort", column.sorted);
      const arrow = { descending: " ▾", ascending: " ▴" }[column.sorted] || "";
      cell.append(column.to ? link(state, column.to, column.text + arrow) : column.text);
      head.append(cell);
    }
  }
  const body = table.createTBody();
  for (const row of data.rows) {
    const line = body.insertRow();
    if (row.to) {
      line.className = "fs-row";
      line.onclick = (event) => event.target.closest("a") || go(state, row.to);
    }
    if (row.here) line.classList.add("fs-here");
    if (row.group) line.classList.add("fs-group");
    const linked = Math.max(0, row.cells.findIndex((cell) => cell.link));
    row.cells.forEach((cell, i) => line.append(tableCell(state, cell, cell.to || (i === linked ? row.to : null))));
  }
  const scroll = element("div", "fs-scroll");
  scroll.append(table);
  parts.push(scroll);
  return parts;
}

function tableCell(state, cell, to) {
  const td = element("td", `${cell.right ? "fs-right fs-num" : ""}`);
  if (cell.spark) {
    td.className = "fs-thin";
    td.append(sparkline(state, cell.spark, cell.color));
    return td;
  }
  if (cell.check) {
    const box = link(state, cell.check.to, cell.check.on ? "✓" : "", "fs-check");
    box.setAttribute("role", "checkbox");
    box.setAttribute("aria-checked", cell.check.on);
    box.setAttribute("aria-label", cell.check.label);
    box.onclick = (event) => {  // not the link's target: it may be older than what was ticked a moment ago
      event.preventDefault();
      event.stopPropagation();
      const on = box.getAttribute("aria-checked") !== "true";
      box.setAttribute("aria-checked", on);
      box.textContent = on ? "✓" : "";
      state.send("tick", { name: cell.check.name, on, at: Date.now() });
    };
    td.className = "fs-tick";
    td.append(box);
    return td;
  }
  const main = element("div", cell.style || "");
  if (cell.swatch) {
    const swatch = element("span", "fs-swatch");
    swatch.style.setProperty("--fs-c", state.palette[cell.swatch]);
    main.append(swatch);
  }
  if (cell.mark) main.append(roleMark(state, cell.mark));
  if (cell.dot) main.append(dot(state, cell.dot));
  if (cell.marks) {
    const marks = link(state, to, "", "fs-marks");
    for (const mark of cell.marks) marks.append(dot(state, mark.dot), mark.text, " ");
    main.append(marks);
  } else {
    const text = cell.text || (cell.when ? shortTime(cell.when) : "");
    main.append(to ? link(state, to, text) : text);
  }
  td.append(main);
  if (cell.sub) {
    const sub = element("div", "fs-sub");
    if (cell.role) sub.append(roleMark(state, cell.role));
    sub.append(cell.sub);
    td.append(sub);
  }
  const title = cell.title || (cell.when ? longTime(cell.when) : "");
  if (title) td.title = title;
  return td;
}

// ---------------------------------------------------------------- findings

function findingsParts(state, data) {
  const parts = titleParts(state, data);
  if (!data.entries.length) {
    if (data.empty) parts.push(element("div", data.compact ? "fs-none" : "fs-empty", data.empty));
    return parts;
  }
  state.open ??= new Set();
  const list = element("div", `fs-findings ${data.compact ? "fs-compact" : ""}`);
  for (const entry of data.entries) list.append(finding(state, entry));
  if (data.more) list.append(link(state, data.more.to, data.more.text, "fs-more"));
  parts.push(list);
  return parts;
}

function finding(state, entry) {
  const details = element("details", `fs-finding ${entry.state === "open" || entry.ending === "ended" ? "" : "fs-past"}`);
  const id = entry.ids[0];
  details.open = state.open.has(id);
  details.ontoggle = () => state.open[details.open ? "add" : "delete"](id);
  const line = element("summary", "");
  const severity = element("span", "fs-severity");
  severity.append(dot(state, entry.severity), entry.severity);
  const what = element("span", "fs-what");
  if (entry.tensor) {
    if (entry.tensor.role) what.append(roleMark(state, entry.tensor.role), `${entry.tensor.role} of `);
    const { to, layer, count } = entry.tensor;
    what.append(to && !count ? link(state, to, layer, "fs-strong") : element("span", "fs-strong", count || layer));
    what.append(": ");
  }
  what.append(entry.says, element("span", "fs-evidence", entry.evidence));
  const when = element("span", "fs-since", entry.since);
  when.title = `${entry.rule}, first seen ${longTime(entry.opened)}`;
  line.append(severity, what);
  if (entry.run) line.append(link(state, entry.run.to, entry.run.text, "fs-link fs-of"));
  const how = entry.seen ? `seen by ${entry.seen.by}` : entry.state === "closed" && entry.ending !== "ended" ? entry.ending || "closed" : "why · what to do";
  line.append(when, element("span", "fs-how", how));
  const body = element("dl", "fs-why");
  const tell = (name, ...what) => {
    const value = element("dd", "");
    value.append(...what);
    body.append(element("dt", "", name), value);
  };
  tell("why", entry.cause);
  tell("what to do", entry.remedy, ...(entry.change ? [element("pre", "fs-code", entry.change)] : []));
  if (entry.members) {
    const members = element("dd", "fs-members");
    for (const { to, text, title } of entry.members) members.append(Object.assign(link(state, to, text, "fs-link"), { title }));
    body.append(element("dt", "", "tensors"), members);
  }
  const facts = [entry.rule, `worst at ${entry.worst}`, entry.ranks, `first seen ${longTime(entry.opened)}`].filter(Boolean).join(" · ");
  tell("evidence", link(state, entry.evidence_to, `look at ${entry.worst}`, "fs-link"), element("span", "fs-sub", `  ${facts}`));
  if (entry.seen) tell("seen", `${entry.seen.by}: ${entry.seen.reason} `, element("span", "fs-sub", longTime(entry.seen.when)));
  else if (entry.state === "open") tell("acknowledge", acknowledgeForm(state, entry.ids));
  details.append(line, body);
  return details;
}

function acknowledgeForm(state, ids) {
  const form = element("form", "fs-form");
  const field = (name, hint, value) => {
    const input = element("input", "");
    Object.assign(input, { name, placeholder: hint, value, required: true, maxLength: name === "by" ? 256 : 4096 });
    input.setAttribute("aria-label", hint);
    return input;
  };
  const button = element("button", "", ids.length > 1 ? `acknowledge all ${ids.length}` : "acknowledge");
  const by = field("by", "who", window.localStorage.getItem("fp8scope who") || "");
  const reason = field("reason", "why it may stay open", "");
  form.append(by, reason, button);
  form.onsubmit = (event) => {
    event.preventDefault();
    window.localStorage.setItem("fp8scope who", by.value);
    document.activeElement.blur();
    state.send("acknowledge", { findings: ids, by: by.value, reason: reason.value, at: Date.now() });
  };
  return form;
}

// ---------------------------------------------------------------- tree

function treeParts(state, data) {
  const branch = (node) => {
    const label = element("span", "fs-node");
    label.append(link(state, node.to, node.text, node.here ? "fs-here" : ""), element("span", "fs-sub", node.layers > 1 ? ` ${node.layers}` : ""));
    if (!node.inside.length) {
      const leaf = element("div", "fs-leaf");
      leaf.append(label);
      return leaf;
    }
    const details = element("details", "");
    details.open = node.open;
    const summary = element("summary", "");
    summary.append(label);
    details.append(summary, ...node.inside.map(branch));
    return details;
  };
  const root = element("div", "fs-tree");
  root.append(...data.nodes.map(branch));
  return [root];
}

function roleMark(state, role) {
  const mark = element("span", "fs-role");
  mark.append(element("i", ""));
  mark.style.setProperty("--fs-c", state.palette[role]);
  return mark;
}

// values: heights from 0 to 1, null where there is no data
function sparkline(state, values, color) {
  const [w, h] = [72, 24];
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("class", "fs-spark");
  svg.setAttribute("width", w);
  svg.setAttribute("height", h);
  const base = document.createElementNS(space, "path");
  base.setAttribute("d", `M0 ${h - 0.5}H${w}`);
  base.setAttribute("stroke", state.palette.line);
  const bars = document.createElementNS(space, "path");
  const step = w / values.length;
  const d = values.map((v, i) => (v === null || v <= 0 ? "" : `M${(i * step).toFixed(2)} ${h}v${-Math.max(1.5, v * (h - 2)).toFixed(2)}h${(step * 0.9).toFixed(2)}V${h}z`));
  bars.setAttribute("d", d.join(""));
  bars.setAttribute("fill", state.palette[color]);
  svg.append(base, bars);
  return svg;
}

// ---------------------------------------------------------------- chart

async function renderChart(state, data) {
  if (!state.plot) {
    state.plot = element("div", "fs-plot");
    state.note = element("div", "fs-note");
    state.tip = element("div", "fs-tip");
    state.tip.hidden = true;
    state.root.append(state.plot, state.note, state.tip);
    state.observer = new ResizeObserver(() => state.drawn && state.plot.offsetWidth && window.Plotly.Plots.resize(state.plot));
  }
  if (state.version !== data.version) {
    if (data.base !== null && data.base !== state.version) {
      state.send("resync", data.version);
      return;
    }
    const old = data.base === null ? {} : state.arrays;
    state.arrays = { ...old };
    for (const [name, array] of Object.entries(data.arrays)) state.arrays[name] = splice(old[name], array);
    if (data.frame) state.frame = patched(state.frame, data.frame);
    state.version = data.version;
  } else if (state.drawn && state.theme === state.palette.name) return;
  state.theme = state.palette.name;
  await draw(state);
}

async function draw(state) {
  const data = state.frame;
  state.plot.style.height = `${data.height}px`;
  const Plotly = await plotly(state.assets["plotly.js"]);
  const colors = { ...state.palette, font: getComputedStyle(state.root).fontFamily };
  const theme = state.palette.name;
  const figure = fill(data.figure, state.arrays, colors, theme);
  const { traces, layout } = figure;
  holdZoom(state, layout, data.view);
  state.traces = traces;
  state.plot.classList.toggle("fs-pointer", Boolean(data.clickable));
  await Plotly.react(state.plot, traces, layout, { displayModeBar: false, doubleClick: false, responsive: false });
  if (!state.drawn) {
    state.drawn = true;
    listen(state);
    state.observer.observe(state.root);
  }
  state.note.replaceChildren(...(data.note || []).map((text) => element("span", "", text)));
  if (data.files) state.note.append(fileLinks(state, data.files));
  state.root.dataset.version = state.version;
  state.root.dataset.columns = Math.max(0, ...traces.filter((t) => t.type === "heatmap").map((t) => t.x.length));
}

// What the chart shows as a file: its numbers from the server, where `query` says which, and its picture from here.
function fileLinks(state, query) {
  const files = element("span", "fs-files");
  if (Object.keys(query).length) {
    for (const [ending, name] of [["csv", "CSV"], ["parquet", "Parquet"]]) {
      const link = element("a", "", name);
      Object.assign(link, { href: `./download.${ending}?${new URLSearchParams(query)}`, download: "" });
      files.append(link);
    }
  }
  const picture = element("button", "", "PNG");
  Object.assign(picture, { type: "button", onclick: () => savePicture(state) });
  files.append(picture);
  return files;
}

async function savePicture(state) {
  const { layout, offsetWidth: width, offsetHeight: height } = state.plot;
  const figure = { data: state.plot.data, layout: { ...layout, paper_bgcolor: state.palette.ground } };
  const link = element("a", "");
  link.href = await window.Plotly.toImage(figure, { format: "png", scale: 2, width, height });
  link.download = "fp8scope.png";
  link.click();
}

function listen(state) {
  const plot = state.plot;
  plot.on("plotly_click", ({ points, event }) => {
    const point = points[0];
    if (!point || (event && event.button)) return;
    const about = point.data.about || {};
    const row = Array.isArray(point.pointIndex) ? point.pointIndex[0] : point.pointIndex;
    const target = about.slots ? about.slots[row] : about.slot;
    if (target === undefined) return;
    const step = about.point ? -1 : Math.round(stepAt(point));  // not every chart has steps
    clearTimeout(state.clicking);  // the first half of a double click is not a click
    state.clicking = setTimeout(() => state.send("click", { slot: target, step, at: Date.now() }), 280);
  });
  plot.on("plotly_relayout", (change) => {
    const [from, to] = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    if (from === undefined || to === undefined) return;
    state.zoom = { range: [from, to], at: performance.now() };
    state.send("zoom", { from: Math.max(0, Math.round(from)), to: Math.max(0, Math.round(to)), at: Date.now() });
  });
  plot.on("plotly_doubleclick", () => {
    clearTimeout(state.clicking);
    state.zoom = null;
    state.send("zoom", { from: null, to: null, at: Date.now() });
    return false;
  });
  plot.on("plotly_hover", ({ points, event }) => showTip(state, points, event));
  plot.on("plotly_unhover", () => (state.tip.hidden = true));
}

// A tick that left the server before it heard of the zoom does not undo it.
function holdZoom(state, layout, view) {
  if (!state.zoom) return;
  if (view !== null || performance.now() - state.zoom.at > 5000) state.zoom = null;
  else layout.xaxis.range = state.zoom.range;
}

const stepAt = (point) => (point.data.type === "heatmap" ? point.data.x[point.pointIndex[1]] - (point.data.about.width - 1) / 2 : point.x);

function showTip(state, points, event) {
  const tip = state.tip;
  tip.replaceChildren();
  const about = points[0].data.about || {};
  const lines = points[0].data.type === "heatmap" ? cellLines(points[0]) : about.point ? namedLines(points[0]) : pointLines(points);
  lines.forEach(([key, value], i) => {
    if (i) tip.append("\n");
    if (key === null) tip.append(element("b", "", value));
    else tip.append(element("span", "fs-key", key.padEnd(11)), value);
  });
  tip.hidden = false;
  const box = state.root.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const left = x + 16 + tip.offsetWidth > box.width ? x - 16 - tip.offsetWidth : x + 16;
  tip.style.left = `${Math.max(0, left)}px`;
  tip.style.top = `${Math.max(0, Math.min(y - tip.offsetHeight / 2, state.root.offsetHeight - tip.offsetHeight))}px`;
}

function cellLines(point) {
  const about = point.data.about;
  const [row, column] = point.pointIndex;
  const first = point.data.x[column] - (about.width - 1) / 2;
  const steps = about.width > 1 ? `${grouped(first)} – ${grouped(first + about.width - 1)}` : grouped(first);
  const lines = [[null, about.names[row]]];
  if (about.role) lines.push(["role", about.role]);
  lines.push([about.width > 1 ? "steps" : "step", steps]);
  for (const line of about.lines) {
    const value = line.minus ? point.z : unfixed(about.values[row][column], about.per);
    lines.push([line.name, line.usual ? fromUsual(value, about.usual[row], line.format) : formatted(value, line.format)]);
  }
  return lines;
}

// A value that travels as its distance from what is usual, below or above it.
function fromUsual(distance, [lowest, highest], format) {
  if (Number.isNaN(distance)) return formatted(distance, format);
  const usual = lowest === highest ? formatted(lowest, format) : `${formatted(lowest, format)} … ${formatted(highest, format)}`;
  return distance === 0 ? usual : `${formatted(distance + (distance < 0 ? lowest : highest), format)}, usually ${usual}`;
}

function namedLines(point) {
  const about = point.data.about;
  const [name, format] = about.value;
  return [[null, about.names[point.pointIndex]], ...about.lines, [name, formatted(point.y, format)]];
}

function pointLines(points) {
  const lines = [["step", grouped(Math.round(points[0].x))]];
  for (const point of points) {
    const about = point.data.about;
    if (about && about.name) {
      const value = about.values ? about.values[point.pointIndex] : point.y;
      const rank = about.ranks && about.ranks[point.pointIndex] >= 0 ? `, rank ${about.ranks[point.pointIndex]}` : "";
      lines.push([about.name, formatted(value, about.format) + rank]);
    }
  }
  return lines;
}

// ---------------------------------------------------------------- arrays and tokens

const TYPES = { f4: Float32Array, f8: Float64Array, i2: Int16Array, i4: Int32Array };

// The old array's first `keep` columns and the new ones behind them; rows of a matrix are views of one buffer.
function splice(old, { dtype, shape, keep, base64 }) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const added = new TYPES[dtype](bytes.buffer);
  const [rows, columns] = shape.length === 2 ? shape : [1, shape[0]];
  const fresh = columns - keep;
  const result = [];
  for (let r = 0; r < rows; r++) {
    const row = new TYPES[dtype](columns);
    if (keep) row.set((shape.length === 2 ? old[r] : old).subarray(0, keep));
    row.set(added.subarray(r * fresh, (r + 1) * fresh), keep);
    result.push(row);
  }
  return shape.length === 2 ? result : result[0];
}

// What the server's `patch` describes, done; what did not change stays the same object.
function patched(old, change) {
  if ("is" in change) return change.is;
  const copy = Array.isArray(old) ? old.slice() : { ...old };
  for (const [key, inside] of Object.entries(change.in)) copy[key] = patched(copy[key], inside);
  for (const key of change.out || []) delete copy[key];
  return copy;
}

// Fixed-point numbers as floats, each row less a number of its own; no data is NaN, a share of zero lies below all others.
const [MISSING, ZERO] = [-32768, -32767];
const unfixed = (v, per) => (v === MISSING ? NaN : v === ZERO ? -99 : v / per);
function floats({ $fixed, per, rows }, arrays) {
  return arrays[$fixed.$array].map((row, i) => {
    const [result, less] = [new Float32Array(row.length), rows ? rows[i] : 0];
    for (let j = 0; j < row.length; j++) result[j] = unfixed(row[j], per) - less;
    return result;
  });
}

// The figure with arrays, colours of the theme and maps of the theme put in. Tokens count only where colours and fonts
// are named: a layer may be called "$text".
function fill(value, arrays, colors, theme, key = "") {
  if (typeof value === "string") return value[0] === "$" && /color|family/.test(key) ? colors[value.slice(1)] : value;
  if (Array.isArray(value)) return value.map((item) => fill(item, arrays, colors, theme, key));
  if (value === null || typeof value !== "object") return value;
  if ("$array" in value) return arrays[value.$array];
  if ("$fixed" in value) return floats(value, arrays);
  if ("$theme" in value) return fill(value.$theme[theme], arrays, colors, theme, key);
  return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, fill(item, arrays, colors, theme, name)]));
}

function paletteOf(root, palettes) {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = getComputedStyle(root).getPropertyValue("--st-background-color").trim() || "#fff";
  const rgb = parseInt(probe.fillStyle.slice(1), 16);
  const luminance = 0.3 * (rgb >> 16) + 0.59 * ((rgb >> 8) & 255) + 0.11 * (rgb & 255);
  const name = luminance < 128 ? "dark" : "light";
  return { ...palettes[name], name };
}

let styled = null;
function style(url) {
  styled ??= new Promise((resolve) => {
    const sheet = document.createElement("link");
    Object.assign(sheet, { rel: "stylesheet", href: url, onload: resolve, onerror: resolve });
    document.head.append(sheet);
  });
  return styled;
}

// Plotly takes a while to start: at once where a chart will follow, else once there is nothing better to do.
let warm = false;
function warmUp(url) {
  if (warm) return;
  warm = true;
  const start = () => plotly(url).catch(() => {});  // who draws asks again
  if (/[?&](run|view=compare)/.test(window.location.search)) start();
  else setTimeout(start, 1500);
}

let loading = null;
function plotly(url) {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = url;
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject((loading = null, new Error(`${url} did not load`)));
    document.head.append(script);
  });
  return loading;
}

// ---------------------------------------------------------------- words and numbers

const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const superscript = (n) => String(n).replace(/[-0-9]/g, (c) => SUPERSCRIPT[c]);
const grouped = (n) => String(Math.round(n)).replace(/\B(?=(\d{3})+$)/g, "\u2009");

function significant(v) {
  if (v === 0) return "0";
  const size = Math.abs(v);
  if (size >= 1e-3 && size < 1e5) {
    const text = Number(v.toPrecision(3)).toString().replace("-", "−");
    return size >= 1000 ? (v < 0 ? "−" : "") + grouped(size) : text;
  }
  const [mantissa, exponent] = v.toExponential(2).split("e");
  return `${mantissa.replace("-", "−")}·10${superscript(Number(exponent))}`;
}

const power = (e) => (Number.isInteger(e) ? `2${superscript(e)}` : `2^${significant(e)}`);
const FORMATS = {
  number: significant,
  bits: (v) => `${significant(v)} bit${v === 1 ? "" : "s"}`,
  change: (v) => `${v > 0 ? "+" : ""}${significant(v)}`,
  exp2: power,
  log2: (v) => `${significant(2 ** v)} = ${power(Math.abs(v - Math.round(v)) < 1e-9 ? Math.round(v) : v)}`,
  db: (v) => `${significant(v)} dB`,
  log10share: (v) => FORMATS.share(v < -30 ? 0 : 10 ** v),
  share: (v) => (v === 0 ? "0" : v < 1e-4 ? `${significant(v * 1e6)} ppm` : `${significant(v * 100)} %`),
};
const formatted = (v, format) => (v === null || v === undefined || Number.isNaN(v) ? "no data" : FORMATS[format](v));

// The viewer's own time zone: times travel as numbers.
const shortTime = (ms) => new Date(ms).toLocaleString(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
const longTime = (ms) => new Date(ms).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "long" });

// ---------------------------------------------------------------- elements

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function dot(state, color) {
  const node = element("span", "fs-dot");
  node.style.setProperty("--fs-c", state.palette[color] || color);
  return node;
}

// A true link, so that it opens in a new tab; a plain click stays in this page.
function link(state, to, text, className) {
  const node = element("a", className, text);
  const query = new URLSearchParams(to).toString();
  node.href = query ? `./?${query}` : "./";
  node.onclick = (event) => {
    if (event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    event.stopPropagation();
    go(state, to);
  };
  return node;
}

const go = (state, to) => state.send("go", { params: to, at: Date.now() });
