/**
 * The load tool: how much does this machine carry, at what latency, for how much CPU, and was anything lost?
 *
 *     bun run ops/load/load.ts                                              a relay of its own, 100 rooms of 8, 60 messages a second each
 *     bun run ops/load/load.ts --url ws://localhost:3000 --rooms 10         a relay that runs already (--pid for its CPU and memory)
 *     bun run ops/load/load.ts --senders all --rooms 50 --phase random      a party: everybody sends, each at a moment of its own
 *     bun run ops/load/load.ts --rate 0 --vs "bun run ops/load/floor.ts"         saturated, compared with the floor, alternating
 *     bun run ops/load/load.ts --connect --rooms 1250                       what connecting costs; --idle: what being connected costs
 *     bun run ops/load/load.ts --flap 1000 --rooms 125                      so many members reconnect at once
 *     bun run ops/load/load.ts --grow bytes --plot bytes.svg                cost a delivery along rising values
 *
 * `--help` lists the flags. Exit code: 0 all well; 1 a delivery was lost, doubled, out of order or astray, or the server
 * closed a socket or refused something; 2 the run could not be made.
 *
 * How it works: plain TCP sockets, one thread. The WebSocket frames are built once with a zero mask key, which is legal and
 * leaves the payload readable, so that a message costs patching a header in place: sender, sequence number, send
 * time. A delivery is read from the bytes as they arrive, no JSON parsed: the header is found by its distance from the
 * frame's end. Where there are two cores and `taskset`, the server has core 0 and the tool core 1.
 *
 * Reading order: Options, Wire, Histogram, Server, Run, Comparing and growing, Output, Main.
 */
import { availableParallelism, cpus, release } from "node:os";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import type { Socket } from "bun";

// ---------------------------------------------------------------- Options

const HELP = `bun run ops/load/load.ts [flags]

what to load
  --url ws://…         a relay that runs already; without it one is started as a child, its limits off
  --server COMMAND     the command that is started instead of server.ts; it prints its port
  --pid N              process of the relay at --url, for its CPU and memory
  --vs URL|COMMAND     a second relay; the two take turns, and the ratio of their medians is printed
  --vs-pid N           process of the relay at a --vs URL
  --runs N             rounds of --vs, or runs a value of --grow, of which the median counts [3 with --vs, else 1]

traffic
  --rooms N            [100]
  --clients N          members a room [8; 4 with --grow rooms]
  --senders N|all      members a room that send [1]
  --bytes N            size of \`data\` as JSON text; at least 16, of an object 22 [48]
  --payload KIND       string, or object: an array of small objects, as a game's state has [string]
  --rate HZ            messages a second of each sender; 0: saturate [60; 0 with --grow bytes]
  --window N           with --rate 0: unacknowledged broadcasts a room [16, fewer of big ones]
  --targeted           send \`to\` the next member rather than to all
  --phase KIND         when senders of one rate send [even]
                         even: spread over the interval, a room's members as far apart as can be
                         random: each at a moment of its own, always the same ones
                         near: a room's members within a tenth of the interval, as games that answer a host's tick
                         room: all members of a room at the same moment
                         all: everybody at the same moment
  --seconds N          measured time [10]
  --warmup N           seconds of the same traffic before it, not measured [1]

instead of traffic
  --connect            connect, create and join only
  --idle               the same, then stay connected for --seconds
  --flap N             the same, then N members reconnect at once with their clientIds

growth
  --grow WHAT          a series: rooms, clients, bytes, or sockets (idle ones beside the traffic)
  --plot FILE.svg      draw it

output
  --json               one JSON object on stdout
  --help`;

const PHASES = ["even", "random", "near", "room", "all"] as const;
const PAYLOADS = ["string", "object"] as const;
const GROWTHS = ["rooms", "clients", "bytes", "sockets"] as const;

type Mode = "traffic" | "connect" | "idle" | "flap";
type Growth = (typeof GROWTHS)[number];

/** What one run does. Seconds are seconds, `rate` is messages a second of each sender (0: saturate). */
interface Scenario {
  mode: Mode;
  rooms: number;
  idleRooms: number; // beside them, connected and silent
  clients: number;
  senders: number | "all";
  bytes: number;
  payload: (typeof PAYLOADS)[number];
  rate: number;
  window: number;
  targeted: boolean;
  phase: (typeof PHASES)[number];
  seconds: number;
  warmup: number;
  flap: number;
}

/** A relay to load: one that runs (`url`), or a command that starts one. */
interface Target {
  name: string;
  url?: string;
  command?: string;
  pid?: number;
}

interface Options {
  scenario: Scenario;
  targets: Target[];
  runs: number;
  grow: Growth | undefined;
  plot: string | undefined;
  json: boolean;
}

/** Reads the command line. Throws a `UsageError` that says which flag is wrong. */
function parseOptions(argv: string[]): Options | "help" {
  let flags;
  try {
    flags = parseArgs({
      args: argv,
      options: {
        url: { type: "string" },
        server: { type: "string" },
        pid: { type: "string" },
        vs: { type: "string" },
        "vs-pid": { type: "string" },
        runs: { type: "string" },
        rooms: { type: "string", default: "100" },
        clients: { type: "string" },
        senders: { type: "string", default: "1" },
        bytes: { type: "string", default: "48" },
        payload: { type: "string", default: "string" },
        rate: { type: "string" },
        window: { type: "string" },
        targeted: { type: "boolean", default: false },
        phase: { type: "string", default: "even" },
        seconds: { type: "string", default: "10" },
        warmup: { type: "string", default: "1" },
        connect: { type: "boolean", default: false },
        idle: { type: "boolean", default: false },
        flap: { type: "string" },
        grow: { type: "string" },
        plot: { type: "string" },
        json: { type: "boolean", default: false },
        help: { type: "boolean", default: false },
      },
    }).values;
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
  if (flags.help) return "help";

  const amount = (flag: string, text: string, least: number): number => {
    const value = Number(text);
    if (text.trim() === "" || !Number.isFinite(value) || value < least)
      throw new UsageError(`--${flag} must be a number, ${least} or more`);
    return value;
  };
  const count = (flag: string, text: string, least: number): number => {
    const value = amount(flag, text, least);
    if (!Number.isInteger(value)) throw new UsageError(`--${flag} must be a whole number`);
    return value;
  };
  const pid = (flag: string, text: string | undefined) => (text === undefined ? undefined : count(flag, text, 1));
  const oneOf = <T extends string>(flag: string, text: string, all: readonly T[]): T => {
    const found = all.find((each) => each === text);
    if (!found) throw new UsageError(`--${flag} is one of ${all.join(", ")}`);
    return found;
  };

  const modes = [flags.connect && "connect", flags.idle && "idle", flags.flap !== undefined && "flap"].filter(
    (mode) => mode !== false,
  ) as Mode[];
  if (modes.length > 1) throw new UsageError("--connect, --idle and --flap exclude each other");
  const mode = modes[0] ?? "traffic";
  const grow = flags.grow === undefined ? undefined : oneOf("grow", flags.grow, GROWTHS);
  if (grow && mode !== "traffic") throw new UsageError("--grow measures traffic");
  if (flags.plot !== undefined && !grow) throw new UsageError("--plot needs --grow");
  if (flags.url !== undefined && flags.server !== undefined) throw new UsageError("--url and --server exclude each other");

  const rooms = count("rooms", flags.rooms, 1);
  // 3,000 rooms of 8 would be more sockets than a process may usually open.
  const clients = count("clients", flags.clients ?? (grow === "rooms" ? "4" : "8"), mode === "traffic" ? 2 : 1);
  const senders = flags.senders === "all" ? ("all" as const) : count("senders", flags.senders, 1);
  if (senders !== "all" && senders > clients) throw new UsageError("--senders must be at most --clients");
  const payload = oneOf("payload", flags.payload, PAYLOADS);
  const bytes = count("bytes", flags.bytes, dataText(payload, 0).length);
  const flap = count("flap", flags.flap ?? "0", 0);
  if (flap > rooms * clients) throw new UsageError("--flap must be at most --rooms times --clients");

  const first: Target = flags.url
    ? { name: flags.url, url: flags.url, pid: pid("pid", flags.pid) }
    : { name: flags.server ?? "server.ts", command: flags.server ?? SERVER };
  const targets = [first];
  if (flags.vs !== undefined)
    targets.push(
      /^(ws|http)s?:/.test(flags.vs)
        ? { name: flags.vs, url: flags.vs, pid: pid("vs-pid", flags["vs-pid"]) }
        : { name: flags.vs, command: flags.vs },
    );

  return {
    scenario: {
      mode,
      rooms,
      idleRooms: 0,
      clients,
      senders,
      bytes,
      payload,
      rate: amount("rate", flags.rate ?? (grow === "bytes" ? "0" : "60"), 0),
      window: count("window", flags.window ?? "0", 0),
      targeted: flags.targeted,
      phase: oneOf("phase", flags.phase, PHASES),
      seconds: amount("seconds", flags.seconds, 0.1),
      warmup: amount("warmup", flags.warmup, 0),
      flap,
    },
    targets,
    runs: count("runs", flags.runs ?? (flags.vs ? "3" : "1"), 1),
    grow,
    plot: flags.plot,
    json: flags.json,
  };
}

class UsageError extends Error {}

const SERVER = `"${process.execPath}" run "${join(import.meta.dir, "../../server.ts")}"`;

// ---------------------------------------------------------------- Wire

/*
 * The header inside every payload: "~", the sender's id (3 digits), its sequence number (5), its send time (5), in base 64.
 * Five digits hold 30 bits: a sequence number never gets there, a time in µs wraps after 18 minutes, which a latency survives.
 */
const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const DIGIT = Uint8Array.from(DIGITS, (digit) => digit.charCodeAt(0));
const VALUE = new Uint8Array(256);
for (const [value, digit] of DIGIT.entries()) VALUE[digit] = value;

const TILDE = 0x7e;
const HEADER = `~${"A".repeat(13)}`;
const SEQUENCE_AT = 4;
const TIME_AT = 9;
const MAX_MEMBERS = 64 ** 3; // ids of three digits
const TIME_MASK = 2 ** 30 - 1;

/** Now in whole µs, modulo 2^30. */
const microsNow = () => (performance.now() * 1000) & TIME_MASK;

function putDigits(bytes: Uint8Array, at: number, digits: number, value: number): void {
  for (let i = at + digits - 1; i >= at; i--) {
    bytes[i] = DIGIT[value & 63] as number;
    value >>>= 6;
  }
}

/** Five digits at `at` as a number. */
function fiveDigits(bytes: Uint8Array, at: number): number {
  return (
    ((VALUE[bytes[at] as number] as number) << 24) |
    ((VALUE[bytes[at + 1] as number] as number) << 18) |
    ((VALUE[bytes[at + 2] as number] as number) << 12) |
    ((VALUE[bytes[at + 3] as number] as number) << 6) |
    (VALUE[bytes[at + 4] as number] as number)
  );
}

/** JSON text of `bytes` ASCII bytes with the header in it; the shortest that there is, if that is longer. */
function dataText(payload: Scenario["payload"], bytes: number): string {
  if (payload === "string") {
    const fill = Math.max(0, bytes - HEADER.length - 2);
    return `"${HEADER}${"x".repeat(fill)}"`;
  }
  const item = '{"id":7,"x":12.5,"y":-3.25,"up":true}';
  const empty = `{"m":"${HEADER}"}`;
  const frame = `{"m":"${HEADER}","o":[],"s":""}`.length;
  const items = Math.floor((bytes - frame + 1) / (item.length + 1));
  if (items < 1) return `{"m":"${HEADER}${"x".repeat(Math.max(0, bytes - empty.length))}"}`;
  const list = Array(items).fill(item).join();
  const fill = bytes - frame - list.length;
  return `{"m":"${HEADER}","o":[${list}],"s":"${"x".repeat(fill)}"}`;
}

/** A client's frame (final, masked with key zero) around a payload. */
function clientFrame(opcode: number, payload: Uint8Array): Buffer {
  const size = payload.length;
  const head = size < 126 ? Buffer.alloc(6) : Buffer.alloc(size < 65536 ? 8 : 14);
  head[0] = 0x80 | opcode;
  head[1] = 0x80 | (size < 126 ? size : size < 65536 ? 126 : 127);
  if (head.length === 8) head.writeUInt16BE(size, 2);
  if (head.length === 14) head.writeBigUInt64BE(BigInt(size), 2);
  return Buffer.concat([head, payload]);
}

const textFrame = (text: string) => clientFrame(TEXT, Buffer.from(text));

const TEXT = 1;
const CLOSE = 8;
const PING = 9;
const PONG = 10;

// ---------------------------------------------------------------- Histogram

/** Counts of whole µs in buckets at most 1/32 wide (relative to their values): cheap to record, any percentile later. */
class Histogram {
  counts = new Uint32Array(832); // up to 2^30 µs
  total = 0;
  max = 0;

  record(micros: number): void {
    this.total++;
    if (micros > this.max) this.max = micros;
    const shift = micros < 64 ? 0 : 26 - Math.clz32(micros);
    (this.counts[shift * 32 + (micros >>> shift)] as number)++;
  }

  /** The middle of a bucket, in µs. */
  static value(bucket: number): number {
    const shift = bucket < 64 ? 0 : (bucket >> 5) - 1;
    return (bucket - shift * 32 + 0.5) * 2 ** shift - (shift ? 0 : 0.5);
  }

  /** The value in ms below which `percent` of the records lie; 0 without records. */
  percentileMs(percent: number): number {
    let left = Math.ceil((this.total * percent) / 100);
    for (const [bucket, count] of this.counts.entries()) {
      left -= count;
      if (left <= 0 && count > 0) return Math.min(Histogram.value(bucket), this.max) / 1000;
    }
    return 0;
  }

  /** `[upper end in ms, count]` in steps of 1, 2, 5, from the first to the last that isn't empty. */
  rows(): [number, number][] {
    const rows: [number, number][] = [];
    let bucket = 0;
    for (let end = 0.05, step = 0; bucket < this.counts.length; step++) {
      let count = 0;
      while (bucket < this.counts.length && Histogram.value(bucket) < end * 1000) count += this.counts[bucket++] as number;
      if (count > 0 || rows.length > 0) rows.push([end, count]);
      end *= step % 3 === 2 ? 2.5 : 2; // 0.05, 0.1, 0.2, 0.5, 1, …
      end = Number(end.toPrecision(1));
    }
    while (rows.at(-1)?.[1] === 0) rows.pop();
    return rows;
  }
}

// ---------------------------------------------------------------- Server

/** The limits that would be measured instead of the relay's work; 0 is unlimited. */
const NO_LIMITS = {
  MAX_MESSAGES_PER_SECOND: "0",
  MAX_CONNECTIONS: "0",
  MAX_ROOMS: "0",
  MAX_MISSES_PER_MINUTE: "0",
  MAX_CLIENTS_PER_ROOM: "0",
};

const SERVER_CORE = 0;
const TOOL_CORE = 1;
const canPin = availableParallelism() > 1 && Bun.which("taskset") !== null;
const MICROS_A_TICK = 10_000; // /proc counts CPU time in 1/100 s

function readProc(process: string, file: string): string | undefined {
  try {
    return readFileSync(`/proc/${process}/${file}`, "utf8");
  } catch {
    return undefined;
  }
}

/** The second field of a main thread's `schedstat`: ns spent waiting for a core. */
const waitedMicros = (schedstat = "0 0") => Number(schedstat.split(" ")[1]) / 1000;

/** How a relay may say its port, the clearest first. */
const PORT_PATTERNS = [/\bport[=: ]+(\d+)/i, /:\/\/[^\s/]*:(\d+)/, /:(\d{4,5})\b/];

/** Our relays that run; they end with the tool, however it ends. */
const children = new Set<Bun.Subprocess>();

/** A relay under load: where it is, what it has used, how to end it if it is ours. */
class Server {
  constructor(
    readonly url: URL,
    private readonly pid: number | undefined,
    private readonly child?: Bun.Subprocess,
  ) {}

  /** Starts the target's command and waits for the line with its port; a target with a URL is taken as it is. */
  static async start(target: Target): Promise<Server> {
    if (target.url) return new Server(new URL(target.url), target.pid);
    const pin = canPin ? ["taskset", "-c", String(SERVER_CORE)] : [];
    const child = Bun.spawn([...pin, "sh", "-c", `exec ${target.command} 2>&1`], {
      stdout: "pipe",
      env: { ...process.env, ...NO_LIMITS, PORT: "0" },
    });
    children.add(child);
    const reader = child.stdout.getReader();
    const decoder = new TextDecoder();
    let printed = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error(`ended before it printed its port\n${printed}`.trim());
      printed += decoder.decode(value, { stream: true });
      const lines = printed.slice(0, printed.lastIndexOf("\n") + 1);
      const port = PORT_PATTERNS.map((pattern) => pattern.exec(lines)?.[1]).find(Boolean);
      if (!port) continue;
      // Read on, so that a server that logs doesn't block on a full pipe.
      void (async () => {
        while (!(await reader.read()).done);
      })();
      return new Server(new URL(`ws://127.0.0.1:${port}/`), child.pid, child);
    }
  }

  /** CPU that the process has used since it began, in µs in steps of 10 ms; undefined if it isn't local or this isn't Linux. */
  cpuMicros(): number | undefined {
    const stat = this.#proc("stat");
    if (stat === undefined) return undefined;
    // After the name, which may hold anything, come the fields from the third on; utime is the 14th, stime the 15th.
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    return (Number(fields[11]) + Number(fields[12])) * MICROS_A_TICK;
  }

  /** Resident memory in bytes; undefined as above. */
  residentBytes(): number | undefined {
    const kibibytes = /^VmRSS:\s*(\d+)/m.exec(this.#proc("status") ?? "")?.[1];
    return kibibytes === undefined ? undefined : Number(kibibytes) * 1024;
  }

  /** How long the process was ready to run and had no core, in µs since it began; 0 if unknown. */
  waitedMicros(): number {
    return waitedMicros(this.#proc("schedstat"));
  }

  #proc(file: string): string | undefined {
    return this.pid === undefined ? undefined : readProc(String(this.pid), file);
  }

  /** Ends a child, by force after 5 s; a relay that ran before stays. */
  async stop(): Promise<void> {
    if (!this.child) return;
    this.child.kill("SIGTERM");
    const force = setTimeout(() => this.child?.kill("SIGKILL"), 5000);
    await this.child.exited;
    clearTimeout(force);
    children.delete(this.child);
  }
}

// ---------------------------------------------------------------- Run

/** What a run found. µs, ms and bytes as named; `null` where the server's process can't be read. */
interface Result {
  target: string;
  sockets: number;
  connect: {
    seconds: number;
    cpuMicrosPerMember: number | null;
  };
  flap: {
    members: number;
    seconds: number;
    cpuMicrosPerMember: number | null;
  } | null;
  messages: number; // sent in the measured time
  deliveries: number; // received in the measured time
  deliveriesPerSecond: number;
  sentInAll: number; // warm-up and the end included, as in the four that follow
  deliveredInAll: number;
  lost: number;
  doubled: number;
  outOfOrder: number;
  astray: number; // reached a member that it wasn't for
  closed: Record<string, number>; // sockets that the server closed, by code
  errors: string[]; // refusals and broken frames, the first few
  latencyMs: { p50: number; p90: number; p99: number; p999: number; max: number };
  histogram: [upToMs: number, count: number][];
  serverCpuMicrosPerDelivery: number | null;
  serverCpuCore: number | null; // share of one core, 1 = all of it
  serverBytes: {
    atStart: number;
    connected: number;
    atEnd: number;
    perMember: number;
  } | null;
  toolCpuCore: number;
  lateMsP99: number; // how late the tool itself sent
  waited: { server: number; tool: number }; // share of the time in which they were ready to run and had no core
  notes: string[];
  ok: boolean;
}

const HANDSHAKE_END = Buffer.from("\r\n\r\n");
// To send what is due when it is due: players don't send in bunches of a millisecond. It takes a whole core, so where the server
// needs that one too, a look each millisecond has to do.
const SPINS = availableParallelism() > 1;
const CONNECTS_AT_ONCE = 100; // below the 512 that a listen queue commonly holds
const NEAR = 0.1; // part of the interval in which a room's members send with --phase near
const JOIN_SECONDS = 60; // for a whole phase of connecting
const SETTLE_MS = 1000; // so long after the last delivery, what is missing is lost
const MAX_ERRORS = 5;
const WINDOW_BYTES = 256 * 1024; // a quarter of what the relay holds for a member before it cuts it
const FULL_CORE = 0.9;
const BUSY_MACHINE = 0.03; // a quiet one shows under 1 % with server and tool on a core each
const LATE_MS = 4; // the loop runs once a millisecond; more than a few and latencies are the tool's

/** One connection of one member. A reconnect is a new one with the same id. */
class Member {
  socket: Socket<Member> | undefined;
  slot = -1;
  sent = 0;
  open = false; // after the handshake
  expectsClose = false;
  closeCode = 1006; // until a close frame says otherwise
  unwritten: Buffer | undefined; // what the socket didn't take yet
  parts: Buffer[] = []; // of a frame that isn't complete
  partsSize = 0;
  frameSize = 0; // what that frame needs, as far as known
  header: Buffer | undefined; // of a message whose rest is still to come
  toSkip = 0; // that rest, in bytes
  joined = Promise.withResolvers<void>();

  constructor(
    readonly id: number, // the room's first id + place in the room
    readonly place: number,
    readonly room: Room,
  ) {
    this.joined.promise.catch(() => {}); // of many that fail together, only the first is waited for
  }
}

/** Broadcasts in flight are counted in deliveries still to come. */
class Room {
  code = "";
  members: Member[] = [];
  outstanding = 0;
  turn = 0; // which sender is next

  constructor(readonly firstId: number) {}
}

/** One run of one scenario against one server. */
class Run {
  readonly rooms: Room[] = [];
  readonly members: Member[] = [];
  readonly senders: number; // a room
  readonly latency = new Histogram();
  readonly late = new Histogram();
  private readonly handlers;
  private readonly data: string;
  private readonly headerInData: number;
  private readonly fan: number; // deliveries of a message
  private readonly batch: number; // messages of one write when saturating
  private readonly refillAt: number;
  private readonly batches = new Map<number | undefined, Batch>();
  private readonly next: Uint32Array; // by receiver and sender: the sequence number that comes next
  private readonly missing = new Map<number, Set<number>>(); // by the same: those that were skipped
  private sent = 0;
  private delivered = 0;
  private doubled = 0;
  private outOfOrder = 0;
  private astray = 0;
  private readonly closed: Record<string, number> = {};
  private readonly errors: string[] = [];
  private saturating = false;

  constructor(
    private readonly scenario: Scenario,
    private readonly server: Server,
    private readonly progress: Progress,
  ) {
    const { clients, bytes, payload, targeted } = scenario;
    const memberCount = (scenario.rooms + scenario.idleRooms) * clients;
    if (memberCount > MAX_MEMBERS) throw new UsageError(`at most ${MAX_MEMBERS} members`);
    this.senders = scenario.senders === "all" ? clients : scenario.senders;
    this.data = dataText(payload, bytes);
    this.headerInData = this.data.indexOf(HEADER);
    this.fan = targeted ? 1 : clients - 1;
    const window = scenario.window || Math.max(1, Math.min(16, Math.floor(WINDOW_BYTES / bytes)));
    this.batch = Math.ceil(window / 2);
    this.refillAt = (window - this.batch) * this.fan;
    this.next = new Uint32Array(scenario.rooms * clients * this.senders);
    for (let id = 0; id < memberCount; id++) {
      if (id % clients === 0) this.rooms.push(new Room(id));
      const room = this.rooms.at(-1) as Room;
      const member = new Member(id, id - room.firstId, room);
      room.members.push(member);
      this.members.push(member);
    }
    this.handlers = {
      open: (socket: Socket<Member>) => this.handshake(socket),
      data: (socket: Socket<Member>, bytes: Buffer) => this.receive(socket.data, bytes),
      drain: (socket: Socket<Member>) => this.flush(socket.data),
      close: (socket: Socket<Member>) => this.onClose(socket.data),
      error: (socket: Socket<Member>, error: Error) => this.fail(socket.data, error.message),
      connectError: (socket: Socket<Member>, error: Error) => this.fail(socket.data, error.message),
    };
  }

  async measure(target: string): Promise<Result> {
    const { scenario, server } = this;
    try {
      const bytesAtStart = server.residentBytes();
      const connect = await this.timed(this.members.length, () => this.connectAll());
      const bytesConnected = server.residentBytes();
      let flap: Result["flap"] = null;
      if (scenario.mode === "flap") {
        const phase = await this.timed(scenario.flap, () => this.flap());
        flap = { members: scenario.flap, ...phase };
      }

      if (scenario.mode === "traffic") {
        this.startSending();
        await this.wait("warming up", scenario.warmup);
        this.latency.counts.fill(0);
        this.latency.total = this.latency.max = 0;
      }
      const before = this.counters();
      if (scenario.mode === "traffic" || scenario.mode === "idle") await this.wait("running", scenario.seconds);
      const after = this.counters();
      const bytesAtEnd = server.residentBytes();
      this.stopSending();
      await this.settle();

      const seconds = (after.micros - before.micros) / 1e6;
      const deliveries = after.delivered - before.delivered;
      const cpu = before.serverCpu === undefined || after.serverCpu === undefined ? null : after.serverCpu - before.serverCpu;
      const lasting = scenario.mode === "traffic" || scenario.mode === "idle";
      const share = (micros: number) => (lasting ? micros / seconds / 1e6 : 0);
      const percentile = (percent: number) => this.latency.percentileMs(percent);
      const result: Result = {
        target,
        sockets: this.members.length,
        connect,
        flap,
        messages: after.sent - before.sent,
        deliveries,
        deliveriesPerSecond: lasting ? deliveries / seconds : 0,
        sentInAll: this.sent,
        deliveredInAll: this.delivered,
        lost: this.lost(),
        doubled: this.doubled,
        outOfOrder: this.outOfOrder,
        astray: this.astray,
        closed: this.closed,
        errors: this.errors,
        latencyMs: {
          p50: percentile(50),
          p90: percentile(90),
          p99: percentile(99),
          p999: percentile(99.9),
          max: this.latency.max / 1000,
        },
        histogram: this.latency.rows(),
        serverCpuMicrosPerDelivery: cpu === null || deliveries === 0 ? null : cpu / deliveries,
        serverCpuCore: cpu === null ? null : share(cpu),
        serverBytes:
          bytesAtStart === undefined || bytesConnected === undefined || bytesAtEnd === undefined
            ? null
            : {
                atStart: bytesAtStart,
                connected: bytesConnected,
                atEnd: bytesAtEnd,
                perMember: ((lasting ? bytesAtEnd : bytesConnected) - bytesAtStart) / this.members.length,
              },
        toolCpuCore: share(after.toolCpu - before.toolCpu),
        lateMsP99: this.late.percentileMs(99),
        waited: {
          server: share(after.serverWaited - before.serverWaited),
          tool: share(after.toolWaited - before.toolWaited),
        },
        notes: [],
        ok: false,
      };
      result.notes = notes(result, scenario);
      result.ok =
        result.lost + result.doubled + result.outOfOrder + result.astray === 0 &&
        Object.keys(result.closed).length === 0 &&
        result.errors.length === 0;
      return result;
    } finally {
      for (const member of this.members) {
        member.expectsClose = true;
        member.socket?.terminate();
      }
    }
  }

  private counters() {
    const tool = process.cpuUsage();
    return {
      micros: performance.now() * 1000,
      sent: this.sent,
      delivered: this.delivered,
      serverCpu: this.server.cpuMicros(),
      toolCpu: tool.user + tool.system,
      serverWaited: this.server.waitedMicros(),
      toolWaited: waitedMicros(readProc("self", "schedstat")),
    };
  }

  /** Runs a phase in which members connect; gives its duration and the server's CPU for each of them. */
  private async timed(members: number, phase: () => Promise<unknown>): Promise<Result["connect"]> {
    const before = this.counters();
    let deadline: Timer | undefined;
    const late = new Promise<never>((_, reject) => {
      deadline = setTimeout(() => reject(new Error(`not all joined in ${JOIN_SECONDS} s`)), JOIN_SECONDS * 1000);
    });
    await Promise.race([phase(), late]).finally(() => clearTimeout(deadline));
    const after = this.counters();
    const cpuMicrosPerMember =
      before.serverCpu === undefined || after.serverCpu === undefined ? null : (after.serverCpu - before.serverCpu) / members;
    return { seconds: (after.micros - before.micros) / 1e6, cpuMicrosPerMember };
  }

  private async wait(what: string, seconds: number): Promise<void> {
    const start = performance.now();
    for (;;) {
      const elapsed = (performance.now() - start) / 1000;
      if (elapsed >= seconds) break;
      this.progress.show(what, elapsed, seconds, "s", this.delivered);
      await Bun.sleep(Math.min(this.progress.everyMs, (seconds - elapsed) * 1000));
    }
    this.progress.clear();
  }

  // ------------------------------ connecting

  /** Creators first, then the others room after room, so that every server sees the same order. */
  private async connectAll(): Promise<void> {
    const creators = this.members.filter((member) => member.place === 0);
    const joiners = this.members.filter((member) => member.place > 0);
    let done = 0;
    for (const group of [creators, joiners]) {
      let index = 0;
      const worker = async () => {
        for (let member; (member = group[index++]);) {
          await this.connect(member);
          done++;
          if (done % CONNECTS_AT_ONCE === 0) this.progress.show("connecting", done, this.members.length);
        }
      };
      await Promise.all(Array.from({ length: CONNECTS_AT_ONCE }, worker));
    }
    this.progress.clear();
  }

  private async connect(member: Member): Promise<void> {
    const { url } = this.server;
    const secure = /^(wss|https):$/.test(url.protocol);
    await Bun.connect<Member>({
      hostname: url.hostname.replace(/^\[|\]$/g, ""),
      port: Number(url.port || (secure ? 443 : 80)),
      tls: secure,
      data: member,
      socket: this.handlers,
    });
    await member.joined.promise;
  }

  /** As after a Wi-Fi drop-out: the old sockets are still open when the same clientIds come back, all at once. */
  private async flap(): Promise<void> {
    await Promise.all(
      this.members.slice(0, this.scenario.flap).map(async (old) => {
        old.expectsClose = true;
        const member = new Member(old.id, old.place, old.room);
        this.members[old.id] = member;
        old.room.members[old.place] = member;
        await this.connect(member);
        if (member.slot !== old.slot) this.error(`slot ${old.slot} came back as ${member.slot}`);
      }),
    );
  }

  private handshake(socket: Socket<Member>): void {
    socket.data.socket = socket;
    socket.setNoDelay(true);
    const { pathname, search, host } = this.server.url;
    socket.write(
      `GET ${pathname}${search} HTTP/1.1\r\nHost: ${host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n` +
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    );
  }

  /** Takes the answer to the handshake; gives what follows it, or undefined while it isn't complete. */
  private upgraded(member: Member, bytes: Buffer): Buffer | undefined {
    member.parts.push(bytes);
    const answer = Buffer.concat(member.parts);
    const end = answer.indexOf(HANDSHAKE_END);
    if (end < 0) return undefined;
    member.parts = [];
    const status = answer.toString("latin1", 0, answer.indexOf("\r\n"));
    if (!/^HTTP\/1\.1 101\b/.test(status)) {
      this.fail(member, `no upgrade: ${status}`);
      return undefined;
    }
    member.open = true;
    const clientId = `load-${member.id}`;
    const { room } = member;
    const maxClients = this.scenario.clients;
    const hello = room.code ? { type: "join", clientId, room: room.code } : { type: "create", clientId, maxClients };
    this.write(member, textFrame(JSON.stringify(hello)));
    return answer.subarray(end + HANDSHAKE_END.length);
  }

  private onClose(member: Member): void {
    member.socket = undefined;
    if (member.expectsClose) return;
    const code = String(member.closeCode);
    this.closed[code] = (this.closed[code] ?? 0) + 1;
    member.joined.reject(new Error(`closed with ${code} before it had joined`));
  }

  private fail(member: Member, message: string): void {
    this.error(message);
    member.joined.reject(new Error(message));
  }

  private error(message: string): void {
    if (this.errors.length < MAX_ERRORS) this.errors.push(message);
  }

  // ------------------------------ sending

  private startSending(): void {
    const rooms = this.rooms.slice(0, this.scenario.rooms);
    if (this.scenario.rate === 0) {
      this.saturating = true;
      for (const room of rooms) this.refill(room);
      return;
    }
    const interval = 1000 / this.scenario.rate;
    const schedule = phases(this.scenario, this.senders).map(({ room, place, phase }) => ({
      member: (rooms[room] as Room).members[place] as Member,
      phaseMs: phase * interval,
    }));
    const start = performance.now();
    let turn = 0;
    let cycle = 0;
    const again = SPINS ? setImmediate : (run: () => void) => setTimeout(run, 1);
    const sendDue = () => {
      for (;;) {
        const { member, phaseMs } = schedule[turn] as (typeof schedule)[number];
        const due = start + cycle * interval + phaseMs;
        const late = performance.now() - due;
        if (late < 0) break;
        this.late.record(Math.floor(late * 1000));
        this.send(member, 1);
        if (++turn === schedule.length) {
          turn = 0;
          cycle++;
        }
      }
      if (this.sending) again(sendDue);
    };
    this.sending = true;
    sendDue();
  }

  private sending = false;

  private stopSending(): void {
    this.sending = false;
    this.saturating = false;
  }

  /** Sends as much as the room's window allows; all of one write comes from one sender, the next from the next. */
  private refill(room: Room): void {
    while (room.outstanding <= this.refillAt) {
      const member = room.members[room.turn] as Member;
      room.turn = (room.turn + 1) % this.senders;
      room.outstanding += this.batch * this.fan;
      this.send(member, this.batch);
    }
  }

  private send(member: Member, count: number): void {
    const to = this.scenario.targeted ? (member.room.members[this.targetOf(member.place)] as Member).slot : undefined;
    let batch = this.batches.get(to);
    if (!batch) this.batches.set(to, (batch = this.newBatch(to)));
    const { bytes, frameSize, headerAt } = batch;
    const now = microsNow();
    for (let i = 0, at = headerAt; i < count; i++, at += frameSize) {
      putDigits(bytes, at + 1, 3, member.id);
      putDigits(bytes, at + SEQUENCE_AT, 5, member.sent++);
      putDigits(bytes, at + TIME_AT, 5, now);
    }
    this.sent += count;
    this.write(member, bytes, count * frameSize);
  }

  /** The place of the member that a targeted message of the member at `place` goes to. */
  private targetOf(place: number): number {
    return (place + 1) % this.scenario.clients;
  }

  private newBatch(to: number | undefined): Batch {
    const target = to === undefined ? "" : `"to":${to},`;
    const frame = textFrame(`{"type":"send",${target}"data":${this.data}}`);
    return {
      bytes: Buffer.concat(Array<Buffer>(this.batch).fill(frame)),
      frameSize: frame.length,
      headerAt: frame.indexOf(HEADER),
    };
  }

  /** The bytes may be reused at once: what the socket doesn't take is copied. */
  private write(member: Member, bytes: Buffer, size = bytes.length): void {
    if (!member.socket) return;
    if (member.unwritten) {
      member.unwritten = Buffer.concat([member.unwritten, bytes.subarray(0, size)]);
      return;
    }
    const written = Math.max(0, member.socket.write(bytes, 0, size));
    if (written < size) member.unwritten = Buffer.from(bytes.subarray(written, size));
  }

  private flush(member: Member): void {
    const bytes = member.unwritten;
    if (!bytes) return;
    member.unwritten = undefined;
    this.write(member, bytes);
  }

  // ------------------------------ receiving

  /** Takes what a read brought: any number of frames, the first and the last perhaps in part. */
  private receive(member: Member, bytes: Buffer): void {
    if (!member.open) {
      const rest = this.upgraded(member, bytes);
      if (!rest) return;
      bytes = rest;
    }
    const now = microsNow();
    let at = 0;
    if (member.toSkip > 0) {
      at = member.toSkip;
      member.toSkip -= Math.min(at, bytes.length);
      if (member.toSkip > 0) return;
      this.delivery(member, member.header as Buffer, 0, now);
    } else if (member.partsSize > 0) {
      member.parts.push(bytes);
      member.partsSize += bytes.length;
      if (member.partsSize < member.frameSize) return;
      bytes = Buffer.concat(member.parts);
      member.parts = [];
      member.partsSize = 0;
    }
    while (at < bytes.length) {
      const left = bytes.length - at;
      member.frameSize = 2;
      if (left < 2) break;
      let size = (bytes[at + 1] as number) & 0x7f;
      let start = at + 2;
      if (size >= 126) {
        start += size === 126 ? 2 : 8;
        member.frameSize = start - at;
        if (left < member.frameSize) break;
        size = size === 126 ? bytes.readUInt16BE(at + 2) : Number(bytes.readBigUInt64BE(at + 2));
      }
      const end = start + size;
      member.frameSize = end - at;
      const first = bytes[at] as number;
      const header = first === (0x80 | TEXT) ? this.findHeader(bytes, start, end) : -1;
      if (end > bytes.length) {
        if (header < 0) break;
        // Of a payload only the header is of interest: the rest is counted, not kept.
        member.header = Buffer.from(bytes.subarray(header, header + HEADER.length));
        member.toSkip = end - bytes.length;
      } else if (header >= 0) this.delivery(member, bytes, header, now);
      else if (first === (0x80 | TEXT)) this.answer(member, bytes.toString("utf8", start, end));
      else this.control(member, first, bytes.subarray(start, end));
      at = end;
    }
    if (at < bytes.length) {
      member.parts.push(bytes.subarray(at));
      member.partsSize = bytes.length - at;
    }
    if (this.saturating) this.refill(member.room);
  }

  /** Where the header is in a text frame whose payload is from `start` to `end`, the last part perhaps still missing; or -1. */
  private findHeader(bytes: Buffer, start: number, end: number): number {
    // Mostly `data` is the last member of a `message`.
    const at = end - 1 - this.data.length + this.headerInData;
    const last = Math.min(end, bytes.length) - HEADER.length;
    if (at >= start && at <= last && bytes[at] === TILDE) return at;
    if (end > bytes.length) return -1;
    const found = bytes.subarray(start, end).indexOf(TILDE);
    return found < 0 || start + found > last ? -1 : start + found;
  }

  /** Counts the message with the header at `at`, all of which has arrived at `now`. */
  private delivery(member: Member, bytes: Buffer, at: number, now: number): void {
    const id =
      ((VALUE[bytes[at + 1] as number] as number) << 12) |
      ((VALUE[bytes[at + 2] as number] as number) << 6) |
      (VALUE[bytes[at + 3] as number] as number);
    const sequence = fiveDigits(bytes, at + SEQUENCE_AT);
    const sentAt = fiveDigits(bytes, at + TIME_AT);
    const { room } = member;
    const place = id - room.firstId;
    if (
      place < 0 ||
      place >= this.senders ||
      (this.scenario.targeted ? this.targetOf(place) !== member.place : place === member.place)
    ) {
      this.astray++;
      return;
    }
    this.delivered++;
    room.outstanding--;
    this.latency.record((now - sentAt) & TIME_MASK);
    const pair = member.id * this.senders + place;
    if (sequence === this.next[pair]) this.next[pair] = sequence + 1;
    else this.irregular(pair, sequence);
  }

  /** A sequence number that isn't the next one: some are skipped, or it is one of those, or it was here before. */
  private irregular(pair: number, sequence: number): void {
    const next = this.next[pair] as number;
    let missing = this.missing.get(pair);
    if (sequence > next) {
      if (!missing) this.missing.set(pair, (missing = new Set()));
      for (let each = next; each < sequence; each++) missing.add(each);
      this.next[pair] = sequence + 1;
    } else if (missing?.delete(sequence)) this.outOfOrder++;
    else this.doubled++;
  }

  /** Frames other than a final text frame. */
  private control(member: Member, first: number, payload: Buffer): void {
    if (first === (0x80 | PING)) this.write(member, clientFrame(PONG, payload));
    else if (first === (0x80 | CLOSE)) {
      if (payload.length >= 2) member.closeCode = payload.readUInt16BE(0);
      this.write(member, clientFrame(CLOSE, payload.subarray(0, 2)));
      member.socket?.end();
    } else if (first !== (0x80 | PONG)) this.error(`unexpected frame 0x${first.toString(16)}`);
  }

  /** What the relay says itself. */
  private answer(member: Member, text: string): void {
    const message = JSON.parse(text);
    if (message.type === "created" || message.type === "joined") {
      member.slot = message.index;
      if (message.type === "created") member.room.code = message.room;
      member.joined.resolve();
    } else if (message.type === "error") this.fail(member, message.message);
  }

  // ------------------------------ the end

  private expected(): number {
    return this.sent * this.fan;
  }

  /** Waits for what is still under way. */
  private async settle(): Promise<void> {
    let last = -1;
    let since = performance.now();
    while (this.delivered < this.expected()) {
      if (this.delivered !== last) {
        last = this.delivered;
        since = performance.now();
      }
      if (performance.now() - since > SETTLE_MS) return;
      await Bun.sleep(5);
    }
  }

  private lost(): number {
    let lost = 0;
    for (const missing of this.missing.values()) lost += missing.size;
    for (const room of this.rooms.slice(0, this.scenario.rooms))
      for (const sender of room.members.slice(0, this.senders))
        for (const { id, place } of room.members) {
          if (this.scenario.targeted ? this.targetOf(sender.place) !== place : sender.place === place) continue;
          const pair = id * this.senders + sender.place;
          lost += sender.sent - (this.next[pair] as number);
        }
    return lost;
  }
}

/** Frames to write at once, all alike but for their headers. */
interface Batch {
  bytes: Buffer;
  frameSize: number;
  headerAt: number;
}

/** Who sends when, as a part of the interval from 0 to 1, in order of time. */
function phases({ rooms, phase }: Scenario, senders: number): { room: number; place: number; phase: number }[] {
  const all = [];
  let random = 1;
  for (let place = 0; place < senders; place++)
    for (let room = 0; room < rooms; room++) {
      random = (random * 48271) % 0x7fffffff; // the same moments in every run, so that runs compare
      all.push({
        room,
        place,
        phase: {
          even: (place * rooms + room) / (rooms * senders),
          random: random / 0x7fffffff,
          near: (room / rooms + NEAR * (random / 0x7fffffff)) % 1,
          room: room / rooms,
          all: 0,
        }[phase],
      });
    }
  return all.sort((a, b) => a.phase - b.phase);
}

/** What a reader of the figures has to know. */
function notes(result: Result, { mode, rate }: Scenario): string[] {
  const notes = [];
  const percent = (share: number) => `${Math.round(share * 100)} %`;
  const spins = SPINS && mode === "traffic" && rate > 0; // `lateMsP99` tells whether a core was enough
  const toolFull = !spins && result.toolCpuCore > FULL_CORE;
  const serverFull = (result.serverCpuCore ?? 0) > FULL_CORE;
  if (toolFull)
    notes.push(
      serverFull
        ? "server and load tool both filled their cores: latencies are partly the tool's"
        : `the load tool, not the server, was the bottleneck: it used ${percent(result.toolCpuCore)} of its core`,
    );
  else if (mode === "traffic" && rate === 0)
    if (result.serverCpuCore !== null && !serverFull)
      notes.push(`the server was not saturated (${percent(result.serverCpuCore)} of a core): raise --window or --rooms`);
  if (result.lateMsP99 > LATE_MS)
    notes.push(`the load tool sent up to ${result.lateMsP99.toFixed(1)} ms late (p99): latencies are partly its own`);
  const waited = Math.max(result.waited.server, result.waited.tool);
  if (waited > BUSY_MACHINE)
    notes.push(
      `the machine is busy with something else: the server waited ${percent(result.waited.server)} of the time for a core, ` +
        `the load tool ${percent(result.waited.tool)}`,
    );
  const cpuMicros =
    mode === "connect"
      ? (result.connect.cpuMicrosPerMember ?? Infinity) * result.sockets
      : (result.serverCpuMicrosPerDelivery ?? Infinity) * result.deliveries;
  if (cpuMicros < 20 * MICROS_A_TICK)
    notes.push(
      `the server's ${Math.round(cpuMicros / 1000)} ms of CPU were counted in steps of 10 ms: a longer run is more exact`,
    );
  return notes;
}

// ---------------------------------------------------------------- Comparing and growing

/** The figure by which runs of a mode are compared; lower is better. */
function headline(mode: Mode): {
  name: string;
  of: (result: Result) => number | null;
} {
  switch (mode) {
    case "traffic":
      return {
        name: "server CPU, µs a delivery",
        of: (result) => result.serverCpuMicrosPerDelivery,
      };
    case "connect":
      return {
        name: "server CPU, µs a member",
        of: (result) => result.connect.cpuMicrosPerMember,
      };
    case "idle":
      return {
        name: "server memory, bytes a member",
        of: (result) => result.serverBytes?.perMember ?? null,
      };
    case "flap":
      return {
        name: "seconds until all had joined",
        of: (result) => result.flap?.seconds ?? null,
      };
  }
}

/** The middle value, or the mean of the two middle ones; null if there is none, or any is null. */
function median(values: (number | null)[]): number | null {
  const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
  if (sorted.length === 0 || sorted.length < values.length) return null;
  const low = sorted[(sorted.length - 1) >> 1] as number;
  const high = sorted[sorted.length >> 1] as number;
  return (low + high) / 2;
}

/** Runs the scenario on each target in turn, `runs` times; gives the results by target. A command is started anew each time. */
async function measure(targets: Target[], scenario: Scenario, runs: number, progress: Progress): Promise<Result[][]> {
  const results: Result[][] = targets.map(() => []);
  for (let round = 1; round <= runs; round++)
    for (const [i, target] of targets.entries()) {
      progress.prefix = `${runs > 1 ? `round ${round}/${runs}, ` : ""}${target.name}: `;
      let server: Server | undefined;
      try {
        server = await Server.start(target);
        const run = new Run(scenario, server, progress);
        (results[i] as Result[]).push(await run.measure(target.name));
      } catch (error) {
        if (error instanceof Error) error.message = `${target.name}: ${error.message}`;
        throw error;
      } finally {
        await server?.stop();
      }
    }
  return results;
}

/** The scenarios of a series, with the value that rises. What else would change the cost is kept as it is. */
function series(grow: Growth, base: Scenario): [number, Scenario][] {
  const { rooms, clients, rate } = base;
  switch (grow) {
    case "rooms": // the same messages a second, spread over more rooms
      return [10, 30, 100, 300, 1000, 3000].map((value) => [value, { ...base, rooms: value, rate: (rate * rooms) / value }]);
    case "clients": // the same members and deliveries a second, in larger rooms
      return [2, 4, 8, 16, 32, 64, 125, 250, 500].map((value) => {
        const count = Math.max(1, Math.round((rooms * clients) / value));
        const senders = base.senders === "all" ? value : base.senders;
        const wanted = rate * rooms * (base.senders === "all" ? clients : base.senders) * (clients - 1);
        const scenario = {
          ...base,
          clients: value,
          rooms: count,
          senders: base.senders === "all" ? base.senders : Math.min(senders, value),
          rate: wanted / (count * Math.min(senders, value) * (value - 1)),
        };
        return [value, scenario];
      });
    case "bytes":
      return [16, 64, 256, 1024, 4096, 16384, 65536]
        .filter((value) => value >= dataText(base.payload, 0).length)
        .map((value) => [value, { ...base, bytes: value }]);
    case "sockets": {
      // The same traffic in as many rooms as fit into the smallest value; the other sockets are idle.
      const values = [100, 300, 1000, 3000, 10_000, 15_000];
      const busy = Math.max(1, Math.floor((values[0] as number) / clients));
      return values.map((value) => [
        value,
        {
          ...base,
          rooms: busy,
          idleRooms: Math.max(0, Math.round(value / clients) - busy),
          rate: (rate * rooms) / busy,
        },
      ]);
    }
  }
}

const GROWTH_LABEL: Record<Growth, string> = {
  rooms: "rooms",
  clients: "members a room",
  bytes: "payload, bytes",
  sockets: "sockets",
};

// ---------------------------------------------------------------- Output

/** A bar on stderr that is drawn over itself; where stderr is no terminal, a line a second. */
class Progress {
  prefix = "";
  readonly #terminal = process.stderr.isTTY;
  readonly everyMs = this.#terminal ? 100 : 1000;
  #shownAt = 0;

  show(what: string, done: number, all: number, unit = "", deliveries?: number): void {
    if (performance.now() - this.#shownAt < this.everyMs) return;
    this.#shownAt = performance.now();
    const part = Math.min(1, done / all);
    const filled = Math.round(part * 24);
    const bar = `[${"#".repeat(filled)}${".".repeat(24 - filled)}]`;
    const figures = `${Number(done.toFixed(1))}/${Number(all.toFixed(1))} ${unit}`;
    const count = deliveries ? `, ${thousands(deliveries)} deliveries` : "";
    const line = `${this.prefix}${what} ${bar} ${figures}${count}`;
    process.stderr.write(this.#terminal ? `\r\x1b[K${line}` : `${line}\n`);
  }

  clear(): void {
    if (this.#terminal) process.stderr.write("\r\x1b[K");
  }
}

const thousands = (value: number) => Math.round(value).toLocaleString("en-US");
const milliseconds = (value: number) => (value < 10 ? value.toFixed(2) : value.toFixed(1));
const figure = (value: number | null) => (value === null ? "n/a" : Number(value.toPrecision(3)).toLocaleString("en-US"));
const megabytes = (bytes: number) => `${(bytes / 1e6).toFixed(1)} MB`;

/** Where the figures come from; no figure means anything without it. */
function machine(targets: Target[]): string {
  const cores = cpus();
  const where = [
    cores[0]?.model.trim() ?? "unknown CPU",
    `${cores.length} cores`,
    `${process.platform} ${release()}`,
    `Bun ${Bun.version}`,
  ];
  if (pinned(targets)) where.push(`server on core ${SERVER_CORE}, tool on core ${TOOL_CORE}`);
  return where.join(", ");
}

/** Whether server and tool get a core each: a relay that ran before is left where it is. */
const pinned = (targets: Target[]) => canPin && targets.every((target) => target.command !== undefined);

/** The scenario in one line. */
function describe(scenario: Scenario): string {
  const { mode, rooms, idleRooms, clients, senders } = scenario;
  const size = `${rooms + idleRooms} rooms of ${clients}`;
  if (mode === "connect") return `${size}, connecting only`;
  if (mode === "idle") return `${size}, idle for ${scenario.seconds} s`;
  if (mode === "flap") return `${size}, ${scenario.flap} reconnect at once`;
  return [
    idleRooms ? `${size}, ${rooms} of them busy` : size,
    `${senders} sending ${scenario.bytes} B (${scenario.payload})${scenario.targeted ? " to one" : ""}`,
    scenario.rate === 0 ? "saturated" : `${figure(scenario.rate)} a second each, phase ${scenario.phase}`,
    `${scenario.seconds} s`,
  ].join(", ");
}

function table(rows: [string, string][]): string {
  const width = Math.max(...rows.map(([name]) => name.length));
  return rows.map(([name, value]) => `  ${name.padEnd(width)}  ${value}`).join("\n");
}

function report(result: Result, { mode }: Scenario): string {
  const { connect, flap, latencyMs, serverBytes } = result;
  const cpu = (micros: number | null) => (micros === null ? "" : `, ${figure(micros)} µs of server CPU each`);
  const rows: [string, string][] = [
    ["sockets", thousands(result.sockets)],
    ["connecting", `${connect.seconds.toFixed(2)} s${cpu(connect.cpuMicrosPerMember)}`],
  ];
  if (flap)
    rows.push([
      "reconnecting",
      `${thousands(flap.members)} at once in ${flap.seconds.toFixed(2)} s${cpu(flap.cpuMicrosPerMember)}`,
    ]);
  if (mode === "traffic")
    rows.push(
      ["messages in", thousands(result.messages)],
      ["deliveries", thousands(result.deliveries)],
      ["deliveries a second", thousands(result.deliveriesPerSecond)],
      [
        "latency, ms",
        `p50 ${milliseconds(latencyMs.p50)}  p90 ${milliseconds(latencyMs.p90)}  p99 ${milliseconds(latencyMs.p99)}  ` +
          `p99.9 ${milliseconds(latencyMs.p999)}  max ${milliseconds(latencyMs.max)}`,
      ],
    );
  if (result.serverCpuCore !== null && (mode === "traffic" || mode === "idle"))
    rows.push([
      "server CPU",
      `${(result.serverCpuCore * 100).toFixed(1)} % of a core` +
        (mode === "traffic" ? `, ${figure(result.serverCpuMicrosPerDelivery)} µs a delivery` : ""),
    ]);
  if (serverBytes)
    rows.push([
      "server memory",
      `${megabytes(serverBytes.atStart)} at start, ${megabytes(serverBytes.connected)} connected, ` +
        `${megabytes(serverBytes.atEnd)} at the end; ${thousands(serverBytes.perMember)} bytes a member above the start`,
    ]);
  if (mode === "traffic") {
    rows.push(
      ["load tool", `${(result.toolCpuCore * 100).toFixed(1)} % of a core, sent ${milliseconds(result.lateMsP99)} ms late (p99)`],
      [
        "lost / doubled / out of order / astray",
        [result.lost, result.doubled, result.outOfOrder, result.astray].map(thousands).join(" / "),
      ],
    );
  }
  for (const [code, count] of Object.entries(result.closed)) rows.push([`closed with ${code}`, thousands(count)]);
  for (const error of result.errors) rows.push(["error", error]);
  const lines = [table(rows)];
  if (result.histogram.length > 0) lines.push("", histogramText(result.histogram));
  for (const note of result.notes) lines.push("", `  Note: ${note}.`);
  return lines.join("\n");
}

function histogramText(rows: Result["histogram"]): string {
  const total = rows.reduce((sum, [, count]) => sum + count, 0);
  const most = Math.max(...rows.map(([, count]) => count));
  return rows
    .map(([end, count]) => {
      const bar = "#".repeat(Math.ceil((count / most) * 40));
      const percent = ((count / total) * 100).toFixed(2).padStart(6);
      return `  < ${String(end).padStart(6)} ms ${percent} % ${bar}`;
    })
    .join("\n");
}

interface Curve {
  name: string;
  points: [x: number, y: number][];
}

/** A plot as SVG: x logarithmic with a label at each value; y from 0, or logarithmic where the highest is over ten times the lowest. */
export function plotSvg(title: string, subtitle: string, xLabel: string, yLabel: string, curves: Curve[]): string {
  const [width, height] = [760, 440];
  const [left, right, top, bottom] = [70, 736, 76, 384]; // the axes' box
  const inset = 30; // from the box to the first and the last value
  const colors = ["#0b62a4", "#c2410c"];
  const points = curves.flatMap((curve) => curve.points);
  const xs = [...new Set(points.map(([x]) => x))].sort((a, b) => a - b);
  const ys = points.map(([, y]) => y);
  const { ticks, part } = scale(Math.min(...ys), Math.max(...ys));
  const [first, last] = [Math.log(xs[0] ?? 1), Math.log(xs.at(-1) ?? 1)];
  const x = (value: number) => left + inset + ((Math.log(value) - first) / (last - first || 1)) * (right - left - 2 * inset);
  const y = (value: number) => bottom - part(value) * (bottom - top);

  const escape = (text: string) => text.replace(/[&<>]/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const text = (x: number, y: number, content: string, style: string) =>
    `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" ${style}>${escape(content)}</text>`;
  const line = (x1: number, y1: number, x2: number, y2: number, of: string) =>
    `<line x1="${x1.toFixed(1)}" y1="${y1.toFixed(1)}" x2="${x2.toFixed(1)}" y2="${y2.toFixed(1)}" stroke="${of}"/>`;
  const middle = 'text-anchor="middle"';

  const parts = [
    text(left, 24, title, 'font-size="16" font-weight="bold"'),
    text(left, 42, subtitle, 'font-size="11" fill="#555"'),
  ];
  for (const tick of ticks)
    parts.push(
      line(left, y(tick), right, y(tick), "#ddd"),
      text(left - 8, y(tick) + 4, String(Number(tick.toPrecision(3))), 'text-anchor="end"'),
    );
  for (const value of xs)
    parts.push(
      line(x(value), bottom, x(value), bottom + 5, "#333"),
      text(x(value), bottom + 20, value.toLocaleString("en-US"), middle),
    );
  const turn = `transform="translate(18 ${(top + bottom) / 2}) rotate(-90)"`;
  parts.push(
    line(left, top, left, bottom, "#333"),
    line(left, bottom, right, bottom, "#333"),
    text((left + right) / 2, height - 12, xLabel, middle),
    text(0, 0, yLabel, `${middle} ${turn}`),
  );
  for (const [i, { name, points }] of curves.entries()) {
    const fill = `fill="${colors[i % colors.length]}"`;
    const path = points.map(([px, py]) => `${x(px).toFixed(1)},${y(py).toFixed(1)}`).join(" ");
    parts.push(
      `<polyline points="${path}" fill="none" stroke="${colors[i % colors.length]}" stroke-width="2"/>`,
      text(left + i * 330, 62, `● ${name}`, `${fill} font-weight="bold"`),
    );
    for (const [px, py] of points) {
      // Of two curves the lower one is labelled below, of equal ones the second.
      const lower = curves.some((other, j) => other.points.some(([ox, oy]) => ox === px && (oy > py || (oy === py && j < i))));
      parts.push(
        `<circle cx="${x(px).toFixed(1)}" cy="${y(py).toFixed(1)}" r="3.5" ${fill}/>`,
        text(x(px), y(py) + (lower ? 18 : -9), String(Number(py.toPrecision(3))), `${middle} font-size="11" ${fill}`),
      );
    }
  }
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" font-family="sans-serif" font-size="12" fill="#222">
<rect width="${width}" height="${height}" fill="#fff"/>
${parts.join("\n")}
</svg>
`;
}

/** An axis for values from `lowest` to `highest`: round ticks, and where on it a value is, from 0 to 1. */
function scale(lowest: number, highest: number): { ticks: number[]; part: (value: number) => number } {
  const ticks: number[] = [];
  if (lowest > 0 && highest > 10 * lowest) {
    let exponent = Math.floor(Math.log10(lowest));
    do {
      for (const step of [1, 2, 5]) ticks.push(step * 10 ** exponent);
      exponent++;
    } while ((ticks.at(-1) as number) < highest);
    // The ticks around the values, and no more.
    while ((ticks[1] ?? Infinity) <= lowest) ticks.shift();
    while ((ticks.at(-2) ?? 0) >= highest) ticks.pop();
    const from = Math.log(ticks[0] as number);
    const to = Math.log(ticks.at(-1) as number);
    const inset = 0.06; // room for a label below the lowest
    return { ticks, part: (value) => inset + ((1 - inset) * (Math.log(value) - from)) / (to - from) };
  }
  const rough = (highest * 1.1) / 5;
  const magnitude = 10 ** Math.floor(Math.log10(rough));
  const step = magnitude * ([1, 2, 5, 10].find((each) => each * magnitude >= rough) ?? 10);
  const end = Math.ceil((highest * 1.1) / step) * step;
  for (let tick = 0; tick <= end + step / 2; tick += step) ticks.push(tick);
  return { ticks, part: (value) => value / end };
}

// ---------------------------------------------------------------- Main

/** Runs a series, prints a line a value, draws it; gives whether all runs were well. */
async function growAndPrint(options: Options, grow: Growth, progress: Progress): Promise<boolean> {
  const { name, of } = headline("traffic");
  const points: { value: number; scenario: Scenario; results: Result[][] }[] = [];
  for (const [value, scenario] of series(grow, options.scenario)) {
    const results = await measure(options.targets, scenario, options.runs, progress);
    points.push({ value, scenario, results });
    if (options.json) continue;
    for (const runs of results) {
      const best = runs[0] as Result;
      const middle = (pick: (result: Result) => number | null) => figure(median(runs.map(pick)));
      console.log(
        `${GROWTH_LABEL[grow]} ${thousands(value)}, ${best.target}: ${middle(of)} µs a delivery, ` +
          `${middle((run) => run.deliveriesPerSecond)} deliveries a second, ` +
          `p50 ${middle((run) => run.latencyMs.p50)} ms, p99 ${middle((run) => run.latencyMs.p99)} ms, ` +
          `${middle((run) => run.serverCpuCore && run.serverCpuCore * 100)} % of a core`,
      );
      for (const run of runs) {
        if (!run.ok) console.log(report(run, scenario));
        for (const note of run.notes) console.log(`  Note: ${note}.`);
      }
    }
  }
  if (options.json) console.log(JSON.stringify({ machine: machine(options.targets), grow, points }, null, 2));
  if (options.plot !== undefined) {
    const curves = options.targets.map((target, i) => ({
      name: target.name,
      points: points.flatMap(({ value, results }): [number, number][] => {
        const cost = median((results[i] as Result[]).map(of));
        return cost === null ? [] : [[value, cost]];
      }),
    }));
    if (curves.every((curve) => curve.points.length === 0)) throw new Error("nothing to plot: the server's CPU can't be read");
    const title = `Cost a delivery by ${GROWTH_LABEL[grow]}`;
    await Bun.write(options.plot, plotSvg(title, machine(options.targets), GROWTH_LABEL[grow], name, curves));
  }
  return points.every(({ results }) => results.flat().every((run) => run.ok));
}

/** Runs the scenario on one target or two, prints what was found; gives whether all runs were well. */
async function runAndPrint({ targets, scenario, runs, json }: Options, progress: Progress): Promise<boolean> {
  const results = await measure(targets, scenario, runs, progress);
  const { name, of } = headline(scenario.mode);
  const medians = results.map((each) => median(each.map(of)));
  const [ours, theirs] = medians;
  const ratio = ours && theirs ? ours / theirs : null;
  if (json) {
    const found = results.flat().length === 1 ? { result: results[0]?.[0] } : { headline: name, medians, ratio, results };
    console.log(JSON.stringify({ machine: machine(targets), scenario, ...found }, null, 2));
  } else {
    console.log(`${machine(targets)}\n${describe(scenario)}`);
    for (const run of results.flat()) console.log(`\n${run.target}\n${report(run, scenario)}`);
    if (results.flat().length > 1) {
      console.log(`\n${name}`);
      for (const [i, target] of targets.entries())
        console.log(
          `  ${target.name}: ${(results[i] as Result[]).map((run) => figure(of(run))).join(", ")}; median ${figure(medians[i] ?? null)}`,
        );
      if (targets.length > 1) console.log(`  ratio of medians: ${ratio?.toFixed(3) ?? "n/a"}`);
    }
  }
  return results.flat().every((run) => run.ok);
}

async function main(): Promise<number> {
  const options = parseOptions(Bun.argv.slice(2));
  if (options === "help") {
    console.log(HELP);
    return 0;
  }
  if (pinned(options.targets)) Bun.spawnSync(["taskset", "-acp", String(TOOL_CORE), String(process.pid)]);
  const progress = new Progress();
  const ok = options.grow ? await growAndPrint(options, options.grow, progress) : await runAndPrint(options, progress);
  return ok ? 0 : 1;
}

if (import.meta.main) {
  process.on("exit", () => children.forEach((child) => child.kill("SIGKILL")));
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(2));
  try {
    process.exitCode = await main();
  } catch (error) {
    console.error(`load: ${(error as Error).message}`);
    if (error instanceof UsageError) console.error("--help lists the flags");
    process.exitCode = 2;
  }
}
