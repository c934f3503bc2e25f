/** What the load tools can be told: the flags that both share, what they mean, and what is wrong with them. */
import { join } from "node:path";
import type { ParseArgsOptionsConfig } from "node:util";
import { badUsage } from "../shared/flags.ts";
import { ROOT } from "../shared/processes.ts";
import type { Quota } from "./cpu-group.ts";
import { leastBytes, MAX_MEMBERS, type Payload, PAYLOADS } from "./wire.ts";

const PHASES = ["even", "random", "near", "room", "all"] as const;

/** From when to when, in seconds of the measured time. */
export type Span = { from: number; to: number };

/** What one run does. Seconds are seconds, rates are messages a second of each sender. */
export type Scenario = {
  mode: "traffic" | "connect" | "idle" | "flap";
  rooms: number;
  /** Rooms beside them, connected and silent. */
  idleRooms: number;
  clients: number;
  senders: number | "all";
  /** 0: saturate. */
  rate: number;
  /** A host that sends to all, and the others to it; `senders`, `rate` and `targeted` don't count then. */
  game: { host: number; others: number } | undefined;
  targeted: boolean;
  /** Undefined: 65 to 90, another size for each sender. */
  bytes: number | undefined;
  payload: Payload;
  /** 0: as fits the size. */
  window: number;
  phase: (typeof PHASES)[number];
  seconds: number;
  warmup: number;
  /** How many reconnect. */
  flap: number;
  /** What the server may use of a core, and when; all the time if `spans` is undefined. */
  cpu: { quota: Quota; spans: Span[] | undefined } | undefined;
  /** When a process competes for the server's core. */
  rival: Span[];
};

/** A relay to load: one that runs (`url`), or a command that starts one. */
export type Target = {
  name: string;
  url?: string;
  command?: string;
  pid?: number;
  /** So many relays are started by the command, and nginx before them; several as a cluster. */
  behindNginx?: number;
};

export const SHARED_HELP = `which server
  --url ws://…         a relay that runs already; without it one is started as a child, its limits off
  --server COMMAND     the command that is started instead of server.ts; it prints its port
  --pid N              process of the relay at --url, for its CPU and memory
  --vs URL|COMMAND     a second relay; the two take turns, and the ratio of their medians is printed
  --vs-pid N           process of the relay at a --vs URL
  --runs N             runs of each, of which the median counts [3 with --vs, else 1]

traffic
  --rooms N            [100]
  --clients N          members a room [8]
  --senders N|all      members a room that send [1]
  --rate HZ            messages a second of each sender; 0: saturate [60]
  --targeted           send \`to\` the next member rather than to all
  --bytes N            size of \`data\` as JSON text [65 to 90, another for each sender]
  --payload KIND       what \`data\` is [object]
                         object: what games send; an input, and from about 100 bytes on a list of small objects
                         drawing: an object of one long string
                         string: a bare string
  --window N           with --rate 0: unacknowledged broadcasts a room [16, fewer of big ones]
  --phase KIND         when senders of one rate send [even]
                         even: spread over the interval, a room's members as far apart as can be
                         random: each at a moment of its own, always the same ones
                         near: a room's members within a tenth of the interval, as games that answer a host's tick
                         room: all members of a room at the same moment
                         all: everybody at the same moment
  --seconds N          measured time [10]
  --warmup N           seconds of the same traffic before it, not measured [1]`;

export const SHARED_FLAGS = {
  url: { type: "string" },
  server: { type: "string" },
  pid: { type: "string" },
  vs: { type: "string" },
  "vs-pid": { type: "string" },
  runs: { type: "string" },
  rooms: { type: "string" },
  clients: { type: "string" },
  senders: { type: "string" },
  rate: { type: "string" },
  targeted: { type: "boolean" },
  bytes: { type: "string" },
  payload: { type: "string" },
  window: { type: "string" },
  phase: { type: "string" },
  seconds: { type: "string" },
  warmup: { type: "string" },
  json: { type: "boolean" },
} as const satisfies ParseArgsOptionsConfig;

/** Flags as they were given. */
export type SharedFlags = {
  [name in keyof typeof SHARED_FLAGS]?: (typeof SHARED_FLAGS)[name]["type"] extends "boolean" ? boolean : string;
};

const DEFAULTS = {
  rooms: "100",
  clients: "8",
  senders: "1",
  rate: "60",
  payload: "object",
  window: "0",
  phase: "even",
  seconds: "10",
  warmup: "1",
};

const SERVER = `"${process.execPath}" run "${join(ROOT, "server.ts")}"`;

/** Reads flags; ends the process if one is wrong, and says which. */
export class Flags {
  constructor(readonly usage: string) {}

  fault(text: string): never {
    return badUsage(this.usage, text);
  }

  amount(flag: string, text: string, least: number): number {
    const value = Number(text);
    if (text.trim() === "" || !Number.isFinite(value) || value < least)
      this.fault(`--${flag} must be a number, ${least} or more`);
    return value;
  }

  count(flag: string, text: string, least: number): number {
    const value = this.amount(flag, text, least);
    if (!Number.isInteger(value)) this.fault(`--${flag} must be a whole number`);
    return value;
  }

  oneOf<T extends string>(flag: string, text: string, all: readonly T[]): T {
    return all.find((each) => each === text) ?? this.fault(`--${flag} is one of ${all.join(", ")}`);
  }

  /** Two amounts with a slash between them. */
  pair(flag: string, text: string, least: number): [number, number] {
    const [first, second, ...more] = text.split("/");
    if (first === undefined || second === undefined || more.length > 0) return this.fault(`--${flag} must be two numbers, A/B`);
    return [this.amount(flag, first, least), this.amount(flag, second, least)];
  }

  /** `10-20,30-35`. */
  spans(flag: string, text: string): Span[] {
    return text.split(",").map((span) => {
      const [from, to, ...more] = span.split("-").map((part) => this.amount(flag, part, 0));
      if (from === undefined || to === undefined || more.length > 0 || to <= from)
        return this.fault(`--${flag} takes seconds as FROM-TO, with commas between several`);
      return { from, to };
    });
  }

  /** `5/80`, `5/80@10-20`: milliseconds of CPU in each so many milliseconds, and when. */
  cpu(text: string): NonNullable<Scenario["cpu"]> {
    const [quota = "", spans, ...more] = text.split("@");
    if (more.length > 0) this.fault("--cpu must be RUN/PERIOD or RUN/PERIOD@FROM-TO");
    const [run, period] = this.pair("cpu", quota, 1).map((ms) => Math.round(ms * 1000)) as [number, number];
    if (period > 1_000_000) this.fault("--cpu takes periods of at most 1000 ms");
    return { quota: { runMicros: run, periodMicros: period }, spans: spans === undefined ? undefined : this.spans("cpu", spans) };
  }

  /** The servers that the shared flags name. */
  targets({ url, server, pid, vs, "vs-pid": vsPid }: SharedFlags): Target[] {
    if (url !== undefined && server !== undefined) this.fault("--url and --server exclude each other");
    const running = (address: string, flag: string, id: string | undefined): Target => {
      return { name: address, url: address, pid: id === undefined ? undefined : this.count(flag, id, 1) };
    };
    const first = url === undefined ? { name: server ?? "server.ts", command: server ?? SERVER } : running(url, "pid", pid);
    if (vs === undefined) return [first];
    return [first, /^(ws|http)s?:/.test(vs) ? running(vs, "vs-pid", vsPid) : { name: vs, command: vs }];
  }

  /** One relay directly, one behind nginx, and a cluster of so many behind nginx. */
  behindNginx({ server }: SharedFlags, relays: number): Target[] {
    const command = server ?? SERVER;
    return [
      { name: "1 relay", command },
      { name: "1 relay behind nginx", command, behindNginx: 1 },
      { name: `${relays} relays behind nginx`, command, behindNginx: relays },
    ];
  }

  /** Runs of each server. @param usual how many, unless the flag says */
  runs({ runs }: SharedFlags, usual: number): number {
    return runs === undefined ? usual : this.count("runs", runs, 1);
  }

  /** The scenario that the shared flags say. @param mode decides how few members will do @param defaults of some flags */
  scenario(flags: SharedFlags, mode: Scenario["mode"] = "traffic", defaults: SharedFlags = {}): Scenario {
    const text = { ...DEFAULTS, ...defaults, ...flags };
    const rooms = this.count("rooms", text.rooms, 1);
    const clients = this.count("clients", text.clients, mode === "traffic" ? 2 : 1);
    if (rooms * clients > MAX_MEMBERS) this.fault(`--rooms times --clients must be at most ${MAX_MEMBERS}`);
    const senders = text.senders === "all" ? ("all" as const) : this.count("senders", text.senders, 1);
    if (senders !== "all" && senders > clients) this.fault("--senders must be at most --clients");
    const payload = this.oneOf("payload", text.payload, PAYLOADS);
    return {
      mode,
      rooms,
      idleRooms: 0,
      clients,
      senders,
      rate: this.amount("rate", text.rate, 0),
      game: undefined,
      targeted: text.targeted === true,
      bytes: text.bytes === undefined ? undefined : this.count("bytes", text.bytes, leastBytes(payload)),
      payload,
      window: this.count("window", text.window, 0),
      phase: this.oneOf("phase", text.phase, PHASES),
      seconds: this.amount("seconds", text.seconds, 0.1),
      warmup: this.amount("warmup", text.warmup, 0),
      flap: 0,
      cpu: undefined,
      rival: [],
    };
  }
}
