// What the page of lit-clip demo does: show a tab, send its form, and show what the model answers.
"use strict";

const tabs = [...document.querySelectorAll("nav button")];

function show(tab) {
  for (const each of tabs) {
    each.setAttribute("aria-selected", each === tab);
    document.getElementById(each.getAttribute("aria-controls")).hidden = each !== tab;
  }
}

function element(kind, text, ...children) {
  const made = document.createElement(kind);
  made.append(text, ...children);  // as text: names and captions are no HTML
  return made;
}

function shownClass([name, probability]) {
  const bar = document.createElement("i");
  bar.style.width = `${100 * probability}%`;
  const line = element("div", "", element("div", "", element("span", name), element("b", `${(100 * probability).toFixed(1)} %`)), bar);
  line.className = "class";
  return line;
}

function shownImage({ image, caption }) {
  const picture = new Image();
  picture.src = image;
  picture.alt = caption;
  return element("figure", picture, element("figcaption", caption));
}

async function send(form) {
  const [button, wrong, found] = ["button", ".wrong", ".found"].map((each) => form.querySelector(each));
  wrong.textContent = "";
  button.disabled = true;
  try {
    const response = await fetch(form.action, { method: "POST", body: new FormData(form) });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.detail);
    const images = Array.isArray(answer);
    const classes = images ? [] : Object.entries(answer).sort((a, b) => b[1] - a[1]).slice(0, 10);
    found.replaceChildren(...(images ? answer.map(shownImage) : classes.map(shownClass)));
    found.classList.toggle("images", images);
  } catch (error) {
    wrong.textContent = error.message;
    found.replaceChildren();
  } finally {
    button.disabled = false;
  }
}

function take(input, files) {
  if (!files.length) return;
  input.files = files;
  input.dispatchEvent(new Event("change"));
}

for (const tab of tabs) tab.addEventListener("click", () => show(tab));
for (const form of document.forms) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(form);
  });
  for (const text of form.querySelectorAll("textarea[rows='1']")) {
    text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
  }
}
for (const drop of document.querySelectorAll(".drop")) {
  const [input, picture, label] = drop.children;
  input.addEventListener("change", () => {
    URL.revokeObjectURL(picture.src);
    picture.hidden = !input.files.length;
    label.hidden = Boolean(input.files.length);
    if (picture.hidden) return;
    picture.src = URL.createObjectURL(input.files[0]);
    const needed = input.form.querySelector("textarea");  // the names or texts, which may come after the image
    if (!needed || needed.value.trim()) send(input.form);
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") take(input, event.dataTransfer.files);
    });
  }
}
document.addEventListener("paste", (event) => {
  const input = document.querySelector("form:not([hidden]) input[type=file]");
  if (input) take(input, event.clipboardData.files);
});
show(tabs[0]);
