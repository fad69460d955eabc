"use strict";
// The web page of a server. It calls /predict like any client, and reads /metrics once per second while the page is visible.
const at = (id) => document.getElementById(id);
const history = [];  // one entry per second of the last minute: {time, inputs, groups, requests, seconds, stages}
let served = {};  // the tasks of /info by name
const SECONDS = 60;
const BEST = 3;  // scores that are shown before "more"
const SAMPLES = [
  "A gripping film from start to finish.",
  "The plot is thin, but I enjoyed every minute of it.",
  "Two hours that felt like four.",
  "The battery died after a week, and nobody answered my letters.",
];

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  if (at("token").value) headers.Authorization = `Bearer ${at("token").value}`;
  const reply = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  if (reply.status === 401) at("token-entry").hidden = false;
  if (!reply.ok) {
    const failure = await reply.json().catch(() => ({}));
    throw new Error(failure.error || `the server answered ${reply.status}`);
  }
  return reply;
}

function cell(row, text) {
  const made = row.insertCell();
  made.dataset.label = row.closest("table").tHead.rows[0].cells[made.cellIndex].textContent;  // for narrow screens
  made.textContent = text;
  return made;
}

function scoreLines(ranking) {
  const lines = ranking.map(({ label, score }) => {
    const line = document.createElement("div");
    line.className = "score";
    line.style.setProperty("--share", `${100 * score}%`);
    line.textContent = `${label} ${score.toFixed(3)}`;
    return line;
  });
  if (lines.length <= BEST) return lines;
  const others = document.createElement("details"), title = document.createElement("summary");
  title.textContent = `${lines.length - BEST} more`;
  others.append(title, ...lines.slice(BEST));
  return [...lines.slice(0, BEST), others];
}

function answeredBy(method, stage, fellBack) {
  if (fellBack) return "fell back to the plain model";
  if (method === "siso") return "plain model";
  return Number(stage) > 1 ? `${method}, stage ${stage}` : method;
}

// exact: the rankings of the plain model alone, or null.
function show(texts, rankings, headers, exact) {
  const [widths, methods, groups, stages, alone] = ["width", "method", "group", "stage", "fallback"].map(
    (name) => headers.get(`x-revmux-${name}`)?.split(",") ?? texts.map(() => "–"),  // large replies do not have them
  );
  const body = at("answers").tBodies[0];
  body.replaceChildren();
  texts.forEach((text, index) => {
    const row = body.insertRow();
    cell(row, text);
    cell(row, rankings[index][0].label);
    cell(row, "").append(...scoreLines(rankings[index]));
    cell(row, widths[index]);
    cell(row, groups[index]);
    cell(row, answeredBy(methods[index], stages[index], alone[index] === "true"));
    if (!exact) return;
    const other = body.insertRow();
    other.className = "exact";
    cell(other, "");
    cell(other, exact[index][0].label).classList.toggle("differs", exact[index][0].label !== rankings[index][0].label);
    cell(other, "").append(...scoreLines(exact[index]));
    cell(other, "1");
    cell(other, "");
    cell(other, "plain model, exact");
  });
  at("answers").hidden = false;
  const time = (name) => `${headers.get(`x-${name}-time`)} ms`;
  at("status").textContent = `${texts.length} texts answered in ${time("total")} (${time("queue")} in the queue, ${time("inference")} in the model)`;
}

async function classify(event) {
  event.preventDefault();
  const texts = at("texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (!texts.length) return;
  const button = at("ask").querySelector("button[type=submit]");
  button.disabled = true;
  at("status").className = "";
  try {
    const body = { inputs: texts.map((text) => [text]) };
    if (at("task").value) body.task = at("task").value;
    if (at("width").value) body.max_multiplex = Number(at("width").value);
    const reply = await ask("predict", body);
    const exact = at("compare").checked ? await ask("predict", { ...body, max_multiplex: 1 }) : null;
    show(texts, await reply.json(), reply.headers, exact && await exact.json());
    if (exact) at("status").textContent += `; the plain model alone took ${exact.headers.get("x-inference-time")} ms in the model`;
  } catch (failure) {
    at("status").className = "error";
    at("status").textContent = failure.message;
  } finally {
    button.disabled = false;
  }
}

// The sum of a metric over all replicas, and the number of its lines.
function total(page, name) {
  let sum = 0, lines = 0;
  for (const line of page.split("\n")) {
    if (line.startsWith(name + "{") || line.startsWith(name + " ")) {
      sum += Number(line.slice(line.lastIndexOf(" ") + 1));
      lines += 1;
    }
  }
  return { sum, lines };
}

// The number of classification requests of all replicas, and the sum of their seconds.
function requestTimes(page) {
  const found = { count: 0, sum: 0 };
  for (const [, kind, labels, value] of page.matchAll(/^revmux_http_request_seconds_(count|sum)\{(.*)\} (\S+)$/gm)) {
    if (/route="(\/|[^"]*\/(predict|classify|infer))"/.test(labels)) found[kind] += Number(value);
  }
  return found;
}

// The answers of all replicas by task and stage, as {"task\nstage": number}.
function answersByStage(page) {
  const found = {};
  for (const [, labels, value] of page.matchAll(/^revmux_ladder_inputs_total\{(.*)\} (\S+)$/gm)) {
    const named = Object.fromEntries([...labels.matchAll(/(\w+)="([^"]*)"/g)].map(([, name, text]) => [name, text]));
    const key = `${named.task}\n${named.stage}`;
    found[key] = (found[key] || 0) + Number(value);
  }
  return found;
}

function showStages(then, now) {
  const body = at("stages").tBodies[0];
  body.replaceChildren();
  for (const [name, task] of Object.entries(served)) {
    const stages = [0, ...new Set(task.adapters.filter((adapter) => adapter.used).map((adapter) => adapter.stage))].sort((a, b) => a - b);
    const gained = stages.map((stage) => Math.max(0, (now[`${name}\n${stage}`] || 0) - (then[`${name}\n${stage}`] || 0)));
    const all = gained.reduce((sum, one) => sum + one, 0);
    stages.forEach((stage, index) => {
      const systems = task.adapters.filter((adapter) => adapter.used && adapter.stage === stage);
      const row = body.insertRow();
      cell(row, index ? "" : name);
      cell(row, stage);
      cell(row, stage ? systems.map((system) => `${system.method}, N = ${system.num_inputs}`).join(" / ") : "plain model");
      cell(row, stage ? systems.map((system) => system.relative_cost.toFixed(2)).join(" / ") : "1.00");
      cell(row, gained[index]);
      cell(row, all ? `${Math.round(100 * gained[index] / all)}%` : "–");
    });
  }
  at("stages").hidden = !body.rows.length;
}

// Show the values of the last minute, of which null means that there was none.
function draw(name, values, digits) {
  const known = values.filter((value) => value !== null), last = values[values.length - 1];
  const top = Math.max(...known, 0);
  const points = values.map((value, index) =>
    value === null ? "" : `${300 - 300 * (values.length - 1 - index) / (SECONDS - 1)},${76 - 72 * value / (top || 1)}`);
  at(`${name}-line`).setAttribute("points", points.filter(Boolean).join(" "));
  at(`${name}-top`).textContent = known.length ? top.toFixed(digits) : "–";
  return last === null ? "–" : last.toFixed(digits);
}

async function watch() {
  if (!document.hidden) {
    try {
      const page = await (await ask("metrics")).text();
      const { count: requests, sum: seconds } = requestTimes(page);
      history.push({
        requests,
        seconds,
        time: performance.now(),
        inputs: total(page, "revmux_inputs_total").sum,
        groups: total(page, "revmux_groups_total").sum,
        stages: answersByStage(page),
      });
      while (history.length > SECONDS + 1) history.shift();
      const steps = history.slice(1).map((now, index) => {
        const then = history[index];
        // A replica that stops takes its counts with it.
        const [inputs, groups, requests] = ["inputs", "groups", "requests"].map((name) => Math.max(0, now[name] - then[name]));
        return {
          rate: 1000 * inputs / (now.time - then.time),
          width: groups ? inputs / groups : null,
          latency: requests ? Math.max(0, 1000 * (now.seconds - then.seconds) / requests) : null,
        };
      });
      showStages(history[0].stages, history[history.length - 1].stages);
      at("waiting").textContent = total(page, "revmux_queue_inputs").sum;
      at("replicas").textContent = total(page, "revmux_queue_limit").lines;
      if (steps.length) {
        at("throughput").textContent = draw("throughput", steps.map((step) => step.rate), 0);
        at("mean-width").textContent = draw("width", steps.map((step) => step.width), 2);
        at("latency").textContent = draw("latency", steps.map((step) => step.latency), 1);
      }
    } catch (failure) {
      at("throughput").textContent = "–";
    }
  }
  setTimeout(watch, 1000);
}

async function describe() {
  try {
    const info = await (await ask("info")).json();
    served = info.tasks;
    const tasks = Object.keys(served);
    at("model").textContent = `${info.model_id}, ${info.model_dtype} on ${info.device}`;
    const chosen = at("task").value;
    at("task").replaceChildren(...tasks.map((name) => new Option(name, name, false, name === chosen)));
    at("task-choice").hidden = tasks.length < 2;
    const widths = new Set(Object.values(served).flatMap((task) => task.group_widths));
    at("width").replaceChildren(new Option("automatic", ""), ...[...widths].sort((a, b) => a - b).map((width) => new Option(width, width)));
  } catch (failure) {
    at("status").textContent = failure.message;
  }
}

at("ask").addEventListener("submit", classify);
at("sample").addEventListener("click", () => {
  at("texts").value = SAMPLES.join("\n");
  at("texts").focus();
});
at("texts").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
at("token").addEventListener("change", describe);
describe();
watch();
