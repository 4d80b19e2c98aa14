// Continuations, token by token: coloured, selected by clicks or keys.
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
  const samples = element("div", "lm-samples");
  el.append(legend, samples);
  const identity = Math.random().toString(36).slice(2); // unique among views
  let shown = null; // number of the continuation that is drawn

  function choose(sample, index) {
    const length = model.get("samples")[sample].length;
    if (length) model.send([sample, Math.max(0, Math.min(length - 1, index))]);
  }

  function onKey(event, sample) {
    if (!(event.key in KEYS) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const [chosen, index] = model.get("selected");
    choose(sample, (chosen === sample ? index : -1) + KEYS[event.key]);
  }

  function addSample(sample) {
    const label = `tokens of sample ${sample + 1}; arrow keys step through them`;
    const box = element("div", "lm-sample", "", { tabIndex: 0, role: "listbox", ariaLabel: label });
    box.append(element("bdi", "lm-prompt", model.get("prompt")));
    box.addEventListener("keydown", (event) => onKey(event, sample));
    box.addEventListener("click", (event) => {
      const token = event.target.closest(".lm-token");
      if (token) choose(sample, Number(token.dataset.index));
    });
    samples.append(box);
    return box;
  }

  function addToken(box, sample, index, [text, probability, colour]) {
    const title = `probability ${probability}`;
    const id = `lm-${identity}-${sample}-${index}`;
    const ariaLabel = `${text}, ${title}`;
    const token = element("span", "lm-token", text, { id, title, ariaLabel, role: "option" });
    token.dataset.index = index;
    token.style.background = colour;
    box.append(token);
  }

  function draw() {
    if (shown !== model.get("number")) samples.replaceChildren();
    shown = model.get("number");
    model.get("samples").forEach((tokens, sample) => {
      const box = samples.children[sample] ?? addSample(sample);
      for (let index = box.children.length - 1; index < tokens.length; index++) {
        addToken(box, sample, index, tokens[index]);
      }
    });
    mark();
  }

  function mark() {
    const [chosen, index] = model.get("selected");
    for (const old of samples.querySelectorAll("[aria-selected]")) old.ariaSelected = null;
    [...samples.children].forEach((box, sample) => {
      const token = sample === chosen ? box.children[index + 1] : null; // after the prompt
      if (token) token.ariaSelected = "true";
      box.setAttribute("aria-activedescendant", token?.id ?? "");
    });
  }

  const listeners = { samples: draw, number: draw, selected: mark };
  for (const [name, act] of Object.entries(listeners)) model.on(`change:${name}`, act);
  draw();
  model.send("opened");
  return () => {
    model.send("closed");
    for (const [name, act] of Object.entries(listeners)) model.off(`change:${name}`, act);
  };
}

export default { render };
