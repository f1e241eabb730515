"use strict";
const {frames, rows, columns, lines, scenes} = JSON.parse(document.getElementById("data").textContent);
const SECONDS_PER_TURN = 9, TURNS_PER_WIDTH = 0.8;
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
let playing = !still;
const visible = new Set();

class Turning {
  constructor(scene, large) {
    this.scene = scene;
    this.turn = 0;                          // in turns; 0 is the first picture
    this.row = Math.floor(rows / 2);        // elevation, lowest first
    this.held = false;
    this.shown = -1;
    const figure = document.createElement("figure"), stage = document.createElement("div"), view = document.createElement("div");
    const caption = document.createElement("figcaption"), name = document.createElement("span"), button = document.createElement("button");
    figure.append(stage, caption);
    stage.append(view);
    stage.className = "stage";
    view.className = "view";
    view.tabIndex = 0;
    view.setAttribute("role", "img");
    view.setAttribute("aria-label", scene.name + ": turn it with the arrow keys");
    view.style.backgroundSize = columns * 100 + "% " + lines * 100 + "%";
    name.textContent = scene.caption;
    if (scene.about) {
      const about = document.createElement("small");
      about.textContent = scene.about;
      name.append(about);
    }
    name.title = scene.about ? scene.name + "\n" + scene.about : scene.name;
    button.textContent = large ? "✕" : "⤢";
    button.setAttribute("aria-label", large ? "Close" : "Show " + scene.name + " large");
    button.addEventListener("click", () => large ? dialog.close() : enlarge(this));
    caption.append(name, button);
    this.figure = figure;
    this.view = view;
    let last = null, moved = 0;
    view.addEventListener("pointerdown", event => {
      if (event.button) return;
      last = event;
      moved = 0;
      this.rest = this.row;
      this.held = true;
      view.setPointerCapture(event.pointerId);
    });
    view.addEventListener("pointermove", event => {
      if (!last) return;
      const dx = event.clientX - last.clientX, dy = event.clientY - last.clientY;
      moved += Math.abs(dx) + Math.abs(dy);
      this.turn -= dx / view.clientWidth * TURNS_PER_WIDTH;
      this.rest = Math.min(rows - 1, Math.max(0, this.rest + dy / view.clientHeight * 1.5 * (rows - 1)));
      this.row = Math.round(this.rest);
      last = event;
      this.draw();
    });
    const release = () => { last = null; this.held = document.activeElement === view && view.matches(":focus-visible"); };
    view.addEventListener("pointerup", release);
    view.addEventListener("pointercancel", release);
    view.addEventListener("dblclick", () => { if (!large && moved < 4) enlarge(this); });
    view.addEventListener("blur", () => { this.held = false; });
    view.addEventListener("keydown", event => {
      if (event.key === "ArrowLeft") this.turn += 1 / frames;
      else if (event.key === "ArrowRight") this.turn -= 1 / frames;
      else if (event.key === "ArrowUp" && rows > 1) this.row = Math.min(rows - 1, this.row + 1);
      else if (event.key === "ArrowDown" && rows > 1) this.row = Math.max(0, this.row - 1);
      else if (event.key === "Enter" && !large) enlarge(this);
      else return;
      this.held = true;
      event.preventDefault();
      this.draw();
    });
  }
  show(on) {
    this.view.style.backgroundImage = on ? "url(data:image/webp;base64," + this.scene.sheet + ")" : "none";
    if (on) { visible.add(this); this.draw(); } else visible.delete(this);
  }
  draw() {
    const frame = ((Math.round(this.turn * frames) % frames) + frames) % frames, tile = this.row * frames + frame;
    if (tile === this.shown) return;
    this.shown = tile;
    const x = tile % columns / Math.max(1, columns - 1), y = Math.floor(tile / columns) / Math.max(1, lines - 1);
    this.view.style.backgroundPosition = x * 100 + "% " + y * 100 + "%";
  }
}

const dialog = document.getElementById("large"), list = document.getElementById("scenes");
let opened = null;
function enlarge(small) {
  opened = new Turning(small.scene, true);
  opened.turn = small.turn;
  opened.row = small.row;
  dialog.replaceChildren(opened.figure);
  opened.show(true);
  dialog.showModal();
  opened.view.focus();
}
dialog.addEventListener("close", () => { opened.show(false); dialog.replaceChildren(); });
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });

const all = scenes.map(scene => new Turning(scene, false)), of = new Map(all.map(turning => [turning.figure, turning]));
list.append(...all.map(turning => turning.figure));
const watcher = new IntersectionObserver(entries => entries.forEach(entry => of.get(entry.target).show(entry.isIntersecting)), {rootMargin: "200px"});
all.forEach(turning => watcher.observe(turning.figure));
addEventListener("beforeprint", () => all.forEach(turning => turning.show(true)));
addEventListener("afterprint", () => all.forEach(({figure}) => { watcher.unobserve(figure); watcher.observe(figure); }));

const filter = document.getElementById("filter"), play = document.getElementById("play");
filter.hidden = scenes.length < 9;
filter.addEventListener("input", () => {
  const wanted = filter.value.trim().toLowerCase();
  all.forEach(turning => { turning.figure.hidden = !(turning.scene.name + " " + turning.scene.about).toLowerCase().includes(wanted); });
  document.getElementById("none").hidden = all.some(turning => !turning.figure.hidden);
});
function label() { play.textContent = playing ? "Pause" : "Turn"; play.setAttribute("aria-pressed", playing); }
play.addEventListener("click", () => { playing = !playing; label(); });
label();

let before = null;
requestAnimationFrame(function step(now) {
  if (playing && before !== null) {
    const turned = Math.min(now - before, 100) / 1000 / SECONDS_PER_TURN;
    visible.forEach(turning => { if (!turning.held) { turning.turn += turned; turning.draw(); } });
  }
  before = now;
  requestAnimationFrame(step);
});
