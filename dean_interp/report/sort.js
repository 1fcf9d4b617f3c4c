// A click on a heading sorts a table by that column, each part of it by itself; a second click turns the order round.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.style.cursor = "pointer";
    head.tabIndex = 0;
    const value = row => (row.cells[column]?.textContent ?? "").trim().replace(/−/g, "-");
    const sort = () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      for (const part of table.tBodies) {
        // The row that names the part stays first.
        const rows = [...part.rows].filter(row => !row.classList.contains("part"));
        rows.sort((a, b) => {
          const [x, y] = [value(a), value(b)], [p, q] = [parseFloat(x), parseFloat(y)];
          const order = Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q;
          return down ? -order : order;
        });
        part.append(...rows);
      }
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
