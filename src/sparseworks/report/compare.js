// The picture of a comparison. Its state is in the address (#x=size&y=quality&off=slimming), so
// that a view can be kept and sent.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const {axes, points, looks, symbols, ink} = data;
const by = id => document.getElementById(id);
const plot = by("plot"), picture = by("picture"), panel = by("chosen");
const boxes = [...document.querySelectorAll("input[name=family]")];
const rows = [...document.querySelectorAll("tr[data-point]")];
let chosen = null;

const PATHS = {
  circle: "M8 3.5a4.5 4.5 0 1 0 .01 0z", square: "M4 4h8v8H4z", diamond: "M8 2l6 6-6 6-6-6z",
  "triangle-up": "M8 2.5l6 10H2z", "triangle-down": "M8 13.5l6-10H2z",
  cross: "M6 2h4v4h4v4h-4v4H6v-4H2V6h4z",
  x: "M4.5 2L8 5.5 11.5 2 14 4.5 10.5 8 14 11.5 11.5 14 8 10.5 4.5 14 2 11.5 5.5 8 2 4.5z",
  star: "M8 1.5l2 4.5 5 .5-3.7 3.3 1 4.9L8 12.2l-4.3 2.5 1-4.9L1 6.5l5-.5z",
};
const SVG = "http://www.w3.org/2000/svg";
function drawn(svg, symbol, color, open) {
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[symbol]);
  path.setAttribute("fill", open ? "none" : color);
  path.setAttribute("stroke", color);
  path.setAttribute("stroke-width", open ? 1.8 : 0);
  svg.replaceChildren(path);
  return svg;
}

const element = (tag, properties) => Object.assign(document.createElement(tag), properties);
const symbolOf = p => symbols[p.family] || "circle";
const nameOf = p => `${p.method} ${p.amount}`.trim();
const at = (p, axis) => p.values[axis][0] / axes[axis].scale;
const number = v => Number(v.toPrecision(4)).toString();
function told(p, axis) {
  const [mean, low, high] = p.values[axis].map(v => v === null ? null : v / axes[axis].scale);
  return low === null || number(low) === number(high) ? number(mean)
    : `${number(mean)} (${number(low)} to ${number(high)})`;
}

// Which points no other one beats; as `pareto_front` in diagnostics/tradeoffs.py, which says how.
function front(list, x, y) {
  const cost = p => [x, y].map(a => (axes[a].higher_is_better ? -1 : 1) * p.values[a][0]);
  const order = list.map(p => [p, ...cost(p)]).sort((a, b) => a[1] - b[1] || a[2] - b[2]);
  const on = new Set();
  let least = null;
  for (const [p, cx, cy] of order) {
    if (least === null || cy < least[1] || (cx === least[0] && cy === least[1])) {
      on.add(p);
      least = [cx, cy];
    }
  }
  return on;
}

function picked() {
  const families = new Set(boxes.filter(b => b.checked).map(b => b.value));
  return {x: by("x").value, y: by("y").value, shown: points.filter(p => families.has(p.family))};
}

// Logarithmic where values are far apart, and all are positive.
function wide(list, axis) {
  const values = list.map(p => at(p, axis));
  return axis !== "sparsity" && Math.min(...values) > 0
    && Math.max(...values) / Math.min(...values) > 20;
}
const positive = (list, axis) => list.every(p => at(p, axis) > 0);

// From the means, with room for intervals up to half as wide as all: a few seeds make wide ones.
function range(list, axis, log) {
  const scale = log ? Math.log10 : v => v;
  const means = list.map(p => scale(at(p, axis)));
  let low = Math.min(...means), high = Math.max(...means);
  const room = (high - low) / 2 || Math.abs(high) / 10 || 1;
  for (const p of list) {
    const [, a, b] = p.values[axis].map(v => v === null ? null : v / axes[axis].scale);
    if (a === null) continue;
    if (!log || a > 0) low = Math.max(Math.min(low, scale(a)), Math.min(...means) - room);
    high = Math.min(Math.max(high, scale(b)), Math.max(...means) + room);
  }
  const pad = (high - low) * 0.06 || room / 4;
  return [low - pad, high + pad];
}

// Ticks of a logarithmic axis with whole labels: at 1, 2 and 5 of every power of ten, or 1 alone.
function marks([low, high]) {
  const steps = high - low > 3 ? [1] : [1, 2, 5], values = [];
  for (let power = Math.floor(low); power <= high; power++) {
    values.push(...steps.map(s => s * 10 ** power));
  }
  return {tickmode: "array", tickvals: values, ticktext: values.map(number)};
}

const escaped = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
function wrapped(text, width) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const last = lines[lines.length - 1];
    if (last && last.length + word.length >= width) lines.push(word);
    else lines[lines.length - 1] = last ? `${last} ${word}` : word;
  }
  return lines.map(escaped).join("<br>");
}
function hover(p, x, y) {
  const lines = [`<b>${escaped(nameOf(p))}</b>`];
  for (const a of [y, x]) lines.push(`${escaped(axes[a].label)}: ${told(p, a)}`);
  const command = p.make || p.measure;
  if (command && innerWidth > 700) lines.push("", wrapped(command, 64));
  return lines.join("<br>");
}

const interval = (p, axis) => p.values[axis][1] !== null && p.values[axis][2] > p.values[axis][1];
function bars(list, axis, hide) {
  const half = p => interval(p, axis) && !hide(p)
    ? (p.values[axis][2] - p.values[axis][1]) / 2 / axes[axis].scale : 0;
  const values = list.map(half);
  return {type: "data", array: values, visible: values.some(v => v > 0), thickness: 1, width: 3};
}

function traces(shown, x, y, log) {
  const quiet = {hoverinfo: "skip", showlegend: false}, made = [];
  const lines = new Map(), banded = new Set();
  for (const p of shown.filter(p => p.line)) lines.set(p.line, [...(lines.get(p.line) || []), p]);
  for (const own of lines.values()) {
    if (own.length < 2) continue;
    own.sort((a, b) => at(a, x) - at(b, x));
    const {color, dash} = looks[own[0].method], xs = own.map(p => at(p, x));
    if (own.some(p => interval(p, y))) {
      const edge = which => own.map(p => {
        const v = (p.values[y][which] ?? p.values[y][0]) / axes[y].scale;
        return log.y && v <= 0 ? at(p, y) / 1e3 : v;  // below all that is shown
      });
      made.push({x: [...xs, ...xs.slice().reverse()], y: [...edge(2), ...edge(1).reverse()],
        fill: "toself", fillcolor: color, opacity: 0.16, mode: "none", ...quiet});
      own.forEach(p => banded.add(p));
    }
    made.push({x: xs, y: own.map(p => at(p, y)), mode: "lines",
      line: {color, width: 1.5, dash}, opacity: 0.7, ...quiet});
  }
  const on = front(shown, x, y);
  const best = [...on].sort((a, b) => at(a, x) - at(b, x) || at(a, y) - at(b, y));
  made.push({x: best.map(p => at(p, x)), y: best.map(p => at(p, y)), mode: "lines",
    line: {color: ink, width: 2, dash: "dot", shape: axes[x].higher_is_better ? "vh" : "hv"},
    ...quiet});
  for (const method of new Set(shown.map(p => p.method))) {
    const own = shown.filter(p => p.method === method), {color, open} = looks[method];
    made.push({
      x: own.map(p => at(p, x)), y: own.map(p => at(p, y)), mode: "markers", showlegend: false,
      customdata: own.map(p => points.indexOf(p)), text: own.map(p => hover(p, x, y)),
      hovertemplate: "%{text}<extra></extra>",
      hoverlabel: {bgcolor: "#fff", bordercolor: color, font: {color: ink, size: 12},
        align: "left"},
      error_x: {...bars(own, x, () => false), color},
      error_y: {...bars(own, y, p => banded.has(p)), color},
      marker: {color, symbol: symbolOf(own[0]) + (open ? "-open" : ""),
        size: own.map(p => on.has(p) || method === "dense" ? 12 : 8),
        line: {color: own.map(p => on.has(p) ? ink : color),
          width: own.map(p => on.has(p) ? 1.5 : open ? 2 : 0)}},
    });
  }
  if (chosen !== null && shown.includes(points[chosen])) {
    const p = points[chosen];
    made.push({x: [at(p, x)], y: [at(p, y)], mode: "markers", ...quiet,
      marker: {symbol: "circle-open", size: 24, color: ink, line: {width: 2.5}}});
  }
  return {made, on};
}

function draw(anew) {
  const {x, y, shown} = picked(), narrow = innerWidth < 600;
  for (const [axis, box] of [[x, by("logx")], [y, by("logy")]]) {
    box.disabled = !positive(shown, axis);
    if (anew) box.checked = wide(shown, axis);
    if (box.disabled) box.checked = false;
  }
  const log = {x: by("logx").checked, y: by("logy").checked};
  const {made, on} = traces(shown, x, y, log);
  const axis = (name, logged) => ({
    title: {text: axes[name].label, standoff: 8}, type: logged ? "log" : "linear", automargin: true,
    range: shown.length ? range(shown, name, logged) : [0, 1], gridcolor: "#e6ecea",
    showgrid: true, zeroline: false, ticks: "outside", linecolor: "#5d6b68", nticks: narrow ? 5 : 9,
    ...(logged && shown.length ? marks(range(shown, name, true)) : {tickmode: "auto"}),
  });
  Plotly.react(picture, made, {
    xaxis: axis(x, log.x), yaxis: axis(y, log.y), height: narrow ? 380 : 480, hovermode: "closest",
    margin: {l: 48, r: 16, t: 16, b: 44}, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
    font: {family: "system-ui, sans-serif", size: 13, color: ink},
    uirevision: [x, y, log.x, log.y].join(),
  }, {displayModeBar: false, responsive: true});
  rows.forEach(row => {
    const p = points[row.dataset.point];
    row.hidden = !shown.includes(p);
    row.classList.toggle("front", on.has(p));
    row.classList.toggle("chosen", points[chosen] === p);
    row.querySelector(".on").textContent = on.has(p) ? "front" : "";
  });
  listed(shown);
  remembered(x, y);
}

function listed(shown) {
  by("legend").replaceChildren(...[...new Set(shown.map(p => p.method))].map(method => {
    const item = document.createElement("li"), svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("width", 16);
    svg.setAttribute("height", 16);
    const {color, open} = looks[method];
    item.append(drawn(svg, symbolOf(points.find(p => p.method === method)), color, open), method);
    return item;
  }), element("li", {textContent: "dotted: the front"}));
}

function choose(index) {
  if (index === chosen) return;
  chosen = index;
  const p = points[index], {x, y} = picked();
  const title = document.createElement("strong"), list = document.createElement("dl");
  title.textContent = `${nameOf(p)} (${p.family})`;
  for (const a of new Set([y, x, ...Object.keys(axes)])) {
    const pair = document.createElement("div");
    for (const [tag, text] of [["dt", axes[a].label], ["dd", told(p, a)]]) {
      pair.append(element(tag, {textContent: text}));
    }
    list.append(pair);
  }
  panel.replaceChildren(title, list);
  if (p.untouched) {
    panel.append(element("p", {className: "muted",
      textContent: `${p.untouched} tensors are as they were: the method does not take them`}));
  }
  for (const [text, command] of [["Make it", p.make], ["Measure it again", p.measure]]) {
    if (!command) continue;
    const pre = element("pre", {textContent: command});
    const copy = element("button", {type: "button", textContent: "Copy"});
    copy.addEventListener("click", () => copied(pre, copy));
    const head = element("div", {className: "picks"});
    head.append(element("span", {textContent: text}), copy);
    panel.append(head, pre);
  }
  draw(false);
}

async function copied(pre, button) {
  try {
    await navigator.clipboard.writeText(pre.textContent);
  } catch {  // not allowed here: select it, and the usual keys copy it
    getSelection().selectAllChildren(pre);
    button.textContent = "Selected";
    return;
  }
  button.textContent = "Copied";
}

function remembered(x, y) {
  const off = boxes.filter(b => !b.checked).map(b => b.value);
  const state = new URLSearchParams({x, y, ...(off.length ? {off: off.join(",")} : {})});
  try {
    history.replaceState(null, "", `#${state}`);
  } catch { /* a page that is shown inside of another has no address of its own */ }
}

function recalled() {
  const state = new URLSearchParams(location.hash.slice(1));
  const off = (state.get("off") || "").split(",");
  for (const which of ["x", "y"]) {
    by(which).value = state.get(which) in axes ? state.get(which) : data[which];
  }
  boxes.forEach(b => { b.checked = !off.includes(b.value); });
}

recalled();
document.querySelectorAll("svg[data-symbol]").forEach(s => drawn(s, s.dataset.symbol, ink, false));
let before = picked();
for (const which of ["x", "y"]) {
  by(which).addEventListener("change", () => {
    const other = which === "x" ? "y" : "x";
    if (by("x").value === by("y").value) by(other).value = before[which];  // they change places
    before = picked();
    draw(true);
  });
}
boxes.forEach(b => b.addEventListener("change", () => draw(false)));
for (const id of ["logx", "logy"]) by(id).addEventListener("change", () => draw(false));
rows.forEach(row => row.querySelector("button").addEventListener("click", () => {
  choose(Number(row.dataset.point));
  panel.scrollIntoView({block: "nearest"});
}));
plot.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1}[event.key];
  const {x, y, shown} = picked();
  if (!shown.length || !(step || event.key === "Home" || event.key === "End")) return;
  event.preventDefault();
  const order = [...shown].sort((a, b) => at(a, x) - at(b, x) || at(a, y) - at(b, y));
  const now = order.indexOf(points[chosen]), last = order.length - 1;
  const next = event.key === "Home" ? 0 : event.key === "End" ? last
    : now < 0 ? (step > 0 ? 0 : last) : Math.min(last, Math.max(0, now + step));
  choose(points.indexOf(order[next]));
});
draw(true);
for (const what of ["plotly_hover", "plotly_click"]) {
  picture.on(what, event => {
    const index = event.points[0].customdata;
    if (index !== undefined) setTimeout(() => choose(index));  // not while Plotly draws its label
  });
}
addEventListener("hashchange", () => { recalled(); draw(true); });
})();
