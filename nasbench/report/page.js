(() => {
  const box = document.getElementById("tip");
  let shown = null;
  const hide = () => { box.hidden = true; shown = null; };
  const show = (mark) => {
    box.textContent = mark.dataset.tip;
    box.hidden = false;
    shown = mark;
    const at = mark.getBoundingClientRect(), own = box.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left + at.width / 2 - own.width / 2), innerWidth - own.width - 8);
    const above = at.top - own.height - 8;
    box.style.left = `${left}px`;
    box.style.top = `${above > 8 ? above : at.bottom + 8}px`;
  };
  for (const mark of document.querySelectorAll(".tip")) {
    mark.addEventListener("pointerenter", () => show(mark));
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("click", (event) => { event.stopPropagation(); shown === mark && box.hidden ? hide() : show(mark); });
  }
  document.addEventListener("click", hide);
  addEventListener("scroll", hide, { passive: true });
})();
