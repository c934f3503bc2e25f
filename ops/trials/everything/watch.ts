/** Looks at the relay once a second, and at what a real Prometheus makes of it with the alert rules. */
import { join } from "node:path";
import { parseMetrics, type Sample } from "../../shared/metrics.ts";
import { type Child, ROOT } from "../../shared/processes.ts";
import { type PrometheusServer, startPrometheusServer } from "../../shared/prometheus.ts";
import { until } from "../../shared/wait.ts";

const LOOK_MS = 1_000;
const LATE_MS = 5_000; // for one look
const ALERTS_MS = 5_000;
const SCRAPE_SECONDS = 15;
const LAG_SECONDS = 0.1; // as in alerts.yml, and so the next
const MEMORY_BYTES = 0.8 * 256 * 1024 * 1024;

/** What one life of the relay was like, from its start to its end. */
export type Life = {
  name: string;
  /** In seconds of this process. */
  from: number;
  to: number;
  rssMax: number;
  lagMax: number;
  deliveries: number;
  cut: number;
  refused: number;
  /** How late this process's own timer was: nothing below it says anything about the relay. */
  ownMs: number;
};

/** Counters, summed over all lives. */
type Totals = { slow: number; refused: number; internal: number; errors: number; framesIn: number };
type Look = Totals & { at: number; life: number; up: boolean; lag: number; rss: number; clients: number };

const NOTHING: Totals = { slow: 0, refused: 0, internal: 0, errors: 0, framesIn: 0 };

/** How long the condition of an alert held at most, -1 if never; and for how long it has to. */
type Held = { alert: string; needsSeconds: number; heldSeconds: number };
/** Also, whether it was long and clear enough for Prometheus, which looks seldom: to have perhaps fired, or certainly. */
export type Judgement = Held & { mayFire: boolean; mustFire: boolean };

const combine = (of: (key: keyof Totals) => number): Totals => ({
  ...{ slow: of("slow"), refused: of("refused"), internal: of("internal") },
  ...{ errors: of("errors"), framesIn: of("framesIn") },
});

/** The conditions of `alerts.yml`, by looks. @param strict how much more than its limits a counter must show */
function longest(looks: Look[], strict: number): Held[] {
  const ago = (seconds: number, end: Look): Look => looks.find(({ at }) => at >= end.at - seconds) as Look;
  const most = (end: Look): number =>
    looks.reduce((most, { at, clients }) => (at >= end.at - 300 && at <= end.at ? Math.max(most, clients) : most), 0);
  const cases: [alert: string, needsSeconds: number, holds: (look: Look) => boolean][] = [
    ["PartySocketsDown", 120, ({ up }) => !up],
    ["PartySocketsLagging", 300, ({ up, lag }) => up && lag > LAG_SECONDS],
    ["PartySocketsMemory", 300, ({ up, rss }) => up && rss > MEMORY_BYTES],
    ["PartySocketsFailing", 0, (look) => look.refused + look.internal > ago(600, look).refused + ago(600, look).internal],
    [
      "PartySocketsErrorBurst",
      300,
      (look) => {
        const before = ago(300, look);
        const errors = look.errors - before.errors;
        return errors > 300 * strict && errors > 0.05 * strict * (look.framesIn - before.framesIn);
      },
    ],
    ["PartySocketsSlowMembers", 0, (look) => look.slow - ago(300, look).slow > strict * Math.max(5, 0.05 * most(look))],
  ];
  return cases.map(([alert, needsSeconds, holds]) => {
    let [heldSeconds, since]: [number, number | undefined] = [-1, undefined];
    for (const look of looks) {
      since = holds(look) ? (since ?? look.at) : undefined;
      if (since !== undefined) heldSeconds = Math.max(heldSeconds, look.at - since);
    }
    return { alert, needsSeconds, heldSeconds };
  });
}

export class Watch implements Disposable {
  readonly lives: Life[] = [];
  readonly #looks: Look[] = [];
  readonly #url: string;
  #before = NOTHING;
  #now = NOTHING;
  #isLooking = false;
  readonly #timer: Timer;

  constructor(url: string) {
    this.#url = url;
    let last = performance.now();
    this.#timer = setInterval(() => {
      const now = performance.now();
      if (this.lives.length > 0) this.life.ownMs = Math.max(this.life.ownMs, now - last - LOOK_MS);
      last = now;
      void this.look();
    }, LOOK_MS);
  }

  /** A relay has been started. */
  begin(name: string): void {
    this.#before = this.#totals;
    this.#now = NOTHING;
    const from = performance.now() / 1000;
    this.lives.push({ name, from, to: from, rssMax: 0, lagMax: 0, deliveries: 0, cut: 0, refused: 0, ownMs: 0 });
  }

  /** The present life, or the last one. */
  get life(): Life {
    return this.lives.at(-1) as Life;
  }

  get last(): Look | undefined {
    return this.#looks.at(-1);
  }

  /** Looks now, if no look is under way. */
  async look(): Promise<void> {
    if (this.#isLooking) return;
    this.#isLooking = true;
    const at = performance.now() / 1000;
    const { life } = this;
    const looked = { at, life: this.lives.length - 1 };
    try {
      const answer = await fetch(`${this.#url}/metrics`, { keepalive: false, signal: AbortSignal.timeout(LATE_MS) });
      const samples = parseMetrics(await answer.text());
      if (life === this.life) this.#take(samples, looked);
    } catch {
      this.#looks.push({ ...this.#totals, ...looked, up: false, lag: 0, rss: 0, clients: 0 });
    }
    this.#isLooking = false;
  }

  #take(samples: Sample[], looked: { at: number; life: number }): void {
    const { life } = this;
    const value = (name: string, labels: Record<string, string> = {}): number =>
      samples
        .filter((sample) => sample.name === name && Object.entries(labels).every(([key, text]) => sample.labels[key] === text))
        .reduce((sum, each) => sum + each.value, 0);
    const errors = (code?: string) => value("party_sockets_errors_total", code === undefined ? {} : { code });
    const slow = value("party_sockets_disconnects_total", { reason: "slow" });
    const framesIn = value("party_sockets_messages_total", { direction: "in" });
    this.#now = { slow, refused: errors("capacity"), internal: errors("internal"), errors: errors(), framesIn };
    const [lag, rss] = [value("party_sockets_event_loop_lag_seconds"), value("process_resident_memory_bytes")];
    this.#looks.push({ ...this.#totals, ...looked, up: true, lag, rss, clients: value("party_sockets_clients") });
    life.to = looked.at;
    life.rssMax = Math.max(life.rssMax, rss);
    life.lagMax = Math.max(life.lagMax, lag);
    life.deliveries = value("party_sockets_messages_total", { direction: "out" });
    life.cut = slow;
    life.refused = this.#now.refused;
  }

  get #totals(): Totals {
    return combine((key) => this.#before[key] + this.#now[key]);
  }

  /** Which alerts have a reason to fire, by these looks and not by Prometheus' own. */
  judge(): Judgement[] {
    const [held, perhaps, surely] = [longest(this.#looks, 1), longest(this.#looks, 0.5), longest(this.#scraped(), 2)];
    return held.map(({ alert, needsSeconds, heldSeconds }, i) => ({
      ...{ alert, needsSeconds, heldSeconds },
      mayFire: (perhaps[i] as Held).heldSeconds >= needsSeconds * 0.8 - SCRAPE_SECONDS,
      mustFire: (surely[i] as Held).heldSeconds > needsSeconds + 3 * SCRAPE_SECONDS,
    }));
  }

  /** The looks without what was counted so near to a life's beginning or end that Prometheus may not have seen it. */
  #scraped(): Look[] {
    let [dropped, before] = [NOTHING, NOTHING];
    return this.#looks.map((look) => {
      const { from, to } = this.lives[look.life] as Life;
      const near = look.at < from + 2 * SCRAPE_SECONDS || look.at > to - 2 * SCRAPE_SECONDS;
      if (near) dropped = combine((key) => dropped[key] + look[key] - before[key]);
      before = look;
      return { ...look, ...combine((key) => look[key] - dropped[key]) };
    });
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer);
  }
}

/** One alert for one set of labels: when it was pending, and when it fired, in seconds of this run. */
export type Alert = { name: string; what: string; pendingAt: number; firedAt: number | undefined; overAt: number | undefined };

/** A Prometheus that scrapes the relay, with the alert rules as they are; and what its alerts did. */
export class Alerts implements AsyncDisposable {
  readonly all: Alert[] = [];
  readonly #server: PrometheusServer;
  readonly #begun: number;
  #timer: Timer | undefined;

  private constructor(server: PrometheusServer, begun: number) {
    this.#server = server;
    this.#begun = begun;
  }

  get process(): Child {
    return this.#server.process;
  }

  /** Starts it; resolves when it answers. @param begun when the run began */
  static async start(relayUrl: string, begun: number): Promise<Alerts> {
    const config = {
      global: { scrape_interval: `${SCRAPE_SECONDS}s`, evaluation_interval: `${SCRAPE_SECONDS}s` },
      rule_files: [join(ROOT, "ops/alerts.yml")],
      scrape_configs: [{ job_name: "party-sockets", static_configs: [{ targets: [new URL(relayUrl).host] }] }],
    };
    const alerts = new Alerts(await startPrometheusServer(config), begun);
    try {
      await until("Prometheus", async () => (await alerts.#ask().catch(() => undefined)) !== undefined);
    } catch (error) {
      await alerts[Symbol.asyncDispose]();
      throw error;
    }
    alerts.#timer = setInterval(() => void alerts.look().catch(() => {}), ALERTS_MS);
    return alerts;
  }

  /** Asks what is pending and what fires. @throws if it doesn't answer */
  async look(): Promise<void> {
    const { alerts } = await this.#ask();
    const now = (performance.now() - this.#begun) / 1000;
    const active = (alerts as { labels: Record<string, string>; state: string }[]).map(({ labels, state }) => {
      const { alertname = "", code } = labels;
      return { name: alertname, what: code ?? "", fires: state === "firing" };
    });
    const isOf = (alert: Alert) => (each: { name: string; what: string }) => each.name === alert.name && each.what === alert.what;
    for (const alert of this.all) if (alert.overAt === undefined && !active.some(isOf(alert))) alert.overAt = now;
    for (const { name, what, fires } of active) {
      let alert = this.all.find((each) => each.overAt === undefined && each.name === name && each.what === what);
      if (alert === undefined) this.all.push((alert = { name, what, pendingAt: now, firedAt: undefined, overAt: undefined }));
      if (fires) alert.firedAt ??= now;
    }
  }

  /** What is active now, for the progress line. */
  get active(): string {
    const now = this.all.filter(({ overAt }) => overAt === undefined);
    return (
      now.map(({ name, firedAt }) => `${name.replace("PartySockets", "")}${firedAt === undefined ? "?" : "!"}`).join(",") ||
      "none"
    );
  }

  #ask(): Promise<any> {
    return this.#server.ask("alerts", {}, LATE_MS);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    clearInterval(this.#timer);
    await this.#server[Symbol.asyncDispose]();
  }
}
