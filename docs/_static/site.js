// Tables of words, which are too wide for a telephone: each cell is told the name of its column, and
// site.css makes a card of each row. Tables of numbers stay as they are.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.docutils")) {
    const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent);
    const cells = [...table.querySelectorAll("tbody td")];
    if (cells.some((cell) => cell.cellIndex > 0 && cell.textContent.length > 25)) {
      table.classList.add("stacked");
      for (const cell of cells) cell.dataset.column = names[cell.cellIndex] ?? "";
    }
  }
});
