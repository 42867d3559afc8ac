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

system.addEventListener("change", apply);
apply();
