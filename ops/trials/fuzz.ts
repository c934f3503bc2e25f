/**
 * Hostile clients: random valid, invalid and truncated requests, handshakes, frames and messages from raw TCP sockets, against
 * a relay that other rooms use meanwhile.
 *
 *     bun run ops/trials/fuzz.ts --seconds 60 --seed 7 [--url http://localhost:3000]
 *
 * Without `--url` it starts a relay of its own, with caps that are small enough to be reached. It exits with 1 and a list of
 * faults unless, at the end, the relay lives, the other rooms' messages all arrived in order, no room, member or socket is
 * left, and memory is where it was after the warm-up. The same seed makes the same attacks; only their timing differs.
 * `ops/trials/soak.ts` puts parties through the same trial.
 */
import { readdirSync, readlinkSync } from "node:fs";
import { badUsage, readFlags } from "../shared/flags.ts";
import { Random } from "../shared/random.ts";
import { Client } from "../shared/testing.ts";

const SLACK_BYTES = 16 * 1024 * 1024; // how far memory may end from where it began
const SETTLE_MS = 30_000; // a paused flooder's queue empties at the refill rate, a lingering room takes its time
const POLL_MS = 50;
const PATIENCE_MS = 10_000; // for one answer, or one attack
const WARM_UP_SHARE = 1 / 4; // of the time, and before it: caches, the heap, the tables of addresses and origins fill
const WARM_UP_LEAST = 1; // seconds
const PROGRESS_MS = 5_000;

// ---------------------------------------------------------------------------------------------------------
// Raw sockets
// ---------------------------------------------------------------------------------------------------------

/** What `clientFrame` may do otherwise than a WebSocket client does. */
export type FrameOptions = {
  /** 1, text, where absent. */
  opcode?: number;
  fin?: boolean;
  /** The three reserved bits, 0 to 7. */
  reserved?: number;
  masked?: boolean;
  /** The length that the header declares; the payload's where absent. */
  length?: number | bigint;
  /** Bytes in which the length is written; the shortest form where absent. */
  lengthBytes?: 0 | 2 | 8;
};

/** The bytes of one WebSocket frame as a client writes it, or as it must not. */
export function clientFrame(payload: string | Uint8Array, options: FrameOptions = {}): Buffer {
  const { opcode = 1, fin = true, reserved = 0, masked = true } = options;
  const body = Buffer.from(payload as string);
  const length = BigInt(options.length ?? body.length);
  const lengthBytes = options.lengthBytes ?? (length < 126n ? 0 : length < 65536n ? 2 : 8);
  const header = Buffer.alloc(2 + lengthBytes + (masked ? 4 : 0));
  header[0] = (fin ? 0x80 : 0) | (reserved << 4) | opcode;
  header[1] = (masked ? 0x80 : 0) | (lengthBytes === 0 ? Number(length & 127n) : lengthBytes === 2 ? 126 : 127);
  if (lengthBytes === 2) header.writeUInt16BE(Number(length & 0xffffn), 2);
  if (lengthBytes === 8) header.writeBigUInt64BE(BigInt.asUintN(64, length), 2);
  if (masked) {
    const mask = [0x9a, 0x3c, 0x51, 0xe7] as const;
    header.set(mask, 2 + lengthBytes);
    for (let i = 0; i < body.length; i++) body[i] = (body[i] as number) ^ mask[(i & 3) as 0 | 1 | 2 | 3];
  }
  return Buffer.concat([header, body]);
}

/** The text of an upgrade request; a header set to undefined is left out. */
export function handshake(path = "/", headers: Record<string, string | undefined> = {}): string {
  const all = {
    Host: "relay",
    Upgrade: "websocket",
    Connection: "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    ...headers,
  };
  const lines = Object.entries(all).flatMap(([name, value]) => (value === undefined ? [] : [`${name}: ${value}`]));
  return `GET ${path} HTTP/1.1\r\n${lines.join("\r\n")}\r\n\r\n`;
}

/** A frame from the server. */
export type ServerFrame = { opcode: number; payload: Buffer };

/** A TCP socket that speaks WebSocket as badly as it is told to: it answers no ping and no close by itself. */
export class RawSocket {
  #socket!: Bun.Socket;
  #unsent = Buffer.alloc(0);
  #received: Buffer[] = [];
  #wake: (() => void) | undefined;
  #isOver = false;
  readonly #closed = Promise.withResolvers<"closed" | "reset">();

  /** Connects. @throws where nobody listens */
  static async connect(url: string): Promise<RawSocket> {
    const raw = new RawSocket();
    const { hostname, port } = new URL(url);
    const over = (how: "closed" | "reset") => {
      raw.#isOver = true;
      raw.#closed.resolve(how);
      raw.#wake?.();
    };
    raw.#socket = await Bun.connect({
      hostname,
      port: Number(port),
      socket: {
        data(_, bytes) {
          raw.#received.push(bytes);
          raw.#wake?.();
        },
        drain: () => raw.#flush(),
        close: (_, error) => over(error ? "reset" : "closed"),
        error: () => over("reset"),
      },
    });
    return raw;
  }

  /** Connects and upgrades. @throws where the upgrade is refused */
  static async open(url: string, path?: string, headers?: Record<string, string | undefined>): Promise<RawSocket> {
    const raw = await RawSocket.connect(url);
    raw.write(handshake(path, headers));
    const head = await raw.head();
    if (!head.startsWith("HTTP/1.1 101 ")) throw new Error(`the upgrade was refused: ${head}`);
    return raw;
  }

  /** How the connection ended. */
  get closed(): Promise<"closed" | "reset"> {
    return this.#closed.promise;
  }

  /** What came and hasn't been read. */
  get received(): Buffer {
    const all = Buffer.concat(this.#received);
    this.#received = [all];
    return all;
  }

  /** Sends bytes as they are. */
  write(bytes: string | Uint8Array): void {
    this.#unsent = Buffer.concat([this.#unsent, Buffer.from(bytes as string)]);
    this.#flush();
  }

  /** Sends messages, each a masked text frame, in one write. */
  send(...messages: (object | string)[]): void {
    const texts = messages.map((message) => (typeof message === "string" ? message : JSON.stringify(message)));
    this.write(Buffer.concat(texts.map((text) => clientFrame(text))));
  }

  /** The head of an HTTP answer; what follows stays. Empty where the connection ends first. */
  async head(): Promise<string> {
    for (;;) {
      const end = this.received.indexOf("\r\n\r\n");
      if (end >= 0) return this.#take(end + 4).toString("latin1");
      if (this.#isOver) return "";
      await this.#more();
    }
  }

  /** The next frame; undefined where the connection ends first. */
  async nextFrame(): Promise<ServerFrame | undefined> {
    for (;;) {
      const frame = this.#readFrame();
      if (frame !== undefined || this.#isOver) return frame;
      await this.#more();
    }
  }

  /** The next message, pings and all else left out. @throws where the connection ends first */
  async next(): Promise<Record<string, any>> {
    for (;;) {
      const frame = await this.nextFrame();
      if (frame === undefined) throw new Error("the connection ended before a message came");
      if (frame.opcode === 1) return JSON.parse(frame.payload.toString());
    }
  }

  /** Stops reading: the kernel's buffers fill, then the relay's. */
  pause(): void {
    this.#socket.pause();
  }

  resume(): void {
    this.#socket.resume();
  }

  /** Closes with a FIN. */
  end(): void {
    this.#socket.end();
  }

  /** Closes with a reset. */
  reset(): void {
    this.#socket.terminate();
  }

  #flush(): void {
    if (this.#unsent.length === 0 || this.#isOver) return;
    const sent = this.#socket.write(this.#unsent);
    if (sent > 0) this.#unsent = this.#unsent.subarray(sent);
  }

  #more(): Promise<void> {
    return new Promise((resolve) => (this.#wake = resolve));
  }

  #take(bytes: number): Buffer {
    const all = this.received;
    this.#received = [all.subarray(bytes)];
    return all.subarray(0, bytes);
  }

  #readFrame(): ServerFrame | undefined {
    const all = this.received;
    if (all.length < 2) return undefined;
    const short = (all[1] as number) & 127;
    const header = short === 126 ? 4 : short === 127 ? 10 : 2;
    if (all.length < header) return undefined;
    const length = short === 126 ? all.readUInt16BE(2) : short === 127 ? Number(all.readBigUInt64BE(2)) : short;
    if (all.length < header + length) return undefined;
    const bytes = this.#take(header + length);
    return { opcode: (bytes[0] as number) & 15, payload: bytes.subarray(header) };
  }
}

// ---------------------------------------------------------------------------------------------------------
// The relay under trial
// ---------------------------------------------------------------------------------------------------------

/** A relay that runs as a process of its own. */
export class ChildRelay {
  /** What it has logged, a line each. */
  readonly lines: string[] = [];
  #port = Promise.withResolvers<number>();
  url = "";

  private constructor(readonly process: Bun.Subprocess<"ignore", "pipe", "inherit">) {
    void this.#read();
  }

  /** Starts `bun run server.ts` on a free port. @throws where it ends before it listens */
  static async start(env: Record<string, string> = {}, server = `${import.meta.dir}/../../server.ts`): Promise<ChildRelay> {
    const { PATH, HOME } = process.env;
    const child = new ChildRelay(
      Bun.spawn([process.execPath, "run", server], {
        env: { PATH, HOME, PORT: "0", IDLE_EXIT_SECONDS: "60", ...env }, // it outlives a parent that crashes by so long
        stdin: "ignore",
        stdout: "pipe",
        stderr: "inherit",
      }),
    );
    child.url = `http://127.0.0.1:${await child.#port.promise}`;
    return child;
  }

  get pid(): number {
    return this.process.pid;
  }

  /** Sockets that the process holds open, the listening one too; undefined where the system doesn't say. */
  get sockets(): number | undefined {
    const fds = `/proc/${this.pid}/fd`;
    try {
      return readdirSync(fds).filter((fd) => {
        try {
          return readlinkSync(`${fds}/${fd}`).startsWith("socket:");
        } catch {
          return false; // closed meanwhile
        }
      }).length;
    } catch {
      return undefined;
    }
  }

  /** Ends the process, whatever it does. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.process.kill("SIGKILL");
    await this.process.exited;
  }

  async #read(): Promise<void> {
    const decoder = new TextDecoder();
    let rest = "";
    for await (const bytes of this.process.stdout) {
      const lines = (rest + decoder.decode(bytes, { stream: true })).split("\n");
      rest = lines.pop() ?? "";
      this.lines.push(...lines);
      const port = /^party-sockets listening .*\bport=(\d+)/.exec(lines.join("\n"))?.[1];
      if (port !== undefined) this.#port.resolve(Number(port));
    }
    this.#port.reject(new Error("the relay ended before it listened"));
  }
}

/** What a relay says of itself at `/metrics` and `/`. */
export type Vitals = { rooms: number; clients: number; internalErrors: number; rssBytes: number; text: string };

/** Asks a relay how it is. @throws where it doesn't answer */
export async function vitals(url: string): Promise<Vitals> {
  const ask = async (path: string) => {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    return (await fetch(url + path, { redirect: "manual", keepalive: false, signal })).text();
  };
  const [metrics, text] = await Promise.all([ask("/metrics"), ask("/")]);
  const read = (series: RegExp): number => Number(series.exec(metrics)?.[1] ?? NaN);
  return {
    rooms: read(/^party_sockets_rooms\{.*\} (\d+)$/m),
    clients: read(/^party_sockets_clients\{.*\} (\d+)$/m),
    internalErrors: read(/^party_sockets_errors_total\{.*code="internal".*\} (\d+)$/m),
    rssBytes: read(/^process_resident_memory_bytes\{.*\} (\d+)$/m),
    text,
  };
}

// ---------------------------------------------------------------------------------------------------------
// Bystanders
// ---------------------------------------------------------------------------------------------------------

const ROOMS = 3;
const MEMBERS = 4;
const EVERY_MS = 40;

type Member = {
  client: Client;
  index: number;
  sent: number;
  /** How many messages came, by their sender's index. */
  got: number[];
  /** A hash of what came, in its order: the same for all of a room. */
  order: number;
};

/** Rooms that only want to play: their members number their messages and count those of the others. */
export class Bystanders {
  readonly faults = new Set<string>();
  /** The first one's room; attackers may come and go there. */
  sharedRoom = "";
  sent = 0;
  /** The longest that a message took since the last reading, ms. */
  worstMs = 0;
  readonly #rooms: Member[][] = [];
  #timer: Timer | undefined;
  #wake: (() => void) | undefined;
  #leaving = false;

  static async start(url: string): Promise<Bystanders> {
    const bystanders = new Bystanders();
    for (let r = 0; r < ROOMS; r++) {
      const members: Member[] = [];
      bystanders.#rooms.push(members);
      let code = "";
      for (let index = 0; index < MEMBERS; index++) {
        const client = await Client.open(url, { "X-Forwarded-For": "192.0.2.1" });
        if (index === 0) code = await client.create(1000, crypto.randomUUID());
        else await client.join(code, crypto.randomUUID());
        const member = { client, index, sent: 0, got: Array<number>(MEMBERS).fill(0), order: 0 };
        members.push(member);
        void bystanders.#listen(r, member);
      }
      bystanders.sharedRoom ||= code;
    }
    bystanders.#timer = setInterval(() => bystanders.#say(), EVERY_MS);
    return bystanders;
  }

  /** Waits until what was sent has arrived, and leaves. */
  async finish(): Promise<void> {
    clearInterval(this.#timer);
    const isWhole = (members: Member[]) => members.every(({ got }) => got.every((count, from) => count === members[from]?.sent));
    const late = Date.now() + 5_000;
    while (!this.#rooms.every(isWhole) && Date.now() < late)
      await Promise.race([new Promise<void>((resolve) => (this.#wake = resolve)), Bun.sleep(POLL_MS)]);
    this.#leaving = true;
    for (const [r, members] of this.#rooms.entries()) {
      if (!isWhole(members)) this.faults.add(`bystander room ${r} misses messages: ${members.map(tally).join("; ")}`);
      else if (members.some(({ order }) => order !== members[0]?.order))
        this.faults.add(`the members of bystander room ${r} saw different orders`);
    }
    await Promise.all(this.#rooms.flat().map(({ client }) => client.close()));
  }

  #say(): void {
    for (const member of this.#rooms.flat()) {
      const data = { n: member.sent++, at: performance.now() };
      member.client.send({ type: "send", data, echo: true });
      this.sent++;
    }
  }

  async #listen(room: number, member: Member): Promise<void> {
    try {
      for (;;) {
        const { type, from, data } = await member.client.next();
        if (type !== "message" || from >= MEMBERS) continue; // an attacker's
        if (data.n !== member.got[from])
          this.faults.add(`bystander ${member.index} of room ${room} got ${data.n} of ${from} after ${member.got[from]}`);
        member.got[from] = data.n + 1;
        member.order = (Math.imul(member.order, 31) + from + 1) | 0;
        this.worstMs = Math.max(this.worstMs, performance.now() - data.at);
        this.#wake?.();
      }
    } catch (error) {
      if (!this.#leaving) this.faults.add(`bystander ${member.index} of room ${room}: ${(error as Error).message}`);
    }
  }
}

function tally({ index, sent, got }: Member): string {
  return `${index} sent ${sent}, got ${got.join(" ")}`;
}

// ---------------------------------------------------------------------------------------------------------
// The trial
// ---------------------------------------------------------------------------------------------------------

/** What a worker of a trial gets. */
export type Arena = {
  url: string;
  random: Random;
  /** Whether it is time to leave. */
  isOver(): boolean;
  /** Codes of rooms to meet in; workers add theirs, the oldest go. */
  rooms: string[];
  /** Says that the relay did what it must not. */
  fault(text: string): void;
  /** Counts a piece of work, for the progress line. */
  count(what: string): void;
};

export type Trial = {
  name: string;
  /** How long, after a warm-up of a fourth of it. */
  seconds: number;
  seed: number;
  /** The relay; one of its own where absent. */
  url?: string | undefined;
  /** The environment of its own relay. */
  env?: Record<string, string>;
  /** Another server.ts than this one. */
  server?: string | undefined;
  workers: number;
  /** What each of the workers does until `isOver()`. */
  work(arena: Arena): Promise<void>;
  /** Takes progress lines. */
  log(line: string): void;
};

/** Runs a trial. @returns what the relay did wrong, a line each; empty where it passed */
export async function trial({ url, env = {}, server, ...settings }: Trial): Promise<string[]> {
  if (url !== undefined) return attend(url, undefined, settings);
  await using child = await ChildRelay.start(env, server);
  return await attend(child.url, child, settings);
}

async function attend(url: string, child: ChildRelay | undefined, settings: Trial): Promise<string[]> {
  const { name, seconds, seed, workers, log } = settings;
  const faults = new Set<string>();
  const socketsBefore = child?.sockets;
  const before = await vitals(url);
  const bystanders = await Bystanders.start(url);
  const begun = performance.now();
  const counts = new Map<string, number>();
  let rss = before.rssBytes;

  const line = () => {
    const work = [...counts].map(([what, n]) => `${what}=${n}`).join(" ");
    const passed = ((performance.now() - begun) / 1000).toFixed(0);
    const late = bystanders.worstMs.toFixed(0);
    log(
      `${name} seed=${seed} ${passed}s ${work} bystanders=${bystanders.sent} worst=${late}ms rss=${mebi(rss)}MiB faults=${faults.size + bystanders.faults.size}`,
    );
    bystanders.worstMs = 0;
  };
  const progress = setInterval(async () => {
    rss = (await vitals(url).catch(() => before)).rssBytes;
    line();
  }, PROGRESS_MS);

  const act = async (part: number, partSeconds: number) => {
    const until = performance.now() + partSeconds * 1000;
    const rooms = [bystanders.sharedRoom];
    const jobs = Array.from({ length: workers }, async (_, worker) => {
      const arena: Arena = {
        url,
        random: new Random(seed * 65_537 + part * 1_009 + worker),
        isOver: () => performance.now() > until || faults.size > 20,
        rooms,
        fault: (text) => void faults.add(text),
        count: (what) => counts.set(what, (counts.get(what) ?? 0) + 1),
      };
      await settings.work(arena).catch((error: Error) => faults.add(`worker ${worker}: ${error.stack}`));
    });
    await Promise.all(jobs);
  };
  /** Waits until the relay is as it should be. @returns whether it came to that */
  const comesTo = async (isSo: (now: Vitals) => boolean): Promise<boolean> => {
    const late = performance.now() + SETTLE_MS;
    for (;;) {
      const now = await vitals(url);
      rss = now.rssBytes;
      if (isSo(now)) return true;
      if (performance.now() > late) return false;
      await Bun.sleep(POLL_MS);
    }
  };
  const alone = (now: Vitals) => now.rooms === before.rooms + ROOMS && now.clients === before.clients + ROOMS * MEMBERS;

  try {
    await act(0, Math.max(WARM_UP_LEAST, seconds * WARM_UP_SHARE));
    await comesTo(alone);
    const rssWarm = rss;
    await act(1, seconds);
    if (!(await comesTo(alone))) faults.add("rooms or members of those who went are left");
    if (!(await comesTo((now) => now.rssBytes <= rssWarm + SLACK_BYTES)))
      faults.add(`memory grew from ${mebi(rssWarm)} to ${mebi(rss)} MiB`);
    await bystanders.finish();
    const empty = `rooms: ${before.rooms}\nclients: ${before.clients}\n`;
    const isEmpty = (now: Vitals) => now.rooms === before.rooms && now.clients === before.clients;
    if (!(await comesTo((now) => isEmpty(now) && (now.text === empty || child === undefined))))
      faults.add(`not empty at the end: ${JSON.stringify(await vitals(url))}`);
    const { internalErrors } = await vitals(url);
    if (internalErrors !== before.internalErrors) faults.add(`${internalErrors - before.internalErrors} exceptions in the relay`);
    if (child !== undefined) await checkProcess(child, socketsBefore, faults);
    log(`${name} seed=${seed} memory after the warm-up ${mebi(rssWarm)}, at the end ${mebi(rss)} MiB`);
  } catch (error) {
    faults.add(`the relay doesn't answer: ${(error as Error).message}`);
    for (const text of child?.lines.slice(-5) ?? []) faults.add(`its log: ${text}`);
  } finally {
    clearInterval(progress);
  }
  line();
  return [...faults, ...bystanders.faults];
}

/** A relay that nobody uses holds no socket, and ends at once when it is told to. */
async function checkProcess(child: ChildRelay, socketsBefore: number | undefined, faults: Set<string>): Promise<void> {
  const late = performance.now() + SETTLE_MS;
  while ((child.sockets ?? 0) > (socketsBefore ?? 0) && performance.now() < late) await Bun.sleep(POLL_MS);
  if ((child.sockets ?? 0) > (socketsBefore ?? 0))
    faults.add(`${child.sockets} sockets are open, ${socketsBefore} were at the start`);
  for (const text of child.lines) if (text.includes(" exception ")) faults.add(`its log: ${text}`);
  child.process.kill("SIGTERM");
  const code = await Promise.race([child.process.exited, Bun.sleep(5_000)]);
  if (code !== 0) faults.add(`SIGTERM without rooms: exit ${code ?? "not within 5 s"}`);
  const end = child.lines.find((text) => text.includes(" drain ends "));
  if (end !== undefined && !end.endsWith(" members=0 roomless=0")) faults.add(`sockets were left: ${end}`);
}

function mebi(bytes: number): string {
  return (bytes / 1024 / 1024).toFixed(1);
}

/** Runs a trial from the command line, and ends the process with 1 where the relay failed. */
export async function main(
  run: (seconds: number, seed: number, log: Trial["log"], url?: string) => Promise<string[]>,
): Promise<void> {
  const usage = "bun run ops/trials/fuzz.ts|ops/trials/soak.ts [--seconds 60] [--seed N] [--url http://…]";
  const values = readFlags(usage, { seconds: { type: "string" }, seed: { type: "string" }, url: { type: "string" } });
  const seconds = Number(values.seconds ?? 60);
  const seed = Number(values.seed ?? crypto.getRandomValues(new Uint16Array(1))[0]);
  if (!(seconds > 0) || !Number.isSafeInteger(seed)) badUsage(usage, "--seconds must be a positive number, --seed a whole one");
  if (values.url !== undefined)
    await vitals(values.url).catch((error: Error) => badUsage(usage, `${values.url} doesn't answer: ${error.message}`));
  console.log(`seed ${seed}`);
  const faults = await run(seconds, seed, console.log, values.url);
  for (const fault of faults) console.error(`FAULT ${fault}`);
  console.log(faults.length === 0 ? "passed" : `failed: ${faults.length} faults; seed ${seed}`);
  process.exit(faults.length === 0 ? 0 : 1);
}

// ---------------------------------------------------------------------------------------------------------
// Attacks
// ---------------------------------------------------------------------------------------------------------

type Attack = (arena: Arena, raw: RawSocket) => Promise<void>;

const TYPES = "create join send send send send set_state close_room set_room kick set_host leave ping".split(" ");
const ANSWERS = new Set("created joined peer_joined peer_left message state room host left pong draining error".split(" "));

/** JSON texts that somebody may not have thought of. */
const HOSTILE = [
  ...["null", "true", "false", "0", "-0", "-1", "1", "1.5", "1e400", "1e308", "9007199254740993", '""', '"x"', "[]", "{}"],
  ...['"\\ud800"', '"\\u0000"', '"é😀"', '"__proto__"', '"constructor"', '"toString"', "[0]", "[0,0,1,2,3]", "[[]]", "[-1]"],
  ...['{"toString":1}', '{"__proto__":{"index":0}}', '"{room}"', '"https://{room}.example/{instance}"', '"javascript:1"'],
  JSON.stringify("long".repeat(40)),
  JSON.stringify('\\"'.repeat(9_000)),
  JSON.stringify(Array.from({ length: 100 }, (_, i) => i)),
  "[".repeat(3_000) + "]".repeat(3_000),
  '{"a":'.repeat(1_000) + "1" + "}".repeat(1_000),
];

/** A message that is right, or nearly. */
function message({ random, rooms }: Arena): string {
  const fields: Record<string, () => string> = {
    clientId: () => JSON.stringify(`c${random.below(9)}`),
    maxClients: () => String(1 + random.below(8)),
    linger: () => String(random.below(2)), // longer, and the rooms outlive the trial
    hostGrace: () => "1",
    migrate: () => String(random.chance(0.5)),
    url: () => '"https://example.com/{room}?at={instance}"',
    room: () => JSON.stringify(random.pick(rooms)),
    data: () => random.pick(HOSTILE),
    to: () => random.pick(["0", "1", "[0,1,2]", "7"]),
    echo: () => "true",
    index: () => String(random.below(4)),
    locked: () => String(random.chance(0.2)),
    t: () => String(random.next()),
  };
  const type = random.pick(TYPES);
  const needed: Record<string, string[]> = {
    create: ["clientId", "maxClients"],
    join: ["clientId", "room"],
    send: ["data"],
    set_state: ["data"],
    kick: ["index"],
    set_host: ["index"],
  };
  const names = [...(needed[type] ?? []), ...Object.keys(fields).filter(() => random.chance(0.1))];
  const members = names.map((name) => {
    const value = random.chance(0.1) ? random.pick(HOSTILE) : (fields[name] as () => string)();
    return `${JSON.stringify(name)}${space(random)}:${space(random)}${value}`;
  });
  const typeText = random.chance(0.05) ? random.pick(HOSTILE) : JSON.stringify(type);
  members.splice(random.chance(0.7) ? 0 : random.below(members.length + 1), 0, `"type":${typeText}`);
  const text = `{${members.join(`,${space(random)}`)}}`;
  if (random.chance(0.03)) return text.slice(0, random.below(text.length));
  if (random.chance(0.06)) return random.pick(HOSTILE);
  return text;
}

function space(random: Random): string {
  return random.chance(0.9) ? "" : random.pick([" ", "\n\t", "\r\n", " ".repeat(40), "\u00a0"]);
}

/** A frame of any kind. */
function anyFrame(arena: Arena): Buffer {
  const { random } = arena;
  const text = message(arena);
  switch (random.below(14)) {
    case 0:
      return clientFrame(random.bytes(random.below(300)), { opcode: random.below(16) });
    case 1:
      return clientFrame(text, { masked: false });
    case 2:
      return clientFrame(text, { reserved: 1 + random.below(7) });
    case 3: {
      const at = random.below(text.length);
      const inner = random.chance(0.5) ? [clientFrame("between", { opcode: 9 })] : [];
      const last = clientFrame(text.slice(at), { opcode: random.chance(0.9) ? 0 : 1 });
      return Buffer.concat([clientFrame(text.slice(0, at), { fin: false }), ...inner, last]);
    }
    case 4: // control frames: at most 125 bytes and never in parts
      return clientFrame(random.bytes(random.below(200)), { opcode: 8 + random.below(8), fin: random.chance(0.7) });
    case 5: {
      const wrong = random.pick([0, 1, 125, 126, 65535, 65536, 2 ** 31, 2n ** 63n, 2n ** 64n - 1n]);
      return clientFrame(text, { length: wrong, lengthBytes: random.pick([2, 8] as const) });
    }
    case 6: {
      const bad = [[0xff], [0xc0, 0x80], [0xed, 0xa0, 0x80], [0xf5, 0x80, 0x80, 0x80], [0xe2, 0x82]];
      return clientFrame(Buffer.concat([Buffer.from(text), Buffer.from(random.pick(bad))]));
    }
    case 7: {
      const code = random.pick([0, 999, 1000, 1004, 1005, 1006, 1015, 2999, 3000, 4000, 4999, 65535]);
      const payload = Buffer.concat([Buffer.from([code >> 8, code & 255]), random.bytes(random.below(130))]);
      return clientFrame(payload.subarray(0, random.below(payload.length)), { opcode: 8 });
    }
    case 8:
      return clientFrame("x".repeat(random.pick([16_384, 65_535, 65_537, 300_000])));
    case 9:
      return Buffer.concat(Array.from({ length: 50 }, () => clientFrame("", { opcode: random.pick([9, 10]) })));
    default:
      return clientFrame(text);
  }
}

/** Changes bytes at random. */
function mutate(random: Random, bytes: Buffer): Buffer {
  const copy = Buffer.from(bytes);
  for (let i = random.below(4); i > 0 && copy.length > 0; i--) {
    const at = random.below(copy.length);
    copy[at] = (copy[at] as number) ^ (1 << random.below(8));
  }
  return random.chance(0.3) ? copy.subarray(0, random.below(copy.length + 1)) : copy;
}

/** Sends bytes whole or in parts. */
async function dribble(random: Random, raw: RawSocket, bytes: Buffer): Promise<void> {
  let from = 0;
  for (let parts = random.below(5); parts > 0; parts--) {
    const to = from + random.below(bytes.length - from + 1);
    raw.write(bytes.subarray(from, to));
    from = to;
    await Bun.sleep(random.below(3));
  }
  raw.write(bytes.subarray(from));
}

/** Stays for a while, or until the relay has had enough. */
async function stay(raw: RawSocket, ms: number): Promise<void> {
  await Promise.race([raw.closed, Bun.sleep(ms)]);
}

/** Reads to the end what the relay said, all of which must be messages of its own. */
async function readAnswers(raw: RawSocket, fault: Arena["fault"]): Promise<void> {
  for (let frame = await raw.nextFrame(); frame !== undefined; frame = await raw.nextFrame()) {
    if (frame.opcode !== 1) continue;
    const text = frame.payload.toString();
    try {
      const { type } = JSON.parse(text) as { type: string };
      if (!ANSWERS.has(type)) fault(`sent a message that isn't its own: ${text.slice(0, 300)}`);
    } catch {
      fault(`sent no JSON: ${text.slice(0, 300)}`);
    }
  }
}

/** Upgrades. @returns whether that went well */
async function upgrade({ random }: Arena, raw: RawSocket): Promise<boolean> {
  raw.write(handshake("/", identity(random)));
  return (await raw.head()).startsWith("HTTP/1.1 101 ");
}

/** Says to be from anywhere. */
function identity(random: Random): Record<string, string> {
  const addresses = ["10.0.0.1", `10.1.${random.below(256)}.${random.below(256)}`, `2001:db8:${random.below(9999)}::1`];
  const origins = ["https://game.example", "null", `https://${random.below(2000)}.example`, "x".repeat(300), 'é"\\'];
  return { "X-Forwarded-For": random.pick([...addresses, "unknown", "1.2.3.4, 10.2.0.1"]), Origin: random.pick(origins) };
}

const TARGETS = [
  ...["/", "/health", "/metrics", "/room/", "/room/%", "/room/%00", "/room/111111", "/room/a/b", "//evil.example/%2e%2e"],
  ...[
    "/\\evil.example",
    "*",
    "http://evil.example/health",
    "?",
    "/?instance=abc;app=other",
    "/?instance=",
    "/#",
    "/é",
    "relay:1",
  ],
  `/${"a".repeat(4_000)}`,
  `/${"/".repeat(40_000)}`,
  `/?${"a=1&".repeat(1_000)}`,
];
const METHODS = "GET GET GET HEAD OPTIONS POST PUT DELETE TRACE CONNECT PATCH get PRI X-ODD".split(" ");
const HEADERS: readonly (readonly [string, readonly string[]])[] = [
  ["Host", ["", "a b", "[::1", "[::1]:99999", "x:99999999", "é", "a/b?c#d", "@", "a\\b", "%", "x".repeat(5_000)]],
  ["Origin", ["", "null", "https://a.example", "x".repeat(20_000), '"\\\t', "é"]],
  ["Upgrade", ["", "websocket", "WEBSOCKET", "h2c", "websocket, h2c", "websocket/13"]],
  ["Connection", ["", "close", "keep-alive", "Upgrade, close", "upgrade"]],
  ["Sec-WebSocket-Key", ["", "x", "dGhlIHNhbXBsZSBub25jZQ==", "x".repeat(300)]],
  ["Sec-WebSocket-Version", ["", "8", "13", "99"]],
  ["Sec-WebSocket-Extensions", ["permessage-deflate", "permessage-deflate; client_max_window_bits=99", ";;,="]],
  ["Sec-WebSocket-Protocol", ["a", "a, b", ",,,"]],
  ["Content-Length", ["0", "5", "-1", "99999999999999999999", "1, 1", "x"]],
  ["Transfer-Encoding", ["chunked", "gzip, chunked", "identity", "xchunked"]],
  ["Expect", ["100-continue", "x"]],
  ["fly-replay-src", ["instance=a;region=b", ""]],
  ["fly-replay-failed", ["x"]],
  ["X-Party-Probe", ["1", "2"]],
  ["X-Forwarded-For", ["", ",", "1.2.3.4", "::ffff:1.2.3.4", "fe80::1%eth0", "x".repeat(1_000)]],
];

const ATTACKS: Record<string, Attack> = {
  /** Bytes that are no HTTP. */
  async garbage({ random }, raw) {
    await dribble(random, raw, random.bytes(random.below(2_000)));
    await stay(raw, random.below(100));
  },

  /** Requests with odd methods, targets and headers, some of them upgrades. */
  async requests({ random, fault }, raw) {
    let text = "";
    for (let n = 1 + random.below(8); n > 0; n--) {
      const headers = HEADERS.flatMap(([name, values]) => (random.chance(0.08) ? [`${name}: ${random.pick(values)}`] : []));
      if (random.chance(0.7)) headers.unshift("Host: relay");
      const version = random.chance(0.95) ? "HTTP/1.1" : random.pick(["HTTP/1.0", "HTTP/2.0", "HTTP/9", ""]);
      const end = random.chance(0.9) ? "\r\n\r\n" : random.pick(["\r\n", "\n\n", "", "\r\n \r\n\r\n"]);
      text += `${random.pick(METHODS)} ${random.pick(TARGETS)} ${version}\r\n${headers.join("\r\n")}${end}`;
      if (random.chance(0.1)) text += random.pick(["hello", "5\r\nhello\r\n0\r\n\r\n", "FFFFFFFFFFFFFFFFF\r\n", "-1\r\n"]);
    }
    await dribble(random, raw, Buffer.from(text));
    await stay(raw, 20 + random.below(50));
    const answer = raw.received.toString("latin1");
    if (/^HTTP\/1\.1 50[0-4]/m.test(answer) || /<html|<!doctype/i.test(answer))
      fault(`answered ${JSON.stringify(answer.slice(0, 200))} to ${JSON.stringify(text.slice(0, 2_000))}`);
  },

  /** A handshake that is cut short, or changed, or stays half open. */
  async handshakes({ random }, raw) {
    await dribble(random, raw, mutate(random, Buffer.from(handshake("/", identity(random)))));
    await stay(raw, random.below(300));
  },

  /** Frames of every kind, right and wrong. */
  async frames(arena, raw) {
    const { random } = arena;
    if (!(await upgrade(arena, raw))) return;
    const frames = Buffer.concat(Array.from({ length: 1 + random.below(12) }, () => anyFrame(arena)));
    await dribble(random, raw, random.chance(0.3) ? mutate(random, frames) : frames);
    await stay(raw, random.below(60));
  },

  /** Messages, most of them right, of a host and guests who come and go. */
  async messages(arena, raw) {
    const { random, url, rooms } = arena;
    const crew = [raw, ...(await Promise.all([1, 2, 3].map(() => RawSocket.connect(url))))];
    try {
      for (const one of crew) if (!(await upgrade(arena, one))) return;
      raw.send({ type: "create", clientId: "c0", maxClients: 2 + random.below(3), linger: random.below(2) });
      const { room } = await raw.next();
      if (room !== undefined && rooms.push(room) > 3) rooms.splice(1, 1); // the first is the bystanders'
      for (const guest of crew.slice(1))
        guest.send({ type: "join", clientId: `c${random.below(9)}`, room: room ?? random.pick(rooms) });
      for (let n = random.below(20); n > 0; n--) {
        random.pick(crew).send(...Array.from({ length: 1 + random.below(10) }, () => message(arena)));
        await Bun.sleep(random.below(4));
      }
      for (const one of crew) one.end();
      for (const one of crew) await readAnswers(one, arena.fault);
    } finally {
      for (const one of crew) one.reset();
    }
  },

  /** A handshake with frames right behind it, or with a body. */
  async impatience(arena, raw) {
    const { random } = arena;
    const frames = Array.from({ length: random.below(5) }, () => anyFrame(arena));
    await dribble(random, raw, Buffer.concat([Buffer.from(handshake("/", identity(random))), ...frames]));
    await stay(raw, random.below(60));
  },

  /** Far more messages than the limit, in one write. */
  async floods(arena, raw) {
    const { random, rooms } = arena;
    if (!(await upgrade(arena, raw))) return;
    const { send, ping } = { send: { type: "send", data: random.next() }, ping: { type: "ping" } };
    raw.send({ type: "join", clientId: `c${random.below(40)}`, room: random.pick(rooms) });
    raw.send(...Array.from({ length: random.pick([600, 4_200, 5_000]) }, () => (random.chance(0.1) ? send : ping)));
    if (random.chance(0.5)) raw.pause();
    await stay(raw, random.below(400));
  },

  /** A room whose guest stops reading while the host says a lot. */
  async slowReaders(arena, raw) {
    const { random, url } = arena;
    if (!(await upgrade(arena, raw))) return;
    raw.send({ type: "create", clientId: "host", maxClients: 2 });
    const { room } = await raw.next();
    if (room === undefined) return;
    const guest = await RawSocket.connect(url);
    try {
      if (!(await upgrade(arena, guest))) return;
      guest.send({ type: "join", clientId: "guest", room });
      await guest.nextFrame();
      guest.pause();
      const data = "x".repeat(60_000);
      raw.send(...Array.from({ length: random.pick([20, 200]) }, () => ({ type: "send", data })));
      await stay(raw, random.below(300));
      if (random.chance(0.5)) guest.resume();
      await stay(raw, random.below(50));
    } finally {
      guest.reset();
    }
  },

  /** More sockets than the relay takes, roomless and idle. */
  async crowds({ random, url }, raw) {
    const crowd = await Promise.allSettled(Array.from({ length: 40 }, () => RawSocket.connect(url)));
    const there = crowd.flatMap((result) => (result.status === "fulfilled" ? [result.value] : []));
    for (const one of there) if (random.chance(0.9)) one.write(handshake());
    await stay(raw, random.below(300));
    for (const one of there) random.chance(0.5) ? one.end() : one.reset();
  },
};

/** Caps that the attacks reach, and the bystanders don't. */
const ENV = {
  MAX_MESSAGES_PER_SECOND: "2000",
  MAX_CONNECTIONS: "100",
  MAX_ROOMS: "9",
  ADDRESS_HEADER: "X-Forwarded-For",
};

/** Attacks a relay for so long. @returns what it did wrong */
export function fuzz(seconds: number, seed: number, log: Trial["log"], url?: string, server?: string): Promise<string[]> {
  return trial({
    ...{ name: "fuzz", seconds, seed, log, url, server, env: ENV, workers: 16 },
    async work(arena) {
      const { random, url, isOver, count, fault } = arena;
      while (!isOver()) {
        const [name, attack] = random.pick(Object.entries(ATTACKS));
        const raw = await RawSocket.connect(url);
        const late = setTimeout(() => {
          fault(`${name} got no answer for ${PATIENCE_MS / 1000} s`);
          raw.reset();
        }, PATIENCE_MS);
        try {
          await attack(arena, raw);
        } catch (error) {
          if (!(error as Error).message.startsWith("the connection ended")) throw error;
        } finally {
          clearTimeout(late);
          random.chance(0.5) ? raw.end() : raw.reset();
          count(name);
        }
      }
    },
  });
}

if (import.meta.main) await main(fuzz);
