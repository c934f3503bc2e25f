/** One run of one scenario against one server, and what it found. */
import type { Throttling } from "./cpu-group.ts";
import { Histogram } from "./histogram.ts";
import { Ledger } from "./ledger.ts";
import { Members } from "./members.ts";
import type { Scenario, Span } from "./options.ts";
import type { Progress } from "./progress.ts";
import { Sender } from "./sender.ts";
import { Rival, type Server, toolWaitedMicros } from "./target.ts";
import { Traffic } from "./traffic.ts";
import { within } from "../shared/wait.ts";

/** What a phase in which members connect took. µs are `null` if the server's process can't be read, here and below. */
export type Joining = { members: number; seconds: number; cpuMicrosPerMember: number | null };

export type Latencies = { p50: number; p90: number; p99: number; p999: number; max: number };

/** What happened in one second of the measured time, or in all of it; in all of the run if it only connects. */
export type Stretch = {
  seconds: number;
  messages: number;
  deliveries: number;
  latencyMs: Latencies;
  serverCpuMicros: number | null;
  serverCpuMicrosPerDelivery: number | null;
  /** Share of one core, 1 = all of it. */
  serverCpuCore: number | null;
  /** Of nginx's worker processes together; `null` without nginx, too. */
  proxyCpuMicros: number | null;
  /** `null` if it has no quota. */
  throttling: Throttling | null;
};

export type Result = Stretch & {
  target: string;
  connect: Joining;
  flap: Joining | null;
  deliveriesPerSecond: number;
  /** Warm-up and the end included, as in the five that follow. */
  sentInAll: number;
  deliveredInAll: number;
  lost: number;
  doubled: number;
  outOfOrder: number;
  /** Reached a member that it wasn't for. */
  astray: number;
  /** Sockets that the server closed, by code. */
  closed: Record<string, number>;
  /** Refusals and broken frames, the first few. */
  errors: string[];
  histogram: [upToMs: number, count: number][];
  series: Stretch[];
  /** How many rooms each relay has, by its instance id. */
  roomsOf: Record<string, number>;
  serverBytes: { atStart: number; connected: number; atEnd: number; perMember: number } | null;
  toolCpuCore: number;
  /** How late the tool itself sent. */
  lateMsP99: number;
  /** Share of the time in which they were ready to run and had no core; null if unknown. */
  waited: { server: number | null; tool: number };
  /** Whether nothing was lost, doubled, out of order, astray, closed or refused. */
  ok: boolean;
};

const JOIN_SECONDS = 60; // for a whole phase of connecting
const SETTLE_MS = 1000; // so long after the last delivery, what is missing is lost

/** What a clock, the server and the tool show at one moment. */
type Reading = ReturnType<Run["read"]>;

export class Run {
  readonly #scenario: Scenario;
  readonly #server: Server;
  readonly #progress: Progress;
  readonly #ledger: Ledger;
  readonly #members: Members;
  readonly #sender: Sender;

  constructor(scenario: Scenario, server: Server, progress: Progress) {
    this.#scenario = scenario;
    this.#server = server;
    this.#progress = progress;
    const traffic = new Traffic(scenario);
    this.#ledger = new Ledger(traffic, scenario.rooms * scenario.clients);
    this.#members = new Members(server, scenario, this.#ledger);
    this.#sender = new Sender(scenario, traffic, this.#members, this.#ledger);
  }

  /** Runs it. @throws if not all members can join */
  async measure(target: string): Promise<Result> {
    try {
      return await this.#measure(target);
    } finally {
      this.#members.end();
    }
  }

  async #measure(target: string): Promise<Result> {
    const { mode, seconds, warmup, flap } = this.#scenario;
    const lasts = mode === "traffic" || mode === "idle";
    const members = this.#members.all.length;
    const begun = this.read();
    const atStart = this.#server.residentBytes();
    const connect = await this.#join(members, () => this.#members.connect(this.#progress));
    const connected = this.#server.residentBytes();
    const reconnect = mode === "flap" ? await this.#join(flap, () => this.#members.flap(flap)) : null;

    if (mode === "traffic") {
      this.#sender.start();
      await this.#wait("warming up", warmup);
    }
    this.#ledger.takeLatency(); // the warm-up's
    this.#sender.takeLate();
    const before = lasts ? this.read() : begun;
    const { series, latency, after } = lasts
      ? await this.#secondBySecond(before, seconds)
      : { series: [], latency: new Histogram(), after: this.read() };
    const atEnd = this.#server.residentBytes();
    this.#sender.stop();
    this.#server.lift(); // what is late arrives all the same, and sooner
    if (mode === "traffic") await this.#settle();

    const stretch = stretchBetween(before, after, latency);
    const share = (micros: number) => (lasts ? micros / 1e6 / stretch.seconds : 0);
    const waited = difference(before.serverWaited, after.serverWaited);
    const { sent, delivered, doubled, outOfOrder, astray } = this.#ledger;
    const { closed, errors, roomsOf } = this.#members;
    const lost = this.#ledger.lost(this.#members.rooms.slice(0, this.#scenario.rooms));
    return {
      ...stretch,
      target,
      connect,
      flap: reconnect,
      deliveriesPerSecond: lasts ? stretch.deliveries / stretch.seconds : 0,
      sentInAll: sent,
      deliveredInAll: delivered,
      lost,
      doubled,
      outOfOrder,
      astray,
      closed,
      errors,
      histogram: latency.rows(),
      series,
      roomsOf,
      serverBytes:
        atStart === undefined || connected === undefined || atEnd === undefined
          ? null
          : { atStart, connected, atEnd, perMember: ((lasts ? atEnd : connected) - atStart) / members },
      toolCpuCore: share(after.toolCpu - before.toolCpu),
      lateMsP99: this.#sender.takeLate().percentileMs(99),
      waited: {
        server: waited === null ? null : share(waited),
        tool: share(after.toolWaited - before.toolWaited),
      },
      ok: lost + doubled + outOfOrder + astray + Object.keys(closed).length + errors.length === 0,
    };
  }

  /** What has been counted so far. */
  read() {
    const tool = process.cpuUsage();
    return {
      atMs: performance.now(),
      sent: this.#ledger.sent,
      delivered: this.#ledger.delivered,
      serverCpu: this.#server.cpuMicros(),
      proxyCpu: this.#server.proxyCpuMicros(),
      throttling: this.#server.throttling(),
      toolCpu: tool.user + tool.system,
      serverWaited: this.#server.waitedMicros(),
      toolWaited: toolWaitedMicros(),
    };
  }

  /** Runs a phase in which members connect. */
  async #join(members: number, phase: () => Promise<unknown>): Promise<Joining> {
    const before = this.read();
    await within(phase(), "all to join", JOIN_SECONDS * 1000);
    const { seconds, serverCpuMicros } = stretchBetween(before, this.read(), new Histogram());
    return { members, seconds, cpuMicrosPerMember: serverCpuMicros === null ? null : serverCpuMicros / members };
  }

  /** Measures for so long, with quota and rival when they are wanted. `after` is the last reading. */
  async #secondBySecond(first: Reading, seconds: number): Promise<{ series: Stretch[]; latency: Histogram; after: Reading }> {
    const { cpu, rival } = this.#scenario;
    const competitor = new Rival();
    const timers = [
      ...inSpans(cpu?.spans ?? [], { begin: () => this.#server.limit(), end: () => this.#server.lift() }),
      ...inSpans(rival, { begin: () => competitor.start(), end: () => void competitor.stop() }),
    ];
    const series: Stretch[] = [];
    const latencies: Histogram[] = [];
    let before = first;
    try {
      for (let second = 1; second - 1 < seconds; second++) {
        await this.#wait("running", Math.min(second, seconds), first.atMs, seconds);
        const after = this.read();
        const latency = this.#ledger.takeLatency();
        series.push(stretchBetween(before, after, latency));
        latencies.push(latency);
        before = after;
      }
    } finally {
      timers.forEach(clearTimeout);
      await competitor.stop();
    }
    return { series, latency: Histogram.sum(latencies), after: before };
  }

  /** Waits until so many seconds have passed since `startMs`; `all` is what the bar shows as full. */
  async #wait(what: string, seconds: number, startMs = performance.now(), all = seconds): Promise<void> {
    for (;;) {
      const elapsed = (performance.now() - startMs) / 1000;
      if (elapsed >= seconds) break;
      this.#progress.show(what, elapsed, all, "s", this.#ledger.delivered);
      await Bun.sleep(Math.min(this.#progress.everyMs, (seconds - elapsed) * 1000));
    }
    this.#progress.clear();
  }

  /** Waits for what is still under way. */
  async #settle(): Promise<void> {
    let last = -1;
    let sinceMs = performance.now();
    while (this.#ledger.pending > 0) {
      if (this.#ledger.delivered !== last) {
        last = this.#ledger.delivered;
        sinceMs = performance.now();
      }
      if (performance.now() - sinceMs > SETTLE_MS) return;
      await Bun.sleep(5);
    }
  }
}

/** How much a figure has grown; null if one of the two is unknown. */
const difference = (from?: number, to?: number): number | null => (from === undefined || to === undefined ? null : to - from);

/** What happened between two readings. */
function stretchBetween(before: Reading, after: Reading, latency: Histogram): Stretch {
  const seconds = (after.atMs - before.atMs) / 1000;
  const deliveries = after.delivered - before.delivered;
  const cpu = difference(before.serverCpu, after.serverCpu);
  const [from, to] = [before.throttling, after.throttling];
  return {
    seconds,
    messages: after.sent - before.sent,
    deliveries,
    latencyMs: {
      p50: latency.percentileMs(50),
      p90: latency.percentileMs(90),
      p99: latency.percentileMs(99),
      p999: latency.percentileMs(99.9),
      max: latency.mostMs,
    },
    serverCpuMicros: cpu,
    serverCpuMicrosPerDelivery: cpu === null || deliveries === 0 ? null : cpu / deliveries,
    serverCpuCore: cpu === null ? null : cpu / 1e6 / seconds,
    proxyCpuMicros: difference(before.proxyCpu, after.proxyCpu),
    throttling:
      from === undefined || to === undefined
        ? null
        : {
            periods: to.periods - from.periods,
            throttled: to.throttled - from.throttled,
            seconds: to.seconds - from.seconds,
          },
  };
}

/** Does something at the beginning and the end of each span, from now on. */
function inSpans(spans: Span[], { begin, end }: { begin(): void; end(): void }): Timer[] {
  return spans.flatMap(({ from, to }) => [setTimeout(begin, from * 1000), setTimeout(end, to * 1000)]);
}
