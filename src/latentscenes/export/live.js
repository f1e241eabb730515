const {files, scenes} = JSON.parse(document.getElementById("data").textContent);
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
let playing = !still;
modules["latent-scene.js"].provide("inside", new modules["source.js"].InnerSource(files));

function card(scene, large) {
  const make = kind => document.createElement(kind);
  const figure = make("figure"), stage = make("div"), caption = make("figcaption");
  const view = make("latent-scene"), name = make("span"), button = make("button");
  stage.className = "stage";
  view.className = "view";
  view.setAttribute("src", "inside");
  view.setAttribute("scene", scene.name);
  view.setAttribute("controls", "");
  if (playing) view.setAttribute("autorotate", "");
  name.textContent = scene.caption;
  if (scene.about) {
    const about = make("small");
    about.textContent = scene.about;
    name.append(about);
  }
  name.title = scene.about ? scene.name + "\n" + scene.about : scene.name;
  button.textContent = large ? "✕" : "⤢";
  button.setAttribute("aria-label", large ? "Close" : "Show " + scene.name + " large");
  button.addEventListener("click", () => large ? dialog.close() : enlarge(scene, view));
  stage.append(view);
  caption.append(name, button);
  figure.append(stage, caption);
  return {figure, view, scene};
}

const dialog = document.getElementById("large");
function enlarge(scene, small) {
  const {figure, view} = card(scene, true);
  view.view = small.view;
  dialog.replaceChildren(figure);
  dialog.showModal();
}
dialog.addEventListener("close", () => dialog.replaceChildren());
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });

const cards = scenes.map(scene => card(scene, false));
document.getElementById("scenes").append(...cards.map(({figure}) => figure));

const filter = document.getElementById("filter"), play = document.getElementById("play");
filter.hidden = scenes.length < 9;
filter.addEventListener("input", () => {
  const wanted = filter.value.trim().toLowerCase();
  for (const {figure, scene} of cards) {
    figure.hidden = !(scene.name + " " + scene.about).toLowerCase().includes(wanted);
  }
  document.getElementById("none").hidden = cards.some(({figure}) => !figure.hidden);
});
function label() {
  play.textContent = playing ? "Pause" : "Turn";
  play.setAttribute("aria-pressed", playing);
}
play.addEventListener("click", () => {
  playing = !playing;
  for (const view of document.querySelectorAll("latent-scene")) view.toggleAttribute("autorotate", playing);
  label();
});
label();
