"use strict";
for (const box of document.querySelectorAll("input[type=search]")) {
  const rows = [...box.closest("section").querySelectorAll("tbody tr")];
  const search = () => {
    const words = box.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const holds = (node) => words.every((word) => node.textContent.toLocaleLowerCase().includes(word));
    for (const row of rows) {
      row.hidden = !holds(row);
      for (const cell of row.querySelectorAll(".one")) cell.classList.toggle("miss", !holds(cell));
    }
    box.nextElementSibling.textContent = `${rows.filter((row) => !row.hidden).length} / ${rows.length}`;
  };
  box.parentElement.hidden = false;
  box.addEventListener("input", search);
  search();
}
