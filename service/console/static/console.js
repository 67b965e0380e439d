// What htmx does not know: when a page had better not show itself again, and that it could not.
"use strict";

const live = () => document.getElementById("live-switch")?.getAttribute("aria-pressed") !== "false";
const selects = () => !window.getSelection().isCollapsed;

document.addEventListener("htmx:before:request", (event) => {
  if (document.hidden || !live() || selects()) event.preventDefault();
});
document.addEventListener("htmx:before:swap", (event) => {
  if (!live() || selects()) event.preventDefault();
});

const stale = (is) => {
  const note = document.getElementById("stale");
  if (note.hidden === is) note.hidden = !is;
};
document.addEventListener("htmx:after:swap", () => stale(false));
document.addEventListener("htmx:response:error", () => stale(true));
document.addEventListener("htmx:error", () => stale(true));

document.addEventListener("click", (event) => {
  if (event.target.id !== "live-switch") return;
  const pressed = live();
  event.target.setAttribute("aria-pressed", String(!pressed));
  event.target.textContent = pressed ? "Stopped" : "Live";
});
