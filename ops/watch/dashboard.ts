/**
 * Checks the Grafana dashboard without a Grafana: `bun run ops/watch/dashboard.ts [--draw FILE.png]`.
 *
 * Its form is checked against what Grafana's import needs. Its queries are put to a real Prometheus (Debian's package) that
 * scrapes two relays with traffic: each must give numbers, whether the labels `instance` and `region` are the relay's own,
 * Prometheus' or Fly.io's. `--draw` paints the layout with those answers, with headless Chromium.
 */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { RelayHandle } from "../../server.ts";
import { openPage } from "../shared/browser.ts";
import { readFlags } from "../shared/flags.ts";
import { Client, testRelay } from "../shared/testing.ts";

type Place = { x: number; y: number; w: number; h: number };
type Threshold = { color: string; value: number | null };
type Target = { refId: string; expr: string; legendFormat?: string; instant?: boolean; datasource?: { uid?: string } };
/** The members of a panel that are looked at here. */
export type Panel = {
  id: number;
  type: string;
  title: string;
  description?: string;
  datasource?: { uid?: string };
  gridPos: Place;
  fieldConfig?: { defaults: { unit?: string; thresholds?: { steps: Threshold[] } } };
  targets?: Target[];
};
type Variable = { name: string; type: string; query: string | { query: string } };
/** The members of a dashboard that are looked at here; the format is Grafana's dashboard JSON model. */
export type Dashboard = {
  uid: string;
  title: string;
  id: number | null;
  schemaVersion: number;
  time: { from: string; to: string };
  templating: { list: Variable[] };
  annotations: { list: { name: string; expr: string; datasource: { uid?: string } }[] };
  panels: Panel[];
};

/** The dashboard as it is in the file. */
export const readDashboard = (): Promise<Dashboard> => Bun.file(new URL("../grafana-dashboard.json", import.meta.url)).json();

const isRow = (panel: Panel): boolean => panel.type === "row";

// ---------------------------------------------------------------------------------------------------------
// Form
// ---------------------------------------------------------------------------------------------------------

const COLUMNS = 24; // of Grafana's grid
const PANEL_TYPES = ["row", "stat", "timeseries", "bargauge", "geomap", "table"]; // part of every Grafana since 9
const UNITS = ["short", "s", "bytes", "binBps", "ops", "opm", "percentunit"]; // Grafana's ids for them
const SCHEMA_VERSION = 36; // Grafana 9; older schemas lack the data source as an object
const BUILT_IN = ["__rate_interval", "__interval", "__range"]; // variables that Grafana fills in itself

/** What Grafana's import, or somebody on duty, would stumble over; a line each, none where all is well. */
export function faults(dashboard: Dashboard): string[] {
  const found: string[] = [];
  const { uid, id, schemaVersion, title, time, templating, annotations, panels } = dashboard;
  if (!/^[\w-]{1,40}$/.test(uid)) found.push(`uid ${uid}: 1 to 40 letters, digits, - or _`);
  if (id !== null) found.push("id: null, or the import overwrites what has that id");
  if (!(schemaVersion >= SCHEMA_VERSION)) found.push(`schemaVersion: at least ${SCHEMA_VERSION}`);
  if (!title || !time?.from || !time.to) found.push("title and time are needed");

  const variables = new Map(templating.list.map((variable) => [variable.name, variable]));
  if (variables.get("datasource")?.type !== "datasource") found.push("templating: a data source variable is needed");
  for (const name of ["region", "instance"])
    if (variables.get(name)?.type !== "query") found.push(`templating: a query variable ${name} is needed`);

  const checkQuery = (where: string, expr: string, source: { uid?: string } | undefined) => {
    if (source?.uid !== "${datasource}") found.push(`${where}: the data source must be the variable`);
    for (const [, name = ""] of expr.matchAll(/\$\{?(\w+)/g))
      if (!variables.has(name) && !BUILT_IN.includes(name)) found.push(`${where}: no variable $${name}`);
    for (const [selector] of expr.matchAll(/\b(?:party_sockets|process)_\w+(?:\{[^}]*\})?/g))
      for (const filter of ['region=~"$region"', 'instance=~"$instance"'])
        if (!selector.includes(filter)) found.push(`${where}: ${selector} lacks ${filter}`);
  };
  for (const { name, expr, datasource } of annotations.list) checkQuery(`annotation ${name}`, expr, datasource);

  const ids = panels.map((panel) => panel.id);
  if (new Set(ids).size !== ids.length) found.push("panels: two have the same id");
  if (new Set(panels.map((panel) => panel.title)).size !== panels.length) found.push("panels: two have the same title");
  for (const panel of panels) {
    const where = `panel ${panel.title}`;
    const { x, y, w, h } = panel.gridPos;
    if (![x, y, w, h].every(Number.isInteger) || x < 0 || y < 0 || w < 1 || h < 1 || x + w > COLUMNS)
      found.push(`${where}: outside the grid of ${COLUMNS} columns`);
    if (!PANEL_TYPES.includes(panel.type)) found.push(`${where}: type ${panel.type} isn't a known one`);
    if (!panel.title) found.push(`panel ${panel.id}: no title`);
    if (isRow(panel)) continue;
    if (!/^[^.]+[^]*\.$/.test(panel.description ?? "")) found.push(`${where}: no sentence of help`);
    const { unit = "none", thresholds } = panel.fieldConfig?.defaults ?? {};
    if (!UNITS.includes(unit)) found.push(`${where}: unit ${unit} isn't a known one`);
    const [base, ...more] = thresholds?.steps ?? [];
    if (base?.value !== null) found.push(`${where}: thresholds must start with a colour for all below`);
    if (more.some(({ value }, i) => value === null || value <= (more[i - 1]?.value ?? -Infinity)))
      found.push(`${where}: thresholds must rise`);
    const targets = panel.targets ?? [];
    if (targets.length === 0) found.push(`${where}: no query`);
    if (new Set(targets.map(({ refId }) => refId)).size !== targets.length) found.push(`${where}: refId repeats`);
    for (const { expr, datasource } of targets) checkQuery(where, expr, datasource ?? panel.datasource);
  }
  panels.forEach((a, i) => {
    for (const b of panels.slice(i + 1))
      if (overlap(a.gridPos, b.gridPos)) found.push(`panels ${a.title} and ${b.title} overlap`);
  });
  return found;
}

const overlap = (a: Place, b: Place): boolean => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;

// ---------------------------------------------------------------------------------------------------------
// Answers
// ---------------------------------------------------------------------------------------------------------

const SCRAPE_MS = 200;
const SCRAPES = 8; // what two rate intervals need, and a line that can be seen
const RATE_MS = 4 * SCRAPE_MS; // Grafana's $__rate_interval is four scrape intervals

/** Why no Prometheus can be asked; undefined where there is one. */
export const whyNoPrometheus = Bun.which("prometheus") === null ? " (skipped: no prometheus on this machine)" : undefined;

type Point = [seconds: number, value: number];
/** One line of an answer: its labels and its points; one point where the query asks for an instant. */
export type Series = { labels: Record<string, string>; points: Point[] };
/** What Prometheus said to one query. */
export type Answer = { where: string; labelling: string; expr: string; target?: Target; series: Series[]; error?: string };

/** A Prometheus that scrapes two relays with traffic. */
export type Prometheus = {
  /** Puts a path of the HTTP API to it. @throws with what Prometheus says is wrong */
  ask(path: string, query: Record<string, string>): Promise<any>;
  /** The labels that it gave the two machines, by who names them: the relay, Prometheus or Fly.io. */
  labellings: Record<string, Chosen>;
  /** The time to ask about, in seconds since 1970: from before the first scrape until all had enough, and the last went well. */
  since: number;
  until: number;
  [Symbol.asyncDispose](): Promise<void>;
};
type Chosen = { region: string[]; instance: string[] };

/** Starts two relays, their players, and the Prometheus; resolves when it has scraped often enough to answer. */
export async function startPrometheus(): Promise<Prometheus> {
  await using stack = new AsyncDisposableStack();
  const ams = stack.use(
    testRelay({
      instance: "m1",
      region: "ams",
      flyApp: "party",
      flyRegion: "ams",
      siblings: { list: async () => ["m3"], has: async () => false },
    }),
  );
  const fra = stack.use(testRelay({ instance: "m2", region: "fra" }));
  const relays = [ams, fra];
  const directory = await mkdtemp(join(tmpdir(), "party-sockets-prometheus-"));
  stack.defer(() => rm(directory, { recursive: true, force: true }));

  const at = (relay: RelayHandle) => `localhost:${relay.port}`;
  const labellings = {
    relay: { region: ["AMS", "FRA"], instance: ["m1", "m2"] },
    Prometheus: { region: ["AMS", "FRA"], instance: relays.map(at) },
    "Fly.io": { region: ["ams", "fra"], instance: ["17811953c92e18", "e784079b449483"] },
  };
  const fly = labellings["Fly.io"];
  await Bun.write(
    join(directory, "prometheus.yml"),
    JSON.stringify({
      global: { scrape_interval: `${SCRAPE_MS}ms`, scrape_timeout: `${SCRAPE_MS}ms` },
      scrape_configs: [
        { job_name: "relay", honor_labels: true, static_configs: [{ targets: relays.map(at) }] },
        { job_name: "party-sockets", static_configs: [{ targets: relays.map(at) }] },
        {
          job_name: "fly",
          static_configs: relays.map((relay, i) => ({
            targets: [at(relay)],
            labels: { app: "party", instance: fly.instance[i], region: fly.region[i] },
          })),
        },
      ],
    }),
  );
  // Prometheus takes no port 0, so a free one is found first.
  const probe = Bun.serve({ port: 0, hostname: "127.0.0.1", fetch: () => new Response() });
  const address = `127.0.0.1:${probe.port}`;
  await probe.stop(true);
  const prometheus = Bun.spawn(
    [
      "prometheus",
      `--config.file=${directory}/prometheus.yml`,
      `--storage.tsdb.path=${directory}/data`,
      `--web.listen-address=${address}`,
      "--log.level=error",
    ],
    { stdout: "inherit", stderr: "inherit" },
  );
  stack.defer(async () => {
    prometheus.kill();
    await prometheus.exited;
  });

  const ask: Prometheus["ask"] = async (path, query) => {
    const answer = await fetch(`http://${address}/api/v1/${path}?${new URLSearchParams(query)}`);
    const { status, data, error } = (await answer.json()) as { status: string; data: unknown; error?: string };
    if (status !== "success") throw new Error(error);
    return data;
  };
  stack.use(await play(ams, fra));
  const since = Date.now() / 1000;
  /** Waits until an expression has an answer. @returns for which time, in seconds since 1970 */
  const holds = async (expr: string): Promise<number> => {
    for (;;) {
      if (prometheus.exitCode !== null) throw new Error(`prometheus ended with ${prometheus.exitCode}`);
      const time = Date.now() / 1000 - (2 * SCRAPE_MS) / 1000; // a scrape that began before has ended by now, well or not
      const answer = await ask("query", { query: expr, time: `${time}` }).catch(() => undefined); // refused until it listens
      if (answer !== undefined && answer.result.length > 0) return time;
      await Bun.sleep(SCRAPE_MS / 2); // it tells nobody when it has scraped
    }
  };
  const scrapes = "min(count_over_time(party_sockets_clients[1h]))";
  await holds(`${scrapes} >= ${SCRAPES / 2}`);
  void fra.drain(); // the dashboard shows that, too
  const jobs = Object.keys(labellings).length;
  const until = await holds(`${scrapes} >= ${SCRAPES} and min(up) == 1 and count(party_sockets_draining == 1) == ${jobs}`);
  const running = stack.move();
  return { ask, labellings, since, until, [Symbol.asyncDispose]: () => running.disposeAsync() };
}

/** Traffic of all kinds that a panel shows. It goes on until disposed. */
async function play(first: RelayHandle, second: RelayHandle) {
  const TICK_MS = 40;
  const members: Client[] = [];
  const party = async (relay: RelayHandle, Origin: string, guests: number) => {
    const host = await Client.open(relay.url, { Origin });
    const room = await host.create(guests + 1);
    members.push(host);
    for (let i = 1; i <= guests; i++) {
      const guest = await Client.open(relay.url, { Origin });
      await guest.join(room, `guest ${i}`);
      members.push(guest);
    }
    return { relay, room, Origin };
  };
  const rooms = [
    await party(first, "https://quiz.example", 7),
    await party(first, "https://draw.example", 3),
    await party(second, "https://quiz.example", 4),
  ];
  const look = (path: string) => fetch(first.url + path, { redirect: "manual" });
  let ticks = 0;
  const timer = setInterval(() => {
    ticks++;
    const busy = ticks % 50 < 35 ? members.length : 3; // a round, and a pause between rounds
    for (const member of members.slice(0, busy)) member.send({ type: "send", data: { x: ticks, y: "a stroke" } });
    if (ticks % 5 === 0) members[0]?.send({ type: "send", data: 1, to: 99 });
    if (ticks % 10 !== 0) return;
    void look("/room/111111"); // of the first region: siblings are asked
    void look("/?instance=m9");
    void look("/room/zzzzzz");
    const { relay, room, Origin } = rooms[(ticks / 10) % rooms.length] as (typeof rooms)[number];
    void Client.open(relay.url, { Origin }).then(async (visitor) => {
      await visitor.join(room, "visitor"); // the room is full
      await visitor.ask({ type: "create", clientId: "visitor", maxClients: 2 });
      await visitor.close();
    });
  }, TICK_MS);
  return { [Symbol.dispose]: () => clearInterval(timer) };
}

const anyOf = (values: string[]): string =>
  values.length === 1 ? (values[0] as string) : `(${values.map((value) => value.replace(/[.:]/g, "\\\\$&")).join("|")})`;

/** Fills in a query's variables as Grafana does. */
function fill(expr: string, { region, instance }: Chosen): string {
  const values: Record<string, string> = {
    region: anyOf(region),
    instance: anyOf(instance),
    __rate_interval: `${RATE_MS}ms`,
    __interval: `${SCRAPE_MS}ms`,
  };
  return expr.replace(/\$\{?(\w+)\}?/g, (whole, name: string) => values[name] ?? whole);
}

/** Puts every query of the dashboard to Prometheus, under each labelling for all machines and for one. */
export async function evaluate({ panels, annotations, templating }: Dashboard, prometheus: Prometheus): Promise<Answer[]> {
  const { since, until } = prometheus;
  const answers: Promise<Answer>[] = [];
  const attempt = async (answer: Omit<Answer, "series">, series: () => Promise<Series[]>): Promise<Answer> => {
    try {
      const given = await series();
      const empty = !given.some(({ points }) => points.some(([, value]) => Number.isFinite(value)));
      return { ...answer, series: given, error: empty ? "an empty answer" : undefined };
    } catch (error) {
      return { ...answer, series: [], error: (error as Error).message };
    }
  };
  const put = (where: string, labelling: string, chosen: Chosen, target: Target) => {
    const expr = fill(target.expr, chosen);
    const step = SCRAPE_MS / 1000;
    const start = until - step * Math.ceil((until - since) / step); // so that the last step is the end
    const range = { start: `${start}`, end: `${until}`, step: `${step}` };
    const asked = target.instant
      ? prometheus.ask("query", { query: expr, time: `${until}` })
      : prometheus.ask("query_range", { query: expr, ...range });
    answers.push(attempt({ where, labelling, expr, target }, async () => readSeries(await asked)));
  };
  for (const [labelling, all] of Object.entries(prometheus.labellings)) {
    const one = { region: all.region.slice(0, 1), instance: all.instance.slice(0, 1) };
    for (const panel of panels)
      for (const target of panel.targets ?? []) {
        put(panel.title, labelling, all, target);
        put(`${panel.title}, one machine`, labelling, one, target);
      }
    for (const { name, expr } of annotations.list) put(`annotation ${name}`, labelling, all, { refId: name, expr });
    for (const { name, type, query } of templating.list) {
      if (type !== "query") continue;
      const expr = typeof query === "string" ? query : query.query;
      const [, selector = "", label = ""] = /^label_values\((.*), (\w+)\)$/.exec(expr) ?? [];
      const values = prometheus.ask(`label/${label}/values`, { "match[]": fill(selector, all) }) as Promise<string[]>;
      const wanted = all[name as keyof Chosen];
      answers.push(
        attempt({ where: `variable ${name}`, labelling, expr }, async () => {
          const offered = await values;
          return wanted.every((value) => offered.includes(value)) ? [{ labels: {}, points: [[until, offered.length]] }] : [];
        }),
      );
    }
  }
  return Promise.all(answers);
}

type Result = { metric: Record<string, string>; value?: [number, string]; values?: [number, string][] };
function readSeries({ result }: { result: Result[] }): Series[] {
  return result.map(({ metric, value, values }) => ({
    labels: metric,
    points: (values ?? (value === undefined ? [] : [value])).map(([at, text]): Point => [at, Number(text)]),
  }));
}

// ---------------------------------------------------------------------------------------------------------
// Drawing: near enough to Grafana's look to judge the layout by
// ---------------------------------------------------------------------------------------------------------

const CELL = { width: 66, height: 30, gap: 8 }; // pixels; Grafana's at a window of 1600
const COLORS = ["#73bf69", "#5794f2", "#f2cc0c", "#ff780a", "#f2495c", "#b877d9", "#37872d", "#8ab8ff"];
const THRESHOLD_COLORS: Record<string, string> = { green: "#73bf69", orange: "#ff9830", red: "#f2495c" };

const escapeHtml = (text: string): string => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll('"', "&quot;");

function formatValue(value: number, unit: string): string {
  const scaled = (base: number, units: string[]) => {
    const step = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log(Math.abs(value) || 1) / Math.log(base))));
    return `${Number((value / base ** step).toPrecision(3))} ${units[step]}`.trim();
  };
  if (unit === "bytes") return scaled(1024, ["B", "KiB", "MiB", "GiB"]);
  if (unit === "binBps") return scaled(1024, ["B/s", "KiB/s", "MiB/s", "GiB/s"]);
  if (unit === "percentunit") return `${Number((100 * value).toPrecision(3))}%`;
  if (unit === "s")
    return value !== 0 && value < 1 ? `${Number((1000 * value).toPrecision(3))} ms` : `${Number(value.toPrecision(3))} s`;
  const suffix = unit === "ops" ? " /s" : unit === "opm" ? " /min" : "";
  return scaled(1000, ["", "K", "M"]) + suffix;
}

type Line = { name: string; labels: Record<string, string>; points: Point[] };

function linesOf(answers: Answer[]): Line[] {
  return answers.flatMap(({ target, series }) =>
    series.map(({ labels, points }) => {
      const name = target?.legendFormat?.replace(/\{\{(\w+)\}\}/g, (_, label: string) => labels[label] ?? "") ?? "";
      return { name, labels, points: points.filter(([, value]) => Number.isFinite(value)) };
    }),
  );
}

const lastValue = ({ points }: Line): number => points.at(-1)?.[1] ?? NaN;

function thresholdColor(steps: Threshold[], value: number): string {
  const reached = steps.filter((step) => step.value === null || value >= step.value).at(-1);
  return THRESHOLD_COLORS[reached?.color ?? "green"] ?? "#ccc";
}

function drawChart(lines: Line[], unit: string, steps: Threshold[], width: number, height: number): string {
  const values = lines.flatMap(({ points }) => points.map(([, value]) => value));
  const times = lines.flatMap(({ points }) => points.map(([at]) => at));
  const [left, right] = [Math.min(...times), Math.max(...times)];
  const [low, high] = [Math.min(0, ...values), Math.max(...values) * 1.05 || 1];
  const MARGIN = 62; // for the axis
  const toX = (at: number) => MARGIN + ((at - left) / (right - left || 1)) * (width - MARGIN);
  const toY = (value: number) => height - 4 - ((value - low) / (high - low)) * (height - 12);
  const axis = [low, (low + high) / 2, high].map((value) => {
    const y = toY(value);
    return `<line x1=${MARGIN} x2=${width} y1=${y} y2=${y} stroke="#333"/><text x=0 y=${Math.max(10, y)}>${formatValue(value, unit)}</text>`;
  });
  const limits = steps
    .filter(({ value }) => value !== null && value >= low && value <= high)
    .map(
      ({ value, color }) =>
        `<line x1=${MARGIN} x2=${width} y1=${toY(value as number)} y2=${toY(value as number)} stroke="${THRESHOLD_COLORS[color]}" stroke-dasharray=6 />`,
    );
  const drawn = lines.map(({ points }, i) => {
    const path = points.map(([at, value]) => `${toX(at).toFixed(1)},${toY(value).toFixed(1)}`).join(" ");
    return `<polyline fill=none stroke="${COLORS[i % COLORS.length]}" stroke-width=2 points="${path}"/>`;
  });
  return `<svg width=${width} height=${height}>${axis.join("")}${limits.join("")}${drawn.join("")}</svg>`;
}

function drawPanel(panel: Panel, answers: Answer[]): string {
  const lines = linesOf(answers);
  const { unit = "short", thresholds } = panel.fieldConfig?.defaults ?? {};
  const steps = thresholds?.steps ?? [];
  const width = panel.gridPos.w * CELL.width - CELL.gap - 20;
  const height = panel.gridPos.h * (CELL.height + CELL.gap) - CELL.gap - 40;
  const failed = answers.find(({ error }) => error !== undefined);
  if (failed !== undefined) return `<b style="color:#f2495c">${escapeHtml(failed.error ?? "")}</b>`;
  if (panel.type === "stat") {
    const value = lines[0] === undefined ? NaN : lastValue(lines[0]);
    return `<div class=stat style="color:${thresholdColor(steps, value)}">${formatValue(value, unit)}</div>`;
  }
  if (panel.type === "timeseries") {
    const legend = lines.map(({ name }, i) => `<i style="color:${COLORS[i % COLORS.length]}">━</i> ${escapeHtml(name)}`);
    return `${drawChart(lines, unit, steps, width, height - 36)}<div class=legend>${legend.join(" &nbsp; ")}</div>`;
  }
  const most = Math.max(...lines.map(lastValue));
  const rows = lines.map((line) => {
    const value = formatValue(lastValue(line), unit);
    const text = panel.type === "table" ? Object.values(line.labels).map(escapeHtml).join("<td>") : escapeHtml(line.name);
    const bar = panel.type === "table" ? "" : `<td><hr style="width:${(lastValue(line) / most) * (width / 2)}px">`;
    return `<tr><td>${text}<td style="color:${thresholdColor(steps, lastValue(line))}">${value}${bar}`;
  });
  return `${panel.type === "geomap" ? "(a map)" : ""}<table>${rows.join("")}</table>`;
}

/** The dashboard as a page. @param answers as from `evaluate`; those for the relay's own labels are shown */
export function drawPage({ title, panels, templating }: Dashboard, answers: Answer[]): { html: string; height: number } {
  const bottom = Math.max(...panels.map(({ gridPos: { y, h } }) => y + h));
  const boxes = panels.map((panel) => {
    const { x, y, w, h } = panel.gridPos;
    const place = `left:${x * CELL.width}px;top:${y * (CELL.height + CELL.gap)}px;width:${w * CELL.width - CELL.gap}px;height:${h * (CELL.height + CELL.gap) - CELL.gap}px`;
    if (isRow(panel)) return `<h2 style="${place}">⌄ ${escapeHtml(panel.title)}</h2>`;
    const own = answers.filter(({ where, labelling }) => where === panel.title && labelling === "relay");
    return `<section style="${place}"><h3>${escapeHtml(panel.title)} <span title="${escapeHtml(panel.description ?? "")}">(i)</span></h3>${drawPanel(panel, own)}</section>`;
  });
  const variables = templating.list.map(({ name }) => `<span class=variable>${name}</span>`).join(" ");
  const css = `
    body { margin: 12px; overflow: hidden; background: #111217; color: #ccccdc; font: 12px sans-serif }
    main { position: relative }
    section { position: absolute; box-sizing: border-box; padding: 8px 10px; background: #181b1f; border: 1px solid #2c3235; overflow: hidden }
    h1 { font-size: 18px; margin: 0 0 10px } h2 { position: absolute; margin: 6px 0; font-size: 15px; overflow: hidden } h3 { margin: 0 0 6px; font-size: 13px; white-space: nowrap }
    h3 span { color: #777; font-weight: normal } .variable { border: 1px solid #444; padding: 3px 10px; font-size: 12px; font-weight: normal }
    .stat { font-size: 40px; text-align: center; padding-top: 14px } .legend { height: 30px; overflow: hidden } i { font-weight: bold }
    text { fill: #888; font-size: 10px } table { border-spacing: 12px 3px } td { text-align: left } hr { border: 0; height: 14px; background: #73bf69; margin: 0 }`;
  return {
    html: `<!doctype html><meta charset=utf-8><style>${css}</style><h1>${escapeHtml(title)} ${variables}</h1><main>${boxes.join("")}</main>`,
    height: 140 + bottom * (CELL.height + CELL.gap),
  };
}

async function main(): Promise<void> {
  const { draw: file } = readFlags("bun run ops/watch/dashboard.ts [--draw FILE.png]", { draw: { type: "string" } });
  if (whyNoPrometheus !== undefined) {
    console.error("needs Debian's prometheus: apt-get install prometheus");
    process.exit(1);
  }
  const dashboard = await readDashboard();
  const wrong = faults(dashboard);
  for (const fault of wrong) console.log(fault);
  await using prometheus = await startPrometheus();
  const answers = await evaluate(dashboard, prometheus);
  const failed = answers.filter(({ error }) => error !== undefined);
  for (const { where, labelling, expr, error } of failed) console.log(`${where} (labels of ${labelling}): ${error}\n  ${expr}`);
  console.log(`${dashboard.panels.length} panels, ${wrong.length} faults; ${answers.length} queries, ${failed.length} failed`);
  if (file !== undefined) {
    const { html, height } = drawPage(dashboard, answers);
    const page = openPage({ width: COLUMNS * CELL.width + 24, height });
    await page.navigate(`data:text/html;base64,${Buffer.from(html).toBase64()}`);
    await Bun.write(file, await page.screenshot());
    page.close();
  }
  if (wrong.length + failed.length > 0) process.exitCode = 1;
}

if (import.meta.main) {
  await main();
  process.exit(); // the players' sockets and the browser are still open
}
