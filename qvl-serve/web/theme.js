/* theme.js - light, dark or the system's, before the first paint.
 * Job: set data-theme and the style of code. Input: localStorage "qvl.theme". Output: window.qvlTheme. */
(() => {
  const order = ["auto", "light", "dark"];
  const media = matchMedia("(prefers-color-scheme: dark)");
  const read = () => { try { return localStorage.getItem("qvl.theme") || "auto"; } catch { return "auto"; } };
  function apply() {
    const chosen = read(), dark = chosen === "dark" || (chosen === "auto" && media.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    let link = document.getElementById("code-style");
    if (!link) {
      link = Object.assign(document.createElement("link"), { id: "code-style", rel: "stylesheet" });
      document.head.append(link);
    }
    const href = `/static/highlight-${dark ? "dark" : "light"}.css`;
    if (!link.href.endsWith(href)) link.href = href;
    document.dispatchEvent(new CustomEvent("theme", { detail: chosen }));
  }
  media.addEventListener("change", apply);
  window.qvlTheme = {
    get: read,
    next() {
      try { localStorage.setItem("qvl.theme", order[(order.indexOf(read()) + 1) % order.length]); } catch { /* private mode: for this page only */ }
      apply();
    },
  };
  apply();
})();
