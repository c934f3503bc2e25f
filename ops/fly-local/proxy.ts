/**
 * What Fly.io's proxy does for one app, as far as a relay can tell: it picks a machine for a request, and moves the request
 * where the answer's `fly-replay` says. What Fly.io leaves to the app to get right is an error here, told by name.
 *
 * A request's body is passed on once its machine is settled, so an app must answer or replay by the head alone.
 */
import { connect, formatHead, type Head, listen, type Wire } from "./wire.ts";

/** A machine that the proxy may route to. */
export type ProxyMachine = { id: string; region: string; address: string; port: number };

/** Why a replay's target wasn't reached, in Fly.io's words. */
type FailureReason = "timeout" | "retries_exhausted" | "no_candidate";

/** What the proxy tells about a request. `replay` is the answer's `fly-replay`, `from` and `to` are machine ids. */
export type ProxyEvent = { path: string; from: string } & (
  | { kind: "replay"; replay: string; to: string }
  | { kind: "fallback"; replay: string; reason: FailureReason; to: string }
  | { kind: "error"; message: string }
);

type ProxyOptions = {
  app: string;
  hostname: string;
  /** 0 takes a free one. */
  port: number;
  /** The machines to route to now: started ones. */
  machines: () => ProxyMachine[];
  onEvent: (event: ProxyEvent) => void;
  /** How a machine is reached; `wire.ts`'s `connect` by default. */
  dial?: typeof connect;
};

/** A proxy that runs: where clients connect, and what stops it, with all connections. */
export type Proxy = { url: string; close(): void };

/** A `fly-replay` value that is as it should be. */
type Replay = {
  target: { instance: string } | { region: string };
  /** How long to try to reach the target. */
  timeoutMs: number;
  fallback: "force_self" | "prefer_self" | null;
  state: string | null;
};

const maxReplays = 10; // Fly.io's
const defaultTimeoutMs = 5_000;
const attemptMs = 1_000; // before the next machine is tried

/** Starts the proxy; throws if the port is taken. */
export function startProxy(options: ProxyOptions): Proxy {
  const listener = listen(options.hostname, options.port, (client) => {
    serve(client, options).catch((error: unknown) => {
      refuse(client, 502, error instanceof Error ? error.message : String(error));
    });
  });
  return { url: `http://${options.hostname}:${listener.port}`, close: () => listener.stop(true) };
}

/**
 * Reads a `fly-replay` value.
 * @throws an Error that names what is wrong with it
 */
function parseReplay(value: string, app: string): Replay {
  const fields = new Map<string, string>();
  for (const part of value.split(";")) {
    const [, key = "", text = ""] = /^\s*([^=]*)=(.*?)\s*$/.exec(part) ?? [];
    const form = fieldForms[key];
    if (form === undefined) throw new Error(`unknown field in "${part}"`);
    if (fields.has(key)) throw new Error(`${key} is given twice`);
    if (!form.test(text)) throw new Error(`${key} can't be "${text}"`);
    fields.set(key, text);
  }
  const other = fields.get("app") ?? app;
  if (other !== app) throw new Error(`it leaves the app for "${other}"`);
  const instance = fields.get("instance");
  const region = fields.get("region");
  if (instance !== undefined && region !== undefined) throw new Error("it has both an instance and a region");
  const target = instance !== undefined ? { instance } : region !== undefined ? { region } : null;
  if (target === null) throw new Error("it has neither an instance nor a region");
  return {
    target,
    timeoutMs: milliseconds(fields.get("timeout")),
    fallback: (fields.get("fallback") as Replay["fallback"] | undefined) ?? null,
    state: fields.get("state") ?? null,
  };
}

const fieldForms: Record<string, RegExp> = {
  instance: /^[A-Za-z0-9_-]{1,64}$/,
  region: /^[a-z]{3}$/,
  app: /^[a-z0-9-]+$/,
  state: /^[!-~]*$/,
  timeout: /^\d+(ms|s)$/,
  fallback: /^(force|prefer)_self$/,
};

function milliseconds(duration: string | undefined): number {
  if (duration === undefined) return defaultTimeoutMs;
  return Number.parseInt(duration, 10) * (duration.endsWith("ms") ? 1 : 1_000);
}

async function serve(client: Wire, options: ProxyOptions): Promise<void> {
  const request = await client.head();
  if (request === null) return refuse(client, 400, "not an HTTP request");
  const path = request.start.split(" ")[1] ?? "";
  const added: Record<string, string> = { "Fly-Client-IP": client.remoteAddress };
  const upgrade = request.headers.has("upgrade");
  if (!upgrade) added.Connection = "close"; // one request a connection
  let upstream: Wire | null = null;
  client.onClose = () => upstream?.destroy();

  let reached = await reach(entryCandidates(request, options.machines()), defaultTimeoutMs, options);
  for (let replays = 0; ; replays += 1) {
    if (typeof reached === "string") return refuse(client, 502, `no machine to route to: ${reached}`);
    const { machine } = reached;
    const fail = (message: string): void => {
      upstream?.destroy();
      options.onEvent({ kind: "error", path, from: machine.id, message });
      refuse(client, 502, message);
    };
    upstream = reached.wire;
    if (client.closed) return upstream.destroy();
    upstream.write(formatHead(request, added));
    const answer = await upstream.head();
    if (client.closed) return upstream.destroy();
    if (answer === null) return fail("the machine closed the connection without an answer");
    const value = answer.headers.get("fly-replay");
    if (value === undefined) return deliver(answer, client, upstream);
    upstream.destroy();

    if (answer.start.split(" ")[1] === "101") return fail("an upgrade together with a replay");
    if ("fly-replay-failed" in added) return fail(`a replay answered to a fallback: ${value}`);
    if (replays === maxReplays) return fail(`more than ${maxReplays} replays`);
    let replay: Replay;
    try {
      replay = parseReplay(value, options.app);
    } catch (error) {
      return fail(`invalid fly-replay "${value}": ${(error as Error).message}`);
    }

    const { target, state } = replay;
    const src = `instance=${machine.id};region=${machine.region};t=${Date.now() * 1_000}`;
    const from = state === null ? src : `${src};state=${state}`;
    reached = await reach(targets(target, options.machines()), replay.timeoutMs, options);
    if (typeof reached !== "string") {
      added["fly-replay-src"] = from;
      options.onEvent({ kind: "replay", path, from: machine.id, replay: value, to: reached.machine.id });
      continue;
    }
    const reason = reached;
    if (replay.fallback === null) return fail(`replay to ${value} failed: ${reason}`);
    const others = replay.fallback === "prefer_self" ? options.machines() : [];
    reached = await reach([machine, ...others.filter(({ id }) => id !== machine.id)], defaultTimeoutMs, options);
    if (typeof reached === "string") return fail(`fallback from ${value} failed: ${reached}`);
    const wanted = "instance" in target ? `instance=${target.instance}` : `region=${target.region}`;
    added["fly-replay-failed"] = `${wanted};reason=${reason};t=${Date.now() * 1_000}`;
    options.onEvent({
      kind: "fallback",
      path,
      from: machine.id,
      replay: value,
      reason,
      to: reached.machine.id,
    });
  }
}

let turn = 0;

/** Every machine once, another one first each time; with `fly-force-instance-id` only that one. */
function entryCandidates({ headers }: Head, machines: ProxyMachine[]): ProxyMachine[] {
  const forced = headers.get("fly-force-instance-id");
  if (forced !== undefined) return machines.filter(({ id }) => id === forced);
  return rotate(machines);
}

function targets(target: Replay["target"], machines: ProxyMachine[]): ProxyMachine[] {
  if ("instance" in target) return machines.filter(({ id }) => id === target.instance);
  return rotate(machines.filter(({ region }) => region === target.region));
}

function rotate<T>(items: T[]): T[] {
  turn += 1;
  const at = turn % Math.max(1, items.length);
  return [...items.slice(at), ...items.slice(0, at)];
}

/** A connection to the first candidate that takes one. Each but the last gets `attemptMs`, all together `timeoutMs`. */
async function reach(
  candidates: ProxyMachine[],
  timeoutMs: number,
  { dial = connect }: ProxyOptions,
): Promise<{ machine: ProxyMachine; wire: Wire } | FailureReason> {
  const until = performance.now() + timeoutMs;
  let reason: FailureReason = "no_candidate";
  for (const [index, machine] of candidates.entries()) {
    const left = until - performance.now();
    const patience = index === candidates.length - 1 ? left : Math.min(left, attemptMs);
    const wire = await dial(machine.address, machine.port, Math.max(0, patience));
    if (typeof wire !== "string") return { machine, wire };
    reason = wire === "timeout" ? "timeout" : "retries_exhausted";
  }
  return reason;
}

function deliver(answer: Head, client: Wire, upstream: Wire): void {
  const upgraded = answer.start.split(" ")[1] === "101";
  client.write(formatHead(answer, upgraded ? {} : { Connection: "close" }));
  client.onClose = () => {}; // what it sent before it left still goes on
  client.pipe(upstream);
  upstream.pipe(client);
}

/** Ends the request with a plain text. */
function refuse(client: Wire, status: 400 | 502, message: string): void {
  const body = `fly-local: ${message}\n`;
  const start = `HTTP/1.1 ${status} ${status === 400 ? "Bad Request" : "Bad Gateway"}`;
  const headers = {
    "Content-Type": "text/plain",
    "Content-Length": `${Buffer.byteLength(body)}`,
    Connection: "close",
  };
  client.write(formatHead({ start, lines: [], headers: new Map() }, headers));
  client.write(Buffer.from(body));
  client.end();
}
