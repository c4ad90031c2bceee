"use strict";
const told = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const NS = "http://www.w3.org/2000/svg";
const CELL = 74, GAP = 56, MIDDLE = 128, HEIGHT = 250;
/* It opens on its point: unfolded, at the last copy, where gradients come in. */
const now = { layer: 0, unfolded: true, copy: told.T - 1, first: told.T - 1 };
const listeners = [];

/* Everything that shows the chosen copy listens; whoever chooses one calls this. */
function choose(change) {
  Object.assign(now, change);
  now.copy = Math.max(0, Math.min(told.T - 1, Math.round(now.copy)));
  const seen = shown();
  if ("copy" in change && now.unfolded) {
    if (now.copy < now.first) now.first = now.copy;
    if (now.copy > now.first + seen - 1) now.first = now.copy - seen + 1;
  }
  now.first = Math.max(0, Math.min(told.T - seen, now.first));
  listeners.forEach((listener) => listener(change));
}

function shown() {
  const room = Math.floor((byId("lattice").clientWidth - 60) / (CELL + GAP));
  return Math.max(1, Math.min(told.T, room, 60));
}

const layer = () => told.layers[now.layer];

function element(name, attributes, ...children) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function html(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/* -- strips: blue below zero, orange above, the paper's colour at zero */

const levels = new Map();
function bytes(strip) {
  if (!levels.has(strip)) levels.set(strip, Uint8Array.from(atob(strip.levels), (c) => c.charCodeAt(0)));
  return levels.get(strip);
}

function colours(logarithmic) {
  const dark = document.documentElement.dataset.theme === "dark";
  const zero = dark ? [28, 33, 38] : [247, 247, 247];
  const ends = dark ? [[86, 180, 233], [240, 130, 60]] : [[0, 90, 160], [200, 80, 0]];
  return Array.from({ length: 256 }, (_, level) => {
    if (level === 255) return [0, 0, 0, 0];
    const value = level / 127 - 1, end = ends[value < 0 ? 0 : 1], share = logarithmic ? Math.abs(value) : Math.sqrt(Math.abs(value));
    return [...zero.map((z, i) => z + (end[i] - z) * share), 255];
  });
}

function paint(canvas, strip, from, count, turned) {
  const data = bytes(strip), table = colours(strip.decades > 0), wide = turned ? strip.entries : count;
  canvas.width = wide;
  canvas.height = turned ? count : strip.entries;
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  for (let t = 0; t < count; t++) for (let i = 0; i < strip.entries; i++) {
    const at = 4 * (turned ? t * wide + i : i * wide + t);
    image.data.set(table[data[(from + t) * strip.entries + i]], at);
  }
  context.putImageData(image, 0, 0);
}

/* -- the lattice: the rolled cell, or a window of copies */

function way(kind, from, to) {
  const [x, y] = to, [a, b] = from, down = b < y ? 1 : -1;
  const head = a === x ? `M${x} ${y}l-5 ${-9 * down}h10z` : `M${x} ${y}l${x > a ? -9 : 9} -5v10z`;
  return [element("path", { class: `way ${kind}`, d: `M${a} ${b}L${x} ${y}` }), element("path", { class: `head ${kind}`, d: head })];
}

function cellAt(x, label, sub, strips, t) {
  const middle = x + CELL / 2;
  const copy = element("g", { class: "copy", "data-copy": t }, element("title", {}, `${layer().cell}, ${sub}`));
  copy.append(element("rect", { class: "cell", x, y: MIDDLE - 30, width: CELL, height: 60, rx: 8 }));
  copy.append(element("text", { class: "name", x: middle, y: MIDDLE - 2, "text-anchor": "middle" }, label));
  copy.append(element("text", { class: "soft", x: middle, y: MIDDLE + 13, "text-anchor": "middle" }, sub));
  copy.append(...way("", [middle, MIDDLE + 78], [middle, MIDDLE + 32]), ...way("", [middle, MIDDLE - 32], [middle, MIDDLE - 78]));
  const put = (strip, y, caption) => {
    const inset = caption ? 0 : 5;
    if (strip && t >= 0) {
      const canvas = document.createElement("canvas");
      paint(canvas, strip, t, 1, true);
      copy.append(element("image", { href: canvas.toDataURL(), x: x + inset, y, width: CELL - 2 * inset, height: 8, preserveAspectRatio: "none", style: "image-rendering:pixelated" }));
    }
    if (caption) copy.append(element("text", { class: "soft", x: middle, y: caption[1], "text-anchor": "middle" }, caption[0]));
  };
  const of = (role) => strips.find((strip) => strip.role === role);
  put(of("input"), MIDDLE + 82, [t < 0 ? "input" : `x ${t}`, MIDDLE + 107]);
  put(of("output"), MIDDLE - 91, [t < 0 ? "output" : `o ${t}`, MIDDLE - 98]);
  put(of("state"), MIDDLE + 19);
  put(of("state gradient") || of("output gradient"), MIDDLE - 27);
  return copy;
}

function short(text, most) { return text.length > most ? text.slice(0, most - 1) + "…" : text; }

function drawLattice() {
  const host = byId("lattice"), width = Math.max(300, host.clientWidth), { strips, reverse, cell } = layer();
  const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, "aria-hidden": "true" });
  if (!now.unfolded) {
    const x = width / 2 - CELL / 2, right = x + CELL;
    svg.append(cellAt(x, short(cell, 9), `T = ${told.T}`, strips, -1));
    svg.append(element("path", { class: "way state", d: `M${right} ${MIDDLE - 14}h26a14 14 0 0 1 0 28h-17` }));
    svg.append(element("path", { class: "head state", d: `M${right} ${MIDDLE + 14}l9 -5v10z` }));
    svg.append(element("text", { class: "soft", x: right + 50, y: MIDDLE + 4 }, "state"));
  } else {
    const count = shown(), start = (width - count * CELL - (count - 1) * GAP) / 2;
    for (let n = 0; n < count; n++) {
      const t = now.first + n, x = start + n * (CELL + GAP);
      svg.append(cellAt(x, short(cell, 9), `t = ${t}`, strips, t));
      const ends = [[x + CELL, MIDDLE], [x + CELL + GAP - 1, MIDDLE]];
      if (n < count - 1) svg.append(...way("state", ...(reverse ? [[ends[1][0], MIDDLE], [ends[0][0] + 1, MIDDLE]] : ends)));
    }
    const dots = (x, seen) => seen && svg.append(element("text", { x, y: MIDDLE + 5, "text-anchor": "middle" }, "…"));
    dots(start - 16, now.first > 0);
    dots(width - start + 16, now.first + count < told.T);
  }
  host.replaceChildren(svg);
  byId("network-hint").textContent = now.unfolded
    ? `Copies ${now.first} to ${now.first + shown() - 1} of ${told.T}; drag to move through time. All share the same weights; the state is handed ${reverse ? "from the last to the first" : "from left to right"}. In each cell: the gradient of its state on top, its state below.`
    : "One cell, whose state comes back to it at every step. Click it to unfold it into its copies.";
  byId("fold").textContent = now.unfolded ? "fold" : "unfold";
  byId("fold").setAttribute("aria-expanded", String(now.unfolded));
  markLattice();
}

function markLattice() {
  document.querySelectorAll("g.copy").forEach((copy) => copy.classList.toggle("chosen", now.unfolded && Number(copy.dataset.copy) === now.copy));
}

/* -- the chosen copy */

function range(strip) {
  const most = `±${Number(strip.scale.toPrecision(2))}`;
  return strip.decades ? `${most}, logarithmic, ${strip.decades} decades` : most;
}

function drawDetails() {
  byId("time").value = now.copy;
  byId("chosen").value = now.copy;
  byId("details").replaceChildren(...layer().strips.map((strip) => {
    const canvas = html("canvas", { role: "img", "aria-label": `${strip.role} ${strip.name} of copy ${now.copy}` });
    paint(canvas, strip, now.copy, 1, true);
    const left = strip.of > strip.entries ? `${strip.entries} of ${strip.of} entries` : `${strip.of} entries`;
    const gone = bytes(strip)[now.copy * strip.entries] === 255 ? "not there" : `${left}, ${range(strip)}`;
    return html("figure", {}, html("figcaption", {}, html("b", {}, strip.name), html("span", {}, `${strip.role} · ${gone}`)), canvas);
  }));
}

/* -- all copies: one picture for each tensor */

function drawFilms() {
  byId("films").replaceChildren(...layer().strips.map((strip) => {
    const canvas = html("canvas", { role: "img", "aria-label": `${strip.role} ${strip.name} over all copies` });
    paint(canvas, strip, 0, told.T, false);
    const reel = html("div", { class: "reel" }, canvas, html("i", {}));
    reel.addEventListener("pointerdown", (event) => {
      const box = canvas.getBoundingClientRect();
      choose({ copy: Math.floor(((event.clientX - box.left) / box.width) * told.T), unfolded: true });
    });
    return html("figure", { class: "film" }, html("figcaption", {}, html("b", {}, strip.name), html("span", {}, `${strip.role} · ${range(strip)}`)), reel);
  }));
  markFilms();
}

function markFilms() {
  document.querySelectorAll(".reel i").forEach((mark) => { mark.style.left = `calc(${((now.copy + 0.5) / told.T) * 100}% - 1px)`; });
}

/* -- the cell */

function drawCell() {
  byId("engine").textContent = layer().engine;
  const graph = new DOMParser().parseFromString(layer().inside || "<svg xmlns='" + NS + "'/>", "image/svg+xml").documentElement;
  byId("inside").replaceChildren(...(layer().inside ? [graph] : []));
  byId("inside").hidden = !layer().inside;
  byId("operations").replaceChildren(...layer().operations.map((operation, number) => html("li", { "data-operation": number },
    html("code", {}, operation.name), html("code", {}, operation.result),
    html("span", { class: `place ${operation.place}` }, operation.place), html("span", { class: "why" }, operation.reason))));
  const told = (event) => event.target.closest("[data-operation]");
  for (const host of [byId("inside"), byId("operations")]) host.onclick = (event) => chooseOperation(told(event)?.dataset.operation);
}

/* The operation that is chosen, in the graph with its edges and in the list; none the second time. */
function chooseOperation(number) {
  const before = document.querySelector("#operations li.chosen")?.dataset.operation;
  const now = number === before ? undefined : number;
  document.querySelectorAll("[data-operation]").forEach((one) => one.classList.toggle("chosen", now !== undefined && one.dataset.operation === now));
  const node = document.querySelector("#inside g.chosen")?.dataset.node;
  document.querySelectorAll("#inside .edge").forEach((edge) => edge.classList.toggle("chosen", node !== undefined && [edge.dataset.from, edge.dataset.to].includes(node)));
}

/* -- charts: drawn when they come into sight */

let views = [];
const eye = new IntersectionObserver((seen) => seen.filter((entry) => entry.isIntersecting).forEach((entry) => plot(entry.target)), { rootMargin: "200px" });

function drawCharts() {
  views.forEach((view) => view.finalize());
  views = [];
  eye.disconnect();
  const charts = [...layer().charts, ...told.charts];
  byId("charts").replaceChildren(...charts.map((chart) => {
    const plot = html("div", { class: "plot", "data-key": chart.key, role: "img", "aria-label": `${chart.title}. ${chart.sentence}` });
    plot.chart = chart;
    eye.observe(plot);
    return html("figure", { class: "chart", style: "margin:0" }, html("h3", {}, chart.title), plot, html("p", {}, chart.sentence));
  }));
  byId("figures").replaceChildren(...layer().figures.flatMap(([name, text]) => [html("dt", {}, name), html("dd", {}, text)]));
  byId("missing").replaceChildren(...layer().missing.map((text) => html("li", {}, text)));
}

function vega() {
  if (!window.vegaEmbed) document.head.append(html("script", {}, byId("vega").textContent));
  return window.vegaEmbed;
}

function theme() {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const axis = { labelColor: colour("soft"), titleColor: colour("soft"), gridColor: colour("line"), domainColor: colour("line"), tickColor: colour("line"), titleFontWeight: 500 };
  return {
    background: "transparent", font: "system-ui, sans-serif", axis, view: { stroke: null },
    legend: { labelColor: colour("ink"), labelLimit: 220, columns: 2 }, rule: { color: colour("mark") }, point: { color: colour("accent") },
    line: { color: colour("accent") }, area: { color: colour("accent") },
    range: { category: ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#8a8a8a", "#d55e00", "#56b4e9", "#b8a500"] },
  };
}

/* Where there is no number, or none that a logarithmic axis has, a line is broken. */
function rows(chart) {
  const there = (y) => y !== null && y !== undefined && !(chart.log_y && y <= 0);
  const number = (y) => (there(y) ? y : null);
  return chart.series.flatMap((series) => chart.x.map((x, n) => {
    const y = number(series.y[n]), band = y !== null && series.lower.length;
    return {
      x, y, low: band ? number(series.lower[n]) : y, high: band ? number(series.upper[n]) : y,
      series: series.name, label: chart.labels[n] || "", chosen: n === chart.chosen,
    };
  }));
}

function plot(host) {
  eye.unobserve(host);
  const width = host.clientWidth, { chart } = host;
  const figure = { ...chart.specification, width: width - 4, datasets: { figures: rows(chart) } };
  vega()(host, figure, { actions: false, renderer: "svg", config: theme() }).then(({ view }) => {
    views.push(view);
    Object.assign(view, { by_copy: chart.by_copy, key: chart.key });
    if (!chart.by_copy) return;
    view.signal("copy", now.copy).runAsync();
    view.addEventListener("click", (event) => {
      const box = host.querySelector("svg").getBoundingClientRect();
      const start = box.left + view.origin()[0] + view.padding().left;
      choose({ copy: view.scale("x").invert(event.clientX - start), unfolded: true });
    });
  });
}

function markCharts() {
  views.filter((view) => view.by_copy).forEach((view) => view.signal("copy", now.copy).runAsync());
}

/* -- hands: click, drag, keys */

let drag = null;
const lattice = byId("lattice");
lattice.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, first: now.first, moved: false }; });
window.addEventListener("pointermove", (event) => {
  if (!drag || !now.unfolded) return;
  const steps = Math.round((drag.x - event.clientX) / (CELL + GAP));
  if (steps) drag.moved = true;
  if (drag.first + steps !== now.first) choose({ first: drag.first + steps });
});
window.addEventListener("pointerup", () => { setTimeout(() => { drag = null; }); });
lattice.addEventListener("click", (event) => {
  if (drag && drag.moved) return;
  const copy = event.target.closest("g.copy");
  if (!now.unfolded) choose({ unfolded: true, first: now.copy });
  else if (copy) choose({ copy: Number(copy.dataset.copy) });
});
const KEYS = {
  ArrowRight: () => ({ copy: now.copy + 1 }), ArrowLeft: () => ({ copy: now.copy - 1 }),
  PageDown: () => ({ copy: now.copy + shown() }), PageUp: () => ({ copy: now.copy - shown() }),
  Home: () => ({ copy: 0 }), End: () => ({ copy: told.T - 1 }),
  "+": () => ({ unfolded: true }), "=": () => ({ unfolded: true }), "-": () => ({ unfolded: false }),
  Enter: () => ({ unfolded: !now.unfolded }), " ": () => ({ unfolded: !now.unfolded }),
};
lattice.addEventListener("keydown", (event) => {
  if (!KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const change = KEYS[event.key]();
  choose("copy" in change ? { ...change, unfolded: true } : change);
});
byId("fold").addEventListener("click", () => choose({ unfolded: !now.unfolded }));
byId("time").addEventListener("input", (event) => choose({ copy: Number(event.target.value), unfolded: true }));
document.querySelectorAll("button.layer").forEach((button) => button.addEventListener("click", () => choose({ layer: Number(button.dataset.layer) })));

function dress(name) {
  document.documentElement.dataset.theme = name;
  drawAll();
}
const dark = window.matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", () => dress(dark.matches ? "dark" : "light"));
byId("theme").addEventListener("click", () => dress(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

function drawAll() {
  document.querySelectorAll("button.layer").forEach((button, n) => button.setAttribute("aria-pressed", String(n === now.layer)));
  drawLattice();
  drawDetails();
  drawFilms();
  drawCell();
  drawCharts();
}

listeners.push((change) => {
  if ("layer" in change) return drawAll();
  drawLattice();
  drawDetails();
  markFilms();
  markCharts();
});
let width = 0;
new ResizeObserver(() => {
  if (lattice.clientWidth === width) return;
  width = lattice.clientWidth;
  choose({ first: now.first });
}).observe(lattice);
now.first = Math.max(0, told.T - shown());
dress(dark.matches ? "dark" : "light");
