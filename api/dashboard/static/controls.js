// Buttons and forms that change the server or ask it for something. `say(text)` is the page's live region.

import { call, complete } from "./server.js";
import { modeColour } from "./theme.js";

const $ = (id) => document.getElementById(id);

export async function setUpControls(say) {
  const session = await call("GET", "/session");
  $("logout").hidden = !session.keys;
  for (const part of document.querySelectorAll("fieldset.teacher")) part.disabled = !session.teacher;
  $("students").hidden = session.teacher;
  await setUpModes(say, session.teacher);
  setUpBurst(say);
  setUpReset(say);
  setUpPrompt(say);
}

async function setUpModes(say, teacher) {
  const { mode, modes } = await call("GET", "/mode");
  for (const name of Object.keys(modes)) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.dataset.mode = name;
    button.style.setProperty("--of-mode", `var(${modeColour(name)})`);
    button.addEventListener("click", () => attempt(say, () => switchTo(name, say)));
    $("modes").append(button);
  }
  showMode(mode);
  if (!teacher) say("You are watching. Only the teacher switches modes and fires bursts.");
}

async function switchTo(name, say) {
  say(`Switching to ${name}: what runs is finished in the old mode first.`);
  $("modes").setAttribute("aria-busy", "true");
  try {
    await call("PUT", "/mode", { mode: name });
    showMode(name);
    say(`The mode is ${name}.`);
  } finally {
    $("modes").removeAttribute("aria-busy");
  }
}

// The mode that is in force, whoever switched to it.
export function showMode(name) {
  for (const button of $("modes").children) button.setAttribute("aria-pressed", String(button.dataset.mode === name));
}

function setUpBurst(say) {
  $("burst").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(say, async () => {
      const body = {
        requests: $("requests").valueAsNumber,
        prompt_tokens: lengths("prompt-tokens"),
        num_tokens: lengths("num-tokens"),
        deferred: $("deferred").valueAsNumber / 100,
      };
      const { taken, refused } = await call("POST", "/burst", body);
      say(`${taken} requests fired` + (refused ? `, ${refused} more refused: the queue is full.` : "."));
    });
  });
  $("call-off").addEventListener("click", () =>
    attempt(say, async () => {
      const { called_off } = await call("DELETE", "/burst");
      say(`${called_off} requests called off.`);
    }),
  );
}

function lengths(id) {
  return $(id).value.split(/[\s,;]+/).filter(Boolean).map(Number);
}

function setUpReset(say) {
  $("reset").addEventListener("click", () =>
    attempt(say, async () => {
      await call("POST", "/stats/reset");
      say("Statistics start anew.");
    }),
  );
}

function setUpPrompt(say) {
  let running = null;
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    running?.abort();
    const own = (running = new AbortController());
    const begun = performance.now();
    attempt(say, async () => {
      $("answer").textContent = $("prompt").value;
      $("stop").disabled = false;
      const text = document.createElement("mark");
      $("answer").append(text);
      try {
        for await (const piece of complete($("prompt").value, $("max-tokens").valueAsNumber, own.signal)) text.append(piece);
        say(`The text is complete, after ${((performance.now() - begun) / 1000).toFixed(1)} seconds.`);
      } catch (error) {
        if (error.name !== "AbortError") throw error;
        say("Stopped.");
      } finally {
        if (running === own) $("stop").disabled = true;
      }
    });
  });
  $("stop").addEventListener("click", () => running?.abort());
}

async function attempt(say, action) {
  try {
    await action();
  } catch (error) {
    say(`That did not work: ${error.message}`, true);
  }
}
