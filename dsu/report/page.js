"use strict";
(() => {
  const { metrics, groups } = JSON.parse(document.getElementById("data").textContent);
  const PER_PAGE = 48;
  // A strip holds these panels side by side; the first is missing if the image is not known.
  const PANELS = ["image", "ground truth", "prediction", "errors"];
  const KINDS = ["all images", "with an object", "without an object"];
  const at = (id) => document.getElementById(id);
  const lightbox = at("lightbox");

  /** State: a group (one set of one run), the order of its images, the page, the open image. */
  let group = groups[0];
  let order = [];
  let page = 0;
  let open = -1;

  const unique = (values) => [...new Set(values)];

  function fill(select, values, label = (value) => value) {
    select.replaceChildren(...values.map((value) => new Option(label(value), value)));
    select.closest("label").hidden = values.length < 2;
  }

  const metric = () => metrics.find(({ key }) => key === at("metric").value);
  const plain = (key) => key.replace("_", " ");
  const figure = (value) => (value === null ? "–" : value.toFixed(3));

  /** Sort and filter again, then show the first page. */
  function arrange() {
    const wanted = at("filter").value.trim().toLowerCase();
    const { key, lower } = metric();
    const scores = group.scores[key];
    const kind = KINDS.indexOf(at("kind").value);
    order = group.names.map((_, index) => index);
    const empty = new Set(group.empty);
    if (kind > 0) order = order.filter((index) => empty.has(index) === (kind === 2));
    if (wanted) order = order.filter((index) => group.names[index].toLowerCase().includes(wanted));
    const direction = (at("order").value === "worst") === lower ? -1 : 1;
    if (at("order").value === "name") {
      const collator = new Intl.Collator("en", { numeric: true });
      order.sort((a, b) => collator.compare(group.names[a], group.names[b]));
    } else {
      // Images without a score come last; ties keep the order of the set.
      order.sort((a, b) => (scores[a] === null) - (scores[b] === null) || direction * (scores[a] - scores[b]) || a - b);
    }
    page = 0;
    show();
  }

  function show() {
    const pages = Math.max(1, Math.ceil(order.length / PER_PAGE));
    const start = page * PER_PAGE;
    const shown = order.slice(start, start + PER_PAGE);
    at("cards").replaceChildren(...shown.map((index, offset) => card(index, start + offset)));
    const total = group.names.length;
    const number = (value) => value.toLocaleString("en");
    const images = `${number(total)} ${total === 1 ? "image" : "images"}`;
    at("count").textContent = order.length === total ? images : `${number(order.length)} of ${images}`;
    at("page").textContent = `${page + 1} of ${pages}`;
    at("previous-page").disabled = page === 0;
    at("next-page").disabled = page === pages - 1;
    document.querySelector(".pager").hidden = pages === 1;
  }

  /** The panels of one image; each shows its part of the strip. */
  function panels(index, describe) {
    const [source, width, height, count] = group.strips[index];
    return PANELS.slice(-count).map((name, place) => {
      const image = new Image();
      image.loading = "lazy";
      image.decoding = "async";
      image.alt = describe ? `${group.names[index]}: ${name}` : "";
      image.style.setProperty("--ratio", width / height);
      image.style.objectPosition = `${(100 * place) / (count - 1)}% 0`;
      image.src = source;
      const panel = document.createElement("span");
      panel.className = "panel";
      panel.append(image);
      return [name, panel];
    });
  }

  function card(index, position) {
    const item = at("card").content.cloneNode(true);
    const button = item.querySelector("button");
    const name = group.names[index];
    const { key, html } = metric();
    const value = figure(group.scores[key][index]);
    button.setAttribute("aria-label", `${name}, ${plain(key)} ${value}`);
    button.addEventListener("click", () => enlarge(position));
    const box = item.querySelector(".panels");
    box.dataset.panels = group.strips[index][3];
    box.append(
      ...panels(index, false).map(([name, panel]) => {
        const heading = document.createElement("span");
        heading.className = "heading";
        heading.textContent = name;
        const column = document.createElement("span");
        column.className = "column";
        column.append(heading, panel);
        return column;
      }),
    );
    item.querySelector(".name").textContent = name;
    item.querySelector(".name").title = name;
    // The metric's markup comes from dsu, never from a user's name.
    item.querySelector(".score").innerHTML = `${html} <b>${value}</b>`;
    return item;
  }

  function enlarge(position) {
    open = position;
    const index = order[position];
    at("lightbox-name").textContent = group.names[index];
    at("lightbox-place").textContent = `${(position + 1).toLocaleString("en")} of ${order.length.toLocaleString("en")}`;
    at("lightbox-panels").dataset.panels = group.strips[index][3];
    at("lightbox-panels").replaceChildren(
      ...panels(index, true).map(([name, panel]) => {
        const holder = document.createElement("figure");
        const caption = document.createElement("figcaption");
        caption.textContent = name;
        holder.append(caption, panel);
        return holder;
      }),
    );
    at("lightbox-scores").replaceChildren(
      ...metrics.map(({ key, html, lower }) => {
        const entry = document.createElement("div");
        entry.innerHTML = `<dt>${html} ${lower ? "↓" : "↑"}</dt><dd>${figure(group.scores[key][index])}</dd>`;
        return entry;
      }),
    );
    at("lightbox-previous").disabled = position === 0;
    at("lightbox-next").disabled = position === order.length - 1;
    if (!lightbox.open) lightbox.showModal();
  }

  function move(by) {
    if (open + by >= 0 && open + by < order.length) enlarge(open + by);
  }

  /** The group that both selects name; another set may not have been evaluated for the same run. */
  function choose() {
    const set = at("set").value;
    const runs = groups.filter((candidate) => candidate.set === set).map(({ run }) => run);
    const before = at("run").value;
    fill(at("run"), runs);
    if (runs.includes(before)) at("run").value = before;
    group = groups.find((candidate) => candidate.set === set && candidate.run === at("run").value);
    const mixed = group.empty.length > 0 && group.empty.length < group.names.length;
    const kind = at("kind").value;
    fill(at("kind"), mixed ? KINDS : KINDS.slice(0, 1));
    if (mixed && kind) at("kind").value = kind;
    arrange();
  }

  fill(at("set"), unique(groups.map(({ set }) => set)));
  fill(at("metric"), metrics.map(({ key }) => key), plain);
  for (const id of ["set", "run"]) at(id).addEventListener("change", choose);
  for (const id of ["kind", "metric", "order"]) at(id).addEventListener("change", arrange);
  at("filter").addEventListener("input", arrange);
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const [id, by] of [["previous-page", -1], ["next-page", 1]]) {
    at(id).addEventListener("click", () => {
      page += by;
      show();
      at("gallery").scrollIntoView();
    });
  }
  at("lightbox-close").addEventListener("click", () => lightbox.close());
  at("lightbox-previous").addEventListener("click", () => move(-1));
  at("lightbox-next").addEventListener("click", () => move(1));
  lightbox.addEventListener("click", (event) => event.target === lightbox && lightbox.close());
  // Of the whole document: a button that is pressed at the last image is disabled and loses the focus.
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && lightbox.open) {
      event.preventDefault();
      move(by);
    }
  });
  // Back to the card of the image that was shown last, on whatever page it is.
  lightbox.addEventListener("close", () => {
    const wanted = Math.floor(open / PER_PAGE);
    if (wanted !== page) {
      page = wanted;
      show();
    }
    at("cards").querySelectorAll("button")[open % PER_PAGE]?.focus();
  });
  choose();
})();
