"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const root = document.documentElement;

  // Light and dark: the system's choice until the reader makes another, which is kept where the browser allows it.
  const theme = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  const say = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-label", `${theme.textContent} colours`); };
  try { const kept = localStorage.getItem("theme"); if (kept) root.dataset.theme = kept; } catch { /* not allowed */ }
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* not allowed */ }
    say();
  });
  system.addEventListener("change", say);
  say();

  // Tables sort by a click on a header: rising, falling, and as they were. What is no number comes after the numbers.
  const number = (text) => {
    const found = /^[≤±]?\s*(-?)([\d,]*\.?\d+(?:e[-+]?\d+)?|∞)/.exec(text);
    return found ? (found[1] ? -1 : 1) * (found[2] === "∞" ? Infinity : Number(found[2].replaceAll(",", ""))) : null;
  };
  const before = (a, b) => {
    const [x, y] = [number(a), number(b)];
    if (x !== null && y !== null) return x - y || a.localeCompare(b);
    return x === null && y === null ? a.localeCompare(b, "en", { numeric: true }) : x === null ? 1 : -1;
  };
  for (const table of all("table")) {
    const body = table.tBodies[0], original = [...body.rows], headers = all("thead th", table);
    headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => {
      const next = { ascending: "descending", descending: null }[header.getAttribute("aria-sort")];
      const order = next === undefined ? "ascending" : next;
      for (const other of headers) other.removeAttribute("aria-sort");
      if (order) header.setAttribute("aria-sort", order);
      const text = (row) => row.cells[column].textContent.trim();
      const sorted = order ? [...original].sort((a, b) => {
        const [x, y] = [text(a), text(b)];
        if (x === "—" || y === "—") return (x === "—") - (y === "—");
        return order === "ascending" ? before(x, y) : before(y, x);
      }) : original;
      body.append(...sorted);
    }));
  }

  // A point of a plot tells its name and values where it is pointed at. A plot is one stop of the Tab key; arrows go on.
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const show = (point) => {
    tip.textContent = point.getAttribute("aria-label");
    tip.hidden = false;
    const box = point.getBoundingClientRect(), width = tip.offsetWidth, height = tip.offsetHeight;
    const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), root.clientWidth - width - 8);
    const top = box.top - height - 6 < 0 ? box.bottom + 6 : box.top - height - 6;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${top + scrollY}px`;
  };
  for (const plot of all("figure svg")) {
    const points = all(".tip", plot).sort((a, b) => a.cx.baseVal.value - b.cx.baseVal.value);
    const go = (index) => {
      for (const point of points) point.setAttribute("tabindex", -1);
      points[index].setAttribute("tabindex", 0);
    };
    points.forEach((point, index) => {
      // The browser's own tooltip would come as well.
      point.querySelector("title").remove();
      point.addEventListener("mouseenter", () => show(point));
      point.addEventListener("mouseleave", hide);
      point.addEventListener("focus", () => { go(index); show(point); });
      point.addEventListener("blur", hide);
      point.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") hide();
        if (!step) return;
        event.preventDefault();
        points[(index + step + points.length) % points.length].focus();
      });
    });
    if (points.length) go(0);
  }

  // A slider shows one row of its data: the first two values as they are, the others as bars on one scale from zero.
  for (const slider of all(".slider")) {
    const { columns, rows, texts } = JSON.parse(slider.querySelector("script").textContent);
    const input = slider.querySelector("input"), list = slider.querySelector("dl");
    const text = slider.querySelector("textarea"), status = slider.querySelector("[role=status]");
    const most = Math.max(...rows.flatMap((row) => row.slice(2).map((cell) => number(cell) ?? 0)));
    const shown = columns.map((column, index) => {
      const name = document.createElement("dt"), value = document.createElement("dd"), bar = document.createElement("div");
      name.textContent = column;
      bar.setAttribute("aria-hidden", "true");
      if (index < 2) value.className = "main";
      else { bar.className = "bar"; bar.append(document.createElement("span")); }
      list.append(name, value, bar);
      return { value, fill: bar.firstElementChild };
    });
    const choose = () => {
      const row = rows[input.value];
      shown.forEach(({ value, fill }, index) => {
        value.textContent = row[index];
        if (fill) fill.style.width = `${most ? 100 * (number(row[index]) ?? 0) / most : 0}%`;
      });
      input.setAttribute("aria-valuetext", `${row[0]}; ${columns[1]}: ${row[1]}`);
      text.value = texts[input.value];
      status.textContent = "";
    };
    input.addEventListener("input", choose);
    slider.querySelector("button").addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text.value);
        status.textContent = "Copied";
      } catch {
        // Not allowed to pages of a disk everywhere: the text is marked, and the browser's own copying tried.
        text.select();
        status.textContent = document.execCommand("copy") ? "Copied" : "Marked: copy it with the keyboard";
      }
    });
    choose();
    slider.hidden = false;
  }

  // Tables below a section are folded; all are open for the printer, and where a link leads into one.
  const folds = all("main details"), unfold = document.getElementById("unfold");
  const set = (open) => {
    for (const fold of folds) fold.open = open;
    unfold.textContent = open ? "Hide all tables" : "Show all tables";
    unfold.setAttribute("aria-expanded", open);
  };
  unfold.addEventListener("click", () => set(unfold.getAttribute("aria-expanded") !== "true"));
  unfold.hidden = !folds.length;
  let closed = [];
  addEventListener("beforeprint", () => { closed = folds.filter((fold) => !fold.open); for (const fold of closed) fold.open = true; });
  addEventListener("afterprint", () => { for (const fold of closed) fold.open = false; });
  const reveal = () => { const target = document.getElementById(decodeURIComponent(location.hash.slice(1))); target?.closest("details")?.setAttribute("open", ""); };
  addEventListener("hashchange", reveal);
  reveal();

  // The contents say where the reader is, and are folded where there is little room.
  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  if (matchMedia("(max-width: 60rem)").matches) document.querySelector("nav details").open = false;
  const seen = new Set();
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) entry.isIntersecting ? seen.add(entry.target) : seen.delete(entry.target);
    const first = all("main section").find((section) => seen.has(section));
    for (const [id, link] of links) first && id === first.getAttribute("aria-labelledby") ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  }, { rootMargin: "0px 0px -60% 0px" });
  for (const section of all("main section")) watch.observe(section);
})();
