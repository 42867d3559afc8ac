// Queue, tokens, memory and latencies out of a recording, drawn by Plotly (served from its Python package as a plain script,
// which defines `Plotly`). Must not know where the records come from.

import { modeColour } from "./theme.js";

const WINDOW_S = 60, BIN_S = 0.5;
const OPACITIES = ["", "a6", "59"]; // of p50, p90, p99, behind the digits of a mode's colour
const HELD_BINS = 4; // a figure stands for so many bins without a step; then nothing runs
const METRICS = { ttft: 1, tpot: 2, e2el: 3 }; // places in an answered request's figures

export class Charts {
  // `places`: {tokens, queue, kv, latency}: the elements to draw in; `told(name, text)` hears what a chart shows, in words, and
  // `counted(text)` of which requests the latencies are.
  constructor(places, told, counted) {
    this.places = places;
    this.told = told;
    this.counted = counted;
    addEventListener("themechange", () => this.style());
    this.style();
  }

  style() {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
    this.ink = colour("--ink");
    this.grid = colour("--grid");
    this.accent = colour("--accent");
    this.colour = colour;
    this.waste = colour("--waste-ink");
    this.size = parseFloat(css.fontSize) * 0.85;
  }

  // `until`: the server's time at the right edge, in seconds. `state`: how the engine stands, as far as it is known.
  draw(recording, end, until, metric, state) {
    if (!globalThis.Plotly) return; // still on its way
    const bins = inBins(recording, end, until);
    const x = bins.map((_, i) => -WINDOW_S + (i + 0.5) * BIN_S);
    const over = (pick) => bins.map(pick);
    this.plot("tokens", "tokens a second", [
      area(x, over((b) => b.tokens / BIN_S), "drawn", this.accent),
      area(x, over((b) => b.padding / BIN_S), "padding", this.waste, "x"),
    ]);
    this.plot("queue", "requests", [
      line(x, over((b) => b.queue), "waiting", this.accent, "solid"),
      line(x, over((b) => b.running), "in a slot", this.ink, "dot"),
    ]);
    this.plot("kv", "% of the KV blocks", [area(x, over((b) => 100 * b.kv), "in use", this.accent)], [0, 100]);
    this.latencies(recording, end, metric, state);
    const last = recording.steps[end - 1]?.record;
    if (last) {
      this.told("tokens", `${Math.round(sum(bins.slice(-10), "tokens") / (10 * BIN_S))} tokens a second in the last 5 seconds`);
      this.told("queue", `${last.queue} waiting, ${last.running} in a slot`);
      this.told("kv", `${Math.round(100 * last.kv)} % of the KV blocks in use`);
    }
  }

  // Of each mode the requests since the last reset of the statistics in it: those that /stats counted.
  latencies(recording, end, metric, state) {
    const modes = new Map(), since = new Map();
    for (let i = 0; i < end; i++) {
      const { mode, first_step, done } = recording.steps[i].record;
      if (since.get(mode) !== first_step || !modes.has(mode)) modes.set(mode, []);
      since.set(mode, first_step);
      for (const figures of done ?? []) if (figures[METRICS[metric]] !== null) modes.get(mode).push(figures[METRICS[metric]]);
    }
    if (state && since.get(state.mode) < state.first_step) modes.delete(state.mode); // a reset after its last step
    const names = [...modes.keys()].filter((name) => modes.get(name).length), texts = [];
    const from = (name) => (recording.first > (since.get(name) ?? 0) ? ` since step ${recording.first}` : "");
    this.counted(names.map((name) => `${name}: ${modes.get(name).length} requests${from(name)}`).join(", "));
    const traces = [50, 90, 99].map((rank, i) => {
      const values = names.map((name) => percentile(modes.get(name), rank) / 1000);
      if (values.length) texts.push(names.map((name, j) => `${name} p${rank} ${values[j].toFixed(2)} s`).join(", "));
      return {
        type: "bar", name: `p${rank}`, x: names, y: values, text: values.map(short), textposition: "outside", textangle: 0, cliponaxis: false,
        marker: { color: names.map((name) => this.colour(modeColour(name)) + OPACITIES[i]), line: { color: this.ink, width: 1 } },
      };
    });
    this.plot("latency", "seconds", traces, null, { barmode: "group" });
    this.told("latency", texts.join("; ") || "nothing is answered yet");
  }

  plot(name, unit, traces, range = null, more = {}) {
    const overTime = name !== "latency";
    const axis = { gridcolor: this.grid, zerolinecolor: this.grid, automargin: true };
    const layout = {
      margin: { l: 8, r: 8, t: 34, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: this.ink, family: "system-ui, sans-serif", size: this.size },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      xaxis: overTime ? { ...axis, range: [-WINDOW_S, 0], title: { text: "seconds ago" }, tickvals: [-60, -40, -20, 0], ticktext: [60, 40, 20, 0] } : { ...axis, type: "category" },
      yaxis: { ...axis, rangemode: "tozero", title: { text: unit }, ...(range ? { range } : {}) },
      showlegend: true,
      ...more,
    };
    Plotly.react(this.places[name], traces, layout, { displayModeBar: false, responsive: true });
  }
}

function inBins(recording, end, until) {
  const bins = Array.from({ length: WINDOW_S / BIN_S }, () => ({ tokens: 0, padding: 0, queue: null, running: null, kv: null }));
  for (let i = end - 1; i >= 0; i--) {
    const { record } = recording.steps[i];
    const place = Math.floor((record.end - until + WINDOW_S) / BIN_S);
    if (place < 0) break;
    const bin = bins[Math.min(place, bins.length - 1)];
    bin.tokens += record.tokens;
    bin.padding += record.padding;
    bin.queue ??= record.queue;
    bin.running ??= record.running;
    bin.kv ??= record.kv;
  }
  for (const name of ["queue", "running", "kv"]) fillGaps(bins, name);
  return bins;
}

function fillGaps(bins, name) {
  let known = 0, age = Infinity;
  for (const bin of bins) {
    if (bin[name] === null) bin[name] = ++age <= HELD_BINS ? known : 0;
    else [known, age] = [bin[name], 0];
  }
}

function line(x, y, name, color, dash) {
  return { type: "scatter", mode: "lines", x, y, name, line: { color, dash, width: 2.5, shape: "hv" } };
}

function area(x, y, name, color, shape = "") {
  return { ...line(x, y, name, color, "solid"), fill: "tozeroy", fillpattern: { shape, fgcolor: color, size: 6 } };
}

function percentile(values, rank) {
  const ordered = Float64Array.from(values).sort();
  const place = ((ordered.length - 1) * rank) / 100, low = Math.floor(place);
  return ordered[low] + ((ordered[Math.min(low + 1, ordered.length - 1)] - ordered[low]) * (place - low) || 0);
}

function sum(rows, field) {
  return rows.reduce((total, row) => total + row[field], 0);
}

function short(seconds) {
  return seconds < 0.1 ? `${(1000 * seconds).toFixed(0)} ms` : `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}
