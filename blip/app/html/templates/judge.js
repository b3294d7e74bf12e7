"use strict";
(() => {
  const get = (id) => document.getElementById(id);
  const place = get("judging"), served = place.dataset.served, key = "openblip audit " + place.dataset.draw;
  const items = [...document.querySelectorAll(".item")], ids = items.map((item) => item.dataset.id);
  const words = { y: "yes", n: "no", s: "skipped" };
  let at = 0, answers = new Map(JSON.parse(get("labels").textContent).filter(([, answer]) => answer in words));
  if (!served) {
    try {
      const kept = JSON.parse(localStorage.getItem(key) || "[]").filter(([id, answer]) => ids.includes(id) && answer in words);
      if (kept.length) answers = new Map(kept);
    } catch (error) { /* the browser keeps nothing: the download has all answers */ }
  }

  function show(said) {
    items.forEach((item, i) => { item.hidden = i !== at; });
    const answer = answers.get(ids[at]);
    get("progress").textContent = `${answers.size} of ${ids.length}`;
    get("answered").textContent = `judged; this is number ${at + 1}` + (answer ? `, answered: ${words[answer]}` : "");
    get("done").value = answers.size;
    get("undo").disabled = !answers.size;
    get("finished").hidden = answers.size < ids.length;
    for (const button of document.querySelectorAll("[data-answer]")) {
      button.setAttribute("aria-pressed", String(button.dataset.answer === answer));
    }
    get("spoken").textContent = (said ? said + ". " : "") + items[at].querySelector(".said").textContent;
  }

  function keep() {
    try { localStorage.setItem(key, JSON.stringify([...answers])); } catch (error) { /* see above */ }
  }

  async function save(id, answer) {
    if (!served) {
      if (answer) { answers.delete(id); answers.set(id, answer); } else answers.delete(id);
      keep();
      return true;
    }
    const trouble = get("trouble");
    try {
      const reply = await fetch("label", { method: "POST", body: JSON.stringify({ id, match: answer }) });
      if (!reply.ok) throw new Error((await reply.json()).error);
    } catch (error) {
      trouble.textContent = `Not saved: ${error.message}. Is the command still running? Try again.`;
      trouble.hidden = false;
      return false;
    }
    trouble.hidden = true;
    if (answer) { answers.delete(id); answers.set(id, answer); } else answers.delete(id);
    return true;
  }

  let saving = Promise.resolve();
  const inTurn = (action) => { saving = saving.then(action); return saving; };

  const answer = (value) => inTurn(async () => {
    if (!await save(ids[at], value)) return;
    for (let step = 1; step <= ids.length; step++) {
      const other = (at + step) % ids.length;
      if (!answers.has(ids[other])) { at = other; break; }
    }
    show(words[value]);
  });

  const undo = () => inTurn(async () => {
    const last = [...answers.keys()].pop();
    if (last === undefined || !await save(last, "")) return;
    at = ids.indexOf(last);
    show("undone");
  });

  const move = (by) => { at = (at + by + ids.length) % ids.length; show(); };

  function help() {
    const hidden = get("keys").hidden;
    get("keys").hidden = !hidden;
    get("help").setAttribute("aria-expanded", String(hidden));
  }

  function download() {
    const rows = ids.map((id) => `${id},${answers.get(id) || ""}\r\n`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(["id,match\r\n", ...rows], { type: "text/csv" }));
    link.download = "labels.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  const keys = { y: () => answer("y"), n: () => answer("n"), s: () => answer("s"), u: undo, "?": help,
    ArrowLeft: () => move(-1), ArrowRight: () => move(1) };
  document.addEventListener("keydown", (event) => {
    const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    event.preventDefault();
    action();
  });
  for (const button of document.querySelectorAll("[data-answer]")) {
    button.addEventListener("click", () => answer(button.dataset.answer));
  }
  get("undo").addEventListener("click", undo);
  get("previous").addEventListener("click", () => move(-1));
  get("next").addEventListener("click", () => move(1));
  get("help").addEventListener("click", help);
  if (get("download")) get("download").addEventListener("click", download);
  place.classList.add("active");
  get("controls").hidden = false;
  at = Math.max(0, ids.findIndex((id) => !answers.has(id)));
  show();
})();
