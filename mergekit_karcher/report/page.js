const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.style.colorScheme ? root.style.colorScheme === "dark" : system.matches);
const config = {responsive: true, displaylogo: false, modeBarButtons: [["toImage"]]};

function draw() {
  const template = isDark() ? themes.dark : themes.white;
  document.querySelectorAll(".chart").forEach((place, index) => {
    const {data, layout} = figures[index];
    const font = {family: "system-ui, sans-serif"};
    // Without a drag mode a finger that moves over a chart scrolls the page.
    Plotly.react(place, data, {dragmode: false, font, ...layout, template}, config);
  });
}

document.getElementById("theme").addEventListener("click", () => {
  root.style.colorScheme = isDark() ? "light" : "dark";
  draw();
});
system.addEventListener("change", draw);
draw();
