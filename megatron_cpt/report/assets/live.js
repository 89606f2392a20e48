// A served page reloads when the files of its run have changed; the browser keeps the place on the page.
(() => {
  "use strict";
  const look = async () => {
    try {
      const answer = await fetch("/version", { cache: "no-store" });
      if (answer.ok && (await answer.text()) !== document.body.dataset.version) return location.reload();
    } catch {
      // The server has ended; the page stays as it is.
    }
    setTimeout(look, 2000);
  };
  setTimeout(look, 2000);
})();
