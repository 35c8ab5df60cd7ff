"use strict";
const { kinds, perKind, folder, clusters } = JSON.parse(document.getElementById("data").textContent);
const KEYS = {
  size: (a, b) => b.size - a.size,
  confidence: (a, b) => b.p - a.p,
  name: (a, b) => a.name.localeCompare(b.name),
};
const number = new Intl.NumberFormat("en-US", { maximumFractionDigits: 1 });
const percent = (share) => `${number.format(100 * share)}%`;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function place(tile, cluster, kind, column) {
  const sheet = String(cluster).padStart(5, "0");
  tile.style.backgroundImage = `url("sheets/${sheet}.jpg")`;
  tile.style.backgroundSize = `${100 * perKind}% ${100 * kinds.length}%`;
  const x = (100 * column) / (perKind - 1);
  const y = (100 * kind) / (kinds.length - 1);
  tile.style.backgroundPosition = `${x}% ${y}%`;
}

// Sheets are fetched when their card comes near the window.
const nearby = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      nearby.unobserve(target);
      for (const tile of target.querySelectorAll("button")) {
        const { cluster, kind, column } = tile.dataset;
        place(tile, cluster, kind, column);
      }
    }
  },
  { rootMargin: "600px" },
);

function drawCard(cluster, id) {
  const card = element("article");
  card.id = `cluster-${id}`;
  const head = element("header");
  head.append(element("h2", "", cluster.name), element("p", "size", number.format(cluster.size)));
  const facts = element("p", "facts", `mean probability ${percent(cluster.p)}`);
  if (cluster.label !== undefined) {
    facts.append(` · ${percent(cluster.purity)} are `, element("b", "", cluster.label));
  }
  const nouns = element("ul", "nouns");
  nouns.ariaLabel = "Other nouns";
  nouns.append(...cluster.nouns.map((noun) => element("li", "", noun)));
  card.append(head, facts, nouns);
  kinds.forEach((title, kind) => {
    const pictures = cluster.pictures.filter((picture) => picture[0] === kind);
    if (!pictures.length) return;
    const row = element("div", "row");
    row.style.gridTemplateColumns = `repeat(${perKind}, 1fr)`;
    row.role = "group";
    row.ariaLabel = title;
    pictures.forEach(([, name, probability], column) => {
      const tile = element("button", "tile");
      tile.type = "button";
      tile.ariaLabel = `${name}, probability ${percent(probability)}`;
      tile.title = name;
      Object.assign(tile.dataset, { cluster: id, kind, column });
      // One stop for the tab key a card; arrows go on from there.
      tile.tabIndex = kind + column ? -1 : 0;
      row.append(tile);
    });
    card.append(element("h3", "", title), row);
  });
  nearby.observe(card);
  return card;
}

const cards = document.getElementById("cards");
clusters.forEach((cluster, id) => {
  cluster.card = drawCard(cluster, id);
  cluster.words = [cluster.name, ...cluster.nouns, cluster.label ?? ""].join("\n").toLowerCase();
});

const search = document.getElementById("search");
const tools = search.form;
function arrange() {
  const wanted = search.value.trim().toLowerCase();
  const order = [...clusters].sort(KEYS[tools.elements.sort.value]);
  let shown = 0;
  for (const { card, words } of order) {
    card.hidden = !words.includes(wanted);
    shown += !card.hidden;
  }
  cards.replaceChildren(...order.map(({ card }) => card));
  const all = number.format(clusters.length);
  document.getElementById("count").textContent = wanted ? `${number.format(shown)} of ${all}` : "";
}
tools.addEventListener("input", arrange);
tools.addEventListener("submit", (event) => event.preventDefault());
arrange();

const dialog = document.getElementById("picture");
function show({ cluster, kind, column }) {
  const { name, pictures } = clusters[cluster];
  const ofKind = pictures.filter((picture) => picture[0] === Number(kind));
  const [, uri, probability, nextId, nextProbability] = ofKind[column];
  place(document.getElementById("picture-tile"), cluster, kind, column);
  document.getElementById("picture-uri").textContent = folder + uri;
  const next = element("a", "", clusters[nextId].name);
  next.href = `#cluster-${nextId}`;
  next.addEventListener("click", () => dialog.close());
  document
    .getElementById("picture-facts")
    .replaceChildren(
      `${percent(probability)} ${name}; next is `,
      next,
      `, ${percent(nextProbability)}`,
    );
  dialog.showModal();
}
cards.addEventListener("click", ({ target }) => {
  if (target.matches("button.tile")) show(target.dataset);
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});

const STEPS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: perKind, ArrowUp: -perKind };
cards.addEventListener("keydown", (event) => {
  const step = STEPS[event.key];
  const card = event.target.closest("article");
  if (!step || !event.target.matches("button.tile")) return;
  const tiles = [...card.querySelectorAll("button.tile")];
  const to = tiles[tiles.indexOf(event.target) + step];
  if (!to) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input[type=search]")) return;
  event.preventDefault();
  search.focus();
});
