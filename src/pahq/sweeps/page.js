"use strict";
{
  const body = document.querySelector("tbody");
  const rows = [...body.rows];
  const heads = [...document.querySelectorAll("th[data-key]")];
  const search = document.querySelector("#search");
  const choices = [...document.querySelectorAll("button[data-state]")];
  const order = document.querySelector("#order select");
  const turn = document.querySelector("#order button");
  const kept = new URLSearchParams(location.hash.slice(1)); // survives the reload of a page whose sweep goes on
  let key = kept.get("sort") ?? "", down = kept.get("down") === "1", state = kept.get("state") ?? "";
  search.value = kept.get("search") ?? "";

  const valueOf = (row) => row.dataset[key] ?? "";
  const compare = (a, b) => {
    const [x, y] = [valueOf(a), valueOf(b)];
    if (x === "" || y === "") return x === y ? 0 : x === "" ? 1 : -1; // what is not known comes last either way
    const [m, n] = [Number(x), Number(y)];
    const sign = Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n;
    return down ? -sign : sign;
  };

  const show = () => {
    body.append(...(key ? [...rows].sort(compare) : rows));
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let seen = 0;
    for (const row of rows) {
      const text = row.dataset.text;
      row.hidden = (state && row.dataset.state !== state) || !words.every((word) => text.includes(word));
      seen += row.hidden ? 0 : 1;
    }
    document.querySelector("#none").hidden = seen > 0;
    for (const head of heads) {
      const mine = head.dataset.key === key;
      head.setAttribute("aria-sort", mine ? (down ? "descending" : "ascending") : "none");
    }
    for (const choice of choices) choice.setAttribute("aria-pressed", String(choice.dataset.state === state));
    order.value = key;
    turn.textContent = down ? "▼" : "▲";
    const said = new URLSearchParams({ sort: key, down: down ? "1" : "", state, search: search.value });
    for (const name of [...said.keys()]) if (!said.get(name)) said.delete(name);
    history.replaceState(null, "", said.size ? `#${said}` : location.pathname + location.search);
  };

  for (const head of heads) {
    head.querySelector("button").addEventListener("click", () => {
      down = head.dataset.key === key && !down;
      key = head.dataset.key;
      show();
    });
  }
  for (const choice of choices) {
    choice.addEventListener("click", () => {
      state = choice.dataset.state === state ? "" : choice.dataset.state;
      show();
    });
  }
  order.addEventListener("change", () => { key = order.value; show(); });
  turn.addEventListener("click", () => { down = !down; show(); });
  search.addEventListener("input", show);
  if (document.documentElement.dataset.reload) setTimeout(() => location.reload(), 1000 * document.documentElement.dataset.reload);
  show();
}
