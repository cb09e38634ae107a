"use strict";
// Makes the static page live: sortable tables, curves with smoothing and read-out, the cost picture, the choice of two runs.
(() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const N_COLOURS = 7;
  const colour = (g) => `var(--c${g % N_COLOURS})`;
  const dash = (g) => ["none", "6 4", "2 3", "8 3 2 3"][Math.floor(g / N_COLOURS) % 4];
  const NS = "http://www.w3.org/2000/svg";

  // ---- small tools

  function el(name, attributes = {}, ...children) {
    const e = document.createElement(name);
    for (const [k, v] of Object.entries(attributes)) {
      if (k.startsWith("on")) e.addEventListener(k.slice(2), v); else e.setAttribute(k, v);
    }
    e.append(...children);
    return e;
  }

  function svg(name, attributes = {}, text) {
    const e = document.createElementNS(NS, name);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    if (text !== undefined) e.textContent = text;
    return e;
  }

  function number(v) {
    if (v === null || v === undefined || !isFinite(v)) return "–";
    const a = Math.abs(v);
    if (a === 0) return "0";
    if (a < 1e-3 || a >= 1e6) return v.toExponential(2);
    return v.toFixed(Math.max(0, Math.min(4, 3 - Math.floor(Math.log10(a)))));
  }

  function prefixed(v, base, names) {
    let i = 0;
    while (Math.abs(v) >= base && i + 1 < names.length) { v /= base; i += 1; }
    return +v.toPrecision(3) + names[i];
  }
  const bytes = (v) => prefixed(v, 1024, [" B", " KiB", " MiB", " GiB", " TiB"]);
  const count = (v) => prefixed(v, 1000, ["", "k", "M", "B", "T"]);
  const tickText = (v) => Math.abs(v) >= 1e4 ? count(v) : v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(0) : String(+v.toPrecision(6));

  function linearTicks(low, high, n) {
    const raw = (high - low) / n, unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * unit).find((s) => s >= raw);
    const out = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-12) + 1e-12 * step; i += 1) out.push(i * step);
    return out;
  }

  function logTicks(low, high, base = 10) {
    const out = [], l = Math.log(low) / Math.log(base), h = Math.log(high) / Math.log(base);
    const every = Math.max(1, Math.ceil((h - l) / 7));
    for (let i = Math.ceil(l - 1e-9); i <= h + 1e-9; i += 1) if (i % every === 0) out.push(base ** i);
    return out.length >= 2 ? out : linearTicks(low, high, 4).filter((v) => v > 0);
  }

  // A map from data to pixels. Logarithmic where asked and possible.
  function scale(low, high, from, to, log, base) {
    if (low === high) { const d = Math.abs(low) * 0.1 || 1; low -= log ? 0 : d; high += d; }
    const f = log ? Math.log : (v) => v;
    const a = f(low), b = f(high);
    const s = (v) => from + (f(v) - a) / (b - a) * (to - from);
    s.inverse = (p) => { const v = a + (p - from) / (to - from) * (b - a); return log ? Math.exp(v) : v; };
    s.ticks = (n) => log ? logTicks(low, high, base) : linearTicks(low, high, n);
    return s;
  }

  // Moves rising positions apart by `gap`, inside low..high where there is room.
  function spread(items, gap, low, high) {
    items.sort((a, b) => a.y - b.y);
    let floor = low;
    for (const i of items) { i.y = Math.max(i.y, floor); floor = i.y + gap; }
    let ceiling = high;
    for (const i of [...items].reverse()) { i.y = Math.min(i.y, ceiling); ceiling = i.y - gap; }
  }

  const shorten = (s, n) => [...s].length <= n ? s : [...s].slice(0, n - 1).join("") + "…";

  function choose(options, value, change) {
    const groups = new Map();
    const select = el("select", { onchange: () => change(select.value) });
    for (const [v, text, group] of options) {
      const o = el("option", { value: v }, text);
      if (String(v) === String(value)) o.selected = true;
      if (!group) { select.append(o); continue; }
      if (!groups.has(group)) { const g = el("optgroup", { label: group }); groups.set(group, g); select.append(g); }
      groups.get(group).append(o);
    }
    return select;
  }

  function check(text, value, change) {
    const box = el("input", { type: "checkbox", onchange: () => change(box.checked) });
    box.checked = value;
    return el("label", {}, box, text);
  }

  function tip(event, head, rows) {
    const t = $("tip");
    const table = el("table");
    for (const [g, name, value] of rows) {
      const dot = el("i", { class: "dot", style: `--c:${colour(g)}` });
      table.append(el("tr", {}, el("td", {}, dot, name), el("td", { class: "num" }, value)));
    }
    t.replaceChildren(el("div", { class: "head" }, head), table);
    t.hidden = false;
    const w = t.offsetWidth, h = t.offsetHeight;
    const left = event.clientX + 18 + w > innerWidth ? event.clientX - w - 18 : event.clientX + 18;
    t.style.left = `${Math.max(4, left)}px`;
    t.style.top = `${Math.max(4, Math.min(innerHeight - h - 4, event.clientY - h / 2))}px`;
  }
  const hideTip = () => { $("tip").hidden = true; };

  // ---- theme

  const theme = $("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // ---- sortable tables

  for (const table of document.querySelectorAll("table.sortable")) {
    table.classList.add("live");
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((th, column) => {
      th.tabIndex = 0;
      const sort = () => {
        const up = th.getAttribute("aria-sort") !== "ascending";
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        th.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (row) => {
          const c = row.cells[column];
          return "v" in c.dataset && column > 0 ? (c.dataset.v === "" ? NaN : +c.dataset.v) : c.textContent;
        };
        const compare = (a, b) => {
          const x = value(a), y = value(b);
          if (typeof x === "string" || typeof y === "string") return String(x).localeCompare(String(y), undefined, { numeric: true }) * (up ? 1 : -1);
          if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
          return (x - y) * (up ? 1 : -1);
        };
        const body = table.tBodies[0];
        body.append(...[...body.rows].sort(compare));
      };
      th.addEventListener("click", sort);
      th.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); sort(); } });
    });
  }

  // ---- learning curves

  const state = { tag: D.metric, x: "step", band: "", smooth: 0, logX: false, logY: false, seeds: false, off: new Set() };

  // What the curves run over: the name of the axis, and the run's table from steps to it.
  const AXES = { step: ["step", null], tokens: ["training tokens", (r) => r.series["train/tokens"]], seconds: ["seconds since the start, evaluations and pauses included", (r) => r.seconds] };

  // 97.5% quantiles of Student's t by degrees of freedom, the factor of a 95% interval.
  const T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12, 2.11, 2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056, 2.052, 2.048, 2.045, 2.042];
  const BANDS = {
    ci: ["95% confidence interval of the mean", (ys, mean, sd) => { const h = (T[ys.length - 2] || 1.96) * sd / Math.sqrt(ys.length); return [mean - h, mean + h]; }],
    sd: ["± one standard deviation over seeds", (ys, mean, sd) => [mean - sd, mean + sd]],
    range: ["lowest to highest seed", (ys) => [Math.min(...ys), Math.max(...ys)]],
    none: ["none", null],
  };
  // An interval from two seeds is wider than any chart.
  state.band = Math.min(...D.groups.map((g) => g.n)) >= 3 ? "ci" : "sd";

  // Exponential moving average without the bias of its start; a gap (null) stays a gap.
  function smoothed(values, weight) {
    if (weight === 0) return values;
    let sum = 0, norm = 0;
    return values.map((v) => {
      if (v === null) return null;
      sum = sum * weight + v * (1 - weight);
      norm = norm * weight + (1 - weight);
      return sum / norm;
    });
  }

  function at(curve, x) {
    const [xs, ys] = curve;
    let low = 0, high = xs.length;
    while (low < high) { const mid = (low + high) >> 1; if (xs[mid] < x) low = mid + 1; else high = mid; }
    if (low === xs.length) return null;
    if (xs[low] === x) return ys[low];
    if (low === 0 || ys[low] === null || ys[low - 1] === null) return null;
    return ys[low - 1] + (ys[low] - ys[low - 1]) * (x - xs[low - 1]) / (xs[low] - xs[low - 1]);
  }

  function curves() {
    const out = [];
    D.groups.forEach((group, g) => {
      if (state.off.has(g)) return;
      const table = AXES[state.x][1];
      const members = D.runs.filter((r) => r.group === g && r.series[state.tag] && (!table || table(r))).map((r) => {
        const [steps, raw] = r.series[state.tag], ys = smoothed(raw, state.smooth);
        if (!table) return [steps, ys];
        const xs = steps.map((x) => at(table(r), x)), known = xs.map((x) => x !== null);
        return [xs.filter((_, i) => known[i]), ys.filter((_, i) => known[i])];
      });
      const xs = [...new Set(members.flatMap((m) => m[0]))].sort((a, b) => a - b);
      const edges = BANDS[state.band][1];
      const points = [];
      for (const x of xs) {
        const ys = members.map((m) => at(m, x)).filter((y) => y !== null && isFinite(y));
        if (ys.length === 0) continue;
        const mean = ys.reduce((a, b) => a + b, 0) / ys.length;
        const sd = ys.length > 1 ? Math.sqrt(ys.reduce((a, y) => a + (y - mean) ** 2, 0) / (ys.length - 1)) : 0;
        const [low, high] = ys.length > 1 && edges ? edges(ys, mean, sd) : [mean, mean];
        points.push({ x, mean, sd, low, high, n: ys.length });
      }
      if (points.length > 0) out.push({ g, name: group.name, points, members });
    });
    return out;
  }

  function drawCurves() {
    const W = 1000, H = 430, left = 64, right = D.groups.length <= 12 ? 200 : 24, top = 12, bottom = 42;
    const lines = curves();
    const figure = $("curve");
    const caption = el("figcaption");
    if (lines.length === 0) {
      caption.textContent = state.off.size ? "every configuration is switched off" : `no run has ${state.tag}`;
      figure.replaceChildren(caption);
      return;
    }
    const okX = (v) => !state.logX || v > 0, okY = (v) => !state.logY || v > 0;
    const all = lines.flatMap((l) => l.points.filter((p) => okX(p.x) && okY(p.mean)));
    if (all.length === 0) {
      caption.textContent = "nothing above zero to draw on a logarithmic axis";
      figure.replaceChildren(caption);
      return;
    }
    // The axis fits the means and their spread; a wider interval is cut at its border.
    const values = all.flatMap((p) => [Math.max(p.low, p.mean - 2 * p.sd), Math.min(p.high, p.mean + 2 * p.sd)]).filter(okY);
    if (state.seeds) for (const l of lines) for (const [, ys] of l.members) for (const y of ys) if (y !== null && okY(y)) values.push(y);
    let y0 = Infinity, y1 = -Infinity;
    for (const v of values) { if (v < y0) y0 = v; if (v > y1) y1 = v; }
    let x0 = Infinity, x1 = -Infinity;
    for (const p of all) { if (p.x < x0) x0 = p.x; if (p.x > x1) x1 = p.x; }
    if (state.logY) { const k = (y1 / y0) ** 0.04; y0 /= k; y1 *= k; } else { const k = 0.04 * (y1 - y0); y0 -= k; y1 += k; }
    const sx = scale(x0, x1, left, W - right, state.logX), sy = scale(y0, y1, H - bottom, top, state.logY);
    const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "chart", role: "img", "aria-label": `${state.tag} over ${AXES[state.x][0]}` });
    for (const t of sy.ticks(5)) {
      const y = sy(t);
      if (y < top - 1 || y > H - bottom + 1) continue;
      root.append(svg("line", { x1: left, x2: W - right, y1: y, y2: y, class: "grid" }), svg("text", { x: left - 8, y: y + 4, class: "tick", "text-anchor": "end" }, tickText(t)));
    }
    for (const t of sx.ticks(7)) root.append(svg("text", { x: sx(t), y: H - bottom + 19, class: "tick", "text-anchor": "middle" }, tickText(t)));
    root.append(svg("text", { x: (left + W - right) / 2, y: H - 3, class: "axis", "text-anchor": "middle" }, AXES[state.x][0]));
    const clip = svg("clipPath", { id: "plot" });
    clip.append(svg("rect", { x: left, y: top, width: W - left - right, height: H - top - bottom }));
    root.append(clip);
    const body = svg("g", { "clip-path": "url(#plot)" });
    root.append(body);
    const path = (points) => points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
    const labels = [];
    for (const l of lines) {
      const points = l.points.filter((p) => okX(p.x) && okY(p.mean));
      if (points.length === 0) continue;
      const group = svg("g", { "data-g": l.g });
      if (!state.seeds && points.some((p) => p.high > p.low)) {
        const floor = (v) => state.logY ? Math.max(v, y0 / 10) : v;
        const edge = [...points.map((p) => [sx(p.x), sy(p.high)]), ...[...points].reverse().map((p) => [sx(p.x), sy(floor(p.low))])];
        group.append(svg("polygon", { points: path(edge), fill: colour(l.g), class: "band" }));
      }
      if (state.seeds) {
        for (const [xs, ys] of l.members) {
          const p = xs.map((x, i) => [x, ys[i]]).filter(([x, y]) => y !== null && okX(x) && okY(y)).map(([x, y]) => [sx(x), sy(y)]);
          group.append(svg("polyline", { points: path(p), stroke: colour(l.g), class: "seed" }));
        }
      }
      group.append(svg("polyline", { points: path(points.map((p) => [sx(p.x), sy(p.mean)])), stroke: colour(l.g), "stroke-dasharray": dash(l.g), class: "line" }));
      if (points.length === 1) group.append(svg("circle", { cx: sx(points[0].x), cy: sy(points[0].mean), r: 4, fill: colour(l.g) }));
      body.append(group);
      labels.push({ y: sy(points[points.length - 1].mean), g: l.g, name: l.name });
    }
    if (labels.length <= 12) {
      spread(labels, 17, top + 6, H - bottom);
      for (const i of labels) {
        const t = svg("text", { x: W - right + 9, y: i.y + 4, class: "label", fill: colour(i.g), "data-g": i.g }, shorten(i.name, 26));
        root.append(t);
      }
    }
    const guide = svg("line", { y1: top, y2: H - bottom, class: "guide", visibility: "hidden" });
    root.append(guide);
    root.addEventListener("pointermove", (e) => {
      const box = root.getBoundingClientRect();
      const p = (e.clientX - box.left) / box.width * W;
      if (p < left - 10 || p > W - right + 10) { guide.setAttribute("visibility", "hidden"); hideTip(); return; }
      const x = sx.inverse(p);
      let near = null;
      for (const q of all) if (near === null || Math.abs(q.x - x) < Math.abs(near - x)) near = q.x;
      guide.setAttribute("x1", sx(near));
      guide.setAttribute("x2", sx(near));
      guide.setAttribute("visibility", "visible");
      const rows = [];
      for (const l of lines) {
        let best = null;
        for (const q of l.points) if (best === null || Math.abs(q.x - near) < Math.abs(best.x - near)) best = q;
        if (best) rows.push([l.g, l.name, number(best.mean) + (best.n > 1 ? ` ± ${number(best.sd)}` : ""), best.mean]);
      }
      rows.sort((a, b) => b[3] - a[3]);
      tip(e, `${AXES[state.x][0].split(" since")[0]} ${tickText(near)}`, rows);
    });
    root.addEventListener("pointerleave", () => { guide.setAttribute("visibility", "hidden"); hideTip(); });
    const notes = [state.tag];
    if (state.smooth > 0) notes.push(`smoothed by ${state.smooth}`);
    const banded = lines.some((l) => l.points.some((p) => p.high > p.low));
    if (state.seeds) notes.push("thin lines are single seeds");
    else if (banded) notes.push(`band: ${BANDS[state.band][0]}`);
    caption.textContent = notes.join(" · ");
    figure.replaceChildren(root, caption);
  }

  function highlight(g) {
    for (const e of $("curve").querySelectorAll("[data-g]")) e.classList.toggle("faint", g !== null && +e.dataset.g !== g);
  }

  if (D.tags.length > 0) {
    const family = (t) => t.includes("/") ? t.split("/")[0] : "other";
    const order = ["eval", "valid", "test", "train"];
    const place = (t) => { const i = order.indexOf(family(t)); return i < 0 ? order.length : i; };
    const tags = [...D.tags].sort((a, b) => place(a) - place(b) || a.localeCompare(b, undefined, { numeric: true }));
    if (!state.tag) state.tag = tags[0];
    const out = el("output", {}, "0");
    const slider = el("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, "aria-label": "smoothing", oninput: () => {
      state.smooth = +slider.value;
      out.textContent = slider.value;
      drawCurves();
    } });
    $("curve-controls").append(
      el("label", {}, "metric", choose(tags.map((t) => [t, t, family(t)]), state.tag, (v) => { state.tag = v; drawCurves(); })),
      el("label", {}, "over", choose(Object.keys(AXES).filter((k) => !AXES[k][1] || D.runs.some(AXES[k][1])).map((k) => [k, k === "step" ? "steps" : k]), state.x, (v) => { state.x = v; drawCurves(); })),
      el("label", {}, "band", choose(Object.entries(BANDS).map(([k, [text]]) => [k, text]), state.band, (v) => { state.band = v; drawCurves(); })),
      el("label", {}, "smoothing", slider, out),
      check("log axis", false, (v) => { state.logX = v; drawCurves(); }),
      check("log values", false, (v) => { state.logY = v; drawCurves(); }),
      check("single seeds", false, (v) => { state.seeds = v; drawCurves(); }),
    );
    $("curve-controls").hidden = false;
    D.groups.forEach((group, g) => {
      const line = svg("svg", { viewBox: "0 0 22 10" });
      line.append(svg("line", { x1: 0, x2: 22, y1: 5, y2: 5, stroke: colour(g), "stroke-width": 3, "stroke-dasharray": dash(g) }));
      const button = el("button", { type: "button", "aria-pressed": "true", title: "click to hide or show; double click for this one alone",
        onclick: () => { if (!state.off.delete(g)) state.off.add(g); press(); },
        ondblclick: () => { state.off = new Set(D.groups.keys()); state.off.delete(g); press(); },
        onpointerenter: () => highlight(g), onpointerleave: () => highlight(null) }, line, group.name);
      $("legend").append(button);
    });
    const press = () => {
      [...$("legend").children].forEach((b, g) => b.setAttribute("aria-pressed", String(!state.off.has(g))));
      drawCurves();
    };
    $("legend").hidden = D.groups.length < 2;
    drawCurves();
  }

  // ---- quality against cost

  const trade = { cost: 0, logX: false, logY: false };
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = `600 13.5px ${getComputedStyle(document.body).fontFamily}`;

  // Sizes that lie far apart are read on a logarithmic axis.
  const wide = (cost) => {
    const xs = cost.x.filter((x) => x !== null && x !== undefined);
    return Math.min(...xs) > 0 && Math.max(...xs) / Math.min(...xs) > 5;
  };

  function drawScatter() {
    const cost = D.costs[trade.cost];
    const W = 1000, H = 400, left = 64, right = 40, top = 16, bottom = 46;
    const points = D.groups.map((group, g) => ({ g, name: group.name, x: cost.x[g], y: group.mean, sd: group.sd || 0, front: cost.front[g] }))
      .filter((p) => p.x !== null && p.y !== null && p.x !== undefined && p.y !== undefined);
    const figure = $("scatter");
    if (points.length === 0) { figure.replaceChildren(el("figcaption", {}, "no configuration has both values")); return; }
    const xs = points.map((p) => p.x), low = Math.min(...xs), high = Math.max(...xs);
    const log = low > 0 && trade.logX;
    const ys = points.flatMap((p) => [p.y - p.sd, p.y + p.sd]);
    let y0 = Math.min(...ys), y1 = Math.max(...ys);
    const logY = trade.logY && y0 > 0;
    const pad = 0.08 * (y1 - y0 || Math.abs(y1) || 1);
    if (logY) { const f = (y1 / y0) ** 0.08; y0 /= f; y1 *= f; } else { y0 -= pad; y1 += pad; }
    const margin = log ? (high / low) ** 0.08 : 0.08 * (high - low || Math.abs(high) || 1);
    const sx = scale(log ? low / margin : Math.max(low - margin, low >= 0 ? Math.min(0, low) : -Infinity) , log ? high * margin : high + margin, left, W - right, log, cost.bytes ? 2 : 10);
    const sy = scale(y0, y1, H - bottom, top, logY);
    const format = cost.bytes ? bytes : count;
    const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "chart", role: "img", "aria-label": `${D.metric} against ${cost.name}` });
    for (const t of sy.ticks(5)) root.append(svg("line", { x1: left, x2: W - right, y1: sy(t), y2: sy(t), class: "grid" }), svg("text", { x: left - 8, y: sy(t) + 4, class: "tick", "text-anchor": "end" }, tickText(t)));
    for (const t of sx.ticks(6)) if (sx(t) >= left - 1) root.append(svg("text", { x: sx(t), y: H - bottom + 19, class: "tick", "text-anchor": "middle" }, format(t)));
    root.append(svg("text", { x: (left + W - right) / 2, y: H - 5, class: "axis", "text-anchor": "middle" }, `${cost.name} – ${cost.lower ? "less" : "more"} is better`));
    root.append(svg("text", { x: left, y: top - 4, class: "axis" }, `${D.metric}`));
    const front = points.filter((p) => p.front).sort((a, b) => a.x - b.x);
    if (front.length > 1) {
      root.append(svg("polyline", { points: front.map((p) => `${sx(p.x)},${sy(p.y)}`).join(" "), class: "front" }));
    }
    for (const l of cost.laws) {
      const at = [...Array(61).keys()].map((i) => l.from * (l.to / l.from) ** (i / 60));
      const line = at.map((x) => [x, l.e + l.a * x ** -l.b]).map(([x, y]) => `${sx(x)},${sy(y)}`).join(" ");
      root.append(svg("polyline", { points: line, class: "law" }));
    }
    const placed = [];
    for (const p of [...points].sort((a, b) => b.y - a.y)) {
      const x = sx(p.x), y = sy(p.y);
      if (p.sd > 0) root.append(svg("line", { x1: x, x2: x, y1: sy(p.y - p.sd), y2: sy(p.y + p.sd), stroke: colour(p.g), "stroke-width": 2 }));
      const mark = svg("circle", { cx: x, cy: y, r: 7, fill: p.front ? colour(p.g) : "var(--bg)", stroke: colour(p.g), "stroke-width": 2.5 });
      const rows = [[p.g, D.metric, number(p.y) + (p.sd ? ` ± ${number(p.sd)}` : "")], [p.g, cost.name, format(p.x)]];
      mark.addEventListener("pointermove", (e) => tip(e, p.name, rows));
      mark.addEventListener("pointerleave", hideTip);
      root.append(mark);
      // The label goes to the first place around the point where it meets no other label and no border.
      const text = shorten(p.name, 30), w = pen.measureText(text).width, h = 17;
      const spots = [[12, 5, "start"], [-12, 5, "end"], [0, -14, "middle"], [0, 25, "middle"], [12, -11, "start"], [12, 22, "start"], [-12, -11, "end"], [-12, 22, "end"], [12, 39, "start"], [-12, 39, "end"]];
      const boxOf = ([dx, dy, anchor]) => { const l = x + dx - (anchor === "end" ? w : anchor === "middle" ? w / 2 : 0); return [l, y + dy - 13, l + w, y + dy - 13 + h]; };
      const meets = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
      const dots = points.filter((q) => q !== p).map((q) => [sx(q.x) - 8, sy(q.y) - 8, sx(q.x) + 8, sy(q.y) + 8]);
      const free = spots.find((s) => { const b = boxOf(s); return b[0] >= left - 50 && b[2] <= W && b[1] >= 0 && b[3] <= H - bottom + 4 && ![...placed, ...dots].some((o) => meets(b, o)); }) || spots[0];
      placed.push(boxOf(free));
      root.append(svg("text", { x: x + free[0], y: y + free[1], class: "label", fill: colour(p.g), "text-anchor": free[2] }, text));
    }
    const fitted = cost.laws.length > 0 ? " · thin lines: scaling laws, see below" : "";
    figure.replaceChildren(root, el("figcaption", {}, `filled points, joined by the dashed line, are the Pareto front: no other configuration is both better and cheaper · whiskers: ± one standard deviation${fitted}`));
  }

  if (D.costs.length > 0 && D.metric && D.groups.length > 1) {
    const fitted = D.costs.findIndex((c) => c.laws.length > 0);
    const first = fitted >= 0 ? fitted : D.costs.findIndex((c) => c.bytes);
    trade.cost = Math.max(0, first);
    const logX = check("log cost", false, (v) => { trade.logX = v; drawScatter(); });
    const pick = (v) => {
      trade.cost = +v;
      trade.logX = wide(D.costs[trade.cost]);
      logX.querySelector("input").checked = trade.logX;
      drawScatter();
    };
    $("trade-controls").append(
      el("label", {}, "cost", choose(D.costs.map((c, i) => [i, c.name]), trade.cost, pick)),
      logX,
      check("log quality", false, (v) => { trade.logY = v; drawScatter(); }),
    );
    $("trade").hidden = false;
    pick(trade.cost);
  }

  // ---- two runs side by side

  // Longest common subsequence by lines, after equal ends are cut off; very long texts are compared line by line.
  function difference(a, b) {
    const x = a.split("\n"), y = b.split("\n");
    let head = 0;
    while (head < x.length && head < y.length && x[head] === y[head]) head += 1;
    let tail = 0;
    while (tail < x.length - head && tail < y.length - head && x[x.length - 1 - tail] === y[y.length - 1 - tail]) tail += 1;
    const m = x.slice(head, x.length - tail), n = y.slice(head, y.length - tail);
    const out = x.slice(0, head).map((t) => [" ", t]);
    if (m.length * n.length > 9e6) {
      m.forEach((t) => out.push(["-", t]));
      n.forEach((t) => out.push(["+", t]));
    } else {
      const w = n.length + 1, best = new Uint32Array((m.length + 1) * w);
      for (let i = m.length - 1; i >= 0; i -= 1) {
        for (let j = n.length - 1; j >= 0; j -= 1) {
          best[i * w + j] = m[i] === n[j] ? best[(i + 1) * w + j + 1] + 1 : Math.max(best[(i + 1) * w + j], best[i * w + j + 1]);
        }
      }
      let i = 0, j = 0;
      while (i < m.length || j < n.length) {
        if (i < m.length && j < n.length && m[i] === n[j]) { out.push([" ", m[i]]); i += 1; j += 1; }
        else if (j >= n.length || (i < m.length && best[(i + 1) * w + j] >= best[i * w + j + 1])) { out.push(["-", m[i]]); i += 1; }
        else { out.push(["+", n[j]]); j += 1; }
      }
    }
    return out.concat(x.slice(x.length - tail).map((t) => [" ", t]));
  }

  function showDifference(a, b) {
    const lines = difference(a, b);
    const near = lines.map(() => false);
    lines.forEach(([s], i) => { if (s !== " ") for (let k = Math.max(0, i - 3); k <= Math.min(lines.length - 1, i + 3); k += 1) near[k] = true; });
    if (!near.includes(true)) return el("p", {}, "Equal.");
    const pre = el("pre", { class: "diff" });
    let gap = false;
    lines.forEach(([s, text], i) => {
      if (!near[i]) { gap = true; return; }
      if (gap) pre.append(el("span", { class: "ctx" }, "…"));
      gap = false;
      pre.append(el("span", { class: s === "+" ? "add" : s === "-" ? "del" : "ctx" }, `${s} ${text}`));
    });
    return pre;
  }

  const graph = (r) => r.graph === null || r.graph === undefined ? null : D.graphs[r.graph];
  const kinds = [["config", "configuration", (r) => r.config], ["graph", "graph", graph]].filter(([, , of]) => D.runs.filter((r) => of(r)).length > 1);
  if (kinds.length > 0) {
    const firstOf = (g) => { const i = D.runs.findIndex((r) => r.group === g); return i < 0 ? 0 : i; };
    const two = { a: firstOf(0), b: firstOf(Math.min(1, D.groups.length - 1)), kind: kinds[0] };
    if (two.b === two.a && D.runs.length > 1) two.b = two.a === 0 ? 1 : 0;
    const show = () => {
      const x = two.kind[2](D.runs[two.a]), y = two.kind[2](D.runs[two.b]);
      $("config-diff").replaceChildren(x && y ? showDifference(x, y) : el("p", {}, "One of the two has none."));
    };
    const runs = D.runs.map((r, i) => [i, r.name]);
    const controls = $("config-controls");
    controls.append(
      el("label", {}, "− from", choose(runs, two.a, (v) => { two.a = +v; show(); })),
      el("label", {}, "+ to", choose(runs, two.b, (v) => { two.b = +v; show(); })),
    );
    if (kinds.length > 1) controls.append(el("label", {}, "of the", choose(kinds.map(([k, t]) => [k, t]), two.kind[0], (v) => { two.kind = kinds.find((k) => k[0] === v); show(); })));
    controls.hidden = false;
    show();
  }
})();
