// Show structures with 3Dmol.js in the element `name`, with a button for each in `name-buttons`.
// models: [{atoms: [[symbol, x, y, z, colour, radius], …], edges: [[x, y, z, x, y, z], …]}, …] in Å.
function showStructures(name, models) {
  const box = document.getElementById(name);
  const instead = document.getElementById(name + "-fallback");
  let viewer = null;
  try {
    viewer = $3Dmol.createViewer(box, { backgroundColor: "white" });
  } catch (error) {
    viewer = null;
  }
  if (!viewer) { // no WebGL
    box.hidden = true;
    instead.hidden = false;
    return;
  }
  let turned = false; // what the reader has turned stays so when another structure is shown
  let shown = 0;
  const show = (number) => {
    shown = number;
    const model = models[number];
    viewer.removeAllModels();
    viewer.removeAllShapes();
    const drawn = viewer.addModel();
    drawn.addAtoms(model.atoms.map((a, i) => ({ elem: a[0], x: a[1], y: a[2], z: a[3], serial: i, bonds: [], bondOrder: [] })));
    model.atoms.forEach((a, i) => drawn.setStyle({ serial: i }, { sphere: { radius: a[5], color: a[4] } }));
    model.edges.forEach((e) => viewer.addLine({
      start: { x: e[0], y: e[1], z: e[2] }, end: { x: e[3], y: e[4], z: e[5] }, color: "gray",
    }));
    if (!turned) {
      viewer.setView([0, 0, 0, 0, 0, 0, 0, 1]);
      viewer.rotate(-75, "x");
      viewer.zoomTo();
      turned = true;
    }
    viewer.render();
    buttons.forEach((button) => button.classList.toggle("shown", button.dataset.model === String(number)));
  };
  const buttons = document.querySelectorAll("#" + name + "-buttons button");
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; };
  buttons.forEach((button) => button.addEventListener("click", () => {
    const playing = timer !== null;
    stop();
    if (button.dataset.model !== undefined) {
      show(Number(button.dataset.model));
    } else if (!playing) { // there and back
      let step = 1;
      timer = setInterval(() => {
        if (shown + step < 0 || shown + step >= models.length) step = -step;
        show(shown + step);
      }, 350);
    }
  }));
  show(0);
}
