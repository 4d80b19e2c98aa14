// Invisible: reports to the kernel when a page opens or closes a view, and answers pings.

function render({ model, el }) {
  el.hidden = true;
  const answer = () => model.send("pong");
  model.on("change:pings", answer);
  model.send("opened");
  return () => {
    model.off("change:pings", answer);
    model.send("closed");
  };
}

export default { render };
