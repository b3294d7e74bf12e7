"use strict";
const slider = JSON.parse(document.getElementById("slider").textContent);
const number = n => n.toLocaleString("en");
const share = (n, all) => all ? " (" + (100 * n / all).toFixed(1) + "%)" : "";

for (const one of document.querySelectorAll(".needs-script")) one.hidden = false;

const marked = [...document.querySelectorAll(".marked")], download = document.getElementById("download");
const ids = () => [...new Set(marked.filter(box => box.checked).map(box => box.value))];
function count() {
  const n = ids().length;
  download.disabled = !n;
  download.textContent = n ? "Download " + number(n) + (n > 1 ? " ids" : " id") : "Download the ids of marked images";
}
for (const box of marked) box.addEventListener("change", () => {
  for (const other of marked) if (other.value === box.value) other.checked = box.checked;
  count();
});
download.addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([ids().join("\n") + "\n"], {type: "text/plain"}));
  link.download = "ids.txt";
  link.click();
});
count();

if (slider) {
  const input = document.getElementById("threshold"), least = document.getElementById("least");
  const counts = document.getElementById("counts"), command = document.getElementById("command");
  const texts = [...document.querySelectorAll("[data-upto]")].map(element => ({
    element, above: +element.dataset.above, upto: +element.dataset.upto,
    fate: element.querySelector(".fate"), why: element.querySelector(".why"), first: element.querySelector(".why").textContent,
  }));
  const decide = () => {
    const at = +input.value, value = slider.thresholds[at];
    let all = 0, kept = 0;
    const parts = slider.kinds.map(kind => {
      const n = kind.kept[at];
      all += kind.texts;
      kept += n;
      return number(n) + " of " + number(kind.texts) + " " + kind.name + share(n, kind.texts);
    });
    least.textContent = value.toFixed(3);
    command.textContent = slider.command + " " + value;
    counts.textContent = number(kept) + " of " + number(all) + " texts kept" + share(kept, all) + ": " + parts.join(", ");
    for (const one of texts) {
      const keeps = one.above < at && at <= one.upto;
      one.element.classList.toggle("kept", keeps);
      one.fate.textContent = keeps ? "kept" : "dropped";
      one.why.textContent = at === slider.now ? one.first
        : (at > one.upto ? "below " : "at least ") + value.toFixed(3) + (!keeps && at <= one.upto ? ", but the web text passes" : "");
    }
    for (const veil of document.querySelectorAll(".veil[data-span]")) veil.setAttribute("width", value * veil.dataset.span);
    for (const line of document.querySelectorAll(".threshold[data-span]"))
      for (const end of ["x1", "x2"]) line.setAttribute(end, +line.dataset.start + value * line.dataset.span);
  };
  document.getElementById("bar").hidden = false;
  input.addEventListener("input", decide);
  decide();
}
