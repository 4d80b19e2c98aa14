// Nothing to see: tells the kernel when a page begins and ends to show the widget it is a part of.

function render({ model, el }) {
  el.hidden = true;
  model.send({ kind: "opened" });
  return () => model.send({ kind: "closed" });
}

export default { render };
