// Invisible: reports to the kernel when a page opens or closes a view, and answers pings.

function render({ model, el }) {
  el.hidden = true;
  const answer = () => model.send({ kind: "pong" });
  model.on("change:pings", answer);
  model.send({ kind: "opened" });
  return () => {
    model.off("change:pings", answer);
    model.send({ kind: "closed" });
  };
}

export default { render };
