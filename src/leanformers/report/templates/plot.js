"use strict";
(() => {
  const { axes, points, goals } = JSON.parse(document.getElementById("plot-data").textContent);
  const plot = document.getElementById("plot");
  const byKey = Object.fromEntries(axes.map((axis) => [axis.key, axis]));
  const byId = (id) => document.getElementById(id);
  const pick = { x: byId("axis-x"), y: byId("axis-y") };
  const show = { dominated: byId("show-dominated"), estimated: byId("show-estimated") };

  const runtimes = [...new Set(points.filter((p) => p.status !== "reference" && p.runtime).map((p) => p.runtime))];
  const series = byId("by-runtime");
  const colour = (p) => `series series-${runtimes.indexOf(p.runtime) % 6}`;

  // ---- numbers as a person writes them -------------------------------------------------------------------------
  const plain = (value, digits = 3) => {
    if (value === 0) return "0";
    const places = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(value))));
    return Number(value.toFixed(Math.min(places, 12))).toLocaleString("en", { maximumFractionDigits: 12 });
  };
  const scaled = (value, units) => {
    let step = 0;
    while (Math.abs(value) >= 999.5 && step < units.length - 1) { value /= 1000; step += 1; }
    return `${plain(value)} ${units[step]}`.trim();
  };
  const WRITE = {
    latency: (v) => (v >= 1 ? `${plain(v)} s` : v >= 1e-3 || v === 0 ? `${plain(v * 1e3)} ms` : `${plain(v * 1e6)} µs`),
    bytes: (v) => scaled(v, ["B", "kB", "MB", "GB", "TB"]),
    memory: (v) => scaled(v, ["B", "kB", "MB", "GB", "TB"]),
    peak_memory: (v) => scaled(v, ["B", "kB", "MB", "GB", "TB"]),
    parameters: (v) => scaled(v, ["", "k", "M", "B"]),
    flops: (v) => scaled(v, ["", "k", "M", "G", "T"]),
    throughput: (v) => scaled(v, ["", "k", "M"]),
    quality: (v) => plain(v, 4),
  };
  const write = (key, value) => (WRITE[key] || plain)(value);

  // Ticks at 1, 2 or 5 times a power of ten, about `count` of them inside [low, high].
  const ticks = (low, high, count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) || 10 * power;
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(Number((i * step).toPrecision(12)));
    return found;
  };

  // ---- drawing -------------------------------------------------------------------------------------------------
  const svg = (name, attributes = {}, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const html = (name, className, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const MAIN = ["frontier", "baseline", "reference"];
  const shapes = {
    frontier: (x, y) => svg("circle", { cx: x, cy: y, r: 6, class: "frontier" }),
    baseline: (x, y) => svg("path", { d: `M${x} ${y - 7.5}L${x + 7.5} ${y}L${x} ${y + 7.5}L${x - 7.5} ${y}Z`, class: "baseline" }),
    reference: (x, y) => svg("path", { d: `M${x} ${y - 7}L${x + 7} ${y + 5.5}H${x - 7}Z`, class: "reference" }),
    dominated: (x, y) => svg("circle", { cx: x, cy: y, r: 4, class: "dominated" }),
    estimated: (x, y) => svg("circle", { cx: x, cy: y, r: 2.5, class: "estimated" }),
  };

  // The range shown: all main points; others may widen it by a third, and what lies further is drawn at the edge.
  const range = (list, key) => {
    const of = (some) => some.map((p) => p.values[key]);
    const main = of(list.filter((p) => MAIN.includes(p.status))), all = of(list);
    let low = Math.min(...main), high = Math.max(...main);
    const span = high - low || Math.abs(high) || 1;
    low = Math.max(Math.min(low, ...all), low - span / 3);
    high = Math.min(Math.max(high, ...all), high + span / 3);
    const pad = (high - low || span) * 0.07;
    const from = low - pad;
    return [low >= 0 && (from < 0 || (key !== "quality" && low < 0.35 * high)) ? 0 : from, high + pad];
  };

  const staircase = (list, x, y) => {
    const sign = (key) => (byKey[key].better === "higher" ? -1 : 1); // so that less is better on both
    const at = (p) => [sign(x) * p.values[x], sign(y) * p.values[y]];
    const sorted = [...list].sort((a, b) => at(a)[0] - at(b)[0] || at(a)[1] - at(b)[1]);
    let best = Infinity;
    return sorted.filter((p) => at(p)[1] < best && ((best = at(p)[1]), true));
  };

  let tip, selected = null;
  function draw() {
    const x = pick.x.value, y = pick.y.value;
    const width = Math.max(300, plot.clientWidth), narrow = width < 560;
    const height = narrow ? 340 : 430;
    const box = { left: narrow ? 50 : 62, right: width - (narrow ? 8 : 16), top: 34, bottom: height - 52 };
    const listed = points.filter((p) => p.values[x] !== undefined && p.values[y] !== undefined && (!show[p.status] || show[p.status].checked));
    const node = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "plot", role: "img", "aria-label": `${byKey[y].title} against ${byKey[x].title}` });
    plot.replaceChildren(node, tip);
    tip.hidden = true;
    if (!listed.length) { node.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing measured on both axes")); return; }

    // A reference that was measured on one axis alone is a line across the other.
    const lines = points.filter((p) => p.status === "reference" && (p.values[x] === undefined) !== (p.values[y] === undefined));
    const on = (key) => [...listed, ...lines.filter((p) => p.values[key] !== undefined)];
    const [x0, x1] = range(on(x), x), [y0, y1] = range(on(y), y);
    const clamp = (v, a, b) => Math.min(Math.max(v, a), b);
    const px = (v) => box.left + ((clamp(v, x0, x1) - x0) / (x1 - x0)) * (box.right - box.left);
    const py = (v) => box.bottom - ((clamp(v, y0, y1) - y0) / (y1 - y0)) * (box.bottom - box.top);

    for (const t of ticks(y0, y1, narrow ? 5 : 6)) {
      node.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: py(t), y2: py(t) }));
      node.append(svg("text", { x: box.left - 9, y: py(t) + 4, "text-anchor": "end" }, write(y, t)));
    }
    for (const t of ticks(x0, x1, narrow ? 3 : 7)) {
      node.append(svg("line", { class: "grid", x1: px(t), x2: px(t), y1: box.bottom, y2: box.bottom + 5 }));
      node.append(svg("text", { x: px(t), y: box.bottom + 19, "text-anchor": "middle" }, write(x, t)));
    }
    node.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    const titleOf = (key, arrows) => {
      const axis = byKey[key], text = svg("text", { class: "axis-title" });
      text.append(svg("tspan", {}, axis.title));
      const unit = narrow || !axis.unit ? "" : `, ${axis.unit}`;
      text.append(svg("tspan", { class: "unit" }, `${unit}  ${arrows[axis.better === "higher" ? 1 : 0]} better`));
      return text;
    };
    const yTitle = titleOf(y, ["↓", "↑"]), xTitle = titleOf(x, ["←", "→"]);
    yTitle.setAttribute("x", 0); yTitle.setAttribute("y", 14);
    xTitle.setAttribute("x", box.right); xTitle.setAttribute("y", height - 8); xTitle.setAttribute("text-anchor", "end");
    node.append(yTitle, xTitle);

    const taken = []; // rectangles that a label must not touch
    const goalTexts = [];
    for (const goal of goals) {
      if (goal.key === x && goal.limit > x0 && goal.limit < x1) {
        node.append(svg("line", { class: "goal", x1: px(goal.limit), x2: px(goal.limit), y1: box.top - 6, y2: box.bottom }));
        goalTexts.push([px(goal.limit) + 5, box.bottom - 8, "start", goal.text]);
      } else if (goal.key === y && goal.limit > y0 && goal.limit < y1) {
        node.append(svg("line", { class: "goal", x1: box.left, x2: box.right, y1: py(goal.limit), y2: py(goal.limit) }));
        goalTexts.push([box.right, py(goal.limit) + 14, "end", goal.text]);
      }
    }

    const worseX = byKey[x].better === "higher" ? box.left : box.right;
    const worseY = byKey[y].better === "higher" ? box.bottom : box.top;
    const shown = listed.filter((p) => ["frontier", "baseline", ...(series.checked ? ["dominated"] : [])].includes(p.status));
    const groups = series.checked ? runtimes.map((name) => shown.filter((p) => p.runtime === name)) : [shown];
    for (const group of groups) {
      const stairs = staircase(group, x, y);
      if (!stairs.length) continue;
      const corners = stairs.map((p) => [px(p.values[x]), py(p.values[y])]);
      const steps = corners.map(([cx, cy], i) => (i ? `H${cx}V${cy}` : `M${cx} ${cy}`)).join("") + `H${worseX}`;
      if (!series.checked) node.append(svg("path", { class: "area", d: `${steps}V${worseY}H${corners[0][0]}Z` }));
      node.append(svg("path", { class: series.checked ? `line ${colour(group[0])}` : "line", d: steps }));
    }
    for (const [gx, gy, anchor, text] of goalTexts) node.append(svg("text", { class: "goal-text", x: gx, y: gy, "text-anchor": anchor }, text));

    for (const p of lines) {
      const flat = p.values[y] !== undefined, at = flat ? py(p.values[y]) : px(p.values[x]);
      node.append(svg("line", flat ? { class: "across", x1: box.left, x2: box.right, y1: at, y2: at } : { class: "across", x1: at, x2: at, y1: box.top, y2: box.bottom }));
      const label = `${p.name} ${p.texts[flat ? y : x][0]}`;
      node.append(svg("text", { class: "label reference", x: flat ? box.left + 6 : at + 6, y: flat ? at - 6 : box.top + 12 }, label));
      if (flat) taken.push([box.left, at - 20, box.left + 8 * label.length, at]);
    }

    const order = ["estimated", "dominated", "reference", "frontier", "baseline"];
    const drawn = [...listed].sort((a, b) => order.indexOf(a.status) - order.indexOf(b.status));
    let outside = 0;
    for (const p of drawn) {
      const cx = px(p.values[x]), cy = py(p.values[y]);
      outside += p.values[x] > x1 || p.values[x] < x0 || p.values[y] > y1 || p.values[y] < y0;
      const group = svg("g", { class: series.checked && p.runtime ? `point ${colour(p)}` : "point", tabindex: MAIN.includes(p.status) ? 0 : -1, role: "button", "aria-label": describe(p) });
      group.append(svg("circle", { class: "hit", cx, cy, r: 13 }));
      if (p.best) group.append(svg("circle", { class: "ring", cx, cy, r: 11 }));
      group.append((shapes[p.status] || shapes.dominated)(cx, cy));
      const on = () => open(p, group, cx, cy), off = () => { if (selected !== group) close(group); };
      group.addEventListener("pointerenter", (e) => e.pointerType === "mouse" && on());
      group.addEventListener("pointerleave", (e) => e.pointerType === "mouse" && off());
      group.addEventListener("focus", on);
      group.addEventListener("blur", () => close(group));
      group.addEventListener("click", (e) => { e.stopPropagation(); selected = group; on(); });
      group.addEventListener("keydown", (e) => e.key === "Enter" && go(p));
      group.addEventListener("dblclick", () => go(p));
      node.append(group);
      if (MAIN.includes(p.status)) taken.push([cx - 9, cy - 9, cx + 9, cy + 9]);
    }

    // Labels: right, left, above, below; the best point and the references first; none where there is no room.
    const wanted = drawn.filter((p) => MAIN.includes(p.status)).sort((a, b) => (b.best - a.best) || MAIN.indexOf(b.status) - MAIN.indexOf(a.status));
    for (const p of wanted) {
      const cx = px(p.values[x]), cy = py(p.values[y]);
      const label = svg("text", { class: `label ${p.status}` }, p.label.length > 30 ? `${p.label.slice(0, 29)}…` : p.label);
      node.append(label);
      const w = label.getComputedTextLength(), h = 14;
      const dx = byKey[x].better === "higher" ? 1 : -1, dy = byKey[y].better === "higher" ? -1 : 1; // the free side
      const out = dx < 0 ? "end" : "start", back = dx < 0 ? "start" : "end";
      const beside = (side, anchor) => [cx + side * 13, cy + 4.5, anchor];
      const over = (side, way, anchor) => [cx + side * 7, way < 0 ? cy - 11 : cy + 21, anchor];
      const places = [
        over(dx, dy, out), beside(dx, out), over(0, dy, "middle"), over(-dx, dy, back), over(dx, -dy, out),
        over(0, -dy, "middle"), over(-dx, -dy, back), beside(-dx, back),
      ];
      const fit = places.find(([lx, ly, anchor]) => {
        const left = anchor === "start" ? lx : anchor === "end" ? lx - w : lx - w / 2;
        const rect = [left, ly - h + 3, left + w, ly + 3];
        const free = rect[0] >= box.left - 4 && rect[2] <= width && rect[1] >= 18 && rect[3] <= box.bottom &&
          taken.every((t) => rect[2] < t[0] || rect[0] > t[2] || rect[3] < t[1] || rect[1] > t[3] || (t[0] === cx - 9 && t[1] === cy - 9));
        if (free) taken.push(rect);
        return free;
      });
      if (!fit) { label.remove(); continue; }
      label.setAttribute("x", fit[0]); label.setAttribute("y", fit[1]); label.setAttribute("text-anchor", fit[2]);
    }
    const note = outside ? `${outside} outside this range, drawn at its edge` : "";
    byId("plot-note").textContent = note || (matchMedia("(hover: hover)").matches ? "hover over a point to see its recipe" : "tap a point to see its recipe");
  }

  const describe = (p) => `${p.name}, ${p.note}: ${axes.filter((a) => p.values[a.key] !== undefined).map((a) => `${a.title} ${p.texts[a.key].join(" ")}`).join(", ")}`;

  // ---- the card of one point -----------------------------------------------------------------------------------
  function open(p, group, cx, cy) {
    plot.querySelectorAll(".point.on").forEach((other) => other.classList.remove("on"));
    group.classList.add("on");
    const table = html("table");
    for (const axis of axes) {
      const [value, share] = p.texts[axis.key];
      if (value === "–") continue;
      const line = html("tr");
      line.append(html("td", "", axis.title), html("td", "", value), html("td", "", share));
      table.append(line);
    }
    const head = p.status === "frontier" ? `${p.label} · ${p.title}` : p.title;
    tip.replaceChildren(html("h3", "", head), html("p", "note", [p.best ? "best for the goals" : p.note, p.tier === "runtime" ? "" : p.tier, runtimes.length > 1 ? p.runtime : ""].filter(Boolean).join(" · ")), table);
    if (p.steps.length) {
      const list = html("ol");
      for (const [method, settings] of p.steps) {
        const item = html("li", "", `${method} `);
        item.append(html("span", "", settings));
        list.append(item);
      }
      tip.append(list);
    }
    if (p.reason) tip.append(html("p", "why", p.reason));
    tip.hidden = false;
    const room = plot.clientWidth, w = tip.offsetWidth, h = tip.offsetHeight;
    const right = cx + 18 + w <= room, left = cx - 18 - w >= 0;
    tip.style.left = `${right ? cx + 18 : left ? cx - 18 - w : Math.max(0, (room - w) / 2)}px`;
    tip.style.top = `${right || left ? Math.max(20, Math.min(cy - h / 2, plot.clientHeight - h + 60)) : cy + 20}px`;
  }
  function close(group) {
    group.classList.remove("on");
    if (selected === group) selected = null;
    tip.hidden = true;
  }
  function go(p) {
    const place = byId(p.name);
    if (!place) return;
    if (place.tagName === "DETAILS") place.open = true;
    place.scrollIntoView();
  }

  // ---- start ---------------------------------------------------------------------------------------------------
  tip = html("div", "tip");
  tip.hidden = true;
  document.querySelector(".controls").hidden = false;
  if (axes.length < 2) { plot.textContent = "Nothing was measured twice, so there is nothing to plot."; return; }
  for (const [side, first] of [["x", "latency"], ["y", "quality"]]) {
    for (const axis of axes) pick[side].append(new Option(axis.title, axis.key));
    pick[side].value = byKey[first] ? first : axes[side === "x" ? 1 : 0].key;
    pick[side].addEventListener("change", draw);
  }
  for (const [status, box] of Object.entries(show)) {
    box.addEventListener("change", draw);
    if (!points.some((p) => p.status === status)) box.parentElement.hidden = true;
  }
  const legend = byId("runtimes");
  for (const name of runtimes) {
    const entry = html("span", colour({ runtime: name }));
    entry.append(html("i"), name);
    legend.append(entry);
  }
  series.parentElement.hidden = runtimes.length < 2;
  series.addEventListener("change", () => { legend.hidden = !series.checked; draw(); });
  document.addEventListener("click", () => { const on = plot.querySelector(".point.on"); if (on) close(on); });
  document.addEventListener("keydown", (e) => { if (e.key === "Escape") { const on = plot.querySelector(".point.on"); if (on) close(on); } });
  document.querySelectorAll('a[href^="#"]').forEach((link) => link.addEventListener("click", () => {
    const place = byId(decodeURIComponent(link.hash.slice(1)));
    if (place && place.tagName === "DETAILS") place.open = true;
  }));
  document.querySelectorAll(".copy").forEach((button) => button.addEventListener("click", () => {
    const text = button.previousElementSibling.textContent;
    const done = () => { button.textContent = "copied"; setTimeout(() => (button.textContent = "copy"), 1500); };
    if (navigator.clipboard && isSecureContext) { navigator.clipboard.writeText(text).then(done); return; }
    const range = document.createRange(); // a page opened from a file: select, and copy the old way
    range.selectNodeContents(button.previousElementSibling);
    getSelection().removeAllRanges(); getSelection().addRange(range);
    if (document.execCommand("copy")) done();
  }));
  let last = 0;
  new ResizeObserver(() => { if (plot.clientWidth !== last) { last = plot.clientWidth; draw(); } }).observe(plot);
  draw();
})();
