"use strict";
(() => {
  const get = (id) => document.getElementById(id);
  const caption = get("caption"), count = Number(get("review").dataset.count), saved = [];
  let item = null;

  const edited = () => item !== null && caption.value !== item.text;

  function trouble(message) {
    get("trouble").textContent = message;
    get("trouble").hidden = !message;
  }

  async function ask(route, options) {
    const reply = await fetch(route, options);
    const answer = await reply.json();
    if (!reply.ok) throw new Error(answer.error);
    return answer;
  }

  function show(one, state) {
    item = one;
    get("place").textContent = `${one.n + 1} of ${count}`;
    get("name").textContent = one.name;
    caption.value = one.text;
    caption.disabled = Boolean(one.problem);
    get("gone").hidden = true;
    const image = get("image");
    image.alt = one.name;
    image.hidden = false;
    const source = `image?n=${one.n}`;
    if (image.getAttribute("src") !== source) image.src = source;
    get("state").textContent = state || "";
    trouble(one.problem);
    get("undo").disabled = !saved.length;
    history.replaceState(null, "", "#" + (one.n + 1));
    if (!one.problem) caption.focus();
  }

  async function go(from, step, state) {
    if (edited()) return trouble("This caption is not saved: Enter saves it, Esc cancels.");
    const query = new URLSearchParams({ from: ((from % count) + count) % count, step, contains: get("contains").value });
    if (get("missing").checked) query.set("missing", "1");
    try {
      show(await ask("item?" + query), state);
    } catch (error) {
      trouble(`${error.message}.`);
    }
  }

  async function put(one, text, digest) {
    return ask("save", { method: "POST", body: JSON.stringify({ n: one.n, text, digest }) });
  }

  let saving = Promise.resolve();
  const inTurn = (action) => { saving = saving.then(action); return saving; };

  const save = () => inTurn(async () => {
    if (!item || item.problem) return;
    let state = "Unchanged.";
    if (edited()) {
      const before = item;
      try {
        item = await put(item, caption.value, item.digest);
      } catch (error) {
        return trouble(`Not saved: ${error.message}.`);
      }
      caption.value = item.text;
      saved.push({ before, after: item });
      state = `Saved ${item.file}.`;
    }
    await go(item.n + 1, 1, state);
  });

  const undo = () => inTurn(async () => {
    const last = saved.pop();
    if (!last) return;
    try {
      const one = await put(last.after, last.before.there ? last.before.text : null, last.after.digest);
      show(one, "Taken back.");
    } catch (error) {
      trouble(`Not taken back: ${error.message}.`);
    }
  });

  function cancel() {
    if (item) caption.value = item.text;
    trouble(item ? item.problem : "");
    get("state").textContent = "Cancelled.";
  }

  document.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    const control = event.ctrlKey || event.metaKey;
    const at = event.target, inCaption = at === caption;
    if (event.key === "Enter" && inCaption && !event.shiftKey && !control && !event.altKey) {
      event.preventDefault();
      if (!event.repeat) save();
    } else if (event.key === "Escape") {
      cancel();
    } else if (control && event.key.toLowerCase() === "z" && !event.shiftKey && !edited() && at !== get("contains")) {
      event.preventDefault();
      undo();
    } else if (event.key === "PageDown" || event.key === "PageUp") {
      event.preventDefault();
      const step = event.key === "PageDown" ? 1 : -1;
      inTurn(() => go(item.n + step, step));
    }
  });
  get("review").addEventListener("submit", (event) => { event.preventDefault(); save(); });
  get("cancel").addEventListener("click", cancel);
  get("undo").addEventListener("click", undo);
  get("previous").addEventListener("click", () => inTurn(() => go(item.n - 1, -1)));
  get("next").addEventListener("click", () => inTurn(() => go(item.n + 1, 1)));
  get("contains").addEventListener("change", () => inTurn(() => go(item ? item.n : 0, 1)));
  get("missing").addEventListener("change", () => inTurn(() => go(item ? item.n : 0, 1)));
  get("image").addEventListener("error", () => {
    get("image").hidden = true;
    get("gone").hidden = false;
    get("gone").textContent = "This image cannot be read.";
  });
  addEventListener("beforeunload", (event) => { if (edited()) event.preventDefault(); });
  go(Math.max(0, (Number(location.hash.slice(1)) || 1) - 1), 1);
})();
