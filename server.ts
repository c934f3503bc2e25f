/**
 * Party-Sockets: a relay for party games. One process, rooms in memory, no packages.
 *
 * The words, used everywhere the same:
 * - room: up to `maxClients` connected members behind one 6-character code. It lives on exactly one machine.
 * - slot, and its index: a member's number in its room; 0 for the creator. Never reassigned while the room lives.
 * - clientId: a string that the client picks. It proves that a slot is its own, and never leaves this process.
 * - host: the slot that may use the host's messages; slot 0 until it is handed on.
 *
 * Reading order: Protocol (what goes over the wire), Slots (who sits where), Messages (what each one does);
 * then HTTP, and the rest as needed. `startRelay` at the end ties it together.
 */
import type { Server, ServerWebSocket } from "bun";
import { heapSize } from "bun:jsc";
import { Resolver } from "node:dns/promises";
import { isIP } from "node:net";
import { version } from "./package.json" with { type: "json" };
import { REGIONS } from "./regions.ts";

// ---- Protocol --------------------------------------------------------------------------------------------

/** What a client may send: JSON text frames. Unknown members are ignored. */
export type ClientMessage =
  | {
      type: "create";
      /** 1 to 128 characters: the secret with which the slot is taken back. */ clientId: string;
      /** Places in the room: a whole number from 1 to the server's limit. */ maxClients: number;
      /** Seconds that the room outlives its last socket: 0 (as where absent) to 300. */ linger?: number;
      /** Seconds that the host may be away while others are connected: 1 to 3600; no end where absent. */ hostGrace?: number;
      /** After `hostGrace` the lowest connected slot becomes host; the room doesn't close. Needs `hostGrace`. */ migrate?: boolean;
      /** A controller page: an https URL of at most 512 bytes in which `{room}` and `{instance}` are filled in. */ url?: string;
    }
  | {
      type: "join";
      /** As in `create`. A clientId that the room knows takes its own slot back. */ clientId: string;
      /** The room's code. */ room: string;
    }
  | {
      type: "send";
      /** Any JSON value; its text arrives as it was written. */ data: unknown;
      /** One slot, or 1 to 64 of them; everyone but the sender where absent. */ to?: number | number[];
      /** A broadcast that the sender gets too, in the same order as everyone. */ echo?: boolean;
    }
  | { type: "set_state"; /** Any JSON value of at most 16384 bytes: the snapshot that joiners get. */ data: unknown }
  | { type: "close_room" }
  | {
      type: "set_room";
      /** Whether clientIds that the room doesn't know are kept out. */ locked?: boolean;
      /** As in `create`. Lowering it evicts nobody. */ maxClients?: number;
    }
  | { type: "kick"; /** The slot whose clientId is barred for the room's life. */ index: number }
  | { type: "set_host"; /** The connected slot that becomes host. */ index: number }
  | { type: "leave" }
  | { type: "ping"; /** Any finite number; it comes back in `pong`. */ t?: number };

/** What the server sends: JSON text frames. Clients ignore types and members that they don't know. */
export type ServerMessage =
  | {
      type: "created";
      room: string;
      /** This machine's labels; empty where unset. */ instance: string;
      region: string;
      index: 0;
      /** The controller page, filled in, where `create` named one. */ url?: string;
    }
  | {
      type: "joined";
      room: string;
      /** The slot of this socket. */ index: number;
      /** The other connected slots, ascending. */ peers: number[];
      /** The host's slot, where it isn't 0. */ host?: number;
      /** There where the slot was this clientId's and vacant. */ resumed?: true;
      /** There where the room is locked. */ locked?: true;
      url?: string;
    }
  | { type: "peer_joined"; index: number; resumed?: true }
  | { type: "peer_left"; index: number; /** Absent where the socket just closed. */ reason?: "left" | "kicked" }
  | { type: "message"; from: number; data: unknown }
  | { type: "state"; data: unknown }
  | { type: "room"; locked: boolean; maxClients: number }
  | { type: "host"; index: number }
  | { type: "left"; room: string }
  | { type: "pong"; t?: number; /** Server time, milliseconds since 1970. */ now: number }
  | { type: "draining"; /** Whole seconds until every room is closed, rounded up. */ seconds: number }
  | {
      type: "error";
      message: string;
      code: ErrorCode;
      /** Of a `send` to several: who isn't there, ascending. */ missing?: number[];
    };

/** The codes with which the server closes a socket itself. */
export const CloseCode = {
  /** 1008: too many wrong codes from this address; wait 30 s. */
  TOO_MANY_ATTEMPTS: 1008,
  /** 1011: a bug in the relay ended this socket. */
  INTERNAL_ERROR: 1011,
  /** 1012 `restarting`: come back in 0.5 to 3 s with the same clientId. */
  RESTARTING: 1012,
  /** 1013 `server full`: try again after 5 s. */
  SERVER_FULL: 1013,
  /** 4000 `replaced`: another socket has this slot now. Final. */
  REPLACED: 4000,
  /** 4001 `room closed`: the host ended the room, or was away too long. Final. */
  ROOM_CLOSED: 4001,
  /** 4002 `kicked`: the host barred this clientId. Final. */
  KICKED: 4002,
} as const;

/** The refusals whose code says all. */
const REFUSALS = {
  bad_json: "Invalid JSON",
  unknown_type: "Unknown message type",
  already_in_room: "Already in a room",
  not_in_room: "Not in a room",
  room_not_found: "Room not found",
  room_full: "Room is full",
  room_locked: "Room is locked",
  kicked: "Kicked from room",
  peer_not_found: "Target peer not found",
  state_too_large: "State too large",
  draining: "Server draining",
  capacity: "Server full",
  too_many_attempts: "Too many attempts",
};

/** The `code` of an `error`; `bad_request` and `not_host` come with several messages. */
export type ErrorCode = keyof typeof REFUSALS | "bad_request" | "not_host";

class Refusal {
  constructor(
    readonly code: ErrorCode,
    readonly message: string,
    readonly missing?: number[],
  ) {}
}
const refuse = (code: keyof typeof REFUSALS, missing?: number[]) => new Refusal(code, REFUSALS[code], missing);
const badRequest = (message: string) => new Refusal("bad_request", message);

/** A message as the handlers get it: `data` is the text that the client wrote. */
type Parsed<M> = M extends { data: unknown } ? Omit<M, "data"> & { data: string } : M;
type MessageType = ClientMessage["type"];
type Message<T extends MessageType> = Parsed<Extract<ClientMessage, { type: T }>>;
type Fields = Record<string, unknown>;

const frameOf = (message: ServerMessage): string => JSON.stringify(message);
const messageFrame = (from: number, data: string): string => `{"type":"message","from":${from},"data":${data}}`;
const stateFrame = (data: string): string => `{"type":"state","data":${data}}`;

const isIndex = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0;
const isWhole = (value: unknown, least: number, most: number): boolean =>
  Number.isInteger(value) && (value as number) >= least && (value as number) <= most;

/** Engines may keep a cut-out string as a view of the whole frame; what outlives the frame is copied. */
function copyOf(text: string): string {
  const encoding = text.isWellFormed() ? "utf8" : "utf16le"; // UTF-8 would merge lone surrogates into one character
  return Buffer.from(text, encoding).toString(encoding);
}

function isSpace(code: number): boolean {
  return code === 0x20 || code === 0x0a || code === 0x0d || code === 0x09;
}

const SEND_HEAD =
  /[ \t\n\r]*\{[ \t\n\r]*"type"[ \t\n\r]*:[ \t\n\r]*"send"[ \t\n\r]*,[ \t\n\r]*(?:"to"[ \t\n\r]*:[ \t\n\r]*(0|[1-9]\d{0,9})[ \t\n\r]*,[ \t\n\r]*)?"data"[ \t\n\r]*:[ \t\n\r]*/y;
const SEND_TAIL = /^,[ \t\n\r]*"to"[ \t\n\r]*:[ \t\n\r]*(0|[1-9]\d{0,9})$/;
const PLAIN_HEAD = '{"type":"send","data":';

const LONG_DATA = 1024; // characters from which looking is cheaper than parsing, which copies: 8 % of a 16 KiB broadcast
const NOT_PLAIN = /[\\\x00-\x1f]/;
/** Whether a text is a JSON string without escapes. */
function isPlainString(text: string): boolean {
  return text.charCodeAt(0) === 0x22 && text.indexOf('"', 1) === text.length - 1 && !NOT_PLAIN.test(text);
}

/**
 * The short cut for a `send` in one of its usual spellings. It is also a proof: head and tail match by the letter,
 * so if what stands between them is one JSON value, then the frame has these members and no others.
 * @returns undefined where the frame needs the careful way
 */
function parsePlainSend(frame: string): Message<"send"> | undefined {
  let start = PLAIN_HEAD.length;
  let to: string | undefined;
  if (!frame.startsWith(PLAIN_HEAD)) {
    SEND_HEAD.lastIndex = 0;
    const head = SEND_HEAD.exec(frame);
    if (head === null) return undefined;
    start = SEND_HEAD.lastIndex;
    to = head[1];
  }
  let end = frame.length;
  while (isSpace(frame.charCodeAt(end - 1))) end--;
  if (frame.charCodeAt(--end) !== 0x7d) return undefined;
  while (isSpace(frame.charCodeAt(end - 1))) end--;
  while (isSpace(frame.charCodeAt(start))) start++;
  const last = frame.charCodeAt(end - 1);
  if (to === undefined && last >= 0x30 && last <= 0x39) {
    const comma = frame.lastIndexOf(",", end);
    to = SEND_TAIL.exec(frame.slice(comma, end))?.[1];
    if (to !== undefined) end = comma;
    while (isSpace(frame.charCodeAt(end - 1))) end--;
  }
  const data = frame.slice(start, end);
  try {
    if (data.length < LONG_DATA || !isPlainString(data)) JSON.parse(data);
  } catch {
    return undefined;
  }
  return to === undefined ? { type: "send", data } : { type: "send", data, to: Number(to) };
}

/** The index after the JSON value that starts at `at`; `json` is known to be valid. */
function skipValue(json: string, at: number): number {
  let depth = 0;
  for (let i = at; ; i++) {
    const code = json.charCodeAt(i);
    if (code === 0x22) {
      for (i++; json.charCodeAt(i) !== 0x22; i++) if (json.charCodeAt(i) === 0x5c) i++;
      if (depth === 0) return i + 1;
    } else if (code === 0x7b || code === 0x5b) depth++;
    else if (code === 0x7d || code === 0x5d) {
      if (depth === 0) return i; // the end of what a number or a word stood in
      if (--depth === 0) return i + 1;
    } else if (depth === 0 && (code === 0x2c || isSpace(code))) return i;
  }
}

/**
 * The text of a member of a JSON object, as it was written: the last one of that name, names compared unescaped.
 * @param json a valid JSON object
 */
export function memberText(json: string, name: string): string | undefined {
  let found: string | undefined;
  let i = json.indexOf("{") + 1;
  /** Goes to the next name or value: at this depth only space, `:` and `,` stand between them. */
  const next = (): number => {
    for (let code = json.charCodeAt(i); isSpace(code) || code === 0x3a || code === 0x2c; code = json.charCodeAt(i)) i++;
    return i;
  };
  for (;;) {
    const nameAt = next();
    if (json.charCodeAt(i) === 0x7d) return found;
    i = skipValue(json, i);
    const written = json.slice(nameAt + 1, i - 1);
    const isWanted = written === name || (written.includes("\\") && JSON.parse(`"${written}"`) === name);
    const valueAt = next();
    i = skipValue(json, i);
    if (isWanted) found = json.slice(valueAt, i);
  }
}

// ---- Limits ----------------------------------------------------------------------------------------------

/** Limits with a variable each (maxRooms: MAX_ROOMS), and their defaults. 0 means unlimited, unless the line says otherwise. */
export const LIMITS = {
  maxMessageBytes: 256 * 1024, // one drawing as a data URL; not assets
  maxMessagesPerSecond: 200, // a socket; three times a 60 Hz game. The burst is twice that
  maxBufferedBytes: 1024 * 1024, // a socket; what a phone may be behind before it is cut
  maxClientsPerRoom: 1000, // a hall, not a stadium
  maxRooms: 10_000,
  maxConnections: 10_000,
  maxMissesPerMinute: 120, // an address; a whole party can be behind one
  drainSeconds: 8, // within the 10 s that `docker stop` gives; 0 is at once
  idleExitSeconds: 0, // 0 is never
};

const MOST = 4_294_967_295; // what the WebSocket layer takes for a size
const CLIENT_ID_LENGTH = 128; // characters; a UUID four times over
const STATE_BYTES = 16 * 1024; // a snapshot is sent to every joiner
const URL_BYTES = 512; // fits a QR code that a phone reads across a room
const LINGER_SECONDS = 300; // long enough to paste a code into another app
const GRACE_SECONDS = 3600; // a host's phone may nap through a film
const TARGETS = 64; // slots that one `send` may name
const BURST = 2; // times `maxMessagesPerSecond` that may come at once
const KNOWN_PER_ROOM = 1000; // absent or barred clientIds that a room remembers
const KNOWN_IN_ALL = 100_000; // absent or barred clientIds in all rooms together
const ORIGIN_LENGTH = 256; // characters of an Origin header that are kept
const ORIGINS_KEPT = 500; // Origin headers are the clients' to invent
const ORIGINS_SHOWN = 100; // series that a scrape can bear
const ADDRESSES = 10_000; // addresses whose misses are counted
const LOCKOUT = 10; // times `maxMissesPerMinute`, above which every look-up is refused
const MISS_WINDOW_MS = 60_000;
const SWEEP_MS = 6_000; // a dead phone is noticed before the party does
const QUIET_MS = 1_000; // silent for longer than this at a sweep: pinged. 1 + 3 sweeps is under 20 s
const REFILL_MS = 50; // how often paused sockets are looked after
const SEARCHES = 64; // searches among siblings at once
const SEARCHES_PER_ADDRESS = 8;
const SEARCH_MS = 1_000; // what a silent sibling may cost
const MISSING_MS = 2_000; // how long a miss that all siblings confirmed is remembered
const MISSING_CODES = 10_000; // such misses remembered at once
const CLOSING_SECONDS = 5; // the end of a drain, over which rooms are closed
const CLOSING_STEP_MS = 20;
const FLUSH_MS = 500; // close frames behind a slow member's backlog get this long to leave
const LAG_MS = 500; // how often the event loop's lag is sampled
const LAG_SAMPLES = 30; // 15 s of them: what a scrape every 15 s sees of the worst
const CAP_LOG_MS = 60_000;
const REST_MS = 1.5; // how long a busy relay lets frames gather; with the timer's own lateness under 2 ms
const LONG_TURN_MS = 4; // after a turn of this length enough of them have gathered
const REST_ABOVE = 80; // deliveries a millisecond: from about a third of a core on, resting pays
const REST_WINDOW_MS = 20; // over which that rate is taken

// ---- Config ----------------------------------------------------------------------------------------------

/** Time, so that tests can move it. */
export type Clock = {
  /** Milliseconds that never go back. */
  now(): number;
  /** Milliseconds since 1970. */
  epoch(): number;
  /** Runs `run` once, `ms` from now, without keeping the process alive. @returns what cancels it */
  after(ms: number, run: () => void): () => void;
  /** Stands still for `ms`, and everything with it. */
  rest(ms: number): void;
};

/** The other machines of this region. */
export type Siblings = {
  /** Their ids, without this machine's. Rejects where the look-up fails. */
  list(signal: AbortSignal): Promise<string[]>;
  /** Whether one of them has the room. Rejects where it doesn't say. */
  has(id: string, code: string, signal: AbortSignal): Promise<boolean>;
};

/** An event for the log: its name and what belongs to it. Never a clientId, never a payload. */
export type Log = (event: string, fields: Record<string, string | number>) => void;

/** All that a relay is told from outside. */
export type Config = typeof LIMITS & {
  /** The port; 0 takes a free one. */
  port: number;
  /** Label of this machine, and on Fly.io its id; may be empty. */
  instance: string;
  /** Label of this region; may be empty. */
  region: string;
  /** The app's name on Fly.io; without it nothing is ever replayed. */
  flyApp: string | undefined;
  /** The region that room codes name, a row of `REGIONS`. */
  flyRegion: string | undefined;
  dashboardUrl: string | undefined;
  /** The origins whose upgrades are taken, in lower case; any where undefined. */
  allowedOrigins: ReadonlySet<string> | undefined;
  /** The header whose last entry is the client's address. */
  addressHeader: string | undefined;
  log: Log;
  clock: Clock;
  siblings: Siblings | undefined;
};

/** The environment is wrong; the message says where, a line a fault. */
export class ConfigError extends Error {
  constructor(
    faults: readonly string[],
    readonly log: Log,
  ) {
    super(faults.join("\n"));
  }
}

const STANDSTILL = new Int32Array(new SharedArrayBuffer(4)); // nobody wakes who waits for it

export const systemClock: Clock = {
  now: () => performance.now(),
  epoch: () => Date.now(),
  after(ms, run) {
    const timer = setTimeout(run, ms);
    timer.unref();
    return () => clearTimeout(timer);
  },
  rest(ms) {
    Atomics.wait(STANDSTILL, 0, 0, ms); // `Bun.sleepSync` knows whole milliseconds only
  },
};

const logText: Log = (event, fields) => {
  const words = Object.entries(fields).map(
    ([key, value]) => `${key}=${/[\s"]/.test(`${value}`) ? JSON.stringify(value) : value}`,
  );
  console.log(["party-sockets", event, ...words].join(" "));
};
const logJson: Log = (event, fields) => console.log(JSON.stringify({ time: new Date().toISOString(), event, ...fields }));

/**
 * Reads the environment; the only place that does.
 * @throws ConfigError naming every variable that is wrong
 */
export function configFromEnv(env: Record<string, string | undefined>): Config {
  const faults: string[] = [];
  const text = (name: string): string | undefined => env[name]?.trim() || undefined;
  const whole = (name: string, fallback: number, most: number): number => {
    const value = text(name);
    if (value === undefined) return fallback;
    if (/^\d{1,15}$/.test(value) && Number(value) <= most) return Number(value);
    faults.push(`${name} must be a whole number from 0 to ${most}, not ${JSON.stringify(value)}`);
    return fallback;
  };
  const LONG = 2_147_483; // seconds; the longest timer
  const config: Config = {
    port: whole("PORT", 3000, 65535),
    instance: text("INSTANCE_ID") ?? text("FLY_MACHINE_ID") ?? "",
    region: text("REGION") ?? text("FLY_REGION") ?? "",
    flyApp: text("FLY_APP_NAME"),
    flyRegion: text("FLY_REGION"),
    dashboardUrl: text("DASHBOARD_URL"),
    allowedOrigins: undefined,
    addressHeader: text("ADDRESS_HEADER"),
    log: logText,
    clock: systemClock,
    siblings: undefined,
    ...LIMITS,
  };
  for (const name of Object.keys(LIMITS) as (keyof typeof LIMITS)[]) {
    const variable = name.replace(/[A-Z]/g, "_$&").toUpperCase();
    config[name] = whole(variable, LIMITS[name], name.endsWith("Seconds") ? LONG : MOST);
  }
  const { flyApp, flyRegion, maxBufferedBytes, maxMessageBytes } = config;
  if (maxBufferedBytes !== 0 && maxMessageBytes !== 0 && maxBufferedBytes < 4 * maxMessageBytes)
    faults.push(
      `MAX_BUFFERED_BYTES must be at least four times MAX_MESSAGE_BYTES (${4 * maxMessageBytes}), not ${maxBufferedBytes}`,
    );
  if (!/^[\x21-\x7e]{0,256}$/.test(config.instance))
    faults.push("INSTANCE_ID must be at most 256 visible ASCII characters: it is sent in a header");
  if (flyApp !== undefined && config.instance !== (text("FLY_MACHINE_ID") ?? ""))
    faults.push("INSTANCE_ID must be left out, or equal FLY_MACHINE_ID, where FLY_APP_NAME is set: Fly.io routes by it");
  const position = flyRegion === undefined ? 0 : REGIONS.indexOf(flyRegion);
  if (position < 0 || position > 31)
    faults.push(`FLY_REGION ${JSON.stringify(flyRegion)} has no row: append ${JSON.stringify(flyRegion)} to regions.ts`);
  if (config.dashboardUrl !== undefined) {
    const url = URL.parse(config.dashboardUrl);
    if (url?.protocol === "https:" || url?.protocol === "http:") config.dashboardUrl = url.href;
    else faults.push(`DASHBOARD_URL must be an http or https URL, not ${JSON.stringify(config.dashboardUrl)}`);
  } else if (flyApp !== undefined)
    config.dashboardUrl = `https://fly-metrics.net/d/fly-app/fly-app?var-app=${encodeURIComponent(flyApp)}`;
  const origins = text("ALLOWED_ORIGINS");
  if (origins !== undefined) {
    const listed = origins
      .toLowerCase()
      .split(/[,\s]+/)
      .map((origin) => origin.replace(/\/$/, ""))
      .filter(Boolean);
    for (const origin of listed)
      if (origin !== "null" && !/^[a-z][a-z\d+.-]*:\/\/[^/\s]+$/.test(origin))
        faults.push(`ALLOWED_ORIGINS must list origins such as https://game.example, not ${JSON.stringify(origin)}`);
    config.allowedOrigins = new Set(listed);
  }
  if (config.addressHeader !== undefined && !/^[\w!#$%&'*+.^`|~-]+$/.test(config.addressHeader))
    faults.push(`ADDRESS_HEADER must be a header's name, not ${JSON.stringify(config.addressHeader)}`);
  if (flyApp !== undefined) {
    config.addressHeader ??= "Fly-Client-IP";
    if (flyRegion !== undefined) config.siblings = flySiblings(flyApp, flyRegion, config.instance, config.port);
  }
  const format = text("LOG_FORMAT") ?? "text";
  if (format === "json") config.log = logJson;
  else if (format !== "text") faults.push(`LOG_FORMAT must be text or json, not ${JSON.stringify(format)}`);
  if (faults.length > 0) throw new ConfigError(faults, config.log);
  return config;
}

// ---- Room codes ------------------------------------------------------------------------------------------

const ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"; // Bitcoin's base58
const CODE = /^[1-9A-HJ-NP-Za-km-z]{6}$/;
const REGION_UNIT = 2 ** 30; // a code is 35 bits: 5 for the region's position, 30 random

/** The six characters of a 35-bit number, big-endian. */
export function encodeCode(value: number): string {
  let code = "";
  for (let i = 0; i < 6; i++) {
    code = ALPHABET.charAt(value % 58) + code;
    value = Math.floor(value / 58);
  }
  return code;
}

/** A fresh code: `region`'s position and 30 random bits, or 35 random bits without a region. */
export function newCode(region: string | undefined): string {
  const [low = 0, high = 0] = crypto.getRandomValues(new Uint32Array(2));
  const position = region === undefined ? high >>> 27 : REGIONS.indexOf(region);
  return encodeCode(position * REGION_UNIT + (low >>> 2));
}

/** The region that a code names, or undefined where it names no row or is no code. */
export function regionOf(code: string): string | undefined {
  if (!CODE.test(code)) return undefined;
  let value = 0;
  for (const character of code) value = value * 58 + ALPHABET.indexOf(character);
  return REGIONS[Math.floor(value / REGION_UNIT)];
}

// ---- State -----------------------------------------------------------------------------------------------

/** A place in a room. It is connected, or absent, or barred. */
type Slot = { readonly index: number; readonly clientId: string; readonly room: Room; barred: boolean };

class Room {
  locked = false;
  host = 0;
  /** The snapshot, as the frame that is sent. */
  state: string | undefined;
  nextIndex = 0;
  /** Every slot that the room remembers. */
  readonly known = new Map<string, Slot>();
  readonly connected = new Map<number, Socket>();
  /** Slots with nobody on them, the longest gone first; without the host's. */
  readonly absent = new Set<Slot>();
  /** What the room's one timer waits for: nobody is connected, or the host is away. */
  waiting: "linger" | "host" | undefined;
  waitEnds = 0;
  cancelWait = () => {};
  /** Payload bytes published so far: who hasn't been heard from over many of them was too slow. */
  published = 0;

  constructor(
    readonly code: string,
    readonly origin: Origin, // the creator's
    readonly url: string | undefined,
    public maxClients: number,
    readonly linger = 0,
    readonly hostGrace?: number,
    readonly migrate = false,
  ) {}
}

/** What is known of a socket. */
class Session {
  slot: Slot | undefined;
  /** When a frame or a pong last came, and what its room had published then. */
  heardAt = 0;
  heardBytes = 0;
  /** Sweeps since an unanswered ping. */
  unanswered = 0;
  /** When the message bucket will be full again (clock time). */
  refilledAt = 0;
  /** Frames that came after the bucket was empty; undefined where the socket isn't paused. */
  queue: (string | Buffer)[] | undefined;
  /** Set when the socket opens: a handshake that fails is no use of its origin. */
  origin!: Origin;

  constructor(
    readonly address: string,
    readonly originName: string,
    /** The code in the upgrade's path, where no sibling had it: that miss is counted, so the first join counts none. */
    public missed?: string,
  ) {}
}
type Socket = ServerWebSocket<Session>;

/** The counts of one Origin header. */
type Origin = { readonly name: string; clients: number; rooms: number; connections: number; created: number };

const JOINS = ["new", "resumed", "replaced"] as const;
const DISCONNECTS = ["left", "lost", "kicked", "replaced", "room_closed", "slow", "shutdown"] as const;
type Disconnect = (typeof DISCONNECTS)[number];
const REPLAYS = ["instance", "region", "sibling", "stale", "failed"] as const;
const PROBES = ["found", "missing", "failed"] as const;
const zeros = <K extends string>(keys: readonly K[]): Record<K, number> =>
  Object.fromEntries(keys.map((key) => [key, 0])) as Record<K, number>;

/** All that a relay has in memory. Two of them share nothing. */
class Relay {
  server!: Server<Session>;
  readonly rooms = new Map<string, Room>();
  readonly sockets = new Set<Socket>();
  /** Sockets in no room, the longest so first. */
  readonly roomless = new Set<Socket>();
  readonly paused = new Set<Socket>();
  readonly lingering = new Set<Room>();
  /** Slots with nobody on them, in all rooms, the longest gone first. */
  readonly absent = new Set<Slot>();
  lastAddress: { text: string; key: string | undefined } = { text: "", key: undefined };
  readonly misses = new Map<string, { count: number; until: number }>();
  readonly searches = new Map<string, { address: string; result: Promise<string | undefined> }>();
  readonly missing = new Map<string, number>();
  readonly origins = new Map<string, Origin>();
  readonly capLogged = new Map<string, number>();
  /** Connected members. */
  clients = 0;
  /** Whether resting pays: by the rate of deliveries since `loadSince`, when there had been `loadFrom`. */
  busy = false;
  loadSince = 0;
  loadFrom = 0;
  /** Whether this turn of the event loop ends with a rest. */
  resting = false;
  cancelRefill: (() => void) | undefined;
  cancelIdle = () => {};
  /** When a drain ends (clock time); undefined while none goes on. */
  drainEnds: number | undefined;
  ending = false;
  readonly ended = Promise.withResolvers<"idle" | "drained">();
  readonly lag: number[] = [];
  readonly startedAt: number;

  // Counters; the rows under Metrics say what they mean.
  connectionsTotal = 0;
  createdTotal = 0;
  messagesIn = 0;
  messagesOut = 0;
  bytesIn = 0;
  bytesOut = 0;
  pausedTotal = 0;
  readonly errors = zeros<ErrorCode | "internal">([
    ...(Object.keys(REFUSALS) as (keyof typeof REFUSALS)[]),
    "bad_request",
    "not_host",
    "internal",
  ]);
  readonly joins = zeros(JOINS);
  readonly disconnects = zeros(DISCONNECTS);
  readonly replays = zeros(REPLAYS);
  readonly probes = zeros(PROBES);

  constructor(readonly config: Config) {
    this.startedAt = config.clock.now();
  }
}

/** The counts of an Origin header, which is used now; the least recently used goes where there are too many. */
function useOrigin(relay: Relay, name: string): Origin {
  const origin = relay.origins.get(name) ?? { name, clients: 0, rooms: 0, connections: 0, created: 0 };
  relay.origins.delete(name);
  relay.origins.set(name, origin);
  if (relay.origins.size > ORIGINS_KEPT) relay.origins.delete(first(relay.origins.keys()) as string);
  return origin;
}

function first<T>(items: Iterator<T>): T | undefined {
  return items.next().value as T | undefined;
}

function capReached(relay: Relay, cap: string): void {
  const now = relay.config.clock.now();
  if (now < (relay.capLogged.get(cap) ?? 0)) return;
  relay.capLogged.set(cap, now + CAP_LOG_MS);
  relay.config.log("cap reached", { cap });
}

// ---- Frames out: all that leaves goes through here, in the order in which it was handled -----------------

function write(relay: Relay, socket: Socket, frame: string): void {
  relay.messagesOut++;
  relay.bytesOut += Buffer.byteLength(frame);
  socket.sendText(frame);
}

function publish(relay: Relay, room: Room, frame: string, except?: Socket): void {
  const receivers = room.connected.size - (except === undefined ? 0 : 1);
  const bytes = Buffer.byteLength(frame);
  relay.messagesOut += receivers;
  relay.bytesOut += bytes * receivers;
  room.published += bytes;
  if (except !== undefined) except.publishText(room.code, frame);
  else relay.server.publish(room.code, frame);
}

/**
 * Lets a busy relay rest for a moment before it reads on: what gathers meanwhile is read in one turn of the event loop, and
 * all that a member gets of it leaves in one system call. Orders and holds nothing back itself: what was read is on its way.
 */
function restIfBusy(relay: Relay, now: number): void {
  const elapsed = now - relay.loadSince;
  if (elapsed >= REST_WINDOW_MS) {
    relay.busy = relay.messagesOut - relay.loadFrom > elapsed * REST_ABOVE;
    relay.loadFrom = relay.messagesOut;
    relay.loadSince = now;
  }
  if (!relay.busy || relay.resting) return;
  relay.resting = true;
  setImmediate(() => {
    relay.resting = false;
    const { clock } = relay.config;
    if (clock.now() - now < LONG_TURN_MS) clock.rest(REST_MS);
  });
}

const say = (relay: Relay, socket: Socket, message: ServerMessage) => write(relay, socket, frameOf(message));

/** Tells the room's members, all but `except`. */
const announce = (relay: Relay, room: Room, message: ServerMessage, except?: Socket) =>
  publish(relay, room, frameOf(message), except);

/** Closes a socket from this side; frames of it that wait are discarded. */
function hangUp(relay: Relay, socket: Socket, code: number, reason: string): void {
  socket.data.queue = undefined;
  relay.paused.delete(socket);
  socket.close(code, reason);
}

// ---- Slots: `sit` and `stand` are the only writers of who sits where -------------------------------------

function sit(relay: Relay, socket: Socket, slot: Slot): void {
  const { room } = slot;
  relay.absent.delete(slot);
  room.absent.delete(slot);
  relay.roomless.delete(socket);
  room.connected.set(slot.index, socket);
  socket.data.slot = slot;
  socket.data.heardBytes = room.published;
  socket.data.origin.clients++;
  relay.clients++;
  socket.subscribe(room.code);
}

function stand(relay: Relay, socket: Socket, slot: Slot, why: Disconnect): void {
  socket.unsubscribe(slot.room.code);
  slot.room.connected.delete(slot.index);
  socket.data.slot = undefined;
  socket.data.origin.clients--;
  relay.clients--;
  relay.disconnects[why]++;
  if (relay.sockets.has(socket)) relay.roomless.add(socket);
}

/** Keeps a slot for its clientId's return. The longest gone is forgotten where there are too many; a host never. */
function remember(relay: Relay, slot: Slot): void {
  if (slot.index === slot.room.host) return;
  slot.room.absent.add(slot);
  relay.absent.add(slot);
  if (slot.room.absent.size > KNOWN_PER_ROOM) forget(relay, first(slot.room.absent.values()) as Slot);
  if (relay.absent.size > KNOWN_IN_ALL) forget(relay, first(relay.absent.values()) as Slot);
}

function forget(relay: Relay, slot: Slot): void {
  relay.absent.delete(slot);
  slot.room.absent.delete(slot);
  slot.room.known.delete(slot.clientId);
}

function addSlot(room: Room, clientId: string): Slot {
  const slot: Slot = { index: room.nextIndex++, clientId: copyOf(clientId), room, barred: false };
  room.known.set(slot.clientId, slot);
  return slot;
}

/**
 * A member goes, and its room lives with that.
 * @param reason what the others are told; undefined where the socket just closed
 */
function depart(relay: Relay, socket: Socket, slot: Slot, why: Disconnect, reason?: "left" | "kicked"): void {
  const { room } = slot;
  stand(relay, socket, slot, why);
  remember(relay, slot);
  if (room.connected.size > 0) {
    announce(relay, room, { type: "peer_left", index: slot.index, reason });
    settle(relay, room);
  } else if (room.linger > 0 && reason === undefined && relay.drainEnds === undefined) settle(relay, room);
  else dropRoom(relay, room);
}

/** Arms, keeps or ends the room's one timer, as who is there demands. */
function settle(relay: Relay, room: Room): void {
  const empty = room.connected.size === 0;
  const hostAway = room.hostGrace !== undefined && !room.connected.has(room.host);
  const waiting = empty ? "linger" : hostAway ? "host" : undefined;
  if (waiting === room.waiting) return;
  room.cancelWait();
  room.cancelWait = () => {};
  room.waiting = waiting;
  if (empty) relay.lingering.add(room);
  else relay.lingering.delete(room);
  if (waiting === undefined) return;
  const { clock } = relay.config;
  const ms = 1000 * (empty ? room.linger : (room.hostGrace ?? 0));
  room.waitEnds = clock.now() + ms;
  room.cancelWait = clock.after(ms, () => {
    if (empty) dropRoom(relay, room);
    else if (room.migrate) migrateHost(relay, room);
    else closeRoom(relay, room, "room_closed");
  });
}

function migrateHost(relay: Relay, room: Room): void {
  const former = room.known.values().find((slot) => slot.index === room.host);
  room.host = room.connected.keys().reduce((lowest, index) => Math.min(lowest, index));
  if (former !== undefined) remember(relay, former);
  announce(relay, room, { type: "host", index: room.host });
  settle(relay, room);
}

/** Ends a room that nobody is connected to. */
function dropRoom(relay: Relay, room: Room): void {
  room.cancelWait();
  relay.rooms.delete(room.code);
  relay.lingering.delete(room);
  for (const slot of room.absent) relay.absent.delete(slot);
  room.origin.rooms--;
  watchIdle(relay);
  if (relay.drainEnds !== undefined && relay.rooms.size === 0) end(relay, "drained");
}

/** Ends a room and all its sockets at once. */
function closeRoom(relay: Relay, room: Room, why: "room_closed" | "shutdown"): void {
  const [code, reason] = why === "room_closed" ? [CloseCode.ROOM_CLOSED, "room closed"] : [CloseCode.RESTARTING, "restarting"];
  for (const socket of [...room.connected.values()]) {
    stand(relay, socket, socket.data.slot as Slot, why);
    hangUp(relay, socket, code, reason);
  }
  dropRoom(relay, room);
}

// ---- Messages: one row each, named as on the wire --------------------------------------------------------

type Handler<T extends MessageType, S> = (relay: Relay, socket: Socket, message: Message<T>, slot: S) => Refusal | void;
/** Fields are parsed into a well-formed message or the refusal; a handler trusts its argument. */
type Row<T extends MessageType> = { parse(fields: Fields, frame: string, config: Config): Message<T> | Refusal } & (
  | { who: "anyone"; handle: Handler<T, Slot | undefined> }
  | { who: "member"; handle: Handler<T, Slot> }
  | { who: "host"; /** Completes "Only the host can …". */ act: string; handle: Handler<T, Slot> }
);

function clientIdFault({ clientId }: Fields): Refusal | undefined {
  if (typeof clientId !== "string" || clientId === "") return badRequest("clientId is required");
  if (clientId.length > CLIENT_ID_LENGTH) return badRequest("clientId is too long");
  return undefined;
}

function maxClientsFault({ maxClients }: Fields, { maxClientsPerRoom }: Config): Refusal | undefined {
  if (!isWhole(maxClients, 1, Infinity)) return badRequest("maxClients must be a positive number");
  if (maxClientsPerRoom !== 0 && (maxClients as number) > maxClientsPerRoom)
    return badRequest(`maxClients must be at most ${maxClientsPerRoom}`);
  return undefined;
}

function optionsFault({ linger, hostGrace, migrate, url }: Fields): Refusal | undefined {
  if (linger !== undefined && !isWhole(linger, 0, LINGER_SECONDS))
    return badRequest(`linger must be a whole number from 0 to ${LINGER_SECONDS}`);
  if (hostGrace !== undefined && !isWhole(hostGrace, 1, GRACE_SECONDS))
    return badRequest(`hostGrace must be a whole number from 1 to ${GRACE_SECONDS}`);
  if (migrate !== undefined && typeof migrate !== "boolean") return badRequest("migrate must be true or false");
  if (migrate === true && hostGrace === undefined) return badRequest("migrate needs hostGrace");
  if (url !== undefined && typeof url !== "string") return badRequest("url must be a string");
  if (url !== undefined && Buffer.byteLength(url) > URL_BYTES) return badRequest(`url must be at most ${URL_BYTES} bytes`);
  return undefined;
}

/** The controller page's address, or undefined where the template doesn't give an absolute https URL. */
function fillUrl(template: string, room: string, instance: string): string | undefined {
  const filled = template.replaceAll("{room}", encodeURIComponent(room)).replaceAll("{instance}", encodeURIComponent(instance));
  const url = /[{}]/.test(filled) ? null : URL.parse(filled);
  return url?.protocol === "https:" ? url.href : undefined;
}

function tellDraining(relay: Relay, socket: Socket): void {
  if (relay.drainEnds === undefined) return;
  const left = Math.max(0, relay.drainEnds - relay.config.clock.now());
  say(relay, socket, { type: "draining", seconds: Math.ceil(left / 1000) });
}

/** Makes place for another room. @returns whether there is one */
function placeForRoom(relay: Relay): boolean {
  const { maxRooms } = relay.config;
  if (maxRooms === 0 || relay.rooms.size < maxRooms) return true;
  capReached(relay, "rooms");
  let nearest: Room | undefined;
  for (const room of relay.lingering) if (nearest === undefined || room.waitEnds < nearest.waitEnds) nearest = room;
  if (nearest === undefined) return false;
  dropRoom(relay, nearest);
  return true;
}

const MESSAGES: { readonly [T in MessageType]: Row<T> } = {
  create: {
    who: "anyone",
    parse(fields, _, config) {
      const fault = clientIdFault(fields) ?? maxClientsFault(fields, config) ?? optionsFault(fields);
      return fault ?? (fields as Message<"create">);
    },
    handle(relay, socket, message, slot) {
      const { clientId, url, maxClients, linger, hostGrace, migrate } = message;
      const { instance, region, flyRegion } = relay.config;
      let code = newCode(flyRegion);
      while (relay.rooms.has(code)) code = newCode(flyRegion);
      const filled = url === undefined ? undefined : fillUrl(url, code, instance);
      if (url !== undefined && filled === undefined)
        return badRequest("url must be an absolute https URL with no braces but {room} and {instance}");
      if (slot !== undefined) return refuse("already_in_room");
      if (relay.drainEnds !== undefined) return refuse("draining");
      if (!placeForRoom(relay)) return refuse("capacity");
      const origin = useOrigin(relay, socket.data.originName);
      const room = new Room(code, origin, filled, maxClients, linger, hostGrace, migrate);
      relay.rooms.set(code, room);
      relay.createdTotal++;
      origin.rooms++;
      origin.created++;
      sit(relay, socket, addSlot(room, clientId));
      say(relay, socket, { type: "created", room: code, instance, region, index: 0, url: filled });
    },
  },

  join: {
    who: "anyone",
    parse(fields) {
      const fault = clientIdFault(fields);
      if (fault !== undefined) return fault;
      if (typeof fields.room !== "string" || fields.room === "") return badRequest("room is required");
      return fields as Message<"join">;
    },
    handle(relay, socket, { clientId, room: code }, slot) {
      if (slot !== undefined) return refuse("already_in_room");
      const room = relay.rooms.get(code);
      const known = room?.known.get(clientId);
      const { address } = socket.data;
      if (known === undefined && lockedOut(relay, address)) return refuse("too_many_attempts");
      if (room === undefined) {
        const counted = socket.data.missed === code;
        socket.data.missed = undefined;
        return refuse(miss(relay, address, counted ? 0 : 1) ? "too_many_attempts" : "room_not_found");
      }
      if (known?.barred) return refuse("kicked");
      if (known === undefined && room.locked) return refuse("room_locked");
      const old = known && room.connected.get(known.index);
      if (old === undefined && room.connected.size >= room.maxClients) return refuse("room_full");

      const mine = known ?? addSlot(room, clientId);
      if (old !== undefined) {
        stand(relay, old, mine, "replaced");
        hangUp(relay, old, CloseCode.REPLACED, "replaced");
      }
      const peers = [...room.connected.keys()].sort((a, b) => a - b);
      const resumed = known !== undefined && old === undefined ? true : undefined;
      relay.joins[old !== undefined ? "replaced" : resumed ? "resumed" : "new"]++;
      sit(relay, socket, mine);
      settle(relay, room);
      say(relay, socket, {
        type: "joined",
        room: code,
        index: mine.index,
        peers,
        host: room.host || undefined,
        resumed,
        locked: room.locked || undefined,
        url: room.url,
      });
      if (room.state !== undefined) write(relay, socket, room.state);
      tellDraining(relay, socket);
      if (old === undefined) announce(relay, room, { type: "peer_joined", index: mine.index, resumed }, socket);
    },
  },

  send: {
    who: "member",
    parse(fields, frame) {
      const data = memberText(frame, "data");
      if (data === undefined) return badRequest("data is required");
      return { ...fields, type: "send", data };
    },
    handle(relay, socket, { data, to, echo }, { index, room }) {
      const frame = messageFrame(index, data);
      if (to === undefined) return publish(relay, room, frame, echo === true ? undefined : socket);
      if (!Array.isArray(to)) {
        const target = isIndex(to) ? room.connected.get(to) : undefined;
        if (target === undefined) return refuse("peer_not_found");
        return write(relay, target, frame);
      }
      const wanted = [...new Set(to)];
      if (wanted.length < 1 || wanted.length > TARGETS || !wanted.every(isIndex)) return refuse("peer_not_found");
      const found = wanted.flatMap((target) => room.connected.get(target) ?? []);
      for (const target of found) write(relay, target, frame);
      if (found.length === wanted.length) return;
      const missing = wanted.filter((target) => !room.connected.has(target)).sort((a, b) => a - b);
      return refuse("peer_not_found", missing);
    },
  },

  set_state: {
    who: "host",
    act: "set state",
    parse(_, frame) {
      const data = memberText(frame, "data");
      if (data === undefined) return badRequest("State data is required");
      if (Buffer.byteLength(data) > STATE_BYTES) return refuse("state_too_large");
      return { type: "set_state", data };
    },
    handle(relay, socket, { data }, { room }) {
      room.state = copyOf(stateFrame(data));
      publish(relay, room, room.state, socket);
    },
  },

  close_room: {
    who: "host",
    act: "close the room",
    parse: () => ({ type: "close_room" }),
    handle: (relay, _, __, { room }) => closeRoom(relay, room, "room_closed"),
  },

  set_room: {
    who: "host",
    act: "change the room",
    parse(fields, _, config) {
      const { locked, maxClients } = fields;
      if (locked !== undefined && typeof locked !== "boolean") return badRequest("locked must be true or false");
      const fault = maxClients === undefined ? undefined : maxClientsFault(fields, config);
      return fault ?? (fields as Message<"set_room">);
    },
    handle(relay, _, { locked, maxClients }, { room }) {
      room.locked = locked ?? room.locked;
      room.maxClients = maxClients ?? room.maxClients;
      announce(relay, room, { type: "room", locked: room.locked, maxClients: room.maxClients });
    },
  },

  kick: {
    who: "host",
    act: "kick",
    parse: ({ index }) => (isIndex(index) ? { type: "kick", index } : refuse("peer_not_found")),
    handle(relay, _, { index }, { index: own, room }) {
      if (index >= room.nextIndex) return refuse("peer_not_found");
      if (index === own) return badRequest("Cannot kick yourself");
      const target = room.connected.get(index);
      const slot = target?.data.slot ?? room.absent.values().find((gone) => gone.index === index);
      if (slot === undefined || slot.barred) return;
      slot.barred = true;
      if (target === undefined) return;
      depart(relay, target, slot, "kicked", "kicked");
      hangUp(relay, target, CloseCode.KICKED, "kicked");
    },
  },

  set_host: {
    who: "host",
    act: "hand on the host's role",
    parse: ({ index }) => (isIndex(index) ? { type: "set_host", index } : refuse("peer_not_found")),
    handle(relay, _, { index }, { index: own, room }) {
      if (!room.connected.has(index)) return refuse("peer_not_found");
      if (index === own) return;
      room.host = index;
      announce(relay, room, { type: "host", index });
    },
  },

  leave: {
    who: "member",
    parse: () => ({ type: "leave" }),
    handle(relay, socket, _, slot) {
      say(relay, socket, { type: "left", room: slot.room.code }); // first: in a drain the last one's leaving ends the relay
      depart(relay, socket, slot, "left", "left");
    },
  },

  ping: {
    who: "anyone",
    parse: ({ t }) => ({ type: "ping", t: Number.isFinite(t) ? (t as number) : undefined }),
    handle(relay, socket, { t }) {
      say(relay, socket, { type: "pong", t, now: relay.config.clock.epoch() });
    },
  },
};

function parseObject(frame: string | Buffer): Fields | undefined {
  if (typeof frame !== "string") return undefined;
  try {
    const value: unknown = JSON.parse(frame);
    return typeof value === "object" && value !== null && !Array.isArray(value) ? (value as Fields) : undefined;
  } catch {
    return undefined;
  }
}

/** Does what one frame asks for; the only place that refuses on a socket. */
function handle(relay: Relay, socket: Socket, frame: string | Buffer): void {
  const refusal = perform(relay, socket, frame);
  if (refusal === undefined) return;
  const { message, code, missing } = refusal;
  relay.errors[code]++;
  say(relay, socket, { type: "error", message, code, missing });
  if (code === "too_many_attempts") hangUp(relay, socket, CloseCode.TOO_MANY_ATTEMPTS, "too many attempts");
}

function perform(relay: Relay, socket: Socket, frame: string | Buffer): Refusal | void {
  const { slot } = socket.data;
  if (slot !== undefined && typeof frame === "string") {
    const send = parsePlainSend(frame);
    if (send !== undefined) return MESSAGES.send.handle(relay, socket, send, slot);
  }
  const fields = parseObject(frame);
  if (fields === undefined) return refuse("bad_json");
  const { type } = fields;
  if (typeof type !== "string" || !Object.hasOwn(MESSAGES, type)) return refuse("unknown_type");
  const row = MESSAGES[type as MessageType] as Row<MessageType>;
  if (row.who !== "anyone" && slot === undefined) return refuse("not_in_room");
  if (row.who === "host" && slot?.index !== slot?.room.host) return new Refusal("not_host", `Only the host can ${row.act}`);
  const message = row.parse(fields, frame as string, relay.config);
  return message instanceof Refusal ? message : row.handle(relay, socket, message, slot as Slot);
}

// ---- Sockets: the rate of messages, dead peers, exceptions -----------------------------------------------

function opened(relay: Relay, socket: Socket): void {
  const { clock, maxConnections } = relay.config;
  relay.sockets.add(socket);
  socket.data.origin = useOrigin(relay, socket.data.originName);
  if (relay.ending) return hangUp(relay, socket, CloseCode.RESTARTING, "restarting");
  relay.cancelIdle();
  relay.connectionsTotal++;
  socket.data.origin.connections++;
  socket.data.heardAt = clock.now();
  if (maxConnections !== 0 && relay.sockets.size > maxConnections) {
    capReached(relay, "connections");
    relay.errors.capacity++;
    const victim = first(relay.roomless.values()) ?? socket;
    hangUp(relay, victim, CloseCode.SERVER_FULL, "server full");
    if (victim === socket) return;
  }
  relay.roomless.add(socket);
}

function heard(socket: Socket, now: number): void {
  const session = socket.data;
  session.heardAt = now;
  session.unanswered = 0;
  if (session.slot !== undefined) session.heardBytes = session.slot.room.published;
}

function received(relay: Relay, socket: Socket, frame: string | Buffer): void {
  const session = socket.data;
  heard(socket, relay.config.clock.now());
  restIfBusy(relay, session.heardAt);
  relay.messagesIn++;
  relay.bytesIn += Buffer.byteLength(frame);
  if (session.queue !== undefined) session.queue.push(frame);
  else {
    takeToken(relay, socket);
    handle(relay, socket, frame);
  }
}

/**
 * Takes a token from the socket's bucket, and pauses the socket where that was the last one. A paused one goes into debt, by
 * one read at most.
 */
function takeToken(relay: Relay, socket: Socket): void {
  const { maxMessagesPerSecond: rate } = relay.config;
  if (rate === 0) return;
  const session = socket.data;
  session.refilledAt = Math.max(session.refilledAt, session.heardAt) + 1000 / rate;
  if (session.queue !== undefined || hasToken(session, rate, session.heardAt)) return;
  session.queue = [];
  socket.pause();
  relay.paused.add(socket);
  relay.pausedTotal++;
  capReached(relay, "messages per second");
  armRefill(relay);
}

/** The bucket is full at `refilledAt`; until then a token is missing for every 1/rate s. */
const hasToken = (session: Session, rate: number, now: number) => session.refilledAt - now <= ((BURST * rate - 1) * 1000) / rate;

function armRefill(relay: Relay): void {
  relay.cancelRefill ??= relay.config.clock.after(REFILL_MS, () => {
    relay.cancelRefill = undefined;
    for (const socket of [...relay.paused]) refill(relay, socket);
    if (relay.paused.size > 0) armRefill(relay);
  });
}

/** Handles as many of a paused socket's frames as its bucket has tokens, and resumes it after the last. */
function refill(relay: Relay, socket: Socket): void {
  const { clock, maxMessagesPerSecond: rate } = relay.config;
  const session = socket.data;
  const now = clock.now();
  while (session.queue !== undefined && hasToken(session, rate, now)) {
    const frame = session.queue.shift();
    if (frame === undefined) {
      session.queue = undefined;
      relay.paused.delete(socket);
      heard(socket, now);
      socket.resume();
    } else {
      session.refilledAt = Math.max(session.refilledAt, now) + 1000 / rate;
      guarded(relay, socket, () => handle(relay, socket, frame));
    }
  }
}

function closed(relay: Relay, socket: Socket, code: number): void {
  const session = socket.data;
  relay.sockets.delete(socket);
  relay.paused.delete(socket);
  // The queue is still there where the other side closed: what was sent before arrives, up to a frame that ends the socket.
  while (session.queue !== undefined && session.queue.length > 0) {
    const frame = session.queue.shift() as string | Buffer;
    guarded(relay, socket, () => handle(relay, socket, frame));
  }
  session.queue = undefined;
  const { slot } = session;
  if (slot !== undefined) {
    const { maxBufferedBytes } = relay.config;
    // A cut for backpressure reads as 1006 like any loss; who let a whole buffer pass unheard was too slow.
    const behind = slot.room.published - session.heardBytes;
    const slow = code === 1006 && maxBufferedBytes !== 0 && behind >= maxBufferedBytes;
    if (slow) capReached(relay, "buffered bytes");
    depart(relay, socket, slot, slow ? "slow" : code === 1006 ? "lost" : "left");
  }
  relay.roomless.delete(socket);
  watchIdle(relay);
}

/** Pings who has been quiet, and cuts who answered nothing for two sweeps: a dead phone sends no FIN. */
function sweep(relay: Relay): void {
  const now = relay.config.clock.now();
  for (const socket of relay.sockets) {
    const session = socket.data;
    if (session.queue !== undefined || now - session.heardAt < QUIET_MS) continue;
    if (session.unanswered === 0) socket.ping();
    if (session.unanswered === 2) socket.terminate();
    session.unanswered++;
  }
  for (const [address, { until }] of relay.misses) {
    if (until > now) break; // in the order of their windows
    relay.misses.delete(address);
  }
  for (const [code, until] of relay.missing) if (until <= now) relay.missing.delete(code);
}

function guarded(relay: Relay, socket: Socket, run: () => void): void {
  try {
    run();
  } catch (error) {
    crashed(relay, socket, error);
  }
}

function crashed(relay: Relay, socket: Socket, error: unknown): void {
  reportException(relay, error);
  hangUp(relay, socket, CloseCode.INTERNAL_ERROR, "internal error");
}

/** Logs where an exception came from. Its message is left out: it may quote what a client sent. */
function reportException(relay: Relay, error: unknown): void {
  relay.errors.internal++;
  const stack = error instanceof Error ? (error.stack ?? "") : "";
  const frames = stack.split("\n").filter((line) => /^\s+at /.test(line));
  relay.config.log("exception", {
    name: error instanceof Error ? error.name : typeof error,
    stack: frames.map((line) => line.trim()).join(" < "),
  });
}

function repeat(relay: Relay, ms: number, run: () => void): void {
  relay.config.clock.after(ms, () => {
    if (relay.ending) return;
    try {
      run();
    } finally {
      repeat(relay, ms, run);
    }
  });
}

// ---- Misses: guessing codes is bounded by address --------------------------------------------------------

/** What an address counts as: an IPv6 address as its /64, an IPv4-mapped one as IPv4; undefined where it is none. */
export function addressKey(text: string): string | undefined {
  const address = text.trim().replace(/%.*$/, "");
  if (isIP(address) !== 6) return isIP(address) === 4 ? copyOf(address) : undefined; // not a slice of the whole header
  const groupsOf = (half: string) =>
    half
      .split(":")
      .filter(Boolean)
      .flatMap((part) => {
        if (!part.includes(".")) return Number.parseInt(part, 16);
        const [a = 0, b = 0, c = 0, d = 0] = part.split(".").map(Number);
        return [a * 256 + b, c * 256 + d];
      });
  const [head = [], tail = []] = address.split("::").map(groupsOf);
  const groups = [...head, ...Array<number>(8 - head.length - tail.length).fill(0), ...tail];
  const [high = 0, low = 0] = groups.slice(6);
  if (groups.slice(0, 6).join() === "0,0,0,0,0,65535") return [high >> 8, high & 255, low >> 8, low & 255].join(".");
  const network = groups.slice(0, 4).map((group) => group.toString(16));
  return `${network.join(":")}::/64`;
}

/** `addressKey`, which a whole party that arrives from one address costs once: 8 % of connecting. */
function knownKey(relay: Relay, text: string): string | undefined {
  if (relay.lastAddress.text !== text) relay.lastAddress = { text, key: addressKey(text) };
  return relay.lastAddress.key;
}

/** Counts a miss, or none where `count` is 0. @returns whether the address is over the limit */
function miss(relay: Relay, address: string, count = 1): boolean {
  const { clock, maxMissesPerMinute } = relay.config;
  if (maxMissesPerMinute === 0) return false;
  const now = clock.now();
  let entry = relay.misses.get(address);
  if (entry === undefined || entry.until <= now) {
    entry = { count: 0, until: now + MISS_WINDOW_MS };
    relay.misses.delete(address); // and last in the order again
    relay.misses.set(address, entry);
    if (relay.misses.size > ADDRESSES) relay.misses.delete(first(relay.misses.keys()) as string);
  }
  entry.count += count;
  if (entry.count <= maxMissesPerMinute) return false;
  capReached(relay, "misses");
  return true;
}

/** Whether an address has missed so often that every look-up of it is refused before looking. */
function lockedOut(relay: Relay, address: string): boolean {
  const { clock, maxMissesPerMinute } = relay.config;
  const entry = relay.misses.get(address);
  return entry !== undefined && entry.until > clock.now() && entry.count > LOCKOUT * maxMissesPerMinute;
}

// ---- Routing and siblings: which machine answers ---------------------------------------------------------

/** What `route` decides by. */
export type Asked = {
  /** The request's path, and its query with the `?` or empty. */
  path: string;
  query: string;
  /** Whether it asks for a WebSocket. */
  upgrade: boolean;
  /** It has been replayed once already (`fly-replay-src` or `fly-replay-failed`). */
  replayed: boolean;
  /** A replay of it came back (`fly-replay-failed`). */
  failed: boolean;
  /** A sibling asks. */
  probe: boolean;
};

/** The form of a machine's id; one of another form could say more in a header than it should: `;app=other`. */
const MACHINE_ID = /^[\w-]{1,64}$/;

/** Where a request is answered. */
export type Route = "here" | { redirect: string } | { instance: string } | { region: string } | { searchSiblings: string };

/** What follows `/room/` in a path, as it stands there. */
const lookedUp = (path: string): string | undefined => /^\/room\/([^/]+)$/.exec(path)?.[1];

/**
 * Decides which machine answers. Headers that a client can forge only ever suppress a replay.
 * @param hasRoom whether this machine has the room of a code
 */
export function route(
  { path, query, upgrade, replayed, failed, probe }: Asked,
  { flyApp, flyRegion, instance }: Pick<Config, "flyApp" | "flyRegion" | "instance">,
  hasRoom: (code: string) => boolean,
): Route {
  if (flyApp === undefined) return "here";
  const pin = new URLSearchParams(query).get("instance");
  if (pin !== null && MACHINE_ID.test(pin) && pin !== instance) {
    if (!replayed) return { instance: pin };
    if (upgrade) return "here"; // its join says what is wrong
    const rest = query
      .slice(1)
      .split("&")
      .filter((part) => !new URLSearchParams(part).has("instance"));
    const target = path.replace(/^[/\\]+/, "/"); // `//host` would lead to another site
    return { redirect: rest.length > 0 ? `${target}?${rest.join("&")}` : target };
  }
  if (path === "/health" || path === "/metrics" || probe) return "here";
  const code = lookedUp(path) ?? path.slice(1);
  const region = flyRegion === undefined ? undefined : regionOf(code);
  if (region === undefined || failed || hasRoom(code)) return "here";
  if (region === flyRegion) return { searchSiblings: code };
  return replayed ? "here" : { region };
}

/** Sends a request on to where it belongs. The only thing to swap for another platform. */
function replay(relay: Relay, outcome: (typeof REPLAYS)[number], target: string): Response {
  relay.replays[outcome]++;
  return reply(409, "", { "fly-replay": `${target};timeout=5s;fallback=force_self` });
}

/**
 * Looks for a room on the siblings; all of them are asked at once, and the first that has it ends the search.
 * @returns the sibling's id, undefined where none said yes within SEARCH_MS, or "busy" where too many searches run
 */
function search(relay: Relay, code: string, address: string): Promise<string | undefined> | "busy" {
  const { siblings, clock } = relay.config;
  const missingUntil = relay.missing.get(code);
  if (siblings === undefined || (missingUntil ?? 0) > clock.now()) return Promise.resolve(undefined);
  const running = relay.searches.get(code);
  if (running !== undefined) return running.result;
  const own = relay.searches.values().reduce((n, other) => n + (other.address === address ? 1 : 0), 0);
  if (relay.searches.size >= SEARCHES || own >= SEARCHES_PER_ADDRESS) {
    capReached(relay, "searches");
    return "busy";
  }
  const result = askSiblings(relay, siblings, code).finally(() => relay.searches.delete(code));
  relay.searches.set(code, { address, result });
  return result;
}

async function askSiblings(relay: Relay, siblings: Siblings, code: string): Promise<string | undefined> {
  const { clock } = relay.config;
  const abort = new AbortController();
  const { promise: found, resolve: finish } = Promise.withResolvers<string | undefined>();
  let confirmed = false;
  const ask = async (id: string): Promise<boolean> => {
    const has = await siblings.has(id, code, abort.signal).catch(() => undefined);
    if (abort.signal.aborted) return false;
    relay.probes[has === undefined ? "failed" : has ? "found" : "missing"]++;
    if (has) finish(id);
    return has === false;
  };
  const cancelLate = clock.after(SEARCH_MS, () => finish(undefined));
  const askAll = async () => {
    const saidNo = await Promise.all((await siblings.list(abort.signal)).map(ask));
    confirmed = saidNo.every(Boolean);
    finish(undefined);
  };
  askAll().catch(() => finish(undefined)); // without DNS there are only local rooms
  const id = await found;
  cancelLate();
  abort.abort();
  if (id === undefined && confirmed) {
    relay.missing.delete(code);
    relay.missing.set(copyOf(code), clock.now() + MISSING_MS);
    if (relay.missing.size > MISSING_CODES) relay.missing.delete(first(relay.missing.keys()) as string);
  }
  return id;
}

/** The siblings as Fly.io's DNS names them: TXT `vms.<app>.internal`, AAAA `<id>.vm.<app>.internal`. */
function flySiblings(app: string, region: string, self: string, port: number): Siblings {
  /** An own resolver, because look-ups by name hang on a small thread pool that everything shares. */
  async function lookUp<T>(signal: AbortSignal, ask: (resolver: Resolver) => Promise<T>): Promise<T> {
    const resolver = new Resolver();
    const cancel = () => resolver.cancel();
    signal.addEventListener("abort", cancel, { once: true });
    try {
      return await ask(resolver);
    } finally {
      signal.removeEventListener("abort", cancel);
    }
  }
  return {
    async list(signal) {
      const records = await lookUp(signal, (resolver) => resolver.resolveTxt(`vms.${app}.internal`));
      return parseMachines(records.map((record) => record.join("")))
        .filter((machine) => machine.region === region && machine.id !== self)
        .map((machine) => machine.id);
    },
    async has(id, code, signal) {
      const [address] = await lookUp(signal, (resolver) => resolver.resolve6(`${id}.vm.${app}.internal`));
      const answer = await fetch(`http://[${address}]:${port}/room/${code}`, {
        headers: { "X-Party-Probe": "1" },
        redirect: "manual",
        keepalive: false, // a pooled connection that died would be tried twice
        signal,
      });
      await answer.body?.cancel();
      if (answer.status !== 200 && answer.status !== 404) throw new Error(`answered ${answer.status}`);
      return answer.status === 200;
    },
  };
}

/** Reads `<id> <region>,<id> <region>`. A text of 255 bytes goes on in the next: DNS cuts there, anywhere. */
export function parseMachines(texts: readonly string[]): { id: string; region: string }[] {
  const whole = texts.map((text) => (Buffer.byteLength(text) === 255 ? text : `${text},`)).join("");
  return whole.split(",").flatMap((entry) => {
    const [id, region] = entry.trim().split(" ");
    return id !== undefined && region !== undefined && MACHINE_ID.test(id) ? [{ id, region }] : [];
  });
}

// ---- Metrics: one row a series ---------------------------------------------------------------------------

type Sample = [labels: Record<string, string>, value: number];
type Metric = [type: "gauge" | "counter", name: string, help: string, read: (relay: Relay) => number | Sample[]];

const by = (label: string, counts: Record<string, number>): Sample[] =>
  Object.entries(counts).map(([key, value]) => [{ [label]: key }, value]);

const OTHER_ORIGINS = "__other__";

/** The origins with the most of `key`; what `total` has beyond them is summed. So no counter ever goes down. */
function byOrigin(relay: Relay, key: Exclude<keyof Origin, "name">, total: number): Sample[] {
  const shown = [...relay.origins.values()]
    .filter((origin) => origin.name !== OTHER_ORIGINS)
    .sort((a, b) => b[key] - a[key] || b.connections - a.connections)
    .slice(0, ORIGINS_SHOWN);
  const rest = total - shown.reduce((sum, origin) => sum + origin[key], 0);
  const samples = shown.map((origin): Sample => [{ origin: origin.name }, origin[key]]);
  return rest > 0 ? [...samples, [{ origin: OTHER_ORIGINS }, rest]] : samples;
}

// prettier-ignore
const METRICS: readonly Metric[] = [
  ["gauge", "party_sockets_clients", "Connected members of all rooms",
    (relay) => relay.clients],
  ["gauge", "party_sockets_rooms", "Rooms, lingering ones included",
    (relay) => relay.rooms.size],
  ["gauge", "party_sockets_clients_by_origin", "Connected members by the Origin header of their socket",
    (relay) => byOrigin(relay, "clients", relay.clients)],
  ["gauge", "party_sockets_rooms_by_origin", "Rooms by the Origin header of their creator",
    (relay) => byOrigin(relay, "rooms", relay.rooms.size)],
  ["counter", "party_sockets_connections_total", "WebSockets opened",
    (relay) => byOrigin(relay, "connections", relay.connectionsTotal)],
  ["counter", "party_sockets_rooms_created_total", "Rooms created",
    (relay) => byOrigin(relay, "created", relay.createdTotal)],
  ["gauge", "party_sockets_origins_tracked", `Origin headers remembered, at most ${ORIGINS_KEPT}`,
    (relay) => relay.origins.size],
  ["counter", "party_sockets_messages_total", "Frames received (in) and delivered (out)",
    (relay) => by("direction", { in: relay.messagesIn, out: relay.messagesOut })],
  ["counter", "party_sockets_bytes_total", "Bytes of payload received (in) and delivered (out)",
    (relay) => by("direction", { in: relay.bytesIn, out: relay.bytesOut })],
  ["counter", "party_sockets_errors_total", "Refusals by code; internal: exceptions in the relay",
    (relay) => by("code", relay.errors)],
  ["counter", "party_sockets_joins_total", "Joins: of a new slot, of one resumed after a vacancy, of one replaced while connected",
    (relay) => by("kind", relay.joins)],
  ["counter", "party_sockets_disconnects_total", "Members gone by reason; slow (cut for backpressure) is best effort",
    (relay) => by("reason", relay.disconnects)],
  ["counter", "party_sockets_replays_total", "Requests sent on: to a pinned instance, a region, a sibling; stale: a pin whose machine is gone; failed: came back",
    (relay) => by("outcome", relay.replays)],
  ["counter", "party_sockets_probes_total", "Siblings asked for a room, by what they answered",
    (relay) => by("outcome", relay.probes)],
  ["counter", "party_sockets_paused_total", "Times that a socket was paused for sending too fast",
    (relay) => relay.pausedTotal],
  ["gauge", "party_sockets_draining", "1 after a stop signal",
    (relay) => (relay.drainEnds === undefined ? 0 : 1)],
  ["gauge", "party_sockets_event_loop_lag_seconds", `Worst delay of a timer in the past ${(LAG_MS * LAG_SAMPLES) / 1000} s`,
    (relay) => Math.max(0, ...relay.lag) / 1000],
  ["gauge", "process_resident_memory_bytes", "Memory that the process occupies",
    () => process.memoryUsage.rss()],
  ["gauge", "process_heap_used_bytes", "JavaScript heap in use",
    () => heapSize()],
  ["gauge", "process_uptime_seconds", "Seconds since the relay started",
    (relay) => (relay.config.clock.now() - relay.startedAt) / 1000],
];

function metricsText(relay: Relay): string {
  const { instance, region } = relay.config;
  const common = { instance: instance || "local", region: region.toUpperCase() || "local", version };
  const lines: string[] = [];
  for (const [type, name, help, read] of METRICS) {
    lines.push(`# HELP ${name} ${help}`, `# TYPE ${name} ${type}`);
    const value = read(relay);
    for (const [labels, sample] of Array.isArray(value) ? value : [[{}, value] as Sample]) {
      const pairs = Object.entries({ ...common, ...labels }).map(([key, text]) => `${key}="${escapeLabel(text)}"`);
      lines.push(`${name}{${pairs.join(",")}} ${sample}`);
    }
  }
  return `${lines.join("\n")}\n`;
}

const escapeLabel = (text: string) => text.replace(/[\\"]/g, "\\$&").replaceAll("\n", "\\n");

/** Samples how late a timer fires. */
function watchLag(relay: Relay): void {
  const { clock } = relay.config;
  let due = clock.now() + LAG_MS;
  repeat(relay, LAG_MS, () => {
    relay.lag.push(Math.max(0, clock.now() - due));
    if (relay.lag.length > LAG_SAMPLES) relay.lag.shift();
    due = clock.now() + LAG_MS;
  });
}

// ---- HTTP ------------------------------------------------------------------------------------------------

const METHODS = "GET, HEAD, OPTIONS";
const WEBSOCKET_VERSION = "13"; // the only one that RFC 6455 has
type Answer = Response | undefined;

/** Every answer over HTTP is made here. */
function reply(status: number, body: string | object, headers: Record<string, string> = {}): Response {
  const isText = typeof body === "string";
  return new Response(isText ? body : JSON.stringify(body), {
    status,
    headers: {
      "Access-Control-Allow-Origin": "*",
      "Access-Control-Expose-Headers": "X-Instance-Id",
      "Content-Type": isText ? "text/plain; charset=utf-8" : "application/json",
      "Cache-Control": "no-store",
      ...headers,
    },
  });
}

/** Answers one HTTP request, where the room is; undefined where it became a WebSocket. */
function answer(relay: Relay, request: Request, server: Server<Session>): Answer | Promise<Answer> {
  const { config } = relay;
  const { method, headers } = request;
  if (method === "OPTIONS") {
    const preflight = { "Access-Control-Allow-Methods": METHODS, "Access-Control-Allow-Headers": "*" };
    return reply(204, "", { ...preflight, "Access-Control-Max-Age": "86400", Allow: METHODS });
  }
  if (method !== "GET" && method !== "HEAD") return reply(405, { error: "Method not allowed" }, { Allow: METHODS });

  const peer = server.requestIP(request)?.address ?? "";
  const named = config.addressHeader === undefined ? undefined : headers.get(config.addressHeader)?.split(",").at(-1);
  const address = knownKey(relay, named ?? peer) ?? knownKey(relay, peer) ?? peer;
  // Cut out by hand, because the host before it may be anything that a client sends.
  const [, path = "/", query = ""] = /^(?:https?:\/\/[^/?]*)?([^?]*)(.*)$/i.exec(request.url) ?? [];
  const upgrade = method === "GET" && headers.get("upgrade")?.toLowerCase() === "websocket";
  const isFly = config.flyApp !== undefined;
  const failed = isFly && headers.has("fly-replay-failed");
  const probe = isFly && named === undefined && headers.get("x-party-probe") === "1";
  if (failed) relay.replays.failed++;
  const replayed = failed || (isFly && headers.has("fly-replay-src"));
  const asked = { path, query, upgrade, replayed, failed, probe };
  const here = (missed?: string) =>
    upgrade ? takeUpgrade(relay, request, server, address, missed) : serve(relay, path, probe ? undefined : address);
  const decision = route(asked, config, (code) => relay.rooms.has(code));
  if (decision === "here") return here();
  if ("redirect" in decision) {
    relay.replays.stale++;
    return reply(302, "", { Location: decision.redirect });
  }
  if ("instance" in decision) return replay(relay, "instance", `instance=${decision.instance}`);
  if ("region" in decision) return replay(relay, "region", `region=${decision.region}`);
  if (lockedOut(relay, address)) return here();
  const found = search(relay, decision.searchSiblings, address);
  if (found === "busy") return reply(503, { error: "Too many searches" }, { "Retry-After": "1" });
  return found.then((id) => {
    if (id !== undefined) return replay(relay, "sibling", `instance=${id}`);
    if (!upgrade && lookedUp(path) !== undefined) return here(); // and counted there
    const over = miss(relay, address);
    return over && !upgrade ? tooManyAttempts(relay) : here(decision.searchSiblings);
  });
}

/**
 * Answers a plain request on this machine.
 * @param address whose miss it is; undefined where misses don't count
 */
function serve(relay: Relay, path: string, address: string | undefined): Response {
  if (path === "/health") return reply(200, { status: "ok" });
  if (path === "/metrics") return reply(200, metricsText(relay), { "Content-Type": "text/plain; version=0.0.4; charset=utf-8" });
  const { dashboardUrl, flyApp } = relay.config;
  const code = lookedUp(path);
  const asksRoom = code !== undefined || (flyApp !== undefined && CODE.test(path.slice(1)));
  if (asksRoom && address !== undefined && lockedOut(relay, address)) return tooManyAttempts(relay);
  if (code !== undefined) return roomAnswer(relay, code, address);
  if (dashboardUrl !== undefined) return reply(302, "", { Location: dashboardUrl });
  return reply(200, `rooms: ${relay.rooms.size}\nclients: ${relay.clients}\n`);
}

function tooManyAttempts(relay: Relay): Response {
  relay.errors.too_many_attempts++;
  const headers = { "X-Instance-Id": relay.config.instance, "Retry-After": String(MISS_WINDOW_MS / 1000) };
  return reply(429, { error: REFUSALS.too_many_attempts }, headers);
}

function roomAnswer(relay: Relay, code: string, address: string | undefined): Response {
  const headers = { "X-Instance-Id": relay.config.instance };
  const room = relay.rooms.get(code);
  if (room === undefined) {
    if (address !== undefined && miss(relay, address)) return tooManyAttempts(relay);
    return reply(404, { error: REFUSALS.room_not_found }, headers);
  }
  const { connected, maxClients, origin, locked, url } = room;
  return reply(200, { clients: connected.size, maxClients, origin: origin.name, locked: locked || undefined, url }, headers);
}

function takeUpgrade(relay: Relay, request: Request, server: Server<Session>, address: string, missed?: string): Answer {
  const origin = request.headers.get("origin");
  const { allowedOrigins } = relay.config;
  if (origin !== null && allowedOrigins !== undefined && !allowedOrigins.has(origin.toLowerCase()))
    return reply(403, { error: "Origin not allowed" });
  if (request.headers.get("sec-websocket-version") !== WEBSOCKET_VERSION) {
    const wanted = { "Sec-WebSocket-Version": WEBSOCKET_VERSION, Upgrade: "websocket" };
    return reply(426, { error: "Unsupported WebSocket version" }, wanted); // Bun's own lacks the CORS headers
  }
  const name = origin ? copyOf(origin.slice(0, ORIGIN_LENGTH)) : "unknown";
  if (server.upgrade(request, { data: new Session(address, name, missed && copyOf(missed)) })) return undefined;
  return reply(400, { error: "Not a WebSocket handshake" });
}

// ---- Stopping --------------------------------------------------------------------------------------------

/** Begins a drain; the second time, or without rooms, the end. */
function drain(relay: Relay): void {
  const { config } = relay;
  const { clock, drainSeconds, log } = config;
  if (relay.drainEnds !== undefined) return end(relay, "drained");
  for (const room of relay.lingering) dropRoom(relay, room);
  const begun = clock.now();
  const seconds = relay.rooms.size === 0 ? 0 : drainSeconds;
  relay.drainEnds = begun + seconds * 1000;
  relay.cancelIdle();
  log("drain begins", { rooms: relay.rooms.size, clients: relay.clients, seconds });
  for (const socket of relay.sockets) tellDraining(relay, socket);
  if (seconds === 0) return end(relay, "drained");
  const closingMs = Math.min(CLOSING_SECONDS, drainSeconds / 2) * 1000;
  const closingBegins = relay.drainEnds - closingMs;
  clock.after(closingBegins - begun, () => {
    const rooms = relay.rooms.size;
    let closedRooms = 0;
    const step = () => {
      const due = Math.min(rooms, Math.floor((rooms * (clock.now() - closingBegins)) / closingMs));
      for (; closedRooms < due && relay.rooms.size > 0; closedRooms++)
        closeRoom(relay, first(relay.rooms.values()) as Room, "shutdown");
      if (!relay.ending) clock.after(CLOSING_STEP_MS, step);
    };
    step();
  });
}

/** Closes what is left and stops listening; `ended` resolves once close frames had time to leave. */
function end(relay: Relay, how: "idle" | "drained"): void {
  if (relay.ending) return;
  relay.ending = true;
  relay.drainEnds ??= relay.config.clock.now();
  for (const room of [...relay.rooms.values()]) closeRoom(relay, room, "shutdown");
  const roomless = relay.sockets.size;
  for (const socket of [...relay.sockets]) hangUp(relay, socket, CloseCode.RESTARTING, "restarting");
  const { shutdown } = relay.disconnects;
  relay.config.log(how === "idle" ? "idle" : "drain ends", { members: shutdown, roomless });
  void relay.server.stop();
  relay.config.clock.after(shutdown + roomless > 0 ? FLUSH_MS : 0, () => relay.ended.resolve(how));
}

/** Ends the process that nobody has used for so long, where a platform starts it again on demand. */
function watchIdle(relay: Relay): void {
  const { clock, idleExitSeconds } = relay.config;
  relay.cancelIdle();
  if (idleExitSeconds === 0 || relay.drainEnds !== undefined) return;
  if (relay.sockets.size > 0 || relay.rooms.size > 0) return;
  relay.cancelIdle = clock.after(idleExitSeconds * 1000, () => end(relay, "idle"));
}

// ---- Start -----------------------------------------------------------------------------------------------

/** A relay that runs. */
export type RelayHandle = {
  /** Where it listens, `http://localhost:PORT`. */
  readonly url: string;
  readonly port: number;
  /** Resolves when the relay has stopped: after a drain, or for lack of use. */
  readonly ended: Promise<"idle" | "drained">;
  /** Stops as on SIGTERM; called again, at once. @returns `ended` */
  drain(): Promise<"idle" | "drained">;
  /** Logs and counts an exception that no handler caught. */
  report(error: unknown): void;
  /** Stops at once, without waiting for anybody. */
  [Symbol.asyncDispose](): Promise<void>;
};

/**
 * Starts a relay. It shares nothing with another one in the same process.
 * @throws ConfigError where it can't listen on the port
 */
export function startRelay(config: Config): RelayHandle {
  const relay = new Relay(config);
  relay.server = listen(relay);
  repeat(relay, SWEEP_MS, () => sweep(relay));
  watchLag(relay);
  watchIdle(relay);
  const port = relay.server.port ?? config.port;
  const { promise: ended } = relay.ended;
  return {
    url: `http://localhost:${port}`,
    port,
    ended,
    drain() {
      drain(relay);
      return ended;
    },
    report: (error) => reportException(relay, error),
    async [Symbol.asyncDispose]() {
      relay.ending = true;
      relay.drainEnds ??= config.clock.now(); // no room lingers
      await relay.server.stop(true);
    },
  };
}

function listen(relay: Relay): Server<Session> {
  const { config } = relay;
  const options: Bun.Serve.Options<Session> = {
    port: config.port, // and no hostname: IPv6 and IPv4, as Fly.io's private network needs
    development: false, // an error page would show the source
    maxRequestBodySize: Number.MAX_SAFE_INTEGER, // no body is read; Bun's own 413 lacks the CORS headers
    reusePort: false, // which `development: false` turns on: a second relay would take half of the connections
    fetch: (request, server) => answer(relay, request, server),
    error(error) {
      reportException(relay, error);
      return reply(500, { error: "Internal error" });
    },
    websocket: {
      maxPayloadLength: config.maxMessageBytes || MOST,
      backpressureLimit: config.maxBufferedBytes,
      closeOnBackpressureLimit: true, // rather than drop frames in silence
      idleTimeout: 0, // every send would restart it; `sweep` does this
      sendPings: false,
      open: (socket) => opened(relay, socket),
      message: (socket, frame) => received(relay, socket, frame),
      ping(socket) {
        heard(socket, config.clock.now());
        takeToken(relay, socket); // each costs a pong
      },
      pong(socket) {
        const asked = socket.data.unanswered > 0;
        heard(socket, config.clock.now());
        if (!asked) takeToken(relay, socket);
      },
      close: (socket, code) => closed(relay, socket, code),
      error: (error, socket) => crashed(relay, socket, error),
    },
  };
  try {
    return Bun.serve(options);
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    const reason = code === "EADDRINUSE" ? "is in use: set PORT to another" : `can't be listened on: ${message}`;
    throw new ConfigError([`Port ${config.port} ${reason}`], config.log);
  }
}

/** The limits that differ from their defaults. */
function changedLimits(config: Config): Record<string, number> {
  const names = Object.keys(LIMITS) as (keyof typeof LIMITS)[];
  return Object.fromEntries(names.filter((name) => config[name] !== LIMITS[name]).map((name) => [name, config[name]]));
}

async function main(): Promise<void> {
  try {
    const config = configFromEnv(process.env);
    const relay = startRelay(config);
    process.on("uncaughtException", relay.report);
    process.on("unhandledRejection", relay.report);
    process.on("SIGTERM", relay.drain);
    process.on("SIGINT", relay.drain);
    const labels = { instance: config.instance || "local", region: config.region || "local" };
    config.log("listening", { url: relay.url, version, port: relay.port, ...labels, ...changedLimits(config) });
    await relay.ended;
    process.exit(0);
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    error.log("start refused", { reason: error.message });
    console.error(error.message);
    process.exit(1);
  }
}

if (import.meta.main) await main();
