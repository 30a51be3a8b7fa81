// The rater's side of a human evaluation. It reads window.RLDIFF_STUDY (study.js), keeps the answers in localStorage
// under the study's id (and the rater's number, where queries are shared out), and exports them as a file. It loads nothing but the pictures.
"use strict";

(() => {
  const study = window.RLDIFF_STUDY;
  const element = (id) => document.getElementById(id);
  if (!study) {
    showWarning("study.js is missing: copy the whole folder.");
    return;
  }
  const KEY = `rldiff-human-eval:${study.id}${study.number ? `:${study.number}` : ""}`;
  /** Below this many pixels across, pictures are enlarged with hard edges. */
  const SMALL = 128;
  /** Longer descriptions are set in smaller letters. */
  const LONG = 90;
  /** Of still longer ones this many characters are shown; the rest comes where one points at them. */
  const LONGEST = 600;
  /** What the two sides are called, as in the answers. */
  const SIDES = { left: "A (left)", right: "B (right)" };
  const KINDS = { pair: "Two images of", group: "Two sets of six images of" };

  /** {rater, session, started, at, answers: {query: {question: {answer, seconds}}}} or null before the start. */
  let state = read();
  /** Queries in this rater's order. */
  let order = state ? shuffled(state.session) : [];
  let shownAt = performance.now();

  // ---- what is kept in the browser

  function read() {
    try {
      const kept = JSON.parse(localStorage.getItem(KEY));
      const whole = kept && typeof kept.session === "string" && typeof kept.rater === "string" && kept.answers;
      return whole ? { ...kept, at: Number(kept.at) || 0 } : null;
    } catch {
      return null;
    }
  }

  function keep() {
    try {
      localStorage.setItem(KEY, JSON.stringify(state));
    } catch {
      showWarning("This browser does not keep your answers: export them before you close or reload this page.");
    }
  }

  function showWarning(text) {
    const warning = element("warning");
    warning.textContent = text;
    warning.hidden = false;
  }

  // ---- the order of the queries: as they come where they are this rater's own, else a function of the session, so that
  // ---- a reload finds the same

  function shuffled(session) {
    if (study.number) return study.queries;
    let word = 2166136261;
    for (const character of session) word = Math.imul(word ^ character.charCodeAt(0), 16777619);
    const below = (n) => {
      word = (word + 0x6d2b79f5) | 0;
      let mixed = Math.imul(word ^ (word >>> 15), 1 | word);
      mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
      return Math.floor((((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296) * n);
    };
    const mix = (queries) => {
      for (let last = queries.length - 1; last > 0; last--) {
        const other = below(last + 1);
        [queries[last], queries[other]] = [queries[other], queries[last]];
      }
      return queries;
    };
    const ofForm = (form) => study.queries.filter((query) => query.form === form);
    return [...mix(ofForm("pair")), ...mix(ofForm("group"))];
  }

  function newSession() {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  }

  // ---- what has been answered

  const questionsOf = (query) => study.forms[query.form].questions;
  const answersTo = (query) => state.answers[query.id] || {};
  const isAnswered = (query) => questionsOf(query).every((question) => answersTo(query)[question.id]);
  const countAnswered = () => order.filter(isAnswered).length;

  // ---- the views

  function show(view) {
    for (const id of ["start", "query", "finish"]) element(id).hidden = id !== view;
    element("open-guidelines").hidden = view === "start";
    element("progress-box").hidden = !state;
    window.scrollTo(0, 0);
    if (state) showProgress();
  }

  function showProgress() {
    const answered = countAnswered();
    element("progress").max = order.length;
    element("progress").value = answered;
    element("progress-text").textContent = `${answered} of ${order.length} answered`;
  }

  function make(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function guidelines() {
    const own = element("guidelines-own");
    if (own) return [own.content.cloneNode(true)];
    const forms = Object.keys(KINDS).filter((form) => study.queries.some((query) => query.form === form));
    return [...forms, "general"].map((name) => element(`guidelines-${name}`).content.cloneNode(true));
  }

  function showStart() {
    element("start-guidelines").replaceChildren(...guidelines());
    // whoever got a number need not think of a name
    element("rater").value = study.number || "";
    show("start");
  }

  function showQuery(at, focus = true) {
    state.at = Math.max(0, Math.min(at, order.length - 1));
    keep();
    const query = order[state.at];
    element("query").dataset.query = query.id;
    element("kind").textContent = `Query ${state.at + 1} of ${order.length}. ${KINDS[query.form]}`;
    const prompt = query.prompt.replace(/[\s\p{Cc}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]+/gu, " ");
    const shown = Array.from(prompt).length > LONGEST ? `${Array.from(prompt).slice(0, LONGEST).join("")}…` : prompt;
    element("prompt").textContent = `“${shown}”`;
    element("prompt").title = shown === prompt ? "" : query.prompt;
    element("prompt").classList.toggle("long", query.prompt.length > LONG);
    element("pictures").replaceChildren(figure(query, "left"), figure(query, "right"));
    element("questions").replaceChildren(...questionsOf(query).map((question) => fieldset(query, question)));
    element("back").disabled = state.at === 0;
    show("query");
    mark(query);
    shownAt = performance.now();
    preload(order[state.at + 1]);
    if (focus) element("main").focus({ preventScroll: true });
  }

  function figure(query, side) {
    const single = query[side].length === 1;
    const name = `${single ? "Image" : "Set"} ${SIDES[side]}`;
    const pictures = query[side].map((path, index) => {
      const number = single ? "" : `, number ${index + 1}`;
      const image = make("img", {
        src: path, width: study.width, height: study.height, alt: `${name}${number}`, draggable: false,
      });
      const button = make("button", { type: "button", className: "picture", title: "Enlarge" }, image);
      image.addEventListener("error", () => {
        button.replaceChildren(make("p", { className: "missing", textContent: `${path} did not load` }));
        showWarning("An image did not load. Reload this page; if it stays away, answer “Did not load” and go on.");
      });
      button.addEventListener("click", () => zoom(single ? [path] : query[side], name));
      return button;
    });
    const box = make("div", { className: single ? "" : "set" }, ...pictures);
    if (study.width < SMALL) box.classList.add("small");
    return make("figure", {}, make("figcaption", { textContent: name }), box);
  }

  function fieldset(query, question) {
    const answers = question.answers.map(([answer, words], index) => {
      const input = make("input", {
        type: "radio", name: question.id, value: answer, checked: answersTo(query)[question.id]?.answer === answer,
      });
      input.addEventListener("change", () => record(query, question, answer));
      return make("label", {}, input, make("span", { textContent: words }), make("kbd", { textContent: index + 1, ariaHidden: true }));
    });
    const hint = make("p", { className: "hint", id: `hint-${question.id}`, textContent: question.hint });
    const box = make("fieldset", { id: `question-${question.id}` }, make("legend", { textContent: question.text }), hint,
      make("div", { className: "answers" }, ...answers));
    box.setAttribute("aria-describedby", hint.id);
    return box;
  }

  function preload(query) {
    if (query) [...query.left, ...query.right].forEach((path) => { new Image().src = path; });
  }

  function zoom(paths, name) {
    const box = element("zoom-pictures");
    box.className = paths.length > 1 ? "set" : "";
    if (study.width < SMALL) box.classList.add("small");
    box.replaceChildren(...paths.map((path, index) =>
      make("img", { src: path, alt: `${name}${paths.length > 1 ? `, number ${index + 1}` : ""}` })));
    element("zoom").showModal();
  }

  // ---- answering

  function record(query, question, answer) {
    const seconds = Math.round(performance.now() - shownAt) / 1000;
    state.answers[query.id] = { ...answersTo(query), [question.id]: { answer, seconds } };
    keep();
    showProgress();
    mark(query);
  }

  /** The question that the number keys answer: the one in focus, else the first without an answer. */
  function current(query) {
    const focused = document.activeElement?.closest("fieldset");
    const questions = questionsOf(query);
    return questions.find((question) => focused && focused.id === `question-${question.id}`)
      || questions.find((question) => !answersTo(query)[question.id]);
  }

  function mark(query) {
    const now = current(query);
    for (const question of questionsOf(query)) {
      element(`question-${question.id}`).classList.toggle("current", question === now);
    }
    element("next").disabled = !isAnswered(query);
    element("next").textContent = state.at === order.length - 1 ? "Finish" : "Next";
  }

  function answerByKey(number) {
    const query = order[state.at];
    const question = current(query);
    if (!question || !question.answers[number]) return;
    const inputs = element(`question-${question.id}`).querySelectorAll("input");
    inputs[number].checked = true;
    record(query, question, question.answers[number][0]);
    // on to the next question without an answer, or to the button
    const open = questionsOf(query).find((other) => !answersTo(query)[other.id]);
    const target = open ? element(`question-${open.id}`).querySelector("input") : element("next");
    target.focus();
    mark(query);
  }

  function next() {
    if (!isAnswered(order[state.at])) return;
    if (state.at + 1 < order.length) showQuery(state.at + 1);
    else showFinish();
  }

  // ---- the end

  function showFinish() {
    const answered = countAnswered();
    const open = order.findIndex((query) => !isAnswered(query));
    const complete = open < 0;
    element("finish-heading").textContent = complete ? "Thank you. All queries are answered." : "Paused";
    element("finish-text").textContent = complete
      ? "Export your answers and send the file to whoever gave you these pages."
      : `${answered} of ${order.length} queries are answered. You can go on now or later, in this browser; or export ` +
        "what there is, if you do not want to go on. Send one file only: the last.";
    element("resume").textContent = complete ? "Look at my answers again" : "Go on";
    element("resume").onclick = () => showQuery(complete ? 0 : open);
    element("export").disabled = answered === 0 && !order.some((query) => state.answers[query.id]);
    element("exported").textContent = "";
    element("export-text").value = exportText();
    show("finish");
    element("main").focus({ preventScroll: true });
  }

  function exportText() {
    const answers = order.flatMap((query) => questionsOf(query).flatMap((question) => {
      const given = answersTo(query)[question.id];
      return given ? [{ query: query.id, question: question.id, ...given }] : [];
    }));
    const votes = {
      format: study.votesFormat, study: study.id, rater: state.rater, ...(study.number && { number: study.number }),
      session: state.session,
      started: state.started, exported: new Date().toISOString(), answers,
    };
    return `${JSON.stringify(votes, null, 1)}\n`;
  }

  function exportFile() {
    const rater = state.rater.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "rater";
    const name = `votes-${rater}-${state.session.slice(0, 8)}.json`;
    const text = exportText();
    element("export-text").value = text;
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    element("exported").textContent = `Saved as ${name}, where your browser puts downloads.`;
  }

  // ---- events

  element("title").textContent = study.title;
  document.title = study.title;
  // a link in the guidelines leads away from the answers: into another tab
  for (const template of document.querySelectorAll("template")) {
    for (const link of template.content.querySelectorAll("a[href]")) Object.assign(link, { target: "_blank", rel: "noreferrer" });
  }
  element("dialog-guidelines").replaceChildren(...guidelines());

  element("start-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const rater = element("rater").value.trim();
    if (!rater) return;
    state = { rater, session: newSession(), started: new Date().toISOString(), at: 0, answers: {} };
    order = shuffled(state.session);
    showQuery(0);
  });
  element("questions").addEventListener("submit", (event) => event.preventDefault());
  element("questions").addEventListener("focusin", () => mark(order[state.at]));
  element("next").addEventListener("click", next);
  element("back").addEventListener("click", () => showQuery(state.at - 1));
  element("pause").addEventListener("click", showFinish);
  element("export").addEventListener("click", exportFile);
  element("open-guidelines").addEventListener("click", () => element("guidelines").showModal());
  element("restart").addEventListener("click", () => element("confirm").showModal());
  element("confirm").addEventListener("close", () => {
    if (element("confirm").returnValue !== "yes") return;
    try {
      localStorage.removeItem(KEY);
    } catch { /* nothing was kept */ }
    state = null;
    showStart();
  });
  // a click beside a dialog closes it
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close("no"); });
  }

  // another tab with this study wrote: go on from what it wrote
  window.addEventListener("storage", (event) => { if (event.key === KEY) location.reload(); });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (!state || event.target.matches("input:not([type=radio]), textarea")) return;
    if (event.key.toLowerCase() === "g") {
      element("guidelines").showModal();
      event.preventDefault();
      return;
    }
    if (element("query").hidden) return;
    const onButton = event.target.closest("button, a, summary");
    if (/^[1-4]$/.test(event.key)) {
      answerByKey(Number(event.key) - 1);
    } else if (event.key === "Enter" && !onButton) {
      next();
    } else if (event.key === "Backspace" && state.at > 0) {
      showQuery(state.at - 1);
    } else {
      return;
    }
    event.preventDefault();
  });

  if (!state) showStart();
  else if (order.every(isAnswered)) showFinish();
  else showQuery(state.at, false);
})();
