(() => {
  const box = document.getElementById("tip");
  const visible = (mark) => mark.getBoundingClientRect().width > 0;

  // Tips: a text, and a placement as a strip of cells.
  const cells = (placement) => {
    const strip = document.createElement("span");
    strip.className = "strip";
    for (const [, count, name] of placement.matchAll(/(\d*)([A-Za-z][^\s]*)/g)) {
      for (let i = 0; i < (count || 1); i++) {
        strip.append(Object.assign(document.createElement("i"), { className: `k-${name[0]}` }));
      }
    }
    return strip;
  };
  let shown = null;
  const hide = () => { box.hidden = true; shown = null; };
  const show = (mark) => {
    box.replaceChildren(...(mark.dataset.placement ? [cells(mark.dataset.placement)] : []), mark.getAttribute("aria-label"));
    box.hidden = false;
    shown = mark;
    const at = mark.getBoundingClientRect(), own = box.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left + at.width / 2 - own.width / 2), innerWidth - own.width - 8);
    const above = at.top - own.height - 10;
    box.style.left = `${left}px`;
    box.style.top = `${above > 8 ? above : at.bottom + 10}px`;
  };
  for (const figure of document.querySelectorAll("figure svg")) {
    // One mark of a figure is in the tab order; arrow keys go on to its neighbours.
    const marks = [...figure.querySelectorAll(".tip")];
    marks.forEach((mark, index) => {
      mark.tabIndex = index ? -1 : 0;
      mark.addEventListener("pointerenter", () => show(mark));
      mark.addEventListener("pointerleave", hide);
      mark.addEventListener("focus", () => show(mark));
      mark.addEventListener("blur", hide);
      mark.addEventListener("click", (event) => {
        event.stopPropagation();
        show(mark);
        pick(mark.id.match(/^pareto-(?:wide|narrow)-point-(\d+)$/)?.[1]);
      });
      mark.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") hide();
        if (event.key === "Enter" || event.key === " ") mark.dispatchEvent(new MouseEvent("click"));
        if (!step && event.key !== " ") return;
        event.preventDefault();
        if (step) marks[(index + step + marks.length) % marks.length].focus();
      });
    });
  }
  document.addEventListener("click", hide);
  addEventListener("scroll", hide, { passive: true });

  // The budget moves the recommendation: its sentences, its commands, and the ring in the front's figure.
  const slider = document.getElementById("budget");
  const choices = [...document.querySelectorAll(".choice")];
  const choose = () => {
    const index = Number(slider.value);
    choices.forEach((choice, i) => { choice.hidden = i !== index; });
    const told = choices[index];
    const words = told.dataset.budget + (slider.dataset.best === slider.value ? ": recommended" : "");
    document.querySelector(".budget output").textContent = words;
    slider.setAttribute("aria-valuetext", words);
    for (const width of ["wide", "narrow"]) {
      const ring = document.querySelector(`#pareto-${width}-ring use`);
      const point = document.querySelector(`#pareto-${width}-point-${told.dataset.rank} use`);
      if (ring && point) for (const name of ["x", "y"]) ring.setAttribute(name, point.getAttribute(name));
    }
  };
  const pick = (rank) => {
    const index = choices.findIndex((choice) => choice.dataset.rank === rank);
    if (slider && index >= 0) { slider.value = index; choose(); }
  };
  if (slider) {
    document.querySelector(".budget").hidden = false;
    slider.addEventListener("input", choose);
    choose();
  }
  for (const button of document.querySelectorAll(".copy")) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.previousElementSibling.textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
  // Paper has no folds.
  addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details")) fold.open = true; });
})();
