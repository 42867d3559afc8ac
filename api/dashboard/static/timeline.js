// The picture: one row a sequence slot, one column an iteration, the newest at the right. What was drawn moves to the left,
// and only new columns are drawn. Must not know where the records come from.

import { modeColour } from "./theme.js";

const ROW_MAX = 26; // CSS pixels
const WARM = [26, 44, 68, 92, 34, 54, 78, 104, 39, 60]; // hues of immediate requests
const COOL = [205, 250, 180, 285, 228, 165, 268, 192, 300, 218]; // and of deferred ones

export const KIND_NAMES = {
  d: "decode",
  p: "prefill",
  r: "computed again after a preemption",
  x: "wasted: finished, computes padding, keeps its slot",
  w: "holds its slot, gets nothing in this step",
  ".": "empty",
};

export class Timeline {
  constructor(cells, bands, scroller) {
    this.cells = cells;
    this.bands = bands;
    this.frame = scroller;
    this.zoom = 3; // CSS pixels a column
    this.recording = null;
    this.end = 0; // index behind the last column that is drawn
    this.stale = true; // all of it has to be drawn anew
    this.pen = cells.getContext("2d");
    this.bandPen = bands.getContext("2d");
    new ResizeObserver(() => this.refresh()).observe(scroller);
    addEventListener("themechange", () => this.refresh());
    this.refresh();
  }

  refresh() {
    this.stale = true;
  }

  setZoom(zoom) {
    this.zoom = Math.max(2, Math.min(24, zoom));
    this.refresh();
  }

  // How many columns there is room for.
  get columns() {
    return Math.max(1, Math.floor(this.cells.width / this.columnWidth));
  }

  // Show `recording` with its step at index end - 1 as the last column.
  draw(recording, end) {
    if (recording !== this.recording || this.recordingLength > recording.length) this.stale = true;
    if (this.firstId !== recording.first) {
      this.end -= recording.first - (this.firstId ?? recording.first); // old records were dropped
      this.firstId = recording.first;
    }
    this.recording = recording;
    this.recordingLength = recording.length;
    if (this.stale) this.layOut();
    const more = end - this.end;
    if (!this.stale && more === 0) return;
    const width = this.columnWidth;
    const from = this.stale || more < 0 || more >= this.columns ? end - this.columns : this.end;
    if (from === this.end && !this.stale) this.pen.drawImage(this.cells, -more * width, 0);
    const left = this.cells.width - (end - from) * width;
    this.pen.fillStyle = this.colours.empty;
    this.pen.fillRect(from === this.end && !this.stale ? left : 0, 0, this.cells.width, this.cells.height);
    for (let i = Math.max(from, 0); i < end; i++) this.drawColumn(this.cells.width - (end - i) * width, recording.steps[i]);
    this.end = end;
    this.stale = false;
    this.drawBands(end);
  }

  layOut() {
    const ratio = devicePixelRatio || 1;
    const style = getComputedStyle(document.documentElement);
    const colour = (this.colour = (name) => style.getPropertyValue(name).trim());
    this.dark = document.documentElement.dataset.theme === "dark";
    this.colours = {
      empty: colour("--empty"), line: colour("--grid"), ink: colour("--ink"), waste: colour("--waste"),
      wasteInk: colour("--waste-ink"), band: colour("--band"), ground: colour("--ground"),
    };
    this.fills = new Map();
    const slots = this.recording?.slots ?? 1;
    const width = Math.max(50, this.frame.clientWidth);
    const below = innerHeight - (this.cells.getBoundingClientRect().top + scrollY) - 40; // to be seen without scrolling
    const height = Math.min(900, Math.max(260, below));
    this.columnWidth = Math.max(1, Math.round(this.zoom * ratio));
    this.rowHeight = Math.max(1, Math.min(Math.round(ROW_MAX * ratio), Math.floor((height * ratio) / slots)));
    resize(this.cells, Math.round(width * ratio), this.rowHeight * slots, ratio);
    resize(this.bands, Math.round(width * ratio), Math.round(1.9 * parseFloat(style.fontSize) * ratio), ratio);
  }

  drawColumn(x, step) {
    const { record, owners } = step;
    for (let slot = 0; slot < record.cells.length; slot++) {
      const kind = record.cells[slot];
      if (kind !== ".") this.drawCell(x, slot * this.rowHeight, kind, owners[slot], (slot + record.id) % 2);
    }
    for (const [slot, how] of record.gone) if (how === "p") this.drawPreempted(x, slot * this.rowHeight);
  }

  // Kinds differ by lightness and shape, so that they can be told apart without seeing hues.
  drawCell(x, y, kind, serial, odd, pen = this.pen) {
    const w = this.columnWidth, h = this.rowHeight;
    const gapX = w >= 5 ? 1 : 0, gapY = h >= 6 ? Math.max(1, Math.round(h / 10)) : 0;
    const right = w - gapX, low = h - gapY;
    const fine = w >= 4 && h >= 4; // room for a shape
    if (kind === "x") {
      pen.fillStyle = fine || odd ? this.colours.waste : this.colours.wasteInk;
      pen.fillRect(x, y, w, low);
      if (!fine) return;
      pen.strokeStyle = this.colours.wasteInk;
      pen.lineWidth = Math.max(1, w / 5);
      pen.beginPath();
      pen.moveTo(x, y + low);
      pen.lineTo(x + w, y);
      pen.stroke();
      return;
    }
    const { light, strong } = this.fill(serial);
    if (kind === "w") {
      pen.fillStyle = strong;
      pen.fillRect(x, y + Math.floor(low / 2) - (h >= 8 ? 1 : 0), w, h >= 8 ? 2 : 1);
      return;
    }
    pen.fillStyle = kind === "d" ? light : strong;
    pen.fillRect(x, y, right, low);
    if (!fine || kind === "d") return;
    pen.fillStyle = this.colours.ground;
    if (kind === "p") {
      const bar = Math.max(1, Math.round(right / 4));
      pen.fillRect(x + Math.floor((right - bar) / 2), y + Math.round(low / 5), bar, low - 2 * Math.round(low / 5));
    } else {
      const bar = Math.max(1, Math.round(low / 5));
      pen.fillRect(x, y + bar, w, bar);
      pen.fillRect(x, y + 3 * bar, w, bar);
    }
  }

  // A cross at the left of the first column without it.
  drawPreempted(x, y, pen = this.pen) {
    const size = Math.max(5, Math.min(this.rowHeight, 14));
    const top = y + (this.rowHeight - size) / 2, left = x - size / 2;
    for (const [colour, width] of [[this.colours.ground, size / 2.2], [this.colours.ink, size / 4.5]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = width;
      pen.beginPath();
      pen.moveTo(left, top);
      pen.lineTo(left + size, top + size);
      pen.moveTo(left + size, top);
      pen.lineTo(left, top + size);
      pen.stroke();
    }
  }

  fill(serial) {
    const cls = this.recording.requests.get(serial)?.cls ?? "?";
    const key = cls === "?" ? "?" : `${cls === "d" ? "cool" : "warm"}${serial % 10}`;
    let fill = this.fills.get(key);
    if (!fill) {
      const hue = (cls === "d" ? COOL : WARM)[serial % 10], grey = key === "?";
      const tone = (saturation, light) => `hsl(${hue} ${grey ? 0 : saturation}% ${light}%)`;
      fill = this.dark ? { light: tone(62, 46), strong: tone(85, 80) } : { light: tone(66, 68), strong: tone(80, 27) };
      this.fills.set(key, fill);
    }
    return fill;
  }

  // Above the slots: which mode was in force, and its padding share: of the whole stretch, whatever of it is in the picture.
  drawBands(end) {
    const pen = this.bandPen, ratio = devicePixelRatio || 1;
    const { width, height } = this.bands;
    const steps = this.recording.steps;
    pen.clearRect(0, 0, width, height);
    pen.font = `600 ${Math.round(height / 2)}px system-ui, sans-serif`;
    pen.textBaseline = "middle";
    let i = Math.max(0, end - this.columns);
    while (i < end) {
      const mode = steps[i].record.mode;
      const { first, cut } = steps[i].stretch;
      let stop = i;
      while (stop < end && steps[stop].stretch.first === first) stop++;
      const left = width - (end - i) * this.columnWidth, right = width - (end - stop) * this.columnWidth;
      const { share } = steps[stop - 1].stretch;
      pen.fillStyle = share >= 0.005 ? this.colours.waste : this.colours.band;
      pen.fillRect(left, 0, right - left - ratio, height);
      pen.fillStyle = this.colour(modeColour(mode));
      pen.fillRect(left, height - 5 * ratio, right - left - ratio, 5 * ratio);
      pen.fillStyle = this.colours.ink;
      const room = right - left - 12 * ratio;
      const known = cut ? [`${mode}: ${percent(share)} padding since step ${first}`] : [`${mode}: ${percent(share)} padding`];
      const texts = [...known, mode];
      const text = texts.find((one) => pen.measureText(one).width <= room);
      if (text) pen.fillText(text, left + 6 * ratio, height / 2);
      i = stop;
    }
  }

  // The step's index and the slot under a point of the canvas, in CSS pixels; null where there is none.
  at(offsetX, offsetY) {
    const ratio = devicePixelRatio || 1;
    const index = this.end - 1 - Math.floor((this.cells.width - 1 - offsetX * ratio) / this.columnWidth);
    const slot = Math.floor((offsetY * ratio) / this.rowHeight);
    const held = this.recording && index >= 0 && index < this.end && slot >= 0 && slot < this.recording.slots;
    return held ? { index, slot } : null;
  }

  describe(index, slot) {
    const { record, owners } = this.recording.steps[index];
    const kind = record.cells[slot] ?? ".";
    const request = this.recording.requests.get(owners[slot]);
    const names = { i: "immediate", d: "deferred", m: "promoted" };
    const who = kind === "." ? "" : request ? `, ${names[request.cls]} request ${request.id.slice(0, 14)}` : "";
    const left = record.gone.some(([gone, how]) => gone === slot && how === "p") ? ", a preempted request left it" : "";
    return `slot ${slot}, step ${record.id} (${record.mode}, ${record.ms.toFixed(1)} ms): ${KIND_NAMES[kind]}${who}${left}`;
  }

  // A sample of each kind, for the legend.
  sample(canvas, kind) {
    const ratio = devicePixelRatio || 1;
    const { columnWidth, rowHeight } = this;
    this.columnWidth = Math.round(9 * ratio);
    this.rowHeight = Math.round(18 * ratio);
    resize(canvas, 4 * this.columnWidth, this.rowHeight, ratio);
    const pen = canvas.getContext("2d");
    pen.fillStyle = this.colours.empty;
    pen.fillRect(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < 4; i++) {
      const shown = kind !== "X" ? kind : i < 2 ? "d" : ".";
      if (shown !== ".") this.drawCell(i * this.columnWidth, 0, shown, 0, i % 2, pen);
    }
    if (kind === "X") this.drawPreempted(2 * this.columnWidth, 0, pen);
    Object.assign(this, { columnWidth, rowHeight });
  }
}

export function percent(share) {
  return `${(100 * share).toFixed(share ? 1 : 0)} %`;
}

function resize(canvas, width, height, ratio) {
  canvas.width = width;
  canvas.height = height;
  canvas.style.width = `${width / ratio}px`;
  canvas.style.height = `${height / ratio}px`;
}
