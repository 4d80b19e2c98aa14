// A text, token by token: coloured, selected by clicks or keys.
// Token text is set as text, never as HTML.

const KEYS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };

function element(tag, className, text = "", attributes = {}) {
  const made = document.createElement(tag);
  return Object.assign(made, { className, textContent: text }, attributes);
}

function render({ model, el }) {
  el.classList.add("lm-tokens");
  el.dataset.lmSuppressShortcuts = "true"; // otherwise JupyterLab handles the arrow keys
  const legend = element("div", "lm-legend", "probability of a token by the model: ");
  for (const [probability, colour] of model.get("legend")) {
    const swatch = element("span", "lm-token", probability);
    swatch.style.background = colour;
    legend.append(swatch, " ");
  }
  const label = "tokens of the text; arrow keys step through them";
  const box = element("div", "lm-sample", "", { tabIndex: 0, role: "listbox", ariaLabel: label });
  const prompt = element("bdi", "lm-prompt");
  box.append(prompt);
  el.append(legend, box);
  const identity = Math.random().toString(36).slice(2); // unique among views

  function choose(place) {
    const last = model.get("tokens").length - 1;
    if (last >= 0) model.send(Math.max(0, Math.min(last, place)));
  }

  box.addEventListener("keydown", (event) => {
    if (!(event.key in KEYS) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    choose(model.get("selected") + KEYS[event.key]);
  });
  box.addEventListener("click", (event) => {
    const token = event.target.closest(".lm-token");
    if (token) choose(Number(token.dataset.index));
  });

  function addToken([text, probability, colour], index) {
    const title = `probability ${probability}`;
    const id = `lm-${identity}-${index}`;
    const ariaLabel = `${text}, ${title}`;
    const token = element("span", "lm-token", text, { id, title, ariaLabel, role: "option" });
    token.dataset.index = index;
    token.style.background = colour;
    box.append(token);
  }

  function draw() {
    const tokens = model.get("tokens");
    box.hidden = !tokens.length;
    prompt.textContent = model.get("prompt");
    if (!tokens.length) box.replaceChildren(prompt); // a new text begins
    const shown = box.children.length - 1; // without the prompt
    tokens.slice(shown).forEach((token, place) => addToken(token, shown + place));
    mark();
  }

  function mark() {
    for (const old of box.querySelectorAll("[aria-selected]")) old.ariaSelected = null;
    const token = box.querySelector(`[data-index='${model.get("selected")}']`);
    if (token) token.ariaSelected = "true";
    box.setAttribute("aria-activedescendant", token?.id ?? "");
  }

  const listeners = { tokens: draw, selected: mark };
  for (const [name, act] of Object.entries(listeners)) model.on(`change:${name}`, act);
  draw();
  return () => {
    for (const [name, act] of Object.entries(listeners)) model.off(`change:${name}`, act);
  };
}

export default { render };
