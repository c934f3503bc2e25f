/**
 * Checks the Grafana dashboard without a Grafana: `bun run ops/watch/dashboard.ts`.
 *
 * Its form is checked against what Grafana's import needs. Its queries are put to a real Prometheus (Debian's package) that
 * scrapes two relays with traffic: each must give numbers, whether the labels `instance` and `region` are the relay's own,
 * Prometheus' or Fly.io's.
 */
import { flyCluster, type RelayHandle } from "../../server.ts";
import { Client } from "../shared/client.ts";
import { readFlags } from "../shared/flags.ts";
import { type PrometheusServer, startPrometheusServer, whyNoPrometheus } from "../shared/prometheus.ts";
import { testRelay } from "../shared/relay.ts";
import { until } from "../shared/wait.ts";

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

/** What Grafana's import, or somebody on duty, would stumble over; a line each, none if all is well. */
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

type Point = [seconds: number, value: number];
/** One line of an answer: its labels and its points; one point if the query asks for an instant. */
type Series = { labels: Record<string, string>; points: Point[] };
/** What Prometheus said to one query. */
type Answer = { where: string; labelling: string; expr: string; target?: Target; series: Series[]; error?: string };

/** A Prometheus that scrapes two relays with traffic. */
type Prometheus = Pick<PrometheusServer, "ask"> & {
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
      cluster: flyCluster("ams", { list: async () => ["m3"], has: async () => false }),
    }),
  );
  const fra = stack.use(testRelay({ instance: "m2", region: "fra" }));
  const relays = [ams, fra];

  const at = (relay: RelayHandle) => `localhost:${relay.port}`;
  const labellings = {
    relay: { region: ["AMS", "FRA"], instance: ["m1", "m2"] },
    Prometheus: { region: ["AMS", "FRA"], instance: relays.map(at) },
    "Fly.io": { region: ["ams", "fra"], instance: ["17811953c92e18", "e784079b449483"] },
  };
  const fly = labellings["Fly.io"];
  const { ask, process: prometheus } = stack.use(
    await startPrometheusServer({
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
  stack.use(await play(ams, fra));
  const since = Date.now() / 1000;
  /** Waits until an expression has an answer. @returns for which time, in seconds since 1970 */
  const holds = (expr: string): Promise<number> =>
    until(`an answer to ${expr}`, async () => {
      if (prometheus.exitCode !== null) throw new Error(`prometheus ended:\n${prometheus.lines.join("\n")}`);
      const time = Date.now() / 1000 - (2 * SCRAPE_MS) / 1000; // a scrape that began before has ended by now, well or not
      const answer = await ask("query", { query: expr, time: `${time}` }).catch(() => undefined); // refused until it listens
      return answer?.result.length > 0 && time;
    });
  const scrapes = "min(count_over_time(party_sockets_clients[1h]))";
  await holds(`${scrapes} >= ${SCRAPES / 2}`);
  void fra.drain(); // the dashboard shows that, too
  const jobs = Object.keys(labellings).length;
  const end = await holds(`${scrapes} >= ${SCRAPES} and min(up) == 1 and count(party_sockets_draining == 1) == ${jobs}`);
  const running = stack.move();
  return { ask, labellings, since, until: end, [Symbol.asyncDispose]: () => running.disposeAsync() };
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

async function main(): Promise<void> {
  readFlags("bun run ops/watch/dashboard.ts", {});
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
  if (wrong.length + failed.length > 0) process.exitCode = 1;
}

if (import.meta.main) {
  await main();
  process.exit(); // the players' sockets are still open
}
