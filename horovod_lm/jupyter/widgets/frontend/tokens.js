// Continuations, token by token: coloured, selected by clicks or keys.
// Token text is set as text, never as HTML.

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function legend(entries) {
  const line = element("div", "lm-legend", "probability of a token by the model: ");
  for (const [probability, colour] of entries) {
    const swatch = element("span", "lm-token", probability);
    swatch.style.background = colour;
    line.append(swatch, " ");
  }
  return line;
}

function render({ model, el }) {
  el.classList.add("lm-tokens");
  el.dataset.lmSuppressShortcuts = "true"; // otherwise JupyterLab handles the arrow keys
  const samples = element("div", "lm-samples");
  const plain = element("details", "lm-details");
  plain.append(element("summary", "", "plain text"), element("div", "lm-texts"));
  el.append(legend(model.get("legend")), samples, plain);
  const identity = Math.random().toString(36).slice(2); // unique among views
  let shown = null; // number of the continuation that is drawn

  function choose(sample, index) {
    const length = model.get("samples")[sample]?.length ?? 0;
    if (length) {
      model.send({ kind: "select", sample, index: Math.max(0, Math.min(length - 1, index)) });
    }
  }

  function onKey(event, sample) {
    const [chosen, index] = model.get("selected").length ? model.get("selected") : [sample, -1];
    const here = chosen === sample ? index : -1;
    const goTo = {
      ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: here + 10, ArrowUp: here - 10,
      Home: 0, End: Infinity,
    }[event.key];
    if (goTo === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    choose(sample, goTo === Infinity ? Number.MAX_SAFE_INTEGER : goTo);
  }

  function addSample(sample) {
    const box = element("div", "lm-sample");
    box.tabIndex = 0;
    box.setAttribute("role", "listbox");
    box.setAttribute("aria-label", `tokens of sample ${sample + 1}; arrow keys step through them`);
    const prompt = element("bdi", "lm-prompt", model.get("prompt"));
    box.append(prompt);
    box.addEventListener("keydown", (event) => onKey(event, sample));
    box.addEventListener("click", (event) => {
      const token = event.target.closest(".lm-token");
      if (token) choose(sample, Number(token.dataset.index));
    });
    samples.append(box);
    return box;
  }

  function addToken(box, sample, index, [text, probability, colour]) {
    const token = element("span", "lm-token", text);
    token.id = `lm-${identity}-${sample}-${index}`;
    token.dataset.index = index;
    token.setAttribute("role", "option");
    token.title = `probability ${probability}`;
    token.setAttribute("aria-label", `${text}, probability ${probability}`);
    token.style.background = colour;
    box.append(token);
  }

  function draw() {
    if (shown !== model.get("number")) {
      samples.replaceChildren();
      shown = model.get("number");
    }
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
    el.querySelectorAll(".lm-chosen").forEach((token) => {
      token.classList.remove("lm-chosen");
      token.removeAttribute("aria-selected");
    });
    [...samples.children].forEach((box, sample) => {
      const token = sample === chosen ? box.children[index + 1] : null; // after the prompt
      if (token) {
        token.classList.add("lm-chosen");
        token.setAttribute("aria-selected", "true");
        box.setAttribute("aria-activedescendant", token.id);
      } else {
        box.removeAttribute("aria-activedescendant");
      }
    });
  }

  function drawPlain() {
    plain.lastChild.replaceChildren(
      ...model.get("texts").map((text) => {
        const line = element("div", "lm-plain", text);
        line.dir = "auto";
        return line;
      }),
    );
    plain.hidden = !model.get("texts").length;
  }

  const listeners = { samples: draw, number: draw, selected: mark, texts: drawPlain };
  for (const [name, act] of Object.entries(listeners)) model.on(`change:${name}`, act);
  draw();
  drawPlain();
  return () => {
    for (const [name, act] of Object.entries(listeners)) model.off(`change:${name}`, act);
  };
}

export default { render };
