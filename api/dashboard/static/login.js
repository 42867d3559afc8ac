// The login page: says what was wrong. Who comes by a link from another site is logged in already, but the browser kept the
// cookie back on the way (SameSite=Strict): asked from here it is sent.

if (new URLSearchParams(location.search).has("wrong")) {
  document.getElementById("wrong").textContent = "That is not a key of this server.";
} else if (document.referrer && new URL(document.referrer).origin !== location.origin) {
  const response = await fetch("/session");
  if (response.ok && (await response.json()).keys) location.replace("/");
}
