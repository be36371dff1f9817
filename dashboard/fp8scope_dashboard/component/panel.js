// The one component of the dashboard: a header, a table or a chart, told apart by data.kind.
//
// Everything that a training job named reaches the page by textContent only. A chart wraps Plotly.react and keeps its
// arrays: a message carries for each array only the columns after the first `keep` ones, on top of message `base`.
// If `base` is not what this browser has, it asks for the whole chart by the trigger "resync".

const states = new WeakMap();

// Called for each message; the answer is what to do when the component goes away.
export async function mount(component, assets) {
  const { data, parentElement } = component;
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
  state.palette = paletteOf(state.root, data.palettes);
  for (const name of ["muted", "line"]) state.root.style.setProperty(`--fs-${name}`, state.palette[name]);
  ({ header: renderHeader, table: renderTable, chart: renderChart })[data.kind](state, data);
  return () => {
    if (!parentElement.isConnected && state.plot) {
      state.observer.disconnect();
      if (window.Plotly) window.Plotly.purge(state.plot);
      states.delete(parentElement);
      state.root.remove();
    }
  };
}

// ---------------------------------------------------------------- header

function renderHeader(state, data) {
  const crumbs = element("div", "fs-crumbs");
  data.crumbs.forEach((crumb, i) => {
    if (i) crumbs.append(element("span", "fs-sep", "▸"));
    const style = i === 0 ? "fs-brand" : i === data.crumbs.length - 1 ? "fs-here" : "";
    crumbs.append(crumb.to !== null && crumb.to !== undefined ? link(state, crumb.to, crumb.text, style) : element("span", style, crumb.text));
  });
  const nav = element("div", "fs-nav");
  for (const item of data.nav || []) nav.append(link(state, item.to, item.text));
  const status = element("div", "fs-status");
  (data.status || []).forEach((part, i) => {
    if (i) status.append(element("span", "fs-sep", "·"));
    const item = element("span", "");
    if (part.color) item.append(dot(state, part.color));
    item.append(part.text);
    if (part.title) item.title = part.title;
    status.append(item);
  });
  const bar = element("div", "fs-header");
  bar.append(crumbs, nav, status);
  state.root.replaceChildren(bar);
}

// ---------------------------------------------------------------- table

function renderTable(state, data) {
  const parts = [];
  if (data.title) {
    const title = element("div", "fs-title");
    title.append(element("b", "", data.title), element("span", "", data.subtitle || ""));
    parts.push(title);
  }
  if (!data.rows.length) {
    parts.push(element("div", "fs-empty", data.empty));
    state.root.replaceChildren(...parts);
    return;
  }
  const table = element("table", `fs-table ${data.style || ""}`);
  if (data.columns) {
    const head = table.createTHead().insertRow();
    for (const column of data.columns) head.append(element("th", column.right ? "fs-right" : "", column.text));
  }
  const body = table.createTBody();
  for (const row of data.rows) {
    const line = body.insertRow();
    if (row.to) {
      line.className = "fs-row";
      line.onclick = (event) => event.target.closest("a") || go(state, row.to);
    }
    if (row.here) line.classList.add("fs-here");
    row.cells.forEach((cell, i) => line.append(tableCell(state, cell, i === 0 ? row.to : null)));
  }
  const scroll = element("div", "fs-scroll");
  scroll.append(table);
  parts.push(scroll);
  state.root.replaceChildren(...parts);
}

function tableCell(state, cell, to) {
  const td = element("td", `${cell.right ? "fs-right fs-num" : ""}`);
  if (cell.spark) {
    td.className = "fs-thin";
    td.append(sparkline(state, cell.spark, cell.color));
    return td;
  }
  const main = element("div", cell.style || "");
  if (cell.dot) main.append(dot(state, cell.dot));
  main.append(to ? link(state, to, cell.text) : cell.text);
  td.append(main);
  if (cell.sub) {
    const sub = element("div", "fs-sub");
    if (cell.role) sub.append(roleMark(state, cell.role));
    sub.append(cell.sub);
    td.append(sub);
  }
  if (cell.title) td.title = cell.title;
  return td;
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
  state.plot.style.height = `${data.height}px`;
  if (state.version !== data.version) {
    if (data.base !== null && data.base !== state.version) {
      state.send("resync", data.version);
      return;
    }
    const old = data.base === null ? {} : state.arrays;
    state.arrays = {};
    for (const [name, array] of Object.entries(data.arrays)) state.arrays[name] = splice(old[name], array);
    state.version = data.version;
  }
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
  state.data = data;
  state.note.replaceChildren(...(data.note || []).map((text) => element("span", "", text)));
  state.root.dataset.version = data.version;
  state.root.dataset.columns = Math.max(0, ...traces.filter((t) => t.type === "heatmap").map((t) => t.x.length));
}

function listen(state) {
  const plot = state.plot;
  plot.on("plotly_click", ({ points, event }) => {
    const point = points[0];
    if (!point || (event && event.button)) return;
    const about = point.data.about || {};
    const row = Array.isArray(point.pointIndex) ? point.pointIndex[0] : null;
    const target = about.slots ? about.slots[row] : about.slot;
    if (target === undefined) return;
    clearTimeout(state.clicking);  // the first half of a double click is not a click
    state.clicking = setTimeout(() => state.send("click", { slot: target, step: Math.round(stepAt(point)), at: Date.now() }), 280);
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
  const lines = points[0].data.type === "heatmap" ? cellLines(points[0]) : pointLines(points);
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
  for (const line of about.lines) lines.push([line.name, formatted(line.minus ? point.z : about.values[row][column], line.format)]);
  return lines;
}

function pointLines(points) {
  const lines = [["step", grouped(Math.round(points[0].x))]];
  for (const point of points) {
    const about = point.data.about;
    if (about && about.name) {
      const value = about.values ? about.values[point.pointIndex] : point.y;
      lines.push([about.name, formatted(value, about.format)]);
    }
  }
  return lines;
}

// ---------------------------------------------------------------- arrays and tokens

const TYPES = { f4: Float32Array, f8: Float64Array, i4: Int32Array };

// The old array's first `keep` columns and the new ones behind them; rows of a matrix are views of one buffer.
function splice(old, { dtype, shape, keep, base64 }) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
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

// Each row of a matrix minus a number of its own.
const less = (matrix, rows) => matrix.map((row, i) => row.map((v) => v - rows[i]));

// The figure with arrays, colours of the theme and maps of the theme put in. Tokens count only where colours and fonts
// are named: a layer may be called "$text".
function fill(value, arrays, colors, theme, key = "") {
  if (typeof value === "string") return value[0] === "$" && /color|family/.test(key) ? colors[value.slice(1)] : value;
  if (Array.isArray(value)) return value.map((item) => fill(item, arrays, colors, theme, key));
  if (value === null || typeof value !== "object") return value;
  if ("$array" in value) return arrays[value.$array];
  if ("$minus" in value) return less(arrays[value.$minus.$array], value.rows);
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
  bits: (v) => `${significant(v)} bits`,
  change: (v) => `${v > 0 ? "+" : ""}${significant(v)}`,
  exp2: power,
  log2: (v) => `${significant(2 ** v)} = ${power(Math.abs(v - Math.round(v)) < 1e-9 ? Math.round(v) : v)}`,
  db: (v) => `${significant(v)} dB`,
  log10share: (v) => FORMATS.share(v < -30 ? 0 : 10 ** v),
  share: (v) => (v === 0 ? "0" : v < 1e-4 ? `${significant(v * 1e6)} ppm` : `${significant(v * 100)} %`),
};
const formatted = (v, format) => (v === null || v === undefined || Number.isNaN(v) ? "no data" : FORMATS[format](v));

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
