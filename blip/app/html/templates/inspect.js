"use strict";
(() => {
  const get = (id) => document.getElementById(id);
  const form = get("filters"), names = ["text", "least", "most", "source", "verdict", "status", "rule", "shard"];
  let after = "", count = 0, turn = 0;

  function element(tag, css, text) {
    const made = document.createElement(tag);
    if (css) made.className = css;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function card(row) {
    const made = element("article", "card");
    if (row.image) {
      const image = element("img");
      image.loading = "lazy";
      image.alt = row.key;
      image.src = `image?pid=${encodeURIComponent(row.pid)}&row=${row.row}`;
      image.addEventListener("error", () => image.replaceWith(element("p", "gone dim", "the image no longer exists")));
      made.append(image);
    }
    const body = element("div", "body");
    if (!row.image) body.append(element("p", "first", row.status), element("p", "dim", row.detail));
    for (const one of row.texts) {
      const text = element("div", "text" + (one.kept ? " kept" : ""));
      const verdict = element("div", "verdict");
      verdict.append(element("b", "", one.kept ? "kept" : "dropped"),
        element("span", "score", `${one.label}${one.score === null ? "" : " " + one.score.toFixed(3)}`));
      const quote = element("q", "", one.text);
      quote.dir = "auto";
      text.append(verdict, quote, element("span", "label", one.reason.replace(/^itm /, "")));
      body.append(text);
    }
    if (row.rules.length) body.append(element("p", "dim", "rules: " + row.rules.join(", ")));
    body.append(element("p", "dim", `${row.where} ${row.key}`));
    made.append(body);
    return made;
  }

  function asked() {
    const pairs = names.map((name) => [name, form.elements[name].value.trim()]).filter(([, value]) => value);
    return new URLSearchParams(pairs);
  }

  async function load(first) {
    const mine = ++turn, query = asked();
    if (first) {
      after = "";
      count = 0;
      get("cards").replaceChildren();
    }
    get("more").hidden = true;
    get("found").textContent = "Searching…";
    if (after) query.set("after", after);
    try {
      const reply = await fetch("cards?" + query);
      const answer = await reply.json();
      if (mine !== turn) return;
      if (!reply.ok) throw new Error(answer.error);
      get("trouble").hidden = true;
      get("cards").append(...answer.cards.map(card));
      after = answer.after;
      count += answer.cards.length;
      const rows = count === 1 ? "1 row" : count.toLocaleString("en") + " rows";
      get("found").textContent = after ? `${count ? "The first " + rows : "No row yet"}; ${answer.searched} of ${answer.parts} parts searched` :
        `${count ? rows : "No row"} ${count === 1 ? "fits" : count ? "fit" : "fits"}; all ${answer.parts} parts searched`;
      get("more").hidden = !after;
    } catch (error) {
      if (mine !== turn) return;
      get("found").textContent = "";
      get("trouble").textContent = `Not found: ${error.message}`;
      get("trouble").hidden = false;
    }
  }

  function read() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name of names) form.elements[name].value = given.get(name) || "";
    load(true);
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const hash = "#" + asked();
    if (hash === location.hash) load(true);
    else location.hash = hash;
  });
  form.addEventListener("reset", () => setTimeout(() => form.requestSubmit()));
  for (const choice of form.querySelectorAll("select")) choice.addEventListener("change", () => form.requestSubmit());
  addEventListener("hashchange", read);
  get("more").addEventListener("click", () => load(false));
  read();
})();
