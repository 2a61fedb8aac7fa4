// Makes the pages live and quick. Without it everything works by plain forms and links.
"use strict";
(() => {
  const parse = (text) => new DOMParser().parseFromString(text, "text/html");
  const say = (kind, text) => {
    const note = document.createElement("p");
    note.className = `note ${kind}`;
    note.textContent = text;
    document.getElementById("notes").replaceChildren(note);
  };

  // Times in the reader's own zone.
  const dress = (root) => {
    for (const time of root.querySelectorAll("time[datetime]")) {
      const at = new Date(time.dateTime);
      if (!Number.isNaN(at.getTime())) time.title = at.toLocaleString();
    }
    for (const slider of root.querySelectorAll("input[data-shows]")) {
      slider.addEventListener("input", () => {
        document.getElementById(slider.dataset.shows).value = slider.value;
      });
    }
    for (const form of root.querySelectorAll("form[data-search]")) {
      for (const select of form.querySelectorAll("select")) {
        select.addEventListener("change", () => form.requestSubmit());
      }
    }
  };

  // --- parts that change by themselves ---------------------------------------------------------
  const busyWith = (part) => {
    const active = document.activeElement;
    return part.contains(active) && active.matches("input, textarea, select") || part.querySelector("form[data-working]");
  };
  const names = (root) => [...root.querySelectorAll("[data-live]")].map((each) => each.id).join(" ");
  const refresh = (fresh) => {
    const main = document.getElementById("main");
    if (names(main) !== names(fresh.getElementById("main")) && !busyWith(main)) {
      main.innerHTML = fresh.getElementById("main").innerHTML;
      dress(main);
    }
    for (const part of document.querySelectorAll("[data-live]")) {
      const other = fresh.getElementById(part.id);
      if (!other || other.innerHTML === part.innerHTML || busyWith(part)) continue;
      const focused = part.contains(document.activeElement) ? document.activeElement : null;
      const label = focused && (focused.getAttribute("aria-label") || focused.textContent);
      const opened = [...part.querySelectorAll("details")].map((each) => each.open);
      part.innerHTML = other.innerHTML;
      part.querySelectorAll("details").forEach((each, i) => { each.open = opened[i] ?? false; });
      dress(part);
      if (label) {
        const again = [...part.querySelectorAll("a, button, summary")]
          .find((each) => (each.getAttribute("aria-label") || each.textContent) === label);
        (again || document.getElementById("main")).focus({ preventScroll: true });
      }
    }
    const nav = fresh.querySelector("nav[aria-label=Pages]");
    const mine = document.querySelector("nav[aria-label=Pages]");
    if (nav && mine && !mine.contains(document.activeElement)) mine.firstElementChild.innerHTML = nav.firstElementChild.innerHTML;
  };
  const main = document.getElementById("main");
  let seen = null, asking = false, again = false;
  const look = async () => {
    if (asking) { again = true; return; }
    asking = true;
    try {
      const answer = await fetch(location.href.split("#")[0], { headers: { "X-Board": "refresh" } });
      if (answer.ok && !answer.redirected) refresh(parse(await answer.text()));
    } catch { /* the stream says when the server is back */ }
    asking = false;
    if (again) { again = false; look(); }
  };
  if (document.querySelector("[data-live]")) {
    const stream = new EventSource("/board/events");
    stream.addEventListener("changed", (event) => {
      // The first message tells what the page knows, unless something has changed since it was made.
      const now = JSON.parse(event.data);
      const known = seen === null ? now.state === main.dataset.state && now.event === Number(main.dataset.event) : seen === event.data;
      if (!known) look();
      seen = event.data;
      document.body.dataset.live = "yes";
    });
    addEventListener("pagehide", () => stream.close());
  }

  // --- forms that take a while -----------------------------------------------------------------
  document.addEventListener("submit", async (event) => {
    const form = event.target;
    if (form.dataset.busy === undefined) return;
    event.preventDefault();
    const button = event.submitter || form.querySelector("button");
    const data = new URLSearchParams(new FormData(form, event.submitter));
    const words = button.textContent, begun = Date.now();
    button.disabled = true;
    form.dataset.working = "yes"; // the part that it stands in is not made anew meanwhile
    const tick = setInterval(() => {
      button.textContent = `${form.dataset.busy} ${Math.round((Date.now() - begun) / 1000)} s`;
    }, 1000);
    button.textContent = form.dataset.busy;
    try {
      const answer = await fetch(form.action.split("#")[0], { method: "POST", body: data });
      const fresh = parse(await answer.text());
      const into = form.dataset.into && fresh.getElementById(form.dataset.into);
      if (into) {
        document.getElementById(form.dataset.into).innerHTML = into.innerHTML;
      } else {
        const where = answer.url.split("#")[0];
        if (where !== location.href.split("#")[0]) history.pushState(null, "", where);
        shown = place();
        document.title = fresh.title;
        document.getElementById("main").innerHTML = fresh.getElementById("main").innerHTML;
        dress(document.getElementById("main"));
        document.getElementById("main").focus({ preventScroll: true });
        const nav = fresh.querySelector("nav[aria-label=Pages]");
        if (nav) document.querySelector("nav[aria-label=Pages] ul").innerHTML = nav.firstElementChild.innerHTML;
      }
      document.getElementById("notes").replaceChildren(...fresh.getElementById("notes").childNodes);
      if (document.getElementById("notes").children.length) scrollTo({ top: 0 });
    } catch {
      say("error", "The server did not answer. Whether the change was made is shown here as soon as it is back.");
    }
    clearInterval(tick);
    delete form.dataset.working;
    button.disabled = false;
    button.textContent = words;
  });
  const place = () => location.pathname + location.search;
  let shown = place();
  addEventListener("popstate", () => {
    if (place() !== shown) location.reload(); // not for a link within the page
  });

  // --- the keyboard ------------------------------------------------------------------------------
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, select")) return;
    if (event.key === "/") {
      const search = document.getElementById("q");
      if (search) { event.preventDefault(); search.focus(); search.select(); }
    }
    if (event.key === "j" || event.key === "k") {
      const links = [...document.querySelectorAll(".facts h2 a")];
      const here = links.indexOf(document.activeElement);
      const next = links[Math.max(0, Math.min(links.length - 1, here + (event.key === "j" ? 1 : -1)))];
      if (next) next.focus();
    }
  });
  dress(document);
  // On a narrow screen the pages stand in one row that scrolls: this one is to be seen.
  const current = document.querySelector("nav[aria-label=Pages] [aria-current]");
  const row = current && current.closest("ul");
  if (row) row.scrollLeft = current.offsetLeft - (row.clientWidth - current.offsetWidth) / 2;
})();
