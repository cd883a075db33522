// Draws the figures and the table of the page from the data elements in it. Everything from outside is shown as text:
// with textContent in the page, and escaped where Plotly would read markup.
(() => {
"use strict";

// --- data ---------------------------------------------------------------------------------------------------------

const bytes = (text) => Uint8Array.from(atob(text.slice(1)), (c) => c.charCodeAt(0)).buffer;
const decoders = {
  f: (text) => new Float32Array(bytes(text)),
  u: (text) => new Uint16Array(bytes(text)),
  i: (text) => new Int32Array(bytes(text)),
  c: (text) => new Float32Array(Uint32Array.from(new Uint16Array(bytes(text)), (half) => half << 16).buffer),
};
const numbers = (text) => decoders[text[0]](text);

const shared = JSON.parse(document.getElementById("shared").textContent);
const elements = [...document.querySelectorAll("script.data")];
const cache = [];

function loadPair(at) {
  if (!cache[at]) {
    const pair = JSON.parse(elements[at].textContent);
    for (const key in pair.whole) pair.whole[key] = numbers(pair.whole[key]);
    for (const groups of Object.values(pair.bands)) {
      for (const band of Object.values(groups)) for (const key in band) band[key] = numbers(band[key]);
    }
    for (const series of Object.values(pair.series)) {
      for (const key of ["start", "index", "value"]) series[key] = numbers(series[key]);
      series.bound = series.bound && numbers(series.bound);
      series.unresolved = new Set(series.unresolved);
    }
    cache[at] = pair;
  }
  return cache[at];
}

// The figures of one matrix in one measure: x is the rank, from 1, or k.
function rowsOf(pair, measure, matrix) {
  const s = pair.series[measure];
  const out = { x: [], y: [], bound: [], resolved: [] };
  if (!s) return out;
  const shift = measure.startsWith("subspace_overlap") ? 0 : 1;
  for (let j = s.start[matrix]; j < s.start[matrix + 1]; j++) {
    out.x.push(s.index[j] + shift);
    out.y.push(s.value[j]);
    out.bound.push(s.bound ? s.bound[j] : NaN);
    out.resolved.push(!s.unresolved.has(j));
  }
  return out;
}

function atRank(pair, measure, matrix, rank) {
  const rows = rowsOf(pair, measure, matrix);
  const at = rows.x.indexOf(rank);
  return at < 0 ? null : { value: rows.y[at], bound: rows.bound[at], resolved: rows.resolved[at] };
}

// --- words and colours --------------------------------------------------------------------------------------------

const escapes = { "&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;" };  // $…$ would be read as TeX
const safe = (text) => String(text).replace(/[&<>$]/g, (c) => escapes[c]);
const wrapped = (text) => text.match(/.{1,44}/gsu).map(safe).join("<br>");
const isNumber = (v) => v !== null && v !== undefined && Number.isFinite(v);
const short = (v, digits = 3) => {
  if (v === Infinity) return "∞";
  if (!isNumber(v)) return "–";
  return (v !== 0 && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5) ? v.toExponential(digits - 1)
    : String(Number(v.toPrecision(digits)))).replaceAll("-", "−");
};
const bounded = (bound) => (isNumber(bound) ? `error at most ${short(bound, 2)}` : "error: rounding only");
const blockName = (block) => (block === null ? "–" : String(block));
// What tells rows of a heat map apart that have no blocks.
const endOf = (name) => (name.length > 22 ? `…${safe(name.slice(-21))}` : safe(name));
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");
const coarse = matchMedia("(pointer: coarse)");

let theme;
function readTheme() {
  theme = {
    page: css("--page"), raised: css("--raised"), ink: css("--ink"), quiet: css("--quiet"), line: css("--line"),
    grid: css("--grid"), missing: css("--missing"), series: [...Array(8).keys()].map((i) => css(`--c${i}`)),
  };
}
const faded = (hex, alpha) => {
  const n = parseInt(hex.slice(1), 16);
  return `rgba(${n >> 16},${(n >> 8) & 255},${n & 255},${alpha})`;
};
const DASHES = ["solid", "dash", "dot", "dashdot"];
const DASH_LENGTHS = { solid: "", dash: "6 4", dot: "2 3", dashdot: "7 3 2 3" };

// --- state --------------------------------------------------------------------------------------------------------

const control = (id) => document.getElementById(id);
const state = { pair: 0, curves: "pairs", side: "left", axis: "linear", scale: "kept", rank: 1, role: "", matrix: 0, sort: null };
const current = () => loadPair(state.pair);
const SIDES = ["left", "right"];
const SIDE_TITLES = { left: "left, U (output side)", right: "right, V (input side)" };

// The curves of the figures that show medians: pairs, or the roles of the chosen pair.
function curves() {
  if (state.curves === "roles") {
    const groups = Object.keys(Object.values(current().bands)[0]).filter((group) => group !== "all");
    return groups.map((group, i) => ({
      name: group, pair: current(), group, color: theme.series[i % 8], dash: DASHES[Math.floor(i / 8) % 4],
      width: 2, band: groups.length <= 4,
    }));
  }
  const many = elements.length > 8;
  return elements.map((_, i) => {
    const chosen = i === state.pair;
    const plain = many && !chosen;
    return {
      name: elements.length === 1 ? "all matrices" : loadPair(i).label, pair: loadPair(i), group: "all",
      color: plain ? theme.missing : many ? theme.series[0] : theme.series[i % 8], dash: "solid",
      order: i, width: chosen ? 2.5 : plain ? 1 : 1.75, band: chosen || elements.length <= 3, above: chosen, plain,
    };
  }).sort((a, b) => (a.above ? 1 : 0) - (b.above ? 1 : 0));
}

// --- layout -------------------------------------------------------------------------------------------------------

// Panels side by side where there is room, else one below the other; each with its own axes and title.
function panels(width, titles, { height = 300, columns = 2, heights = null, left = 58, right = 12, lowest = false } = {}) {
  const across = width >= 620 ? Math.min(columns, titles.length) : 1;
  const down = Math.ceil(titles.length / across);
  const rowHeights = heights && across === 1 ? heights
    : Array.from({ length: down }, (_, r) => (heights ? Math.max(...heights.slice(r * across, (r + 1) * across)) : height));
  const head = 30, foot = 50, gap = 66, bar = coarse.matches ? 0 : 18;  // Plotly's buttons stand above the titles
  // Where only the lowest panels carry the title of the x axis, the others stand closer.
  const between = lowest ? 24 : foot;
  const inner = rowHeights.reduce((a, b) => a + b, 0) + (down - 1) * (head + between);
  const layout = {
    height: inner + head + bar + foot, width, autosize: false, margin: { l: left, r: right, t: head + bar, b: foot },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: theme.quiet, activecolor: theme.ink },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif", size: 12.5, color: theme.ink },
    hoverlabel: { bgcolor: theme.raised, bordercolor: theme.line, font: { color: theme.ink, size: 12.5 }, align: "left", namelength: -1 },
    dragmode: coarse.matches ? false : "zoom", annotations: [], shapes: [],
  };
  const plotWidth = width - left - right;
  let top = 0;
  titles.forEach((title, i) => {
    const row = Math.floor(i / across), column = i % across;
    if (column === 0 && row > 0) top += rowHeights[row - 1] + head + between;
    const id = i ? String(i + 1) : "";
    const panelWidth = (plotWidth - (across - 1) * gap) / across;
    const x0 = (column * (panelWidth + gap)) / plotWidth;
    const y1 = 1 - top / inner, y0 = Math.max(0, 1 - (top + rowHeights[row]) / inner);
    const axis = { gridcolor: theme.grid, linecolor: theme.line, tickcolor: theme.line, zeroline: false, ticks: "outside",
      ticklen: 4, showline: true, automargin: false, tickfont: { color: theme.quiet, size: 12 } };
    layout[`xaxis${id}`] = { ...axis, domain: [x0, Math.min(1, x0 + panelWidth / plotWidth)], anchor: `y${id}` };
    layout[`yaxis${id}`] = { ...axis, domain: [y0, y1], anchor: `x${id}` };
    layout.annotations.push({ text: `<b>${safe(title)}</b>`, xref: `x${id} domain`, yref: `y${id} domain`, x: 0, y: 1,
      yanchor: "bottom", xanchor: "left", yshift: 6, showarrow: false, font: { size: 13, color: theme.ink } });
  });
  const title = (text) => ({ text, standoff: 6, font: { size: 12.5, color: theme.quiet } });
  return {
    layout,
    on: (i) => ({ xaxis: `x${i ? i + 1 : ""}`, yaxis: `y${i ? i + 1 : ""}` }),
    set: (i, x, y) => {
      if (lowest && i < titles.length - across) x = { ...x, title: undefined };
      const id = i ? String(i + 1) : "";
      Object.assign(layout[`xaxis${id}`], x, x.title ? { title: title(x.title) } : {});
      Object.assign(layout[`yaxis${id}`], y, y.title ? { title: title(y.title) } : {});
    },
    empty: (i, text) => layout.annotations.push({ text: safe(text), xref: `x${i ? i + 1 : ""} domain`,
      yref: `y${i ? i + 1 : ""} domain`, x: 0.5, y: 0.5, showarrow: false, font: { color: theme.quiet, size: 13 } }),
  };
}

const rankAxis = (last, title = "rank i") => {
  if (state.axis === "log") {
    const top = Math.log10(Math.max(2, last)), pad = 0.03 * top;
    return { type: "log", title, range: [-pad, top + pad], dtick: 1, minor: { ticks: "outside", ticklen: 2 }, tickformat: "d" };
  }
  const span = Math.max(1, last - 1), pad = Math.max(0.03 * span, last < 8 ? 0.4 : 0);
  const step = [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10000].find((s) => span / s <= 7) || 20000;
  const ticks = [1];
  for (let t = step === 1 ? 2 : step; t <= last; t += step) if (t > 1) ticks.push(t);
  return { type: "linear", title, range: [1 - pad, last + pad], tickvals: ticks };
};
const unitAxis = (title) => ({ title, range: [-0.02, 1.03], tickvals: [0, 0.25, 0.5, 0.75, 1] });
// What is kept, from 0 to 1; or on demand what is lost, 1 minus it, on a logarithmic axis. The page holds float32 numbers,
// whose distance from 1 has a least step of 6e-8: nothing is drawn below LEAST.
const LEAST = 1e-7;
const lost = () => state.scale === "lost";
const shownAs = (v) => (lost() ? Math.max(LEAST, 1 - v) : v);
const keptAxis = (title) => (lost() ? { title: `1 − ${title}`, type: "log", range: [-7.15, 0.1], ...logTicks(-7.15, 0.1, 9) } : unitAxis(title));
const maximum = (values, start) => { let m = start; for (const v of values) if (isNumber(v) && v > m) m = v; return m; };

// Where all groups of a band run along the same x: median as a line, quartiles as a filled band around it.
function bandTraces(axes, curve, band, { color = curve.color, dash = curve.dash, fill = curve.band, scale = 1, x = null,
  y: shape = (v) => v, hover, key = curve.name } = {}) {
  const at = [...band.count.keys()].filter((i) => band.count[i] > 0);
  if (!at.length) return [];
  const xs = at.map((i) => (x ? x(band.x[i]) : band.x[i]));
  const y = (name) => at.map((i) => shape(band[name][i] * scale));
  const base = { type: "scatter", x: xs, ...axes, meta: key };
  const traces = [];
  if (fill) {
    const edge = { ...base, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
    traces.push({ ...edge, y: y("low") });
    traces.push({ ...edge, y: y("high"), fill: "tonexty", fillcolor: faded(color, dark.matches ? 0.22 : 0.16) });
  }
  traces.push({
    ...base, y: y("median"), mode: at.length === 1 ? "markers" : "lines", line: { color, width: curve.width, dash },
    marker: { color, size: 8 }, customdata: at.map((i) => [short(band.low[i] * scale, 4), short(band.high[i] * scale, 4), band.count[i]]),
    hovertemplate: `<b>${wrapped(curve.name)}</b><br>${hover}<br>quartiles %{customdata[0]} … %{customdata[1]}, `
      + "%{customdata[2]} matrices<extra></extra>",
    text: at.map((i) => short(band.median[i] * scale, 5)),
  });
  return traces;
}

function chanceTraces(axes, pair, side, last) {
  return pair.chance[side].filter(([, level]) => isNumber(level)).map(([d, level, count]) => ({
    type: "scatter", mode: "lines", x: Array.from({ length: 9 }, (_, i) => last ** (i / 8)),
    y: Array(9).fill(shownAs(level)), ...axes, meta: "chance", line: { color: theme.quiet, width: 1.25, dash: "dash" },
    hovertemplate: `chance ${short(level)} for d = ${d}<br>${count} matrices<extra></extra>`,
  }));
}

// Chance where several pairs are drawn: that of the pair with most matrices, as in the files beside the page.
const widest = () => (state.curves === "roles" ? current() : elements.map((_, i) => loadPair(i))
  .reduce((a, b) => (b.matrices.name.length > a.matrices.name.length ? b : a)));

const chanceKey = { name: "chance", still: true, dash: "dash", quiet: true };
const keyOf = (list) => [...list].sort((a, b) => (a.order ?? 0) - (b.order ?? 0)).map((c) => ({ name: c.name, color: c.color, dash: c.dash, plain: c.plain }));

// --- figures ------------------------------------------------------------------------------------------------------
// Each takes the width there is and returns {data, layout, key, label}.

const figures = {};

figures.alignment = (width) => {
  const list = curves();
  const p = panels(width, SIDES.map((side) => SIDE_TITLES[side]));
  const data = [];
  SIDES.forEach((side, i) => {
    const of = (c) => c.pair.bands[`alignment_${side}`][c.group];
    const last = list.reduce((m, c) => maximum(of(c).x, m), 1);
    data.push(...chanceTraces(p.on(i), widest(), side, last));
    for (const c of list) data.push(...bandTraces(p.on(i), c, of(c), { y: shownAs, hover: "rank %{x}: median %{text}" }));
    p.set(i, rankAxis(last), keptAxis("alignment |⟨base, tuned⟩|"));
    if (list.every((c) => !maximum(of(c).count, 0))) p.empty(i, "no resolved alignment");
  });
  const band = current().bands.alignment_left.all;
  const told = [1, 10, 100].filter((r) => [...band.x].includes(r))
    .map((r) => `${short(band.median[[...band.x].indexOf(r)])} at rank ${r}`);
  return { data, layout: p.layout, key: [...keyOf(list), chanceKey],
    label: `Median left alignment of ${current().label}: ${told.join(", ") || "none resolved"}` };
};

figures.overlap = (width) => {
  const list = curves();
  const p = panels(width, SIDES.map((side) => SIDE_TITLES[side]));
  const data = [];
  SIDES.forEach((side, i) => {
    const of = (c) => c.pair.bands[`subspace_overlap_${side}`][c.group];
    const last = list.reduce((m, c) => maximum(of(c).x, m), 1);
    for (const [d, , count] of widest().chance[side]) {
      const ks = Array.from({ length: 24 }, (_, j) => Math.min(last, d) ** (j / 23));
      data.push({ type: "scatter", mode: "lines", x: ks, y: ks.map((k) => shownAs(k / d)), ...p.on(i), meta: "chance",
        line: { color: theme.quiet, width: 1.25, dash: "dash" }, text: ks.map((k) => short(k / d)),
        hovertemplate: `chance k/d = %{text} for d = ${d}<br>${count} matrices<extra></extra>` });
    }
    for (const c of list) data.push(...bandTraces(p.on(i), c, of(c), { y: shownAs, hover: "k = %{x}: median %{text}" }));
    p.set(i, { ...powersOfTwo(last), title: "number of leading ranks k" }, keptAxis("overlap of subspaces"));
    if (list.every((c) => !maximum(of(c).count, 0))) p.empty(i, "no resolved overlap");
  });
  return { data, layout: p.layout, key: [...keyOf(list), { ...chanceKey, name: "chance k/d" }],
    label: `Overlap of the leading subspaces of base and ${current().label}` };
};

const powersOfTwo = (last) => {
  const ticks = [];
  for (let k = 1; k <= last; k *= 2) ticks.push(k);
  const top = Math.log10(Math.max(2, last));
  return { type: "log", tickvals: ticks, ticktext: ticks.map(String), range: [-0.04 * top, 1.04 * top] };
};

figures.heat = (width) => {
  const pair = current();
  const chosen = pair.panels.filter(([, role]) => state.role === "" || role === state.role);
  const narrow = width < 620;
  const columns = new Set(chosen.map(([stack]) => stack)).size > 1 || state.role === "" ? 2 : 1;
  const cell = Math.max(...chosen.map((c) => c[2].length)) > 24 ? 9 : 15;
  const heights = chosen.map(([, , members]) => Math.max(54, Math.min(560, members.length * cell)));
  const titles = chosen.map(([stack, role]) => (stack ? `${stack}: ${role}` : role));
  const unnumbered = chosen.every(([, , members]) => members.every((m) => pair.matrices.block[m] === null));
  const p = panels(width, titles, { heights, columns: unnumbered ? 1 : columns, lowest: true, left: unnumbered ? 165 : 46, right: narrow ? 12 : 78 });
  const measure = `alignment_${state.side}`;
  const data = [];
  let scale = !narrow;
  chosen.forEach(([, , members], i) => {
    const rows = members.map((m) => rowsOf(pair, measure, m));
    const x = [...new Set(rows.flatMap((r) => r.x))].sort((a, b) => a - b);
    const column = new Map(x.map((rank, j) => [rank, j]));
    const z = [], custom = [];
    rows.forEach((r, k) => {
      const zs = Array(x.length).fill(null), cs = Array(x.length).fill("");
      r.x.forEach((rank, j) => {
        if (r.resolved[j]) zs[column.get(rank)] = r.y[j];
        cs[column.get(rank)] = bounded(r.bound[j]);
      });
      z.push(zs);
      custom.push(cs);
    });
    const names = members.map((m) => Array(x.length).fill(wrapped(pair.matrices.name[m])));
    const ys = members.map((_, k) => k);
    const every = Math.ceil(members.length / Math.max(1, Math.floor(heights[i] / 15)));
    const shown = ys.filter((k) => k % every === 0);
    if (x.length) {
      data.push({ type: "heatmap", x, y: ys, z, text: names, customdata: custom, ...p.on(i), zmin: 0, zmax: 1, colorscale: "Cividis",
        hoverongaps: false, showscale: scale, ygap: members.length <= 24 ? 1 : 0, meta: titles[i],
        colorbar: { title: { text: "alignment<br>", font: { size: 12, color: theme.quiet } }, thickness: 12, len: 240, lenmode: "pixels",
          y: 1, yanchor: "top", outlinewidth: 0, tickfont: { color: theme.quiet } },
        hovertemplate: "<b>%{text}</b><br>rank %{x}: %{z:.4f}<br>%{customdata}<extra></extra>" });
      scale = false;
    } else p.empty(i, "no alignment (a matrix of zeros)");
    p.layout.shapes.push({ type: "rect", xref: `${p.on(i).xaxis} domain`, yref: `${p.on(i).yaxis} domain`, x0: 0, x1: 1, y0: 0, y1: 1,
      fillcolor: theme.missing, line: { width: 0 }, layer: "below" });
    const last = x.length ? x[x.length - 1] : 1;
    const axis = rankAxis(last);
    if (axis.type === "linear") axis.range = [0.5, last + 0.5];
    else axis.range = [Math.log10(0.75), Math.log10(last + 0.5)];
    p.set(i, { ...axis, showgrid: false },
      { title: unnumbered ? undefined : "block", range: [members.length - 0.5, -0.5], tickvals: shown, showgrid: false,
        ticktext: shown.map((k) => (unnumbered ? endOf(pair.matrices.name[members[k]]) : blockName(pair.matrices.block[members[k]]))) });
  });
  return { data, layout: p.layout, key: narrow ? [{ name: "alignment 0", ramp: true, end: "1" }] : [],
    label: `Heat maps of ${state.side} alignment by block and rank: ${titles.join(", ")}` };
};

figures.change = (width) => {
  const list = curves();
  const p = panels(width, ["median and quartiles over matrices"], { columns: 1, height: 320, left: 66 });
  const data = [];
  for (const c of list) {
    data.push(...bandTraces(p.on(0), c, c.pair.bands.singular_value_change[c.group],
      { scale: 100, x: (q) => q * 100, hover: "%{x:.1f} % of the spectrum: median %{y:.4g} %" }));
  }
  // The quartiles of the last ranks can be far larger than everything else: they may leave the frame.
  let low = 0, high = 0;
  for (const c of list) {
    const band = c.pair.bands.singular_value_change[c.group];
    band.x.forEach((q, i) => {
      const found = [band.median[i], ...(c.band && q < 0.95 ? [band.low[i], band.high[i]] : [])].filter(isNumber);
      low = Math.min(low, ...found);
      high = Math.max(high, ...found);
    });
  }
  const pad = 0.08 * (high - low) || 0.01;
  if (!data.length) p.empty(0, "no relative change (zero singular values)");
  p.set(0, { title: "relative rank (% of the spectrum, largest first)", range: [0, 100] },
    { title: "change of singular value (%)", range: [100 * (low - pad), 100 * (high + pad)], zeroline: true, zerolinecolor: theme.quiet, zerolinewidth: 1 });
  return { data, layout: p.layout, key: keyOf(list), label: `Relative change of singular values of ${current().label}` };
};

figures.variance = (width) => {
  const list = curves();
  const p = panels(width, ["by relative rank", "by number of ranks"]);
  const data = [];
  let last = 1;
  ["", "_leading"].forEach((suffix, i) => {
    for (const c of list) {
      for (const which of ["base", "tuned"]) {
        const band = c.pair.bands[`explained_variance_${which}${suffix}`][c.group];
        if (i) last = maximum(band.x, last);
        data.push(...bandTraces(p.on(i), c, band, {
          dash: which === "base" ? "dot" : "solid", fill: which === "tuned" && c.band, scale: 100,
          x: i ? null : (q) => q * 100,
          hover: `${which}, ${i ? "leading %{x} ranks" : "leading %{x:.1f} %"}: median %{y:.2f} %`,
        }));
      }
    }
  });
  const share = { title: "explained variance (% of ‖W‖²)", range: [-2, 103], tickvals: [0, 25, 50, 75, 100] };
  p.set(0, { title: "relative rank (%)", range: [0, 100] }, share);
  p.set(1, rankAxis(last, "number of ranks"), share);
  return { data, layout: p.layout, key: [...keyOf(list.map((c) => ({ ...c, dash: "solid" }))),
    { name: "base", still: true, dash: "dot", quiet: true }], label: `Explained variance of base and ${current().label}` };
};

figures.scatter = (width) => {
  const pair = current();
  const n = pair.matrices.name.length;
  const points = [];
  let identical = 0;
  for (let m = 0; m < n; m++) {
    const ratio = atRank(pair, "singular_value_ratio", m, state.rank);
    const aligned = atRank(pair, `alignment_${state.side}`, m, state.rank);
    if (!ratio || !aligned || !aligned.resolved || !isNumber(ratio.value)) continue;
    if (ratio.value === 0) { identical++; continue; }
    const update = atRank(pair, `update_alignment_${state.side}`, m, state.rank);
    points.push({ m, x: ratio.value, y: aligned.value, bound: aligned.bound, color: update && update.resolved ? update.value : NaN });
  }
  const narrow = width < 620;
  const p = panels(width, [`rank ${state.rank}, ${SIDE_TITLES[state.side]}`], { columns: 1, height: 360, right: narrow ? 12 : 92 });
  const trace = (part, marker) => ({
    type: "scatter", mode: "markers", ...p.on(0), x: part.map((q) => q.x), y: part.map((q) => shownAs(q.y)), text: part.map((q) => wrapped(pair.matrices.name[q.m])),
    customdata: part.map((q) => [q.m, bounded(q.bound), short(q.color), short(q.y, 5)]), marker: { size: 11, line: { color: theme.ink, width: 1 }, ...marker },
    hovertemplate: `<b>%{text}</b><br>rank ${state.rank}: alignment %{customdata[3]} (%{customdata[1]})<br>ratio S(Δ)/S(base) %{x:.4g}`
      + "<br>update alignment %{customdata[2]}<extra></extra>",
  });
  const known = points.filter((q) => isNumber(q.color)), unknown = points.filter((q) => !isNumber(q.color));
  const data = [];
  if (known.length) {
    data.push(trace(known, { color: known.map((q) => q.color), cmin: 0, cmax: 1, colorscale: "Cividis", showscale: !narrow,
      colorbar: { title: { text: "update<br>alignment<br>", font: { size: 12, color: theme.quiet } }, thickness: 12, len: 260, lenmode: "pixels", outlinewidth: 0,
        tickfont: { color: theme.quiet } } }));
  }
  if (unknown.length) data.push(trace(unknown, { color: "rgba(0,0,0,0)", symbol: "circle-open" }));
  const selected = points.find((q) => q.m === state.matrix);
  if (selected) {
    data.push({ type: "scatter", mode: "markers", ...p.on(0), x: [selected.x], y: [shownAs(selected.y)], hoverinfo: "skip", meta: "selected",
      marker: { size: 20, symbol: "circle-open", color: theme.series[1], line: { width: 2.5 } } });
  }
  if (!points.length) p.empty(0, identical ? "no update: the matrices are equal" : `no resolved figure at rank ${state.rank}`);
  let low = Math.min(...points.map((q) => Math.log10(q.x))), high = Math.max(...points.map((q) => Math.log10(q.x)));
  if (!points.length) { low = -1; high = 0; }
  const pad = Math.max(0.1, 0.06 * (high - low));
  p.set(0, { title: narrow ? "size of the update, S<sub>i</sub>(Δ) / S<sub>i</sub>(base)" : "size of the update at this rank, S<sub>i</sub>(Δ) / S<sub>i</sub>(base), logarithmic",
    type: "log", range: [low - pad, high + pad], ...logTicks(low - pad, high + pad, narrow ? 5 : 9) }, keptAxis("alignment |⟨base, tuned⟩|"));
  const key = [{ name: "selected matrix", still: true, color: theme.series[1], ring: true }];
  if (narrow && known.length) key.push({ name: "update alignment 0", ramp: true, end: "1" });
  if (unknown.length) key.push({ name: "update alignment unresolved", still: true, ring: true, quiet: true });
  if (identical) key.push({ name: `${identical} equal matrices not drawn`, still: true, none: true });
  return { data, layout: p.layout, key, label: `${points.length} matrices at rank ${state.rank}: size of the update against alignment` };
};

figures.equal = (width) => {
  const pair = current(), w = pair.whole, side = state.side;
  const p = panels(width, [`vectors: ${SIDE_TITLES[side]}`], { columns: 1, height: 360, left: 66 });
  const marks = [["change of values (RSD)", "rsd", "circle", theme.series[0]], ["rotation of vectors", `turned_${side}`, "square-open", theme.series[1]],
    ["rotation by noise of this size", `turned_null_${side}`, "x-thin-open", theme.quiet]];
  const data = [], key = [];
  let low = 0, high = -6;
  for (const [name, of, symbol, color] of marks) {
    const at = pair.matrices.name.map((_, m) => m).filter((m) => [w.relative_update[m], w[of][m]].every((v) => v > 0 && v < Infinity));
    if (!at.length) continue;
    for (const m of at) for (const v of [w.relative_update[m], w[of][m]]) { low = Math.min(low, Math.log10(v)); high = Math.max(high, Math.log10(v)); }
    data.push({ type: "scatter", mode: "markers", ...p.on(0), meta: name, x: at.map((m) => w.relative_update[m]), y: at.map((m) => w[of][m]),
      text: at.map((m) => wrapped(pair.matrices.name[m])), marker: { symbol, color, size: 8, line: { color, width: 1.5 } },
      hovertemplate: `<b>%{text}</b><br>‖Δ‖/‖W‖ %{x:.3g}<br>${name} %{y:.3g}<extra></extra>` });
    key.push({ name, color, ring: true });
  }
  if (!data.length) { p.empty(0, "no update: the matrices are equal"); low = -1; high = 0; }
  const pad = Math.max(0.1, 0.05 * (high - low));
  const range = [low - pad, high + pad];
  data.unshift({ type: "scatter", mode: "lines", ...p.on(0), x: range.map((v) => 10 ** v), y: range.map((v) => 10 ** v), hoverinfo: "skip", meta: "equal",
    line: { color: theme.quiet, width: 1.25, dash: "dash" } });
  p.set(0, { type: "log", title: "size of the update, ‖Δ‖/‖W‖", range, ...logTicks(...range, width < 620 ? 5 : 9) }, { type: "log", title: "change", range, ...logTicks(...range, 7) });
  return { data, layout: p.layout, key: [...key, { name: "equal", still: true, dash: "dash", quiet: true }], label: `Changes of values and vectors against the size of the update in ${pair.label}` };
};

figures.nulls = (width) => {
  const pair = current();
  const p = panels(width, SIDES.map((side) => SIDE_TITLES[side]));
  const group = { pair, group: "all", width: 2, band: false };
  const lines = [["observed", "alignment", theme.series[0], "solid"], ["noise of the same size", "null_alignment_gaussian", theme.series[1], "dash"],
    ["predicted from the update", "predicted_alignment", theme.series[2], "dot"], ["rounding alone", "null_alignment_rounding", theme.series[3], "dashdot"]];
  const data = [], drawnLines = new Set();
  SIDES.forEach((side, i) => {
    let last = 1;
    for (const [name, measure, color, dash] of lines) {
      const bands = pair.bands[`${measure}_${side}`];
      if (!bands) continue;
      drawnLines.add(name);
      last = maximum(bands.all.x, last);
      data.push(...bandTraces(p.on(i), { ...group, name, color, dash }, bands.all, { y: shownAs, hover: "rank %{x}: median %{text}" }));
    }
    data.unshift(...chanceTraces(p.on(i), pair, side, last));
    p.set(i, rankAxis(last), keptAxis("alignment |⟨base, tuned⟩|"));
    if (drawnLines.size < 2) p.empty(i, "no nulls were taken for this pair");
  });
  return { data, layout: p.layout, key: [...lines.filter(([name]) => drawnLines.has(name)).map(([name, , color, dash]) => ({ name, color, dash })), chanceKey],
    label: `Alignment of ${pair.label} beside that under noise of the same size` };
};

figures.heads = (width) => {
  const pair = current(), t = pair.matrices;
  const has = (m) => rowsOf(pair, "head_rotation", m).x.length > 0;
  const chosen = pair.panels.map(([stack, role, members]) => [stack, role, members.filter(has)]).filter(([, , members]) => members.length);
  const narrow = width < 620;
  const titles = chosen.length ? chosen.map(([stack, role]) => (stack ? `${stack}: ${role}` : role)) : ["heads"];
  const heights = chosen.length ? chosen.map(([, , members]) => Math.max(70, Math.min(420, members.length * 18))) : [120];
  const p = panels(width, titles, { heights, columns: 2, lowest: true, left: 46, right: narrow ? 12 : 78 });
  if (!chosen.length) p.empty(0, "no heads are known in this pair");
  const data = [];
  let top = 0;
  for (const [, , members] of chosen) for (const m of members) top = maximum(rowsOf(pair, "head_rotation", m).y, top);
  chosen.forEach(([, , members], i) => {
    const z = members.map((m) => rowsOf(pair, "head_rotation", m).y);
    const text = members.map((m) => {
      const share = rowsOf(pair, "head_update_share", m).y, size = rowsOf(pair, "head_relative_update", m).y;
      const left = rowsOf(pair, "head_alignment_left", m).y, right = rowsOf(pair, "head_alignment_right", m).y;
      return left.map((v, h) => `<b>${wrapped(t.name[m])}</b><br>alignment ${short(v)} left, ${short(right[h])} right<br>`
        + `‖Δ‖/‖W‖ ${short(size[h])}, ${isNumber(share[h]) ? short(100 * share[h]) : "–"} % of the update`);
    });
    const most = Math.max(...z.map((row) => row.length));
    data.push({ type: "heatmap", x: Array.from({ length: most }, (_, h) => h + 1), y: members.map((_, k) => k), z, text, ...p.on(i), meta: titles[i],
      colorscale: "Cividis", zmin: 0, zmax: top || 1, xgap: 1, ygap: 1, showscale: i === 0 && !narrow,
      colorbar: { title: { text: "rotation<br>", font: { size: 12, color: theme.quiet } }, thickness: 12, len: 200, lenmode: "pixels", y: 1, yanchor: "top", outlinewidth: 0, tickfont: { color: theme.quiet } },
      hovertemplate: "%{text}<br>head %{x}: rotation %{z:.4f}<extra></extra>" });
    const every = Math.ceil(members.length / Math.max(1, Math.floor(heights[i] / 15)));
    const shown = members.map((_, k) => k).filter((k) => k % every === 0);
    p.set(i, { title: "head", showgrid: false, range: [0.5, most + 0.5], dtick: most > 16 ? 4 : 1 }, { title: "block", showgrid: false, range: [members.length - 0.5, -0.5], tickvals: shown,
      ticktext: shown.map((k) => blockName(t.block[members[k]])) });
  });
  return { data, layout: p.layout, key: narrow && chosen.length ? [{ name: "rotation 0", ramp: true, end: short(top) }] : [], label: `Rotation of each attention head of ${pair.label}, by block` };
};

figures.own = (width) => {
  const pair = current();
  const names = pair.own.length ? pair.own : ["own measures"];
  const p = panels(width, names, { left: 70 });
  const data = [];
  names.forEach((name, i) => {
    const bands = pair.bands[name];
    if (!bands) { p.empty(i, "no rows"); return; }
    data.push(...bandTraces(p.on(i), { name, pair, group: "all", width: 2, band: true, color: theme.series[i % 8], dash: "solid" }, bands.all,
      { hover: "rank %{x}: median %{y:.4g}" }));
    p.set(i, rankAxis(maximum(bands.all.x, 1)), { title: name });
  });
  return { data, layout: p.layout, key: [], label: `Own measures by rank: ${names.join(", ")}` };
};

figures.spectra = (width) => {
  const pair = current();
  const p = panels(width, [pair.matrices.name[state.matrix].length > (width < 620 ? 40 : 90) ? "singular values" : pair.matrices.name[state.matrix]],
    { columns: 1, height: 320, left: 72 });
  const key = [], data = [];
  let last = 1;
  ["base", "tuned", "delta"].forEach((which, i) => {
    const rows = rowsOf(pair, `singular_value_${which}`, state.matrix);
    last = maximum(rows.x, last);
    const name = { base: "base", tuned: "tuned", delta: "update Δ = tuned − base" }[which];
    const style = { color: [theme.series[0], theme.series[1], theme.series[6]][i], dash: ["solid", "dash", "dot"][i] };
    key.push({ name, ...style });
    const zero = rows.y.every((v) => v === 0);
    if (zero) { key[i].name += ": zero"; key[i].still = true; return; }
    const change = rowsOf(pair, "singular_value_change", state.matrix), ratio = rowsOf(pair, "singular_value_ratio", state.matrix);
    const beside = rows.x.map((_, j) => (which === "base" ? "" : which === "tuned" ? `change ${short(change.y[j] * 100)} %<br>` : `ratio to base ${short(ratio.y[j])}<br>`));
    data.push({ type: "scatter", mode: rows.x.length < 40 ? "lines+markers" : "lines", x: rows.x, y: rows.y.map((v) => (v > 0 ? v : null)), ...p.on(0), meta: name,
      line: { width: which === "tuned" ? 2.25 : 2, ...style }, marker: { size: 5, color: style.color },
      customdata: rows.x.map((_, j) => beside[j] + bounded(rows.bound[j])),
      hovertemplate: `<b>${name}</b><br>rank %{x}: %{y:.5g}<br>%{customdata}<extra></extra>` });
  });
  if (!data.length) p.empty(0, "all singular values are zero");
  p.set(0, rankAxis(last), { title: "singular value (unit of the weights)", type: "log", ...logSpan(data) });
  return { data, layout: p.layout, key, label: `Singular values of ${pair.matrices.name[state.matrix]} in base, tuned and their difference` };
};

// Ticks of a logarithmic axis between two powers of ten, written out: 1, 2, 5 in each decade, or fewer.
function logTicks(low, high, most) {
  const within = (values) => values.filter((v) => Math.log10(v) >= low && Math.log10(v) <= high);
  const decades = Array.from({ length: Math.ceil(high) - Math.floor(low) + 1 }, (_, i) => Math.floor(low) + i);
  const choices = [[1, 2, 5], [1, 3], [1]].map((steps) => within(decades.flatMap((e) => steps.map((s) => s * 10 ** e))));
  const every = Math.max(1, Math.ceil(decades.length / most));
  choices.push(within(decades.filter((e) => e % every === 0).map((e) => 10 ** e)));
  const tickvals = choices.find((c) => c.length <= most) || choices[3];
  const exponent = (e) => `10<sup>${String(e).replace("-", "−")}</sup>`;
  const ticktext = tickvals.map((v) => (v >= 1e-3 && v < 1e5 ? String(Number(v.toPrecision(3)))
    : Number.isInteger(Math.round(1e6 * Math.log10(v)) / 1e6) ? exponent(Math.round(Math.log10(v))) : short(v, 1)));
  return { tickvals, ticktext };
}

const logSpan = (data) => {
  let low = Infinity, high = -Infinity;
  for (const t of data) for (const v of t.y) if (v > 0) { low = Math.min(low, Math.log10(v)); high = Math.max(high, Math.log10(v)); }
  if (low > high) return { range: [-1, 1] };
  const pad = Math.max(0.08, 0.05 * (high - low));
  return { range: [low - pad, high + pad], ...logTicks(low - pad, high + pad, 7) };
};

figures.single = (width) => {
  const pair = current();
  const p = panels(width, SIDES.map((side) => SIDE_TITLES[side]));
  const data = [];
  const kinds = [["alignment", "base and tuned", theme.series[0], "solid"], ["update_alignment", "update and base", theme.series[1], "dot"]];
  SIDES.forEach((side, i) => {
    let last = 1;
    for (const [kind, name, color, dash] of kinds) {
      const rows = rowsOf(pair, `${kind}_${side}`, state.matrix);
      last = maximum(rows.x, last);
      if (!rows.x.length) continue;
      const open = rows.resolved.some((r) => !r) || rows.x.length < 40;
      const visible = rows.bound.some((b) => b > 0.002);
      data.push({ type: "scatter", mode: open ? "lines+markers" : "lines", x: rows.x, y: rows.y, ...p.on(i), meta: name,
        line: { color, dash, width: kind === "alignment" ? 2 : 1.5 },
        marker: { color, size: rows.resolved.map((r) => (r ? (rows.x.length < 40 ? 5 : 0.1) : 7)), symbol: rows.resolved.map((r) => (r ? "circle" : "circle-open")) },
        error_y: visible ? { type: "data", array: rows.y.map((y, j) => Math.min(rows.bound[j], 1 - y)), arrayminus: rows.y.map((y, j) => Math.min(rows.bound[j], y)),
          symmetric: false, color: faded(color, 0.55), thickness: 1, width: 2 } : undefined,
        customdata: rows.x.map((_, j) => bounded(rows.bound[j]) + (rows.resolved[j] ? "" : "<br>unresolved")),
        hovertemplate: `<b>${name}</b><br>rank %{x}: %{y:.5f}<br>%{customdata}<extra></extra>` });
    }
    const d = pair.matrices[side === "left" ? "out" : "in"][state.matrix];
    const level = pair.whole[`chance_alignment_${side}`][state.matrix];
    data.unshift({ type: "scatter", mode: "lines", x: [1, Math.sqrt(last), last], y: [level, level, level], ...p.on(i), meta: "chance",
      line: { color: theme.quiet, width: 1.25, dash: "dash" }, hovertemplate: `chance ${short(level)} for d = ${d}<extra></extra>` });
    if (data.length === i + 1) p.empty(i, "no singular vectors: a matrix of zeros");
    p.set(i, rankAxis(last), unitAxis("alignment"));
  });
  return { data, layout: p.layout, key: [...kinds.map(([, name, color, dash]) => ({ name, color, dash })), chanceKey],
    label: `Alignment by rank of ${pair.matrices.name[state.matrix]}` };
};

figures.angles = (width) => {
  const pair = current();
  const p = panels(width, ["overlap of the leading k", "principal angles"]);
  const data = [], key = [];
  let last = 1, most = 1;
  SIDES.forEach((side, i) => {
    const color = theme.series[i === 0 ? 0 : 1], dash = i === 0 ? "solid" : "dash";
    key.push({ name: SIDE_TITLES[side], color, dash });
    const line = (rows, panel, scale, hover) => data.push({ type: "scatter", mode: "lines+markers", x: rows.x, y: rows.y.map((y) => y * scale), ...p.on(panel),
      meta: SIDE_TITLES[side], line: { color, dash, width: 2 },
      marker: { color, size: 7, symbol: rows.resolved.map((r) => (i === 0 ? "circle" : "square") + (r ? "" : "-open")) },
      customdata: rows.x.map((_, j) => bounded(rows.bound[j] * scale) + (panel ? "°" : "") + (rows.resolved[j] ? "" : "<br>unresolved")),
      hovertemplate: `<b>${SIDE_TITLES[side]}</b><br>${hover}<br>%{customdata}<extra></extra>` });
    const overlap = rowsOf(pair, `subspace_overlap_${side}`, state.matrix);
    last = maximum(overlap.x, last);
    if (overlap.x.length) line(overlap, 0, 1, "k = %{x}: %{y:.5f}");
    const d = pair.matrices[side === "left" ? "out" : "in"][state.matrix];
    const ks = Array.from({ length: 24 }, (_, j) => Math.min(Math.max(1, last), d) ** (j / 23));
    data.unshift({ type: "scatter", mode: "lines", x: ks, y: ks.map((k) => k / d), ...p.on(0), meta: "chance", line: { color: theme.quiet, width: 1.25, dash: "dash" },
      hovertemplate: `chance k/d = %{y:.3f} for d = ${d}<extra></extra>` });
    const angles = rowsOf(pair, `principal_angle_${side}`, state.matrix);
    most = maximum(angles.x, most);
    if (angles.x.length) line(angles, 1, 180 / Math.PI, "angle %{x}: %{y:.3f}°");
  });
  if (data.length === 2) { p.empty(0, "no subspace: a matrix of zeros"); p.empty(1, "no subspace"); }
  p.set(0, { ...powersOfTwo(last), title: "number of leading ranks k" }, unitAxis("overlap of subspaces"));
  p.set(1, { title: `angle, ascending (leading ${most} ranks)`, range: [0.5, most + 0.5], dtick: most > 12 ? undefined : 1 },
    { title: "principal angle (degrees)", range: [-2, 92], tickvals: [0, 15, 30, 45, 60, 75, 90] });
  return { data, layout: p.layout, key: [...key, { ...chanceKey, name: "chance k/d" }], label: `Leading subspaces of ${pair.matrices.name[state.matrix]}` };
};

// --- drawing ------------------------------------------------------------------------------------------------------

const drawn = new Map();  // figure id -> what it was drawn for
// Plotly stands compressed in the page. Unpacked it is a script that the page's content security policy names by its hash.
async function unpackPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const script = document.createElement("script");
  script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
}

const inView = new Set();
const hidden = {};        // figure id -> names of the curves that the reader switched off
const DEPENDS = {
  alignment: ["pair", "curves", "axis", "scale"], overlap: ["pair", "curves", "scale"], heat: ["pair", "side", "role", "axis"], change: ["pair", "curves"],
  variance: ["pair", "curves", "axis"], scatter: ["pair", "side", "rank", "matrix", "scale"], spectra: ["pair", "matrix", "axis"],
  equal: ["pair", "side"], nulls: ["pair", "axis", "scale"], heads: ["pair"], own: ["pair", "axis"],
  single: ["pair", "matrix", "axis"], angles: ["pair", "matrix"],
};

function draw(id) {
  const box = document.querySelector(`#${id} .canvas`);
  const width = Math.floor(box.clientWidth);
  const wanted = JSON.stringify([width, dark.matches, [...(hidden[id] || [])], ...DEPENDS[id].map((name) => state[name])]);
  if (!width || drawn.get(id) === wanted) return;
  drawn.set(id, wanted);
  const { data, layout, key, label } = figures[id](width);
  for (const trace of data) if (hidden[id] && hidden[id].has(trace.meta)) trace.visible = false;
  const buttons = { displaylogo: false, displayModeBar: coarse.matches ? false : "hover", responsive: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], toImageButtonOptions: { filename: `specbasis-${id}`, scale: 2 } };
  Plotly.react(box, data, layout, buttons);
  box.setAttribute("aria-label", label);
  drawKey(id, key);
  if (id === "scatter" && !box.dataset.listens) {
    box.dataset.listens = "yes";
    box.on("plotly_click", ({ points }) => { if (points[0].customdata) chooseMatrix(points[0].customdata[0]); });
  }
}

const SVG = "http://www.w3.org/2000/svg";
function swatch({ color, dash = "solid", quiet, ring, plain }) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("width", ring ? 14 : 26);
  svg.setAttribute("height", 14);
  svg.setAttribute("aria-hidden", "true");
  const shape = document.createElementNS(SVG, ring ? "circle" : "line");
  const size = ring ? { cx: 7, cy: 7, r: 5 } : { x1: 1, y1: 7, x2: 25, y2: 7 };
  for (const [name, value] of Object.entries({ ...size, fill: "none", stroke: quiet ? theme.quiet : color,
    "stroke-width": plain ? 1.5 : 2.25, "stroke-dasharray": DASH_LENGTHS[dash] })) shape.setAttribute(name, value);
  svg.append(shape);
  return svg;
}

function drawKey(id, key) {
  const place = document.querySelector(`#${id} .key`);
  const focused = place.contains(document.activeElement) ? document.activeElement.dataset.name : null;
  const entries = [...key].map((entry) => {
    const switchable = !entry.still && !entry.ramp;
    const item = document.createElement(switchable ? "button" : "span");
    const text = document.createElement("span");
    text.textContent = entry.name;
    if (entry.ramp) {
      const ramp = document.createElement("span");
      ramp.style.cssText = "width:7rem;height:.7rem;border-radius:.2rem;background:linear-gradient(90deg,#00224e,#35456c,#666970,#948e77,#c8b866,#fee838)";
      ramp.setAttribute("aria-hidden", "true");
      const end = document.createElement("span");
      end.textContent = entry.end;
      item.append(text, ramp, end);
    } else if (entry.none) item.append(text);
    else item.append(swatch(entry), text);
    if (switchable) {
      item.type = "button";
      item.dataset.name = entry.name;
      item.title = entry.name;
      item.setAttribute("aria-pressed", String(!(hidden[id] && hidden[id].has(entry.name))));
      item.addEventListener("click", () => {
        hidden[id] ||= new Set();
        if (!hidden[id].delete(entry.name)) hidden[id].add(entry.name);
        draw(id);
      });
    } else item.className = "still";
    return item;
  });
  place.replaceChildren(...entries);
  if (focused !== null) entries.find((e) => e.dataset.name === focused)?.focus();
}

const drawVisible = () => inView.forEach(draw);

// --- table of matrices --------------------------------------------------------------------------------------------

const forms = {
  d: (v) => String(v), f: (v) => short(v), s: (v) => (v > 0 ? "+" : "") + short(v), 1: (v) => v.toFixed(1).replace("-", "−"),
  s1: (v) => (v > 0 ? "+" : "") + v.toFixed(1).replace("-", "−"),
};
const WORDS = [["name", "matrix"], ["role", "role"], ["block", "block"], ["shape", "out × in"]];

function cellsOf(pair, m) {
  const t = pair.matrices;
  return [t.name[m], t.role[m], blockName(t.block[m]), `${t.out[m]} × ${t.in[m]}`];
}

function drawTable() {
  const pair = current();
  const columns = [...WORDS.map(([key, name]) => ({ key, name, title: name })), ...shared.table.map(([key, name, title, form]) => ({ key, name, title, form }))];
  const words = control("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const value = (m, key) => (key === "shape" ? pair.matrices.out[m] * pair.matrices.in[m] : key in pair.matrices ? pair.matrices[key][m] : pair.whole[key][m]);
  let order = pair.matrices.name.map((_, m) => m).filter((m) => {
    const text = [pair.matrices.stack[m], ...cellsOf(pair, m)].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  if (state.sort) {
    const { key, down } = state.sort;
    const last = (v) => v === null || Number.isNaN(v);
    order = order.map((m) => [m, value(m, key)]).sort(([a, x], [b, y]) => {
      if (last(x) || last(y)) return last(x) - last(y) || a - b;
      return ((x > y) - (x < y)) * (down ? -1 : 1) || a - b;
    }).map(([m]) => m);
  }
  const head = document.createElement("tr");
  for (const { key, name, title } of columns) {
    const th = document.createElement("th");
    th.scope = "col";
    if (["role"].includes(key)) th.className = "word";
    const sorted = state.sort && state.sort.key === key;
    th.setAttribute("aria-sort", sorted ? (state.sort.down ? "descending" : "ascending") : "none");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.title = title;
    button.dataset.key = key;
    button.addEventListener("click", () => {
      state.sort = { key, down: sorted ? !state.sort.down : !WORDS.some(([word]) => word === key) };
      drawTable();
      document.querySelector(`#matrices button[data-key="${key}"]`).focus();
    });
    th.append(button);
    head.append(th);
  }
  const body = document.createElement("tbody");
  for (const m of order) {
    const tr = document.createElement("tr");
    tr.dataset.matrix = m;
    cellsOf(pair, m).forEach((text, i) => {
      const cell = document.createElement(i ? "td" : "th");
      if (i === 0) {
        cell.scope = "row";
        const button = document.createElement("button");
        button.type = "button";
        button.className = "link";
        button.append(...text.split(/(?<=[/._[])/).flatMap((part) => [part, document.createElement("wbr")]));
        button.addEventListener("click", () => {
          chooseMatrix(m);
          document.getElementById("h-matrix").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
        });
        cell.append(button);
      } else cell.textContent = text;
      if (i === 1) cell.className = "word";
      tr.append(cell);
    });
    for (const [key, , , form] of shared.table) {
      const td = document.createElement("td");
      const v = pair.whole[key][m];
      td.textContent = isNumber(v) ? forms[form](v) : short(v);
      tr.append(td);
    }
    body.append(tr);
  }
  const thead = document.createElement("thead");
  thead.append(head);
  control("matrices").replaceChildren(thead, body);
  control("found").textContent = words.length ? `${order.length} of ${pair.matrices.name.length} matrices` : `${pair.matrices.name.length} matrices`;
  markRow();
}

function markRow() {
  for (const tr of document.querySelectorAll("#matrices tbody tr")) tr.classList.toggle("chosen", Number(tr.dataset.matrix) === state.matrix);
}

// --- controls -----------------------------------------------------------------------------------------------------

function options(select, entries, value) {
  select.replaceChildren(...entries.map(([v, text, group]) => {
    const option = new Option(text, v);
    if (group) option.dataset.group = group;
    return option;
  }));
  const groups = [...new Set(entries.map((e) => e[2]).filter(Boolean))];
  for (const group of groups) {
    const element = document.createElement("optgroup");
    element.label = group;
    element.append(...[...select.options].filter((o) => o.dataset.group === group));
    select.append(element);
  }
  select.value = String(value);
}

function chooseMatrix(m) {
  state.matrix = m;
  const pair = current(), t = pair.matrices, w = pair.whole;
  control("matrix").value = String(m);
  control("about-matrix").textContent = `${t.out[m]} × ${t.in[m]} (out × in), ${t.role[m]}${t.block[m] === null ? "" : `, block ${t.block[m]}`}${t.stack[m] ? ` of the ${t.stack[m]}` : ""}; `
    + `‖Δ‖/‖W‖ ${short(w.relative_update[m])}, RSD ${short(w.rsd[m])}, cosine ${short(w.weight_cosine[m], 4)}`;
  markRow();
  drawVisible();
}

function choosePair(at) {
  const before = cache[state.pair] ? current().matrices.name[state.matrix] : null;
  state.pair = at;
  const pair = current();
  for (const section of document.querySelectorAll("section.pair")) section.hidden = Number(section.dataset.pair) !== at;
  if (control("pair")) control("pair").value = String(at);
  const t = pair.matrices;
  const roles = [...new Set(pair.panels.map(([, role]) => role))];
  if (!roles.includes(state.role)) state.role = "";
  // Many panels at once are slow to draw and to read: then a role is chosen, as in the source, in the feed-forward part.
  const rows = pair.panels.reduce((n, panel) => n + panel[2].length, 0);
  const crowded = rows > 150 || (innerWidth < 640 && pair.panels.length > 4);
  if (state.role === "" && crowded && roles.length > 1) state.role = roles.includes("ffn.up") ? "ffn.up" : roles[0];
  options(control("role"), [["", "all roles"], ...roles.map((role) => [role, role])], state.role);
  const ranks = new Set();
  const ratio = pair.series.singular_value_ratio, vectors = pair.series[`alignment_left`];
  if (ratio && vectors) for (const r of shared.marked) if (vectors.index.includes(r - 1)) ranks.add(r);
  if (!ranks.size) ranks.add(1);
  if (!ranks.has(state.rank)) state.rank = Math.min(...ranks);
  options(control("rank"), [...ranks].map((r) => [r, r]), state.rank);
  const names = t.name.map((name, m) => [m, name, [t.stack[m], t.block[m] === null ? "outside of the blocks" : `block ${t.block[m]}`].filter(Boolean).join(", ")]);
  const again = t.name.indexOf(before);
  options(control("matrix"), names, 0);
  control("thinned").textContent = pair.thinned ? "To keep this page small, ranks beyond the leading ones are thinned out evenly in the figures of single matrices; the rows on disk hold them all." : "";
  drawTable();
  chooseMatrix(again >= 0 ? again : pair.first);
}

function listen(id, name, convert = String) {
  control(id)?.addEventListener("change", (event) => {
    state[name] = convert(event.target.value);
    drawVisible();
  });
}

readTheme();
control("pair")?.addEventListener("change", (event) => choosePair(Number(event.target.value)));
control("matrix").addEventListener("change", (event) => chooseMatrix(Number(event.target.value)));
control("find").addEventListener("input", drawTable);
listen("curves", "curves");
listen("side", "side");
listen("axis", "axis");
listen("scale", "scale");
listen("role", "role");
listen("rank", "rank", Number);
for (const button of document.querySelectorAll("[data-choose-pair]")) {
  button.addEventListener("click", () => {
    choosePair(Number(button.dataset.choosePair));
    document.querySelector("section.pair:not([hidden])").scrollIntoView({ behavior: "smooth" });
  });
}
dark.addEventListener("change", () => { readTheme(); drawVisible(); });
choosePair(0);
// Where everything is kept, nothing can be told apart between 0 and 1.
const medians = elements.flatMap((_, i) => [...(loadPair(i).bands.alignment_left?.all.median ?? [])]).filter(isNumber);
if (medians.length && Math.min(...medians) > 0.95) state.scale = control("scale").value = "lost";

// Says of a table that is cut that it goes on.
const cut = new ResizeObserver((entries) => entries.forEach(({ target }) => {
  target.nextElementSibling.hidden = target.scrollWidth <= target.clientWidth + 2;
}));
for (const box of document.querySelectorAll(".scroll")) {
  const hint = document.createElement("p");
  hint.className = "quiet hint";
  hint.textContent = "More columns to the right: scroll the table sideways →";
  hint.hidden = true;
  box.after(hint);
  cut.observe(box);
}

const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) { inView.add(target.id); draw(target.id); } else inView.delete(target.id);
  }
}, { rootMargin: "500px 0px" });
const resized = new ResizeObserver(() => requestAnimationFrame(drawVisible));
const plots = document.querySelectorAll("figure.plot:not([hidden])");
unpackPlotly().then(() => {
  for (const figure of plots) {
    observer.observe(figure);
    resized.observe(figure.querySelector(".canvas"));
  }
  addEventListener("beforeprint", () => Object.keys(figures).filter((id) => control(id) && !control(id).hidden).forEach(draw));
}, () => {
  for (const figure of plots) {
    figure.querySelector(".canvas").textContent = "This browser cannot unpack the drawing library (browsers since 2023 can). The same figures are in the folder figures beside this page.";
  }
});
})();
