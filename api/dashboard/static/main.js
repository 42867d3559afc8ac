// The page: the live stream or a recording, the moment that is shown, and everything that shows it.

import { Charts } from "./charts.js";
import { setUpControls, showMode } from "./controls.js";
import { Recording } from "./recording.js";
import { call, follow } from "./server.js";
import { toggleTheme } from "./theme.js";
import { percent, Timeline } from "./timeline.js";

const HISTORY = 3000; // steps asked for when the page opens
const REDRAW_MS = 500; // charts and figures; the timeline follows each frame
const FRAMES = [6, 120]; // at least and at most so many show what came in one event
const MAX_REASONS = 8;
const $ = (id) => document.getElementById(id);

let live = null; // the Recording that grows; null until the server has told how many slots it has
let shown = null; // the one on the page: `live`, or one from a file
let pending = []; // records that have come and are not yet in `live`
let came = 0; // when the last of them did, in milliseconds
let pace = 1; // of them a frame, so that they last until the next event
let due = 0; // what has become of the pace: a frame takes whole records
let now = null; // how the engine stands between steps
let clock = null; // the server's time minus the page's, in seconds
let viewed = null; // id of the step that is shown last; null: the newest
let slot = 0; // the row that is read out
let stopFollowing = () => {};

const timeline = new Timeline($("cells"), $("bands"), $("timeline"));
const charts = new Charts(
  { tokens: $("chart-tokens"), queue: $("chart-queue"), kv: $("chart-kv"), latency: $("chart-latency") },
  (name, text) => $(`chart-${name}`).setAttribute("aria-label", text),
  (text) => ($("latency-of").textContent = text),
);

function say(text, wrong = false) {
  $("said").textContent = text;
  $("said").classList.toggle("wrong", wrong);
}

// The stream.

async function connect() {
  stopFollowing();
  try {
    const { slots, limits, last } = await call("GET", "/steps?limit=1");
    const again = live !== null && live.slots === slots && live.last <= last;
    const { steps } = await call("GET", `/steps?after=${again ? live.last : Math.max(0, last - HISTORY)}`);
    if (!again) {
      const wasShown = shown === live;
      live = new Recording(slots, limits);
      if (wasShown) shown = live;
    }
    pending = [];
    live.add(steps);
    clock = null;
    stopFollowing = follow(live.last, { onRecords, onNow, onState, onBreak: connect });
  } catch (error) {
    onState(error.message);
    setTimeout(connect, 2000);
  }
}

function onRecords(records) {
  now = null;
  clock = records[records.length - 1].end - performance.now() / 1000;
  pending.push(...records);
  const frames = Math.max(FRAMES[0], Math.min(FRAMES[1], ((performance.now() - came) * 60) / 1000));
  came = performance.now();
  pace = pending.length / frames;
}

function onNow(state) {
  now = state;
  showMode(state.mode);
}

function onState(text) {
  $("connection").textContent = text || "live";
  $("connection").classList.toggle("wrong", text !== "");
}

// The moment that is shown.

function endIndex() {
  return viewed === null ? shown.length : shown.indexOf(viewed) + 1;
}

function pause() {
  if (viewed === null && shown?.length) viewed = shown.last;
  showPaused();
}

function goLive() {
  viewed = null;
  if (shown !== live) {
    shown = live;
    say("Back to the live server.");
  }
  showPaused();
}

function step(by) {
  if (!shown?.length) return;
  pause();
  viewed = Math.max(shown.first, Math.min(shown.last, viewed + by));
  readOut();
  update();
}

function showPaused() {
  const paused = viewed !== null;
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Go on" : "Pause";
  $("live").disabled = !paused && shown === live;
  document.body.classList.toggle("paused", paused);
}

function readOut() {
  const end = endIndex();
  if (end) $("readout").textContent = timeline.describe(end - 1, slot);
}

// What shows it.

function frame() {
  requestAnimationFrame(frame);
  if (pending.length && live) {
    due += document.hidden ? pending.length : pace;
    live.add(pending.splice(0, Math.floor(due)));
    due = pending.length ? due % 1 : 0;
  }
  if (shown) timeline.draw(shown, endIndex());
  const steady = viewed !== null && shown?.length;
  $("cursor").hidden = !steady;
  if (steady) {
    const height = timeline.rowHeight / (devicePixelRatio || 1);
    Object.assign($("cursor").style, { top: `${$("cells").offsetTop + slot * height}px`, height: `${height}px` });
  }
}

function update() {
  if (!shown || document.hidden) return;
  const end = endIndex(), last = shown.steps[end - 1]?.record;
  const isLive = viewed === null && shown === live;
  const time = isLive && clock !== null ? clock + performance.now() / 1000 : (last?.end ?? 0);
  const from = Math.max(0, end - timeline.columns);
  const state = isLive && now ? now : last;
  charts.draw(shown, end, time, $("metric").value, state);
  const recent = isLive && clock === null ? [] : stepsOfLast(end, time, 2);
  $("fact-mode").textContent = state?.mode ?? "–";
  $("fact-busy").textContent = state ? `${state.running} of ${shown.slots}` : "–";
  const padding = state?.padding_share ?? shown.steps[end - 1]?.stretch.share; // a recording of old has no such field
  $("fact-padding").textContent = padding === undefined ? "–" : percent(padding);
  $("fact-padding").classList.toggle("some", padding > 0);
  $("fact-queue").textContent = state?.queue ?? "–";
  $("fact-tokens").textContent = Math.round(recent.reduce((sum, one) => sum + one.tokens, 0) / 2);
  $("fact-kv").textContent = state ? percent(state.kv) : "–";
  $("fact-step").textContent = last ? `${last.ms.toFixed(1)} ms` : "–";
  if (isLive && last && !now) showMode(last.mode);
  const slider = $("moment");
  slider.min = shown.first;
  slider.max = shown.last;
  slider.value = last?.id ?? 0;
  slider.setAttribute("aria-valuetext", last ? `step ${last.id} of ${shown.last}` : "no steps yet");
  const span = end > from ? last.end - shown.steps[from].record.end : 0;
  $("window").textContent = last ? `steps ${shown.steps[from].record.id} to ${last.id}, ${span.toFixed(1)} s` : "no steps yet: fire a burst";
  $("cells").setAttribute("aria-label", summary(state, end, padding));
  showReasons(end);
}

function stepsOfLast(end, time, seconds) {
  const found = [];
  for (let i = end - 1; i >= 0 && shown.steps[i].record.end > time - seconds; i--) found.push(shown.steps[i].record);
  return found;
}

function summary(state, end, padding) {
  if (!state || !end) return "Slot timeline: no steps yet";
  const held = `${state.running} of ${shown.slots} slots held, ${state.queue} waiting`;
  return `Slot timeline: ${state.mode}, ${held}, since the last reset ${percent(padding)} of what was computed was padding`;
}

function showReasons(end) {
  const found = [], seen = new Set();
  for (let i = end - 1; i >= Math.max(0, end - 1500) && found.length < MAX_REASONS; i--) {
    const { id, why } = shown.steps[i].record;
    for (const [request, text] of why) {
      const key = text.startsWith("waits") ? text : request + text; // of all that wait for the same, the latest
      if (!seen.has(key) && found.length < MAX_REASONS) found.push({ id, request, text });
      seen.add(key);
    }
  }
  const key = found.map((one) => one.request + one.text).join();
  if ($("why").dataset.key === key) return;
  $("why").dataset.key = key;
  $("why").replaceChildren(...found.map(reason));
  $("no-why").hidden = found.length > 0;
}

function reason({ id, request, text }) {
  const item = document.createElement("li");
  const name = document.createElement("code");
  name.textContent = request.slice(0, 14);
  item.append(`step ${id}: `, name, ` ${text}`);
  return item;
}

// Recordings.

function save() {
  if (!shown?.length) return say("There is nothing to save yet.", true);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(shown)], { type: "application/json" }));
  link.download = `batchlab-steps-${shown.first}-${shown.last}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
  say(`Saved ${shown.length} steps as ${link.download}.`);
}

async function load(file) {
  try {
    shown = Recording.from(JSON.parse(await file.text()));
  } catch (error) {
    say(`${file.name}: ${error.message}`, true);
    return;
  }
  viewed = shown.last;
  showPaused();
  update();
  say(`${file.name}: ${shown.length} steps. "Live" leads back to the server.`);
}

// Hands and keys.

$("pause").addEventListener("click", () => (viewed === null ? pause() : goLive()));
$("live").addEventListener("click", goLive);
$("back").addEventListener("click", () => step(-1));
$("forward").addEventListener("click", () => step(1));
$("moment").addEventListener("input", (event) => step(event.target.valueAsNumber - (viewed ?? shown.last)));
$("wider").addEventListener("click", () => timeline.setZoom(timeline.zoom * 1.5));
$("narrower").addEventListener("click", () => timeline.setZoom(timeline.zoom / 1.5));
$("save").addEventListener("click", save);
$("load").addEventListener("change", (event) => event.target.files.length && load(event.target.files[0]));
$("theme").addEventListener("click", toggleTheme);
$("metric").addEventListener("change", update);
$("describe").addEventListener("click", () => {
  update();
  say($("cells").getAttribute("aria-label"));
});

$("cells").addEventListener("keydown", (event) => {
  const far = Math.max(1, Math.floor(timeline.columns / 2));
  const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -far, PageDown: far, Home: -Infinity, End: Infinity };
  if (event.key in moves) step(moves[event.key]);
  else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    slot = Math.max(0, Math.min((shown?.slots ?? 1) - 1, slot + (event.key === "ArrowUp" ? -1 : 1)));
    step(0);
  } else if (event.key === " ") $("pause").click();
  else return;
  event.preventDefault();
});
$("cells").addEventListener("pointermove", (event) => {
  const place = timeline.at(event.offsetX, event.offsetY);
  if (place) $("hover").textContent = timeline.describe(place.index, place.slot);
});
$("cells").addEventListener("pointerleave", () => ($("hover").textContent = ""));

function drawLegend() {
  timeline.recording ??= new Recording(1);
  timeline.layOut();
  for (const canvas of document.querySelectorAll("#legend canvas")) timeline.sample(canvas, canvas.dataset.kind);
  timeline.refresh();
}
addEventListener("themechange", drawLegend);
drawLegend();

setUpControls(say).catch((error) => say(error.message, true));
connect();
frame();
setInterval(update, REDRAW_MS);
