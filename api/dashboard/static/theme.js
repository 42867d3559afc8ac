// Light or dark: what the viewer chose here, else what their system says. Must not know what is on the page.

const system = matchMedia("(prefers-color-scheme: dark)");

function chosen() {
  return localStorage.getItem("theme");
}

function apply() {
  document.documentElement.dataset.theme = chosen() ?? (system.matches ? "dark" : "light");
  dispatchEvent(new Event("themechange"));
}

export function toggleTheme() {
  localStorage.setItem("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  apply();
}

// The name of a mode's colour in style.css. A policy of one's own has one of three, always the same.
export function modeColour(mode) {
  const known = getComputedStyle(document.documentElement).getPropertyValue(`--mode-${mode}`);
  const sum = [...mode].reduce((total, letter) => total + letter.codePointAt(0), 0);
  return known ? `--mode-${mode}` : `--own-${sum % 3}`;
}

system.addEventListener("change", apply);
apply();
