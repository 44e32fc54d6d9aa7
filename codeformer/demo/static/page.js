"use strict";

const byId = (id) => document.getElementById(id);
const GONE = "The program does not answer. Is it still running? Its terminal says what happened.";
const CUT = "The program broke off before there was a result. Its terminal says why.";
// Photos in work at a time: one computes, and the next one is being read meanwhile.
const AT_ONCE = 2;

// ---- Talking to the program

async function ask(url, options = {}) {
  let reply;
  try {
    reply = await fetch(url, { method: "POST", ...options });
  } catch (failure) {
    throw failure.name === "AbortError" ? failure : new Error(GONE);
  }
  if (reply.ok) return reply;
  let message = `The program failed (status ${reply.status}). Its terminal says why.`;
  if (reply.headers.get("content-type")?.startsWith("application/json")) message = (await reply.json()).message;
  throw new Error(message);
}

async function askJson(url, options) {
  return (await ask(url, options)).json();
}

// Reads a line of JSON for each step; returns the last one.
async function follow(url, wanted, signal, onStep) {
  const reply = await ask(url, { body: JSON.stringify(wanted), signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (failure) {
      throw failure.name === "AbortError" ? failure : new Error(CUT);
    }
    if (part.done) throw new Error(CUT);
    const lines = (text + part.value).split("\n");
    text = lines.pop();
    for (const line of lines) {
      const step = JSON.parse(line);
      if (step.state === "failed") throw new Error(step.message);
      if (step.state === "done") return step;
      onStep(step);
    }
  }
}

function upload(file, signal) {
  return askJson(`/photos?name=${encodeURIComponent(file.name)}`, { body: file, signal });
}

async function sample() {
  const reply = await ask("/sample.jpg", { method: "GET" });
  return new File([await reply.blob()], "sample portrait.jpg", { type: "image/jpeg" });
}

const faces = (count) => `${count} face${count === 1 ? "" : "s"}`;

function describe(step) {
  if (step.state === "waiting") return "Waiting for its turn …";
  if (step.state === "finding") return "Looking for faces …";
  if (step.state === "comparing") return `Comparing: ${step.done} of ${step.of} runs are done …`;
  return `Restoring: ${step.done} of ${faces(step.of)} done …`;
}

function showProgress(bar, step) {
  bar.hidden = false;
  if (step.of) {
    bar.max = step.of;
    bar.value = step.done;
  } else {
    bar.removeAttribute("value");
  }
}

// ---- Photos

const settings = byId("settings");
const cards = new Set();
const queue = [];
let inWork = 0;

function chosen() {
  const values = Object.fromEntries(new FormData(settings));
  return { ...values, codeformer_fidelity: Number(values.codeformer_fidelity), strength: Number(values.strength) };
}

function enqueue(work) {
  return new Promise((resolve) => {
    queue.push(() => work().finally(resolve));
    next();
  });
}

function next() {
  if (inWork >= AT_ONCE || !queue.length) return;
  inWork += 1;
  queue.shift()().finally(() => {
    inWork -= 1;
    next();
  });
  next();
}

class Card {
  constructor(file) {
    this.file = file;
    this.out = new Set();
    this.element = byId("card").content.firstElementChild.cloneNode(true);
    this.part(".name").textContent = file.name;
    this.part(".remove").setAttribute("aria-label", `Remove ${file.name}`);
    this.part(".remove").addEventListener("click", () => this.remove());
    this.part(".stop").addEventListener("click", () => this.abort.abort());
    this.part(".boxes-shown input").addEventListener("change", (event) => {
      this.part(".boxes").hidden = !event.target.checked;
    });
    this.slide();
    cards.add(this);
    byId("cards").append(this.element);
  }

  part(selector) {
    return this.element.querySelector(selector);
  }

  say(text, isError = false) {
    const status = this.part(".status");
    status.textContent = text;
    status.classList.toggle("error", isError);
    this.part(".state").hidden = !text;
  }

  busy(isBusy) {
    this.part(".stop").hidden = this.part(".state progress").hidden = !isBusy;
    this.part(".viewer").classList.toggle("busy", isBusy);
    this.element.setAttribute("aria-busy", String(isBusy));
  }

  restore() {
    this.abort?.abort();
    const abort = (this.abort = new AbortController());
    this.say("Waiting for its turn …");
    this.busy(true);
    return enqueue(() => this.work(abort));
  }

  async work(abort) {
    try {
      abort.signal.throwIfAborted();
      if (!this.photo) {
        this.say("Reading …");
        this.photo = await upload(this.file, abort.signal);
      }
      this.wanted = chosen();
      const result = await follow(`/photos/${this.photo.id}/restore`, this.wanted, abort.signal, (step) => {
        this.say(describe(step));
        showProgress(this.part(".state progress"), step);
      });
      this.show(result);
      this.say("");
    } catch (failure) {
      if (this.abort !== abort) return;
      if (failure.name === "AbortError") this.say("Stopped. “Restore again” starts it once more.");
      else this.say(failure.message, true);
    } finally {
      if (this.abort === abort) this.busy(false);
      refresh();
    }
    if (this.out.size) this.paste();
  }

  // Faces in or out, and the strength, of the latest result; one request at a time, the last wish wins.
  async paste() {
    this.isStale = true;
    if (this.isPasting || !this.result) return;
    this.isPasting = true;
    this.part(".viewer").classList.add("busy");
    try {
      while (this.isStale) {
        this.isStale = false;
        this.wanted.strength = chosen().strength;
        const wish = { left_out: [...this.out], strength: this.wanted.strength };
        const links = await askJson(`/photos/${this.photo.id}/paste`, { body: JSON.stringify(wish) });
        await this.load(links);
      }
      this.say("");
    } catch (failure) {
      this.say(failure.message, true);
    } finally {
      this.isPasting = false;
      this.part(".viewer").classList.remove("busy");
      refresh();
    }
  }

  // The old picture stays until the new one is there.
  async load(links) {
    await new Promise((resolve) => {
      const picture = new Image();
      picture.onload = picture.onerror = resolve;
      picture.src = links.after;
    });
    this.part(".after").src = links.after;
    const download = this.part(".download");
    download.href = links.download;
    download.download = `${this.file.name.replace(/\.[^.]*$/, "")}_restored.jpg`;
  }

  show(result) {
    this.result = result;
    const { width, height, before } = this.photo;
    const viewer = this.part(".viewer");
    viewer.style.aspectRatio = `${width} / ${height}`;
    viewer.style.width = `min(100%, calc(74vh * ${width / height}), ${Math.max(width, 560)}px)`;
    this.part(".before").src = before;
    this.part(".before").alt = `${this.file.name} as it was`;
    this.part(".after").alt = `${this.file.name} restored`;
    this.load(result);
    this.out = new Set([...this.out].filter((number) => number <= result.faces.length));
    this.showFaces(result.faces);
    this.showNotes(result);
    // Made by the program's own templates, which escape every text.
    this.part(".times").innerHTML = result.times;
    this.part(".result").hidden = false;
  }

  showFaces(found) {
    const boxes = this.part(".boxes");
    const list = this.part(".faces .list");
    boxes.replaceChildren();
    list.replaceChildren();
    this.part(".faces").hidden = !found.length;
    this.part(".faces legend").textContent =
      `${faces(found.length)}: click or untick to leave out`;
    for (const face of found) {
      const [left, top, right, bottom] = face.box.map((value) => Math.min(Math.max(value, 0), 1));
      const box = document.createElement("div");
      box.className = "box";
      box.dataset.number = face.number;
      box.classList.toggle("inside", top < 0.05);
      box.style.left = `${left * 100}%`;
      box.style.top = `${top * 100}%`;
      box.style.width = `${(right - left) * 100}%`;
      box.style.height = `${(bottom - top) * 100}%`;
      const tag = document.createElement("span");
      // In a crowd there is no room for scores; the list has them.
      tag.textContent = found.length <= 8 ? `${face.number} · ${face.score.toFixed(3)}` : String(face.number);
      box.append(tag);
      boxes.append(box);

      const label = document.createElement("label");
      label.className = "check";
      const input = document.createElement("input");
      input.type = "checkbox";
      input.value = face.number;
      input.checked = !this.out.has(face.number);
      const size = document.createElement("small");
      size.textContent = `score ${face.score.toFixed(3)}, ${face.size[0]} × ${face.size[1]} px`;
      label.append(input, `Face ${face.number}`, size);
      list.append(label);
      const mark = () => box.classList.toggle("out", !input.checked);
      input.addEventListener("change", () => {
        mark();
        this.out[input.checked ? "delete" : "add"](face.number);
        this.paste();
      });
      box.addEventListener("click", () => {
        if (!this.wasDragged) input.click();
      });
      mark();
    }
  }

  showNotes(result) {
    const notes = [];
    if (!result.faces.length) notes.push("No face to restore was found; the photo was only encoded anew.");
    const reasons = new Map();
    for (const reason of result.skipped) reasons.set(reason, (reasons.get(reason) ?? 0) + 1);
    for (const [reason, count] of reasons) notes.push(`Not restored: ${faces(count)} (${reason}).`);
    if (result.losing_detail) {
      notes.push(`${faces(result.losing_detail)} larger than the 512 px that a face is restored at: the result may be softer than the photo.`);
    }
    this.part(".notes").replaceChildren(
      ...notes.map((text) => Object.assign(document.createElement("li"), { textContent: text })),
    );
  }

  // The range is for the keyboard and for screen readers, too; dragging in the picture moves it.
  slide() {
    const viewer = this.part(".viewer");
    const range = this.part(".slide input");
    const place = () => viewer.style.setProperty("--at", `${range.value}%`);
    const follow = (event) => {
      const { left, width } = viewer.getBoundingClientRect();
      range.value = (100 * (event.clientX - left)) / width;
      place();
    };
    range.addEventListener("input", place);
    let from = null;
    viewer.addEventListener("pointerdown", (event) => {
      from = event.clientX;
      this.wasDragged = false;
    });
    viewer.addEventListener("pointermove", (event) => {
      if (from === null) return;
      if (!this.wasDragged && Math.abs(event.clientX - from) > 4) {
        this.wasDragged = true;
        viewer.setPointerCapture(event.pointerId);
      }
      if (this.wasDragged) follow(event);
    });
    const end = () => (from = null);
    viewer.addEventListener("pointerup", end);
    viewer.addEventListener("pointercancel", end);
    viewer.addEventListener("dragstart", (event) => event.preventDefault());
    viewer.addEventListener("click", (event) => {
      if (!this.wasDragged && !event.target.closest(".box")) follow(event);
    });
  }

  remove() {
    this.abort?.abort();
    if (this.photo) ask("/forget", { body: JSON.stringify({ photos: [this.photo.id] }) }).catch(() => {});
    cards.delete(this);
    this.element.remove();
    byId("photos").focus();
    refresh();
  }
}

function add(files) {
  for (const file of files) new Card(file).restore();
  refresh();
}

function refresh() {
  byId("drop").classList.toggle("small", cards.size > 0);
  byId("try").hidden = cards.size > 0;
  const wish = chosen();
  const fields = ["restorer", "codeformer_fidelity", "runtime_profile", "stability_mode"];
  const others = [...cards].filter((card) => card.result && fields.some((name) => card.wanted[name] !== wish[name]));
  const isBusy = [...cards].some((card) => card.element.getAttribute("aria-busy") === "true");
  byId("again").hidden = !cards.size;
  byId("again").disabled = isBusy;
  byId("again-why").textContent = cards.size && !isBusy && others.length ? "The results below have other settings." : "";
  byId("fidelity-shown").value = wish.codeformer_fidelity;
  byId("strength-shown").value = wish.strength;
  byId("fidelity").disabled = !wish.restorer.split("+").includes("codeformer");
}

settings.addEventListener("input", refresh);
settings.addEventListener("submit", (event) => {
  event.preventDefault();
  for (const card of cards) card.restore();
  refresh();
});
byId("strength").addEventListener("change", () => {
  for (const card of cards) card.paste();
});
byId("photos").addEventListener("change", (event) => {
  add([...event.target.files]);
  event.target.value = "";
});
byId("sample").addEventListener("click", async () => {
  add([await sample()]);
  // The button has gone.
  byId("photos").focus();
});
window.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
window.addEventListener("dragleave", () => byId("drop").classList.remove("over"));
window.addEventListener("drop", (event) => {
  if (event.target.matches("input[type=file]:not(#photos)")) return;
  event.preventDefault();
  byId("drop").classList.remove("over");
  if (event.dataTransfer.files.length) {
    open("restore");
    add([...event.dataTransfer.files]);
  }
});
window.addEventListener("pagehide", () => {
  const photos = [...cards].filter((card) => card.photo).map((card) => card.photo.id);
  if (photos.length) navigator.sendBeacon("/forget", JSON.stringify({ photos }));
});

// ---- Tabs

const tabs = ["restore", "compare"];

function open(name) {
  for (const one of tabs) {
    const tab = byId(`tab-${one}`);
    tab.setAttribute("aria-selected", String(one === name));
    tab.tabIndex = one === name ? 0 : -1;
    byId(`panel-${one}`).hidden = one !== name;
  }
}

tabs.forEach((name, index) => {
  const tab = byId(`tab-${name}`);
  tab.addEventListener("click", () => open(name));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs[1 - index];
    open(other);
    byId(`tab-${other}`).focus();
  });
});

// ---- Comparison

let comparing = null;

function sayComparison(text, isError = false) {
  byId("compare-state").textContent = text;
  byId("compare-state").classList.toggle("error", isError);
}

byId("compare-sample").addEventListener("click", async () => {
  const files = new DataTransfer();
  files.items.add(await sample());
  byId("compare-photo").files = files.files;
});
byId("compare-stop").addEventListener("click", () => comparing?.abort());
byId("compare-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  const [photo] = byId("compare-photo").files;
  const [clean] = byId("compare-clean").files;
  if (!photo) {
    sayComparison("Choose a photo first.", true);
    byId("compare-photo").focus();
    return;
  }
  comparing = new AbortController();
  const { signal } = comparing;
  const bar = byId("compare-progress");
  const busy = (isBusy) => {
    byId("compare-go").disabled = isBusy;
    byId("compare-stop").hidden = bar.hidden = !isBusy;
  };
  const uploaded = [];
  busy(true);
  sayComparison("Reading …");
  try {
    for (const file of clean ? [photo, clean] : [photo]) uploaded.push((await upload(file, signal)).id);
    const price = byId("price").value;
    const wanted = {
      photo: uploaded[0],
      clean: uploaded[1] ?? null,
      restorers: [...form.querySelectorAll("[name=restorers]:checked")].map((input) => input.value),
      fidelities: [...form.querySelectorAll("[name=fidelities]:checked")].map((input) => Number(input.value)),
      price: price && `${price}/${byId("unit").value}`,
      runtime_profile: byId("compare-profile").value,
      stability_mode: byId("compare-mode").value,
    };
    const result = await follow("/compare", wanted, signal, (step) => {
      sayComparison(describe(step));
      showProgress(bar, step);
    });
    byId("comparison").innerHTML = result.html;
    sayComparison("Done. ");
    const link = Object.assign(document.createElement("a"), {
      href: result.file,
      download: "comparison.html",
      textContent: "Save this comparison as one HTML file",
    });
    byId("compare-state").append(link);
  } catch (failure) {
    sayComparison(failure.name === "AbortError" ? "Stopped." : failure.message, failure.name !== "AbortError");
  } finally {
    busy(false);
    if (uploaded.length) ask("/forget", { body: JSON.stringify({ photos: uploaded }) }).catch(() => {});
  }
});

refresh();
