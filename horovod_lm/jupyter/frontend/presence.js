// Nothing to see: tells the kernel when a page begins and ends to show the widget it is a part of.

function render({ model, el }) {
  el.hidden = true;
  const answer = () => model.send({ kind: "here" });
  model.on("change:question", answer);
  model.send({ kind: "opened" });
  return () => {
    model.off("change:question", answer);
    model.send({ kind: "closed" });
  };
}

export default { render };
