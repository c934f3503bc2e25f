/**
 * Party-Sockets: a relay for party games. One process, rooms in memory, no packages.
 *
 * The words, used everywhere the same:
 * - room: up to `maxClients` connected members behind one 6-character code. It lives on exactly one machine.
 * - slot, and its index: a member's number in its room; 0 for the creator. Never reassigned while the room lives.
 * - clientId: a string that the client picks and keeps secret. Whoever sends it owns the slot. It never leaves this process.
 * - host: the slot that may use the host's messages; slot 0 until it is handed on.
 * - turn: one round of the event loop. It reads what has arrived, and has a budget of work that the rooms share.
 * - flow: one of those who share that budget: a room, or an address with its sockets that are in no room.
 *
 * Reading order: Protocol (what goes over the wire), State (what is kept), Slots (who sits where), Messages (what each one
 * does), Turns (when it is done); then HTTP, and the rest as needed. `startRelay` at the end ties it together.
 * `regions.ts` says what a room's code is.
 */
import type { Server, ServerWebSocket } from "bun";
import { heapSize, noFTL } from "bun:jsc";
import { Resolver } from "node:dns/promises";
import { readFileSync } from "node:fs";
import { isIP } from "node:net";
import { isCode, newCode, regionOf, REGIONS } from "./regions.ts";

/** The version that `/metrics` and the log name; the same as package.json's. */
export const VERSION = "1.0.0";

// ---- Protocol --------------------------------------------------------------------------------------------

/** What a client may send: JSON text frames. Unknown members are ignored. */
export type ClientMessage =
  | {
      type: "create";
      /** 1 to 128 characters: the secret with which the slot is taken back. */
      clientId: string;
      /** Places in the room: a whole number from 1 to the server's limit. */
      maxClients: number;
      /** Seconds that the room outlives its last socket, 0 to 300; if absent, the operator's default. */
      linger?: number;
      /** Seconds that the host may be away while others are connected, 1 to 3600; 0: no end; if absent, the operator's default. */
      hostGrace?: number;
      /** After `hostGrace` the lowest connected slot becomes host; the room doesn't close. Needs a grace. */
      migrate?: boolean;
      /** A controller page: an https URL of at most 512 bytes in which `{room}` and `{instance}` are filled in. */
      url?: string;
    }
  | {
      type: "join";
      /** As in `create`. A clientId that the room knows takes its own slot back. */
      clientId: string;
      /** The room's code. */
      room: string;
      /** The token of a `slot_offer`: the slot is from now on this clientId's. */
      claim?: string;
    }
  | {
      type: "send";
      /** Any JSON value; its text arrives as it was written. */
      data: unknown;
      /** One slot, or 1 to 64 of them; if absent, everyone but the sender. */
      to?: number | number[];
      /** A broadcast that the sender gets too, in the same order as everyone. */
      echo?: boolean;
    }
  | {
      type: "set_state";
      /** Any JSON value of at most 16384 bytes: the snapshot that joiners get. */
      data: unknown;
    }
  | { type: "close_room" }
  | {
      type: "set_room";
      /** Whether clientIds that the room doesn't know are kept out. */
      locked?: boolean;
      /** As in `create`. Lowering it evicts nobody. */
      maxClients?: number;
    }
  | {
      type: "kick";
      /** The slot whose clientId is barred for the room's life. */
      index: number;
    }
  | {
      type: "set_host";
      /** The connected slot that becomes host. */
      index: number;
    }
  | {
      type: "offer_slot";
      /** The slot that is to move to another device; if absent, one's own. Another's: the host only. */
      index?: number;
    }
  | { type: "leave" }
  | {
      type: "ping";
      /** Any finite number; it comes back in `pong`. */
      t?: number;
    };

/** What the server sends: JSON text frames. Clients ignore types and members that they don't know. */
export type ServerMessage =
  | {
      type: "created";
      room: string;
      /** This machine's label; empty if it has none. */
      instance: string;
      /** As `instance`. */
      region: string;
      index: 0;
      /** The controller page, filled in, if `create` named one. */
      url?: string;
    }
  | {
      type: "joined";
      room: string;
      /** The slot of this socket. */
      index: number;
      /** The other connected slots, ascending. */
      peers: number[];
      /** The host's slot, if it isn't 0. */
      host?: number;
      /** The slot was there already, and vacant: this clientId's own, or one that it claimed. */
      resumed?: true;
      locked?: true;
      url?: string;
    }
  | { type: "peer_joined"; index: number; resumed?: true }
  | {
      type: "peer_left";
      index: number;
      /** Absent if the socket just closed. */
      reason?: "left" | "kicked";
    }
  | { type: "message"; from: number; data: unknown }
  | { type: "state"; data: unknown }
  | { type: "room"; locked: boolean; maxClients: number }
  | { type: "host"; index: number }
  | {
      type: "slot_offer";
      index: number;
      /** 22 characters, good for one `join` within 300 s: whoever has it can take the slot. */
      token: string;
    }
  | { type: "left"; room: string }
  | {
      type: "pong";
      t?: number;
      /** Server time, milliseconds since 1970. */
      now: number;
    }
  | {
      type: "draining";
      /** Whole seconds until every room is closed, rounded up. */
      seconds: number;
    }
  | {
      type: "error";
      message: string;
      code: ErrorCode;
      /** After a `send` to several: who isn't there, ascending. */
      missing?: number[];
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

/** What Bun's close handler is told if no close frame came: a FIN without one, a reset, a dead peer, a cut. */
const NO_CLOSE_FRAME = 1006;

/** The refusals with one message each, by their code. */
const REFUSALS = {
  bad_json: "Invalid JSON",
  unknown_type: "Unknown message type",
  already_in_room: "Already in a room",
  not_in_room: "Not in a room",
  room_not_found: "Room not found",
  claim_not_found: "Claim not found",
  room_full: "Room is full",
  room_locked: "Room is locked",
  kicked: "Kicked from room",
  peer_not_found: "Target peer not found",
  peer_away: "Target peer not found", // the older message, which clients match on
  state_too_large: "State too large",
  draining: "Server draining",
  capacity: "Server full",
  too_many_attempts: "Too many attempts",
};
type PlainCode = keyof typeof REFUSALS;

/** The `code` of an `error`; `bad_request` and `not_host` come with several messages. */
export type ErrorCode = PlainCode | "bad_request" | "not_host";

class Refusal {
  constructor(
    readonly code: ErrorCode,
    readonly message: string,
    readonly missing?: number[],
  ) {}
}
const refuse = (code: PlainCode, missing?: number[]) => new Refusal(code, REFUSALS[code], missing);
const badRequest = (message: string) => new Refusal("bad_request", message);
const notHost = (deed: string) => new Refusal("not_host", `Only the host can ${deed}`);

/** A `send`, checked: `to` is one slot, several different ones, or absent for everyone. */
type Send = { type: "send"; data: string; to?: number | readonly number[]; echo?: boolean };
/** A message as the handlers get it: `data` is the text that the client wrote. */
type Parsed<M> = M extends { type: "send" } ? Send : M extends { data: unknown } ? Omit<M, "data"> & { data: string } : M;
type MessageType = ClientMessage["type"];
type Message<T extends MessageType> = Parsed<Extract<ClientMessage, { type: T }>>;
type Fields = Record<string, unknown>;

const frameOf = (message: ServerMessage): string => JSON.stringify(message);
const messageFrame = (from: number, data: string): string => `{"type":"message","from":${from},"data":${data}}`;
const stateFrame = (data: string): string => `{"type":"state","data":${data}}`;

const isWhole = (value: unknown, least: number, most: number): value is number =>
  typeof value === "number" && Number.isInteger(value) && value >= least && value <= most;
const isIndex = (value: unknown): value is number => isWhole(value, 0, Number.MAX_SAFE_INTEGER);

/**
 * Engines may keep a cut-out string as a view of the whole frame; what outlives it is copied. What `JSON.parse` gives is a copy
 * already.
 */
function copyOf(text: string): string {
  const encoding = text.isWellFormed() ? "utf8" : "utf16le"; // UTF-8 would merge lone surrogates into one character
  return Buffer.from(text, encoding).toString(encoding);
}

function isSpace(code: number): boolean {
  return code === 0x20 || code === 0x0a || code === 0x0d || code === 0x09;
}
const isDigit = (code: number): boolean => code >= 0x30 && code <= 0x39;

const LONG_STRING = 64; // characters; the rest of a longer one is searched by the engine
const NOT_PLAIN = /[\\\x00-\x1f]/;
const MOST_OPEN = 2 ** 30; // 30 objects and arrays, one in another, as bits

/**
 * Whether what stands between two places of a text is one JSON value; throws nothing. `JSON.parse` builds objects that nobody
 * needs, and a relay that is full feels that. So a scan that builds nothing decides, and `JSON.parse` is asked only if the scan
 * isn't sure.
 */
export function isJson(text: string, start = 0, end = text.length): boolean {
  return isPlainJson(text, start, end) || isParsed(text.slice(start, end));
}

/**
 * Whether it is JSON as `JSON.stringify` mostly writes it: no space between values, no escapes in strings, no exponents in
 * numbers, no more than 30 objects and arrays in one another. If not, it may be other JSON, or none. All in one loop, because
 * functions for its parts made it take twice as long.
 */
function isPlainJson(text: string, start: number, end: number): boolean {
  let at = start;
  // What is open, a bit each, the innermost last: 1 an object, 0 an array. The first bit stands for the whole.
  let open = 1;
  let isName = false;
  for (;;) {
    // A value or a name begins. `code` is always the character at `at`; NaN if the text has ended.
    let code = text.charCodeAt(at);
    if (code === 0x22) {
      const searchedFrom = at + LONG_STRING;
      do code = text.charCodeAt(++at);
      while (code !== 0x22 && code !== 0x5c && code >= 0x20 && at < searchedFrom);
      if (code !== 0x22) {
        if (at < searchedFrom) return false;
        at = text.indexOf('"', searchedFrom);
        if (at < 0 || NOT_PLAIN.test(text.slice(searchedFrom, at))) return false;
      }
      code = text.charCodeAt(++at);
      if (isName) {
        if (code !== 0x3a) return false;
        isName = false;
        at++;
        continue;
      }
    } else if (isName) return false;
    else if (code === 0x7b || code === 0x5b) {
      if (open >= MOST_OPEN) return false;
      const isObject = code === 0x7b;
      open = (open << 1) | (isObject ? 1 : 0);
      code = text.charCodeAt(++at);
      if (code !== (isObject ? 0x7d : 0x5d)) {
        isName = isObject;
        continue;
      }
    } else if (code === 0x2d || isDigit(code)) {
      if (code === 0x2d) code = text.charCodeAt(++at);
      const digitsAt = at;
      const isZero = code === 0x30;
      while (isDigit(code)) code = text.charCodeAt(++at);
      if (at === digitsAt || (isZero && at > digitsAt + 1)) return false;
      if (code === 0x2e) {
        const point = at;
        do code = text.charCodeAt(++at);
        while (isDigit(code));
        if (at === point + 1) return false;
      }
    } else {
      const word = code === 0x74 ? "true" : code === 0x66 ? "false" : "null";
      if (!text.startsWith(word, at)) return false;
      at += word.length;
      code = text.charCodeAt(at);
    }
    // A value has ended, and perhaps what it is in.
    while (open > 1 && code === ((open & 1) === 1 ? 0x7d : 0x5d)) {
      open >>= 1;
      code = text.charCodeAt(++at);
    }
    if (open === 1) return at === end;
    if (code !== 0x2c) return false;
    isName = (open & 1) === 1;
    at++;
  }
}

function isParsed(text: string): boolean {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

const SEND_HEAD = '{"type":"send",';
const TO = '"to":';
const DATA = '"data":';
const USUAL_INDEX = /^(0|[1-9]\d{0,9})$/;

/** The slot number that stands between two places; undefined if it isn't one as `JSON.stringify` writes it. */
function indexBetween(text: string, from: number, to: number): number | undefined {
  const digits = text.slice(from, to);
  return USUAL_INDEX.test(digits) ? Number(digits) : undefined;
}

/**
 * Parses a `send` that is spelled as `JSON.stringify` does it: `data` alone, or with one `to` before or after it. All around
 * `data` is compared letter by letter, so if `data` is one JSON value, the frame can't have another member. With it a frame of
 * 80 bytes costs 0.35 µs in place of 0.82, without what sending costs.
 * @returns undefined if the frame is spelled in another way, isn't a `send`, or is wrong: the parser for all frames says which
 */
function parseUsualSend(frame: string): Send | undefined {
  if (!frame.startsWith(SEND_HEAD) || !frame.endsWith("}")) return undefined;
  let start = SEND_HEAD.length;
  let end = frame.length - 1;
  let to: number | undefined;
  if (frame.startsWith(TO, start)) {
    const comma = frame.indexOf(",", start);
    to = indexBetween(frame, start + TO.length, comma);
    if (to === undefined) return undefined;
    start = comma + 1;
  } else if (isDigit(frame.charCodeAt(end - 1))) {
    const comma = frame.lastIndexOf(",", end);
    if (frame.startsWith(TO, comma + 1)) {
      to = indexBetween(frame, comma + 1 + TO.length, end);
      if (to === undefined) return undefined;
      end = comma;
    }
  }
  if (!frame.startsWith(DATA, start)) return undefined;
  start += DATA.length;
  if (isSpace(frame.charCodeAt(start)) || isSpace(frame.charCodeAt(end - 1))) return undefined; // not part of it
  return isJson(frame, start, end) ? { type: "send", data: frame.slice(start, end), to } : undefined;
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
      if (depth === 0) return i; // closes the object or array that this number or word is in
      if (--depth === 0) return i + 1;
    } else if (depth === 0 && (code === 0x2c || isSpace(code))) return i;
  }
}

/** The index of the next name or value: inside an object only space, `:` and `,` stand between them. */
function skipBetween(json: string, at: number): number {
  for (let i = at; ; i++) {
    const code = json.charCodeAt(i);
    if (!isSpace(code) && code !== 0x3a && code !== 0x2c) return i;
  }
}

/**
 * The text of a member of a JSON object, as it was written: the last one of that name, names compared unescaped.
 * @param json a valid JSON object
 * @returns undefined if it has no such member
 */
function memberText(json: string, name: string): string | undefined {
  let found: string | undefined;
  let end = json.indexOf("{") + 1;
  for (;;) {
    const nameAt = skipBetween(json, end);
    if (json.charCodeAt(nameAt) === 0x7d) return found;
    end = skipValue(json, nameAt);
    const written = json.slice(nameAt + 1, end - 1);
    const isWanted = written === name || (written.includes("\\") && JSON.parse(`"${written}"`) === name);
    const valueAt = skipBetween(json, end);
    end = skipValue(json, valueAt);
    if (isWanted) found = json.slice(valueAt, end);
  }
}

// ---- Limits ----------------------------------------------------------------------------------------------

const MIB = 1024 * 1024;

/**
 * The defaults of the limits that an environment variable can set (`maxRooms`: MAX_ROOMS). 0 means unlimited, unless the line
 * says otherwise.
 */
export const LIMITS = {
  maxMessageBytes: 256 * 1024, // one drawing as a data URL; not assets
  maxMessagesPerSecond: 200, // a socket; three times a 60 Hz game. The burst is twice that
  maxBufferedBytes: MIB, // a socket; what a phone may be behind before it is cut
  maxMemoryBytes: Math.max(96 * MIB, Math.floor(process.constrainedMemory() / 2)), // the process; half of what it may use
  maxClientsPerRoom: 1000, // a hall, not a stadium
  maxRooms: 10_000,
  maxConnections: 10_000,
  maxMissesPerMinute: 600, // an address; a whole party can be behind one
  defaultLingerSeconds: 0, // 0 is off
  defaultHostGraceSeconds: 0, // 0 is off
  drainSeconds: 8, // within the 10 s that `docker stop` gives; 0 is at once
  idleExitSeconds: 0, // 0 is never
};
type LimitName = keyof typeof LIMITS;
const LIMIT_NAMES = Object.keys(LIMITS) as LimitName[];

const LINGER_SECONDS = 300; // long enough to paste a code into another app
const LONGEST_TIMER_SECONDS = 2_147_483; // of a timer that counts milliseconds in 32 bits
const GRACE_SECONDS = 3600; // a host's phone may nap through a film
/** The most that a limit may be set to; LARGEST_LIMIT for those that aren't named here. */
const MOST: { [name in LimitName]?: number } = {
  maxMemoryBytes: Number.MAX_SAFE_INTEGER,
  defaultLingerSeconds: LINGER_SECONDS,
  defaultHostGraceSeconds: GRACE_SECONDS,
  drainSeconds: LONGEST_TIMER_SECONDS,
  idleExitSeconds: LONGEST_TIMER_SECONDS,
};
const LARGEST_LIMIT = 4_294_967_295; // the largest size that the WebSocket layer takes

const CLIENT_ID_LENGTH = 128; // characters; a UUID four times over
const STATE_BYTES = 16 * 1024; // a snapshot is sent to every joiner
const URL_BYTES = 512; // fits a QR code that a phone reads across a room
const SEND_TARGETS = 64; // slots that one `send` may name
const OFFER_BYTES = 16; // of a slot offer's token; 22 characters of base64url
const OFFER_MS = 300_000; // long enough to find the other phone and scan a code
const PROTOCOLS_LENGTH = 1_000; // characters of a Sec-WebSocket-Protocol header: Bun's answer repeats it, and proxies keep few KB
const ORIGIN_LENGTH = 256; // characters of an Origin header that are kept
const ORIGIN_SHOWN_LENGTH = 100; // characters of it in /metrics
const ORIGINS_KEPT = 500; // Origin headers are the clients' to invent
const ORIGINS_SHOWN = 100; // series that a scrape can bear
const ADDRESSES = 10_000; // addresses whose misses are counted
const MISS_WINDOW_MS = 60_000;
const SWEEP_MS = 6_000; // a dead phone is noticed before the party does
const SWEEP_STEP_SOCKETS = 256; // that one step of a sweep looks at, at the least: a ping takes 10 µs
const SWEEP_STEPS = 40; // of a sweep, at the most
const SWEEP_STEP_MS = 10; // from one to the next
const QUIET_MS = 1_000; // silent for longer than this at a sweep: pinged. This, three sweeps and all steps are less than 20 s
const SEARCHES = 64; // searches among siblings at once
const SEARCHES_PER_ADDRESS = 8;
const PROBES_AT_ONCE = 200; // requests to siblings; Bun's fetch runs 256 at once
const SEARCH_MS = 1_000; // what a silent sibling may cost
const NOWHERE_MS = 2_000; // how long a miss that all siblings confirmed is remembered
const NOWHERE_CODES = 10_000; // such misses remembered at once
const MOST_PEERS = 64; // machines of a cluster
const CLOSING_SECONDS = 5; // the end of a drain, over which rooms are closed
const CLOSING_STEP_MS = 20;
const FLUSH_MS = 500; // close frames behind a slow member's backlog get this long to leave
const LAG_MS = 500; // how often the event loop's lag is sampled
const LAG_SAMPLES = 30; // 15 s of them: what a scrape every 15 s sees of the worst
const CAP_LOG_MS = 60_000;
const DESCRIPTORS_BESIDE = 300; // beside the sockets: for requests over HTTP and to siblings, and the process itself

// A unit of work is one frame handled or delivered, or 2 KiB of it: about half a microsecond.
const WORK_BYTES = 2048;
const LARGE_BYTES = 4 * MIB; // a broadcast of more than this, for all its receivers together, goes to one after the other
const CALL_WORK = 6; // of a system call: each frame to one socket is one; what a room broadcasts in a turn is one a member
const SIT_WORK = 20; // of a member that sits down
const WORK_PER_MS = 2_000; // units that a millisecond of handling is worth
const TIMED_BYTES = 128; // from here on a frame is timed: parsing it may take far longer than its length says
const PARSE_BYTES = 8; // a frame's time counts as one unit at most for so many of its bytes; the dearest text known takes one for 15
const TURN_WORK = 6_000; // that a turn is to do, shared by the rooms: some 3 ms
const TURN_FRAMES = 8192; // that a turn reads before it holds flows that bring many; a single read may bring as many, some 2 ms
const FLOW_FRAMES = 256; // a flow that brought fewer in a turn isn't held, however much the turn has read
const TURN_SOCKETS = 256; // held ones that a turn reads on from at most
const LEAST_SHARE = 500; // work that a room may do in a turn, however many rooms there are: 50 frames among 8 members
const BURST_MS = 2_000; // a full bucket holds what the rate gives in this time: a burst of twice the rate
const REFILL_MS = 50; // how often sockets whose bucket was empty are read on from, if it has a token
const PEEKS = 3; // how often a paused socket is read from all the same, to see whether it was reset
const GOODBYE_MS = 5_000; // how long the frames that a properly closed socket left behind may wait to be handled
const REST_MS = 1.85; // how long a busy relay lets frames gather; with the timer's own lateness under 2 ms
const LONG_TURN_MS = 8; // during a turn of this length enough frames have gathered: no rest after it
const ALONE_BYTES = 8 * 1024; // no two frames from here on fit into the 16 KiB that leave together, however many have gathered
const REST_ABOVE = 80; // deliveries a millisecond: from about a third of a core on, resting pays
const CPU_LOOK_MS = 20; // over which that rate is taken, and how often a timer shows whether the machine withholds CPU
const WITHHELD_MS = 12; // if a timer is so much later than our own work explains, CPU is withheld; a competing process delays it less
const AGAIN_MS = 250; // late once may be a hiccup; twice within this time, the machine sets a limit
const KNOWN_WITHHELD_MS = 6; // the same in place of WITHHELD_MS, once it is known that the machine sets a limit
const AT_LIMIT = 0.9; // of what is granted: for who uses more, being late once is proof enough
const WITHHELD_REST_MS = 4; // at first; then longer with each time that CPU is withheld
const REST_GROWTH = 1.2; // times as long, each time
const LONGEST_REST_MS = 9.5; // with the timer's own lateness under 10 ms
const USED_PART = 0.65; // of what the machine grants; some moments need more than others
const USED_MS = 1_000; // over which the use of CPU is averaged
const SETTLE_MS = 1_000; // in which the rest follows it
const PATIENCE_MS = 2_000; // until a relay from which nothing was withheld tries to use more
const MOST_PATIENCE_MS = 8_000; // it doubles each time that trying was in vain
const TRIAL_MS = 2_500; // from then until it uses all that was granted; after twice this, no limit is assumed any more

const UNSENT_BYTES = 64 * 1024; // a socket with less than this unsent isn't cut for memory
const ROOM_BYTES = 2048; // about what a lingering room occupies, without its state and the slots that it remembers
const SLOT_BYTES = 256; // about what a remembered slot occupies
const FRAME_BYTES = 64; // about what a short frame that waits occupies
const SOCKET_BYTES = 4096; // about what a socket that holds nothing occupies
const EFFECT_MS = 300; // memory that was freed has left the figure after this time
const FILL_BYTES_PER_MS = 4 * MIB; // how fast one core can take in unfinished messages
const LOOK_MOST_MS = 500; // between two looks at memory
const LOOK_LEAST_MS = 5;
const LOOK_LEAST_BYTES = 8 * MIB; // that are sent before the next look, at the least
const QUIET_HELD_MS = 100; // a socket that sent no whole message for so long isn't read from while memory is short
const RELEASE_MS = 1_000; // within this time after the last hold a look reads on from as many as memory has room for; later only turns do
const LOOK_SOCKETS = 32; // up to so many sockets are few: opened since the last look at memory, in one room, or of one address
const LOOK_FRAMES = 2048; // memory is looked at whenever so many more of one socket wait

// ---- Config ----------------------------------------------------------------------------------------------

/** Time, so that tests can move it. */
export type Clock = {
  /** Milliseconds that never go back. */
  now(): number;
  /** Milliseconds since 1970. */
  epoch(): number;
  /** Runs `run` once, `ms` from now, without keeping the process alive. @returns what cancels it */
  after(ms: number, run: () => void): () => void;
  /** Blocks the whole process for `ms`, fractions included: nothing is read, sent or timed meanwhile. */
  rest(ms: number): void;
};

/** The other machines that may have a room of this region. */
export type Siblings = {
  /** Their ids, without this machine's. Rejects if they can't be looked up. */
  list(signal: AbortSignal): Promise<string[]>;
  /** Whether one of them has the room. Rejects if it doesn't say. */
  has(id: string, code: string, signal: AbortSignal): Promise<boolean>;
};

/** Where a request is sent on to. */
export type Target = { instance: string } | { region: string };

/** What differs between the platforms that make several machines look like one relay. */
export type Cluster = {
  /** This machine's region, as `regionOf` names it. */
  readonly region: string;
  /** The region in which the room of a code is to be looked for; undefined if codes of this form aren't routed. */
  regionOf(code: string): string | undefined;
  /** Whether the text of a pin (`?instance=`) can be a machine's id. It is written into a header, where another could do harm. */
  isMachine(id: string): boolean;
  /** The header of a request that was sent on to here. A client can forge it, so it only ever suppresses a replay. */
  readonly replayedHeader: string;
  /** The header of a request that came back because its machine didn't answer. A client can forge it, too. */
  readonly failedHeader: string;
  /** The answer that makes the platform's proxy send the request on. */
  replay(target: Target): Response;
  readonly siblings: Siblings;
  /** Whether the proxy takes an upgrade to another machine if this one answers 503. */
  readonly triesNext: boolean;
};

/** The limits of which the log says that they are reached. */
export const CAPS = [
  "rooms",
  "connections",
  "memory",
  "misses",
  "searches",
  "messages per second",
  "buffered bytes",
  "cpu", // the machine's
] as const;
export type Cap = (typeof CAPS)[number];

/** Writes an event to the log: its name and what belongs to it. Never a clientId, never a payload. */
export type Log = (event: string, fields: Record<string, string | number>) => void;

/** All that a relay is told from outside. */
export type Config = Record<LimitName, number> & {
  /** The port; 0 takes a free one. */
  port: number;
  /** The address to listen on; undefined: every one, IPv6 and IPv4. */
  host: string | undefined;
  /** Label of this machine, and its id in a cluster; may be empty. */
  instance: string;
  /** Label of this region; may be empty. */
  region: string;
  /** The region that room codes name, a row of `REGIONS`; undefined: none. */
  codeRegion: string | undefined;
  /** Undefined: nothing is ever replayed. */
  cluster: Cluster | undefined;
  /** Where `GET /` leads, if anywhere. */
  dashboardUrl: string | undefined;
  /** The origins whose upgrades are taken, in lower case; undefined: any. */
  allowedOrigins: ReadonlySet<string> | undefined;
  /** The header whose last entry is the client's address; undefined: the connection's own address is it. */
  addressHeader: string | undefined;
  log: Log;
  clock: Clock;
  /** How many absent or barred clientIds a room remembers. */
  knownPerRoom: number;
  /** How many of them all rooms together remember. */
  knownInAll: number;
  /** How old the text of `/metrics` may be, in ms: nobody can keep the relay busy with scrapes. */
  metricsMs: number;
  /** Bytes of memory that the process occupies. May throw if the system doesn't say. */
  memory(): number;
  /** Milliseconds that the process has been on a CPU so far. */
  cpuMs(): number;
};

/** The configuration is wrong; the message says what, a line a fault. */
export class ConfigError extends Error {
  constructor(
    faults: readonly string[],
    readonly log: Log,
  ) {
    super(faults.join("\n"));
  }
}

const NEVER_NOTIFIED = new Int32Array(new SharedArrayBuffer(4));

/** The time of this machine. */
export const systemClock: Clock = {
  now: () => performance.now(),
  epoch: () => Date.now(),
  after(ms, run) {
    const timer = setTimeout(run, ms);
    timer.unref();
    return () => clearTimeout(timer);
  },
  rest(ms) {
    Atomics.wait(NEVER_NOTIFIED, 0, 0, ms); // ends by its time-out; `Bun.sleepSync` cuts to whole milliseconds
  },
};

const logText: Log = (event, fields) => {
  const words = Object.entries(fields).map(
    ([key, value]) => `${key}=${/[\s"]/.test(`${value}`) ? JSON.stringify(value) : value}`,
  );
  console.log(["party-sockets", event, ...words].join(" "));
};
const logJson: Log = (event, fields) => console.log(JSON.stringify({ time: new Date().toISOString(), event, ...fields }));

/** The configuration of a relay that is told nothing. */
const DEFAULTS: Config = {
  ...LIMITS,
  port: 3000,
  host: undefined,
  instance: "",
  region: "",
  codeRegion: undefined,
  cluster: undefined,
  dashboardUrl: undefined,
  allowedOrigins: undefined,
  addressHeader: undefined,
  log: logText,
  clock: systemClock,
  knownPerRoom: 1000, // a hall that went out for a moment
  knownInAll: 100_000, // some 25 MB
  metricsMs: 1_000, // Prometheus asks less often
  memory: () => process.memoryUsage.rss(),
  cpuMs() {
    const { user, system } = process.cpuUsage();
    return (user + system) / 1000;
  },
};

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
    if (/^\d+$/.test(value) && Number(value) <= most) return Number(value);
    faults.push(`${name} must be a whole number from 0 to ${most}, not ${JSON.stringify(value)}`);
    return fallback;
  };
  const flyApp = text("FLY_APP_NAME");
  const flyRegion = text("FLY_REGION");
  const config: Config = {
    ...DEFAULTS,
    port: whole("PORT", DEFAULTS.port, 65535),
    host: text("HOST"),
    instance: text("INSTANCE_ID") ?? text("FLY_MACHINE_ID") ?? "",
    region: text("REGION") ?? flyRegion ?? "",
    codeRegion: flyRegion,
    dashboardUrl: text("DASHBOARD_URL"),
    addressHeader: text("ADDRESS_HEADER"),
  };
  for (const name of LIMIT_NAMES) {
    const variable = name.replace(/[A-Z]/g, "_$&").toUpperCase();
    config[name] = whole(variable, LIMITS[name], MOST[name] ?? LARGEST_LIMIT);
  }
  const { maxBufferedBytes, maxMessageBytes } = config;
  if (maxBufferedBytes !== 0 && maxMessageBytes !== 0 && maxBufferedBytes < 4 * maxMessageBytes)
    faults.push(
      `MAX_BUFFERED_BYTES must be at least four times MAX_MESSAGE_BYTES (${4 * maxMessageBytes}), not ${maxBufferedBytes}`,
    );
  if (!/^[\x21-\x7e]{0,256}$/.test(config.instance))
    faults.push("INSTANCE_ID must be at most 256 visible ASCII characters: it is sent in a header");
  if (flyRegion !== undefined && !REGIONS.includes(flyRegion))
    faults.push(`FLY_REGION ${JSON.stringify(flyRegion)} has no row: append ${JSON.stringify(flyRegion)} to regions.ts`);
  if (config.dashboardUrl !== undefined) {
    const url = URL.parse(config.dashboardUrl);
    if (url?.protocol === "https:" || url?.protocol === "http:") config.dashboardUrl = url.href;
    else faults.push(`DASHBOARD_URL must be an http or https URL, not ${JSON.stringify(config.dashboardUrl)}`);
  } else if (flyApp !== undefined)
    config.dashboardUrl = `https://fly-metrics.net/d/fly-app/fly-app?var-app=${encodeURIComponent(flyApp)}`;
  const origins = text("ALLOWED_ORIGINS");
  if (origins !== undefined) {
    const listed = origins.split(/[,\s]+/).filter(Boolean);
    const odd = listed.length === 0 ? [origins] : listed.filter((each) => originFrom(each) === undefined);
    for (const each of odd)
      faults.push(`ALLOWED_ORIGINS must list origins such as https://game.example, not ${JSON.stringify(each)}`);
    config.allowedOrigins = new Set(listed.flatMap((each) => originFrom(each) ?? []));
  }
  if (config.addressHeader !== undefined && !/^[\w!#$%&'*+.^`|~-]+$/.test(config.addressHeader))
    faults.push(`ADDRESS_HEADER must be a header's name, not ${JSON.stringify(config.addressHeader)}`);
  if (flyApp !== undefined) {
    if (config.instance !== (text("FLY_MACHINE_ID") ?? ""))
      faults.push("INSTANCE_ID must be left out, or equal FLY_MACHINE_ID, if FLY_APP_NAME is set: Fly.io routes by it");
    config.addressHeader ??= "Fly-Client-IP";
    config.cluster = flyCluster(flyRegion, flySiblings(flyApp, flyRegion ?? "", config.instance, config.port));
  }
  const peers = text("PEERS");
  if (peers !== undefined) {
    const ids = new Set(peers.split(",").map((id) => id.trim()));
    const address = text("PEER_ADDRESS") ?? `{id}:${config.port}`;
    faults.push(...peerFaults(ids, address, config, flyApp));
    config.addressHeader ??= "X-Forwarded-For";
    config.cluster = nginxCluster(ids, peerSiblings(ids, address, config.instance));
  }
  const format = text("LOG_FORMAT") ?? "text";
  if (format === "json") config.log = logJson;
  else if (format !== "text") faults.push(`LOG_FORMAT must be text or json, not ${JSON.stringify(format)}`);
  if (faults.length > 0) throw new ConfigError(faults, config.log);
  return config;
}

/** An origin as browsers send it: in lower case, without the default port, its host in ASCII; undefined if none would. */
function originFrom(text: string): string | undefined {
  const origin = text.toLowerCase().replace(/\/$/, "");
  if (origin === "null") return origin;
  if (!/^[a-z][a-z\d+.-]*:\/\/[^/?#@*\s]+$/.test(origin)) return undefined;
  const url = URL.parse(origin);
  return url?.origin === "null" ? origin : url?.origin; // URLs don't know the origins of apps, such as capacitor://localhost
}

/** What is wrong with a cluster behind nginx, as the environment describes it. */
function peerFaults(ids: ReadonlySet<string>, address: string, { instance, host, port }: Config, flyApp?: string): string[] {
  const faults: string[] = [];
  const odd = [...ids].filter((id) => !PEER_ID.test(id));
  const addresses = [...ids].filter((id) => PEER_ID.test(id)).map((id) => address.replaceAll("{id}", id));
  const wrong = addresses.find((each) => !isHostAndPort(each));
  if (odd.length > 0)
    faults.push(
      `PEERS must list ids of at most 64 letters, digits, "-", "_" and ".", not ${odd.map((id) => JSON.stringify(id)).join(", ")}`,
    );
  if (ids.size > MOST_PEERS) faults.push(`PEERS must list at most ${MOST_PEERS} ids, not ${ids.size}`);
  if (!ids.has(instance)) faults.push(`INSTANCE_ID must be one of PEERS, not ${JSON.stringify(instance)}`);
  if (host === undefined)
    faults.push("HOST must be set if PEERS is: the address at which only nginx and the peers reach this relay");
  if (flyApp !== undefined) faults.push("PEERS must be left out if FLY_APP_NAME is set: Fly.io knows the machines");
  if (port === 0 && address === "{id}:0") faults.push("PORT must be set if PEERS is, so that the peers know it, or PEER_ADDRESS");
  else if (!address.includes("{id}"))
    faults.push(`PEER_ADDRESS must be a host and port with {id} in it, such as {id}.relay:3000, not ${JSON.stringify(address)}`);
  else if (wrong !== undefined)
    faults.push(
      `PEER_ADDRESS must give each peer a host and port, as {id}.relay:3000 does; ${JSON.stringify(address)} gives ${JSON.stringify(wrong)}`,
    );
  return faults;
}

/** Whether a request can be sent there: `host`, `host:port`, with an IPv6 address in brackets. A bare number is no host. */
function isHostAndPort(text: string): boolean {
  const [, host] = /^([\w.-]+|\[[\da-f:.]+\])(?::\d+)?$/i.exec(text) ?? [];
  const url = URL.parse(`http://${text}`);
  if (host === undefined || url === null || url.port === "0") return false;
  return isIP(url.hostname) !== 4 || url.hostname === host; // URLs take 4501 for 0.0.17.149
}

// ---- State -----------------------------------------------------------------------------------------------

/**
 * A place in a room. If a socket sits on it, the room's `connected` has it. If none does, `absent` has it, barred or not, unless it is
 * the host's: that one is never forgotten.
 */
type Slot = {
  readonly room: Room;
  readonly index: number;
  /** Whose it is; another's after a claim. */
  clientId: string;
  barred: boolean;
  /** When the bucket of its last socket is full again (clock time). */
  bucketFullAt: number;
  /** What lets another clientId take it over, until `ends` (clock time). */
  offer: { readonly token: string; readonly ends: number } | undefined;
};

class Room {
  locked = false;
  host = 0;
  /** The snapshot, as the frame that is sent. */
  state: string | undefined;
  nextIndex = 0;
  /** Every slot that the room remembers, by its clientId. */
  readonly known = new Map<string, Slot>();
  /** The same slots, by their index, ascending: a new one comes last. */
  readonly slots = new Map<number, Slot>();
  /** The sockets of the slots that are connected, by their index. */
  readonly connected = new Map<number, Socket>();
  /** Slots with nobody on them, the longest gone first; without the host's. */
  readonly absent = new Set<Slot>();
  readonly flow: Flow = new Flow(this);
  /** Which countdown runs, if any: for a room with nobody connected, or for a host who is away. */
  countdown: "linger" | "host" | undefined;
  /** When it ends (clock time). */
  countdownEnds = 0;
  cancelCountdown = () => {};
  /** Bytes broadcast so far. A member that wasn't heard from during many of them was too slow. */
  published = 0;

  maxClients: number;
  /** Seconds; 0: none. */
  readonly linger: number;
  /** Seconds; 0: none. */
  readonly hostGrace: number;
  readonly migrate: boolean;
  readonly url: string | undefined;

  constructor(
    readonly relay: Relay,
    readonly code: string,
    readonly creator: Address,
    /** The creator's. */
    readonly origin: Origin,
    { maxClients, linger, hostGrace, migrate, url }: Message<"create">,
  ) {
    const { instance, defaultLingerSeconds, defaultHostGraceSeconds } = relay.config;
    this.maxClients = maxClients;
    this.linger = linger ?? defaultLingerSeconds;
    this.hostGrace = hostGrace ?? defaultHostGraceSeconds;
    this.migrate = migrate === true;
    this.url = url === undefined ? undefined : fillUrl(url, code, instance);
  }
}

/** What is known of a socket. */
class Session {
  slot: Slot | undefined;
  /** Who pays for what it sends: its room, or its address while it is in none. */
  flow!: Flow;
  /** The record of its address; set when the socket opens. */
  home!: Address;
  /** Its number among all sockets, in the order in which they opened. */
  serial = 0;
  readonly bucket: Bucket;
  /** Frames that wait to be handled, while the socket is paused; undefined if frames are handled as they are read. */
  queue: (string | Buffer)[] | undefined;
  /** How often it was peeked at since it was paused. */
  peeks = 0;
  /** Whether it is read from all the same, until something comes. */
  isPeeking = false;
  /** The sockets of its flow that are held, if it is one of them. */
  heldIn: Set<Socket> | undefined;
  /** The flow whose turn the first frame of `queue` waits for. */
  waitsFor: Flow | undefined;
  /** Set if it closed while frames of it waited: `leave` ends it, `cancel` stops the timer that would. */
  goodbye: { leave(): void; cancel(): void } | undefined;
  /** When a frame, ping or pong last came (clock time). */
  heardAt = 0;
  /** What its room had published then. */
  heardBytes = 0;
  /** Sweeps since an unanswered ping. */
  unanswered = 0;
  /** Cut because memory was short. */
  cut = false;
  /** Set when the socket opens: a handshake that fails doesn't count for its origin. */
  origin!: Origin;

  constructor(
    readonly relay: Relay,
    readonly address: string,
    readonly originName: string,
  ) {
    this.bucket = new Bucket(relay.config.maxMessagesPerSecond);
  }
}
type Socket = ServerWebSocket<Session>;

/** What one address has here; kept as long as it has a socket or a room. */
class Address {
  /** The flow of its sockets that are in no room. */
  readonly flow = new Flow();
  readonly sockets = new Set<Socket>();
  /** How many of the present rooms it has created. */
  rooms = 0;
  readonly lingering: Lingering;
  /** Slots with nobody on them in those rooms, the longest gone first; without the hosts'. */
  readonly absent = new Set<Slot>();

  constructor(
    readonly key: string,
    { byLingering }: Relay,
  ) {
    this.lingering = new Lingering(this, byLingering);
  }
}

/** Addresses by how many they have of something, so that who has the most is found without a look at all of them. */
class Ranking {
  /** Those who have so many, at that place. A set that is empty moves on with its last address: no garbage is made. */
  readonly #byCount: (Set<Address> | undefined)[] = [];
  #most = 0;

  /** An address has got one more, or has one less. @param count what it has now */
  change(address: Address, count: number, by: 1 | -1): void {
    const before = this.#byCount[count - by];
    const equals = this.#byCount[count];
    before?.delete(address);
    const isEmpty = before?.size === 0;
    if (isEmpty) this.#byCount[count - by] = undefined;
    if (equals !== undefined) equals.add(address);
    else if (count > 0) this.#byCount[count] = (isEmpty ? before : new Set<Address>()).add(address);
    if (count > this.#most || this.#byCount[this.#most] === undefined) this.#most = count;
  }

  /** One of those who have the most. */
  get top(): Address | undefined {
    return first(this.#byCount[this.#most] ?? []);
  }
}

/** The rooms of one creator that nobody is connected to. */
class Lingering {
  size = 0;
  /** By how long they linger. As each is added when its countdown begins, the first of a set is the nearest to its end. */
  readonly #sets = new Map<number, Set<Room>>();
  readonly #creator: Address;
  readonly #ranking: Ranking;

  constructor(creator: Address, ranking: Ranking) {
    this.#creator = creator;
    this.#ranking = ranking;
  }

  add(room: Room): void {
    let set = this.#sets.get(room.linger);
    if (set === undefined) this.#sets.set(room.linger, (set = new Set()));
    set.add(room);
    this.#ranking.change(this.#creator, ++this.size, 1);
  }

  delete(room: Room): void {
    const set = this.#sets.get(room.linger);
    if (!set?.delete(room)) return;
    this.#ranking.change(this.#creator, --this.size, -1);
    if (set.size === 0) this.#sets.delete(room.linger);
  }

  /** The one that is nearest to its end. */
  nearest(): Room | undefined {
    let nearest: Room | undefined;
    for (const set of this.#sets.values()) {
      const room = first(set);
      if (room !== undefined && (nearest === undefined || room.countdownEnds < nearest.countdownEnds)) nearest = room;
    }
    return nearest;
  }
}

/** The counts of one Origin header. */
type Origin = { readonly name: string; clients: number; rooms: number; connections: number; created: number };

const JOINS = ["new", "resumed", "replaced"] as const;
type Join = (typeof JOINS)[number];
const DISCONNECTS = ["left", "lost", "kicked", "replaced", "room_closed", "slow", "shutdown"] as const;
type Disconnect = (typeof DISCONNECTS)[number];
const REPLAYS = ["instance", "region", "sibling", "stale", "failed"] as const;
const PROBES = ["found", "missing", "failed"] as const;
const zeros = <K extends string>(keys: readonly K[]): Record<K, number> =>
  Object.fromEntries(keys.map((key) => [key, 0])) as Record<K, number>;

/** Where a relay is in its life. */
type Stage =
  | { name: "serving" }
  | {
      name: "draining";
      /** Clock time. */
      ends: number;
    }
  | { name: "ended" };

/** All that a relay has in memory. Two of them share nothing. */
class Relay {
  server!: Server<Session>;
  stage: Stage = { name: "serving" };
  readonly ended = Promise.withResolvers<"idle" | "drained">();
  readonly rooms = new Map<string, Room>();
  readonly sockets = new Set<Socket>();
  /** Sockets in no room, the longest so first. */
  readonly roomless = new Set<Socket>();
  /** Sockets that have closed while frames of them waited; `sockets` doesn't have them any more. */
  readonly leaving = new Set<Socket>();
  readonly addresses = new Map<string, Address>();
  /** By how many of the rooms that they have created linger. */
  readonly byLingering = new Ranking();
  /** By how many slots with nobody on them there are in those rooms. */
  readonly byAbsent = new Ranking();
  readonly origins = new Map<string, Origin>();
  /** Slots with nobody on them in all rooms, without the hosts'. */
  remembered = 0;
  /** Connected members. */
  clients = 0;
  /** The number of the socket that opened last. */
  lastSerial = 0;
  readonly turns: Turns;
  readonly memory: Memory;
  readonly lookUpMisses: Misses;
  readonly socketMisses: Misses;
  readonly searches: Searches;
  readonly capLogged = new Map<Cap, number>();
  lastAddress: { text: string; key: string | undefined } = { text: "", key: undefined };
  metricsText = { text: "", until: 0 };
  hasSeenForwarded = false;
  cancelIdle = () => {};
  /** When the last close frame from this side has had its time to leave (clock time). */
  flushedAt = 0;
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
    ...(Object.keys(REFUSALS) as PlainCode[]),
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
    this.turns = new Turns(this);
    this.memory = new Memory(this);
    this.lookUpMisses = new Misses(config);
    this.socketMisses = new Misses(config);
    this.searches = new Searches(this);
  }
}

/** The record of an address, made if there is none. */
function addressOf(relay: Relay, key: string): Address {
  let address = relay.addresses.get(key);
  if (address === undefined) relay.addresses.set(key, (address = new Address(key, relay)));
  return address;
}

/** Forgets an address that has nothing here any more. */
function releaseAddress(relay: Relay, { key, sockets, rooms }: Address): void {
  if (sockets.size === 0 && rooms === 0) relay.addresses.delete(key);
}

/** The counts of an Origin header, which is used now; the least recently used goes if there are too many. */
function useOrigin(relay: Relay, name: string): Origin {
  const origin = relay.origins.get(name) ?? { name, clients: 0, rooms: 0, connections: 0, created: 0 };
  relay.origins.delete(name);
  relay.origins.set(name, origin);
  if (relay.origins.size > ORIGINS_KEPT) dropFirst(relay.origins);
  return origin;
}

function first<T>(items: Iterable<T>): T | undefined {
  for (const item of items) return item;
  return undefined;
}

function dropFirst(map: Map<string, unknown>): void {
  const key = first(map.keys());
  if (key !== undefined) map.delete(key);
}

/** Says in the log that a limit is reached, once a minute for each. */
function capReached(relay: Relay, cap: Cap): void {
  const now = relay.config.clock.now();
  if (now < (relay.capLogged.get(cap) ?? 0)) return;
  relay.capLogged.set(cap, now + CAP_LOG_MS);
  relay.config.log("cap reached", { cap });
}

// ---- Frames out: all that leaves goes through here, in the order in which it was handled -----------------

/**
 * Counts a frame that goes to so many receivers.
 * @param sent what Bun's send returned: the frame's bytes; 0 if nobody gets it, or the socket is closed; -1 if it waits to leave
 * @returns the frame's bytes
 */
function delivered(relay: Relay, receivers: number, sent: number, frame: string): number {
  const bytes = sent > 0 ? sent : Buffer.byteLength(frame);
  relay.messagesOut += receivers;
  relay.bytesOut += bytes * receivers;
  relay.memory.unlooked -= bytes * receivers;
  if (bytes < ALONE_BYTES) relay.turns.deliveries += receivers;
  relay.turns.work += receivers * (1 + bytes / WORK_BYTES);
  return bytes;
}

function write(socket: Socket, frame: string): void {
  const { relay } = socket.data;
  delivered(relay, 1, socket.sendText(frame), frame);
  relay.turns.work += CALL_WORK;
}

/** Sends a frame to the room's members, all but `except`: now, unless others wait before it or it is too large for that. */
function publish(room: Room, frame: string, except?: Socket): void {
  const { relay, connected, flow } = room;
  if (flow.outbox.length === 0 && frame.length * connected.size <= LARGE_BYTES) return publishNow(room, frame, except);
  relay.turns.publishLater(room, frame, except);
}

function publishNow(room: Room, frame: string, except?: Socket): void {
  const { relay, code, connected } = room;
  const receivers = connected.size - (except === undefined ? 0 : 1);
  const sent = except === undefined ? relay.server.publish(code, frame) : except.publishText(code, frame);
  room.published += delivered(relay, receivers, sent, frame);
  relay.turns.countCalls(room.flow, receivers);
}

const say = (socket: Socket, message: ServerMessage) => write(socket, frameOf(message));

/** Tells the room's members, all but `except`. */
const announce = (room: Room, message: ServerMessage, except?: Socket) => publish(room, frameOf(message), except);

/** Closes a socket from this side; frames of it that wait are discarded. */
function hangUp(socket: Socket, code: number, reason: string): void {
  const { relay } = socket.data;
  relay.turns.discard(socket);
  relay.flushedAt = relay.config.clock.now() + FLUSH_MS;
  socket.close(code, reason);
}

// ---- Slots: `sit` and `stand` are the only writers of who sits where -------------------------------------

/** Puts a socket on a slot that nobody is on. Tells nobody. */
function sit(socket: Socket, slot: Slot): void {
  const { room } = slot;
  const { relay } = room;
  const session = socket.data;
  unremember(slot);
  relay.roomless.delete(socket);
  room.connected.set(slot.index, socket);
  session.slot = slot;
  session.flow = room.flow;
  session.heardBytes = room.published;
  session.bucket.fullAt = Math.max(session.bucket.fullAt, slot.bucketFullAt);
  session.origin.clients++;
  relay.clients++;
  relay.turns.work += SIT_WORK;
  socket.subscribe(room.code);
}

/** Takes a socket off its slot. Tells nobody, and doesn't care what becomes of the slot or the room. */
function stand(socket: Socket, slot: Slot, why: Disconnect): void {
  const { room } = slot;
  const { relay } = room;
  const session = socket.data;
  socket.unsubscribe(room.code);
  room.connected.delete(slot.index);
  session.slot = undefined;
  session.flow = session.home.flow;
  slot.bucketFullAt = session.bucket.fullAt;
  session.origin.clients--;
  relay.clients--;
  relay.disconnects[why]++;
  if (relay.sockets.has(socket)) relay.roomless.add(socket);
}

/** Whether a member from an address sits in a room. */
function sitsIn(room: Room, address: string): boolean {
  return room.connected.values().some((socket) => socket.data.address === address);
}

/**
 * Keeps a slot for its clientId's return; a host's as long as the room lives. The longest gone is forgotten if there are too many:
 * in the room, or in the rooms of the address whose rooms remember the most.
 */
function remember(slot: Slot): void {
  const { room } = slot;
  const { relay, creator } = room;
  const { knownPerRoom, knownInAll } = relay.config;
  if (slot.index === room.host) return;
  room.absent.add(slot);
  creator.absent.add(slot);
  relay.byAbsent.change(creator, creator.absent.size, 1);
  relay.remembered++;
  if (room.absent.size > knownPerRoom) forget(first(room.absent));
  if (relay.remembered <= knownInAll) return;
  // Of addresses that remember equally many, the one that has just got one more loses one: so nobody costs another what both have.
  const { top = creator } = relay.byAbsent;
  forget(first((top.absent.size > creator.absent.size ? top : creator).absent));
}

/** Takes a slot off the lists of those with nobody on them. */
function unremember(slot: Slot): void {
  const { relay, creator, absent } = slot.room;
  if (!absent.delete(slot)) return;
  creator.absent.delete(slot);
  relay.byAbsent.change(creator, creator.absent.size, -1);
  relay.remembered--;
}

function forget(slot: Slot | undefined): void {
  if (slot === undefined) return;
  unremember(slot);
  slot.room.known.delete(slot.clientId);
  slot.room.slots.delete(slot.index);
}

function addSlot(room: Room, clientId: string): Slot {
  const index = room.nextIndex++;
  const slot: Slot = { room, index, clientId, barred: false, bucketFullAt: 0, offer: undefined };
  room.known.set(slot.clientId, slot);
  room.slots.set(index, slot);
  return slot;
}

/** Gives a slot to another clientId, and ends the offer. */
function handOver(slot: Slot, clientId: string): void {
  const { known } = slot.room;
  known.delete(slot.clientId);
  slot.clientId = clientId;
  slot.offer = undefined;
  known.set(slot.clientId, slot);
}

/**
 * Takes a member out of its room, tells the others, and decides what becomes of the room. A room lingers if its last socket
 * closes, and not if its last member says `leave`.
 * @param reason what the others are told; undefined if the socket just closed
 */
function depart(socket: Socket, slot: Slot, why: Disconnect, reason?: "left" | "kicked"): void {
  const { room } = slot;
  stand(socket, slot, why);
  remember(slot);
  if (room.connected.size > 0) {
    room.relay.turns.farewell(room, { type: "peer_left", index: slot.index, reason });
    settle(room);
  } else if (room.linger > 0 && reason === undefined && room.relay.stage.name !== "ended") settle(room);
  else dropRoom(room);
}

/** Starts, keeps or stops the room's countdown, depending on who is connected. */
function settle(room: Room): void {
  const { clock } = room.relay.config;
  const isEmpty = room.connected.size === 0;
  const isHostAway = room.hostGrace > 0 && !room.connected.has(room.host);
  const countdown = isEmpty ? "linger" : isHostAway ? "host" : undefined;
  if (countdown === room.countdown) return;
  room.cancelCountdown();
  room.cancelCountdown = () => {};
  room.countdown = countdown;
  if (isEmpty) room.creator.lingering.add(room);
  else room.creator.lingering.delete(room);
  if (countdown === undefined) return;
  const ms = 1000 * (isEmpty ? room.linger : room.hostGrace);
  room.countdownEnds = clock.now() + ms;
  room.cancelCountdown = clock.after(ms, () => {
    if (isEmpty) dropRoom(room);
    else if (room.migrate) migrateHost(room);
    else closeRoom(room, "room_closed");
  });
}

function migrateHost(room: Room): void {
  const former = room.slots.get(room.host);
  room.host = room.connected.keys().reduce((lowest, index) => Math.min(lowest, index));
  if (former !== undefined) remember(former);
  announce(room, { type: "host", index: room.host });
  settle(room);
}

/** Of the address that has created the most lingering rooms, the one that is nearest to its end. */
function nearestToEnd(relay: Relay): Room | undefined {
  return relay.byLingering.top?.lingering.nearest();
}

function unusedCode({ rooms, config: { codeRegion } }: Relay): string {
  let code = newCode(codeRegion);
  while (rooms.has(code)) code = newCode(codeRegion);
  return code;
}

/** Makes the room that a `create` asks for, with nobody in it yet. */
function openRoom({ relay, address, originName }: Session, code: string, message: Message<"create">): Room {
  const room = new Room(relay, code, addressOf(relay, address), useOrigin(relay, originName), message);
  relay.rooms.set(code, room);
  relay.createdTotal++;
  room.creator.rooms++;
  room.origin.rooms++;
  room.origin.created++;
  relay.cancelIdle(); // the socket may have closed: what it sent before is handled all the same
  return room;
}

/** Ends a room that nobody is connected to. */
function dropRoom(room: Room): void {
  const { relay, creator } = room;
  room.cancelCountdown();
  relay.rooms.delete(room.code);
  for (const slot of room.absent) unremember(slot);
  room.origin.rooms--;
  creator.rooms--;
  creator.lingering.delete(room);
  releaseAddress(relay, creator);
  relay.turns.disband(room.flow);
  watchIdle(relay);
  if (relay.stage.name === "draining" && relay.rooms.size === 0) end(relay, "drained");
}

/** Ends a room and all its sockets at once. */
function closeRoom(room: Room, why: "room_closed" | "shutdown"): void {
  const [code, reason] = why === "room_closed" ? [CloseCode.ROOM_CLOSED, "room closed"] : [CloseCode.RESTARTING, "restarting"];
  for (const socket of [...room.connected.values()]) {
    const { slot } = socket.data;
    if (slot !== undefined) stand(socket, slot, why);
    hangUp(socket, code, reason);
  }
  dropRoom(room);
}

// ---- Messages: one row each, named as on the wire --------------------------------------------------------

/** What came of a message: a refusal, or nothing, or the flow that must have its turn before the message can be handled. */
type Outcome = Refusal | Flow | void;
/** Fields are parsed into a well-formed message or the refusal; a handler trusts its argument. */
type Row<T extends MessageType> = {
  parse(fields: Fields, frame: string, config: Config): Message<T> | Refusal;
} & (
  | { who: "anyone"; handle(socket: Socket, message: Message<T>): Outcome }
  | { who: "member"; handle(socket: Socket, message: Message<T>, slot: Slot): Outcome }
  | {
      who: "host";
      /** Completes "Only the host can …". */
      deed: string;
      handle(socket: Socket, message: Message<T>, slot: Slot): Outcome;
    }
);

function clientIdFault({ clientId }: Fields): Refusal | undefined {
  if (typeof clientId !== "string" || clientId === "") return badRequest("clientId is required");
  if (clientId.length > CLIENT_ID_LENGTH) return badRequest("clientId is too long");
  return undefined;
}

function maxClientsFault({ maxClients }: Fields, { maxClientsPerRoom }: Config): Refusal | undefined {
  if (!isWhole(maxClients, 1, Infinity)) return badRequest("maxClients must be a positive number");
  if (maxClientsPerRoom !== 0 && maxClients > maxClientsPerRoom)
    return badRequest(`maxClients must be at most ${maxClientsPerRoom}`);
  return undefined;
}

function optionsFault({ linger, hostGrace, migrate, url }: Fields, config: Config): Refusal | undefined {
  if (linger !== undefined && !isWhole(linger, 0, LINGER_SECONDS))
    return badRequest(`linger must be a whole number from 0 to ${LINGER_SECONDS}`);
  if (hostGrace !== undefined && !isWhole(hostGrace, 0, GRACE_SECONDS))
    return badRequest(`hostGrace must be a whole number from 0 to ${GRACE_SECONDS}`);
  if (migrate !== undefined && typeof migrate !== "boolean") return badRequest("migrate must be true or false");
  if (migrate === true && (hostGrace ?? config.defaultHostGraceSeconds) === 0) return badRequest("migrate needs hostGrace");
  if (url === undefined) return undefined;
  if (typeof url !== "string") return badRequest("url must be a string");
  if (Buffer.byteLength(url) > URL_BYTES) return badRequest(`url must be at most ${URL_BYTES} bytes`);
  return urlFault(url, "1zzzzz", config); // any code
}

function urlFault(url: string, room: string, { instance }: Config): Refusal | undefined {
  if (fillUrl(url, room, instance) !== undefined) return undefined;
  return badRequest("url must be an absolute https URL with no braces but {room} and {instance}");
}

/** The controller page's address, or undefined if the template doesn't give an absolute https URL. */
function fillUrl(template: string, room: string, instance: string): string | undefined {
  const filled = template.replaceAll("{room}", encodeURIComponent(room)).replaceAll("{instance}", encodeURIComponent(instance));
  const url = /[{}]/.test(filled) ? null : URL.parse(filled);
  return url?.protocol === "https:" ? url.href : undefined;
}

/** To whom a `send` goes: everyone, one slot, or several different ones; null if `to` is none of them. */
function parseTargets(to: unknown): Send["to"] | null {
  if (to === undefined || isIndex(to)) return to;
  if (!Array.isArray(to)) return null;
  const targets = [...new Set<unknown>(to)];
  return targets.length >= 1 && targets.length <= SEND_TARGETS && targets.every(isIndex) ? targets : null;
}

/** Makes place for another room. @returns whether there is one */
function placeForRoom(relay: Relay): boolean {
  const { maxRooms } = relay.config;
  if (maxRooms === 0 || relay.rooms.size < maxRooms) return true;
  capReached(relay, "rooms");
  const room = nearestToEnd(relay);
  if (room !== undefined) dropRoom(room);
  return room !== undefined;
}

/** The indices of a room's connected members, ascending. */
function connectedIndices({ relay, slots, connected }: Room): number[] {
  const indices: number[] = [];
  relay.turns.work += slots.size / 50; // looking at each of them is work, too
  for (const index of slots.keys()) if (connected.has(index)) indices.push(index);
  return indices;
}

/** Why a room doesn't take who comes. @param slot the one that is theirs; undefined if the room doesn't know them */
function joinFault(room: Room, slot: Slot | undefined): Refusal | undefined {
  if (slot?.barred) return refuse("kicked");
  if (slot === undefined && room.locked) return refuse("room_locked");
  if (slot !== undefined && room.connected.has(slot.index)) return undefined;
  return room.connected.size >= room.maxClients ? refuse("room_full") : undefined;
}

/** Tells who has sat down what there is to know of the room. */
function welcome(socket: Socket, { room, index }: Slot, peers: number[], resumed: true | undefined): void {
  const host = room.host || undefined;
  const locked = room.locked || undefined;
  say(socket, { type: "joined", room: room.code, index, peers, host, resumed, locked, url: room.url });
  if (room.state !== undefined) write(socket, room.state);
  tellDraining(socket);
}

const MESSAGES: { readonly [T in MessageType]: Row<T> } = {
  create: {
    who: "anyone",
    parse(fields, _, config) {
      const fault = clientIdFault(fields) ?? maxClientsFault(fields, config) ?? optionsFault(fields, config);
      return fault ?? (fields as Message<"create">);
    },
    handle(socket, message) {
      const { relay, slot } = socket.data;
      const { instance, region } = relay.config;
      if (slot !== undefined) return refuse("already_in_room");
      if (relay.stage.name !== "serving") return refuse("draining");
      const code = unusedCode(relay);
      const fault = message.url === undefined ? undefined : urlFault(message.url, code, relay.config);
      if (fault !== undefined) return fault; // a code in the host's name may not go with what stands around it
      if (!placeForRoom(relay)) return refuse("capacity");
      const room = openRoom(socket.data, code, message);
      sit(socket, addSlot(room, message.clientId));
      say(socket, { type: "created", room: room.code, instance, region, index: 0, url: room.url });
    },
  },

  join: {
    who: "anyone",
    parse(fields) {
      const fault = clientIdFault(fields);
      if (fault !== undefined) return fault;
      if (typeof fields.room !== "string" || fields.room === "") return badRequest("room is required");
      if (fields.claim !== undefined && typeof fields.claim !== "string") return badRequest("claim must be a string");
      return fields as Message<"join">;
    },
    handle(socket, { clientId, room: code, claim }) {
      const { relay, address } = socket.data;
      const { turns, socketMisses: misses } = relay;
      if (socket.data.slot !== undefined) return refuse("already_in_room");
      const room = relay.rooms.get(code);
      let slot = room?.known.get(clientId);
      if (slot === undefined && misses.isOver(address) && !(room && sitsIn(room, address))) {
        capReached(relay, "misses");
        return refuse("too_many_attempts");
      }
      if (room === undefined) {
        misses.add(address);
        return refuse("room_not_found");
      }
      if (slot === undefined && claim !== undefined) {
        slot = slotOffered(room, claim);
        if (slot === undefined) {
          misses.add(address);
          return refuse("claim_not_found");
        }
      }
      // Who can't come in is told so at once, and pays for it: else strangers could keep the members waiting.
      const fault = joinFault(room, slot);
      if (fault !== undefined) return fault;
      // A join is work of the room that it is for: it waits until that room's turn, and the room pays for it.
      if (!turns.canTakeJoiner(room.flow)) return room.flow;
      turns.payFrom(room.flow);
      const old = slot && room.connected.get(slot.index);
      // A socket that has closed meanwhile replaces none that opened after it: that may be the same person, back again.
      if (old !== undefined && socket.data.goodbye !== undefined && old.data.serial > socket.data.serial) return;
      // What a socket sent before it closed properly is heard first, if it only waits for the room's turn, as this join did.
      if (old?.data.goodbye !== undefined && old.data.waitsFor === room.flow) return room.flow;

      const kind: Join = old !== undefined ? "replaced" : slot !== undefined ? "resumed" : "new";
      const resumed = kind === "resumed" || undefined;
      slot ??= addSlot(room, clientId);
      if (slot.clientId !== clientId) handOver(slot, clientId); // it was claimed
      if (old !== undefined) {
        stand(old, slot, "replaced");
        hangUp(old, CloseCode.REPLACED, "replaced");
      }
      const peers = connectedIndices(room);
      relay.joins[kind]++;
      sit(socket, slot);
      settle(room);
      welcome(socket, slot, peers, resumed);
      if (kind !== "replaced") announce(room, { type: "peer_joined", index: slot.index, resumed }, socket);
    },
  },

  send: {
    who: "member",
    parse(fields, frame) {
      const data = memberText(frame, "data");
      if (data === undefined) return badRequest("data is required");
      const to = parseTargets(fields.to);
      if (to === null) return refuse("peer_not_found");
      return { type: "send", data, to, echo: fields.echo === true };
    },
    handle(socket, { data, to, echo }, { index, room }) {
      const frame = messageFrame(index, data);
      if (to === undefined) return publish(room, frame, echo === true ? undefined : socket);
      if (typeof to === "number") {
        const target = room.connected.get(to);
        if (target !== undefined) return write(target, frame);
        return refuse(room.slots.get(to)?.barred === false ? "peer_away" : "peer_not_found");
      }
      const missing: number[] = [];
      for (const each of to) {
        const target = room.connected.get(each);
        if (target === undefined) missing.push(each);
        else write(target, frame);
      }
      if (missing.length > 0)
        return refuse(
          "peer_not_found",
          missing.sort((a, b) => a - b),
        );
    },
  },

  set_state: {
    who: "host",
    deed: "set state",
    parse(_, frame) {
      const data = memberText(frame, "data");
      if (data === undefined) return badRequest("State data is required");
      if (Buffer.byteLength(data) > STATE_BYTES) return refuse("state_too_large");
      return { type: "set_state", data };
    },
    handle(socket, { data }, { room }) {
      room.state = copyOf(stateFrame(data));
      publish(room, room.state, socket);
    },
  },

  close_room: {
    who: "host",
    deed: "close the room",
    parse: () => ({ type: "close_room" }),
    handle: (_, __, { room }) => closeRoom(room, "room_closed"),
  },

  set_room: {
    who: "host",
    deed: "change the room",
    parse(fields, _, config) {
      const { locked, maxClients } = fields;
      if (locked !== undefined && typeof locked !== "boolean") return badRequest("locked must be true or false");
      const fault = maxClients === undefined ? undefined : maxClientsFault(fields, config);
      return fault ?? (fields as Message<"set_room">);
    },
    handle(_, { locked, maxClients }, { room }) {
      room.locked = locked ?? room.locked;
      room.maxClients = maxClients ?? room.maxClients;
      announce(room, { type: "room", locked: room.locked, maxClients: room.maxClients });
    },
  },

  kick: {
    who: "host",
    deed: "kick",
    parse: ({ index }) => (isIndex(index) ? { type: "kick", index } : refuse("peer_not_found")),
    handle(_, { index }, { index: own, room }) {
      if (index >= room.nextIndex) return refuse("peer_not_found");
      if (index === own) return badRequest("Cannot kick yourself");
      const slot = room.slots.get(index);
      if (slot === undefined || slot.barred) return; // gone for good already
      slot.barred = true;
      const target = room.connected.get(index);
      if (target === undefined) return;
      depart(target, slot, "kicked", "kicked");
      hangUp(target, CloseCode.KICKED, "kicked");
    },
  },

  set_host: {
    who: "host",
    deed: "hand on the host's role",
    parse: ({ index }) => (isIndex(index) ? { type: "set_host", index } : refuse("peer_not_found")),
    handle(_, { index }, { index: own, room }) {
      if (!room.connected.has(index)) return refuse("peer_not_found");
      if (index === own) return;
      room.host = index;
      announce(room, { type: "host", index });
    },
  },

  offer_slot: {
    who: "member",
    parse: ({ index }) => ({ type: "offer_slot", index: isIndex(index) || index === undefined ? index : -1 }), // -1: nobody's
    handle(socket, { index }, { index: own, room }) {
      const offered = index ?? own;
      if (offered !== own && own !== room.host) return notHost("offer another's slot");
      const slot = room.slots.get(offered);
      if (slot === undefined || slot.barred) return refuse("peer_not_found");
      const token = Buffer.from(crypto.getRandomValues(new Uint8Array(OFFER_BYTES))).toString("base64url");
      slot.offer = { token, ends: room.relay.config.clock.now() + OFFER_MS };
      say(socket, { type: "slot_offer", index: offered, token });
    },
  },

  leave: {
    who: "member",
    parse: () => ({ type: "leave" }),
    handle(socket, _, slot) {
      say(socket, { type: "left", room: slot.room.code }); // first: in a drain the last one's leaving ends the relay
      depart(socket, slot, "left", "left");
    },
  },

  ping: {
    who: "anyone",
    parse: ({ t }) => ({ type: "ping", t: typeof t === "number" && Number.isFinite(t) ? t : undefined }),
    handle(socket, { t }) {
      say(socket, { type: "pong", t, now: socket.data.relay.config.clock.epoch() });
    },
  },
};

/** The slot that a claim's token opens, if it still does. */
function slotOffered(room: Room, token: string): Slot | undefined {
  const now = room.relay.config.clock.now();
  for (const slot of room.known.values())
    if (slot.offer?.token === token) return slot.offer.ends > now && !slot.barred ? slot : undefined;
  return undefined;
}

const isMessageType = (type: unknown): type is MessageType => typeof type === "string" && Object.hasOwn(MESSAGES, type);

function parseObject(frame: string | Buffer): Fields | undefined {
  if (typeof frame !== "string") return undefined;
  try {
    const value: unknown = JSON.parse(frame);
    return typeof value === "object" && value !== null && !Array.isArray(value) ? (value as Fields) : undefined;
  } catch {
    return undefined;
  }
}

/** Parses a frame, and handles what it asks for. */
function perform(socket: Socket, frame: string | Buffer): Outcome {
  const { slot, relay } = socket.data;
  if (slot !== undefined && typeof frame === "string") {
    const send = parseUsualSend(frame);
    if (send !== undefined) return MESSAGES.send.handle(socket, send, slot);
  }
  const fields = parseObject(frame);
  if (fields === undefined) return refuse("bad_json");
  const { type } = fields;
  if (!isMessageType(type)) return refuse("unknown_type");
  const row = MESSAGES[type] as Row<MessageType>;
  if (row.who !== "anyone" && slot === undefined) return refuse("not_in_room");
  if (row.who === "host" && slot?.index !== slot?.room.host) return notHost(row.deed);
  const message = row.parse(fields, frame as string, relay.config);
  return message instanceof Refusal ? message : row.handle(socket, message, slot as Slot);
}

/**
 * Does what one frame asks for; the only place that refuses on a socket.
 * @returns the flow that must have its turn first; then nothing was done
 */
function dispatch(socket: Socket, frame: string | Buffer): Flow | undefined {
  const outcome = perform(socket, frame);
  if (!(outcome instanceof Refusal)) return outcome ?? undefined;
  const { message, code, missing } = outcome;
  socket.data.relay.errors[code]++;
  say(socket, { type: "error", message, code, missing });
  if (code === "too_many_attempts") hangUp(socket, CloseCode.TOO_MANY_ATTEMPTS, "too many attempts");
  return undefined;
}

// ---- Turns: who may send how much, and when the relay reads on -------------------------------------------

/** A token bucket, a token a frame: `rate` a second in the long run, those of BURST_MS at once. A rate of 0 is unlimited. */
class Bucket {
  /** When it is full again (clock time): each frame moves that on by `1 / rate`. The slot keeps it between two sockets. */
  fullAt = 0;
  readonly #frameMs: number;

  constructor(rate: number) {
    this.#frameMs = rate === 0 ? 0 : 1000 / rate;
  }

  take(now: number): void {
    this.fullAt = Math.max(this.fullAt, now) + this.#frameMs;
  }

  isEmpty(now: number): boolean {
    return this.fullAt - now > BURST_MS - this.#frameMs;
  }
}

/** A frame for a room's members, all but `except`. `remaining` are those who haven't got it yet, if it goes to one after the other. */
type Broadcast = { readonly frame: string; readonly except: Socket | undefined; readonly remaining: Socket[] | undefined };

/**
 * One of those who share the relay: a room, or an address with its sockets that are in no room. What is beyond its share of a turn
 * waits here, in order.
 */
class Flow {
  /** Work that it may still do; below 0 it is a debt, which later turns pay off. */
  credit = 0;
  /** The turn in which `credit` was last added to. */
  turn = -1;
  /** The turn in which it was read last, and how many of its frames that turn has read. */
  readIn = -1;
  frames = 0;
  /** The turn in which the system calls of a broadcast were last counted. */
  calledIn = -1;
  /** Sockets whose next frame waits for this flow; one frame of each in turn. */
  readonly waiting = new Set<Socket>();
  /** What had no credit, or is large: the room's members are sent it before anything else is handled for the room. */
  readonly outbox: Broadcast[] = [];

  constructor(readonly room?: Room) {}

  get isBehind(): boolean {
    return this.waiting.size > 0 || this.outbox.length > 0;
  }
}

/** Sockets that aren't read from, because their flow has brought much or memory is short. */
class Held {
  /** The flows in rotation. A socket that goes takes itself out of its set. */
  readonly #sockets = new Map<Flow, Set<Socket>>();

  get isEmpty(): boolean {
    return this.#sockets.size === 0;
  }

  add(socket: Socket): void {
    const session = socket.data;
    session.heldIn = this.#sockets.get(session.flow) ?? new Set();
    session.heldIn.add(socket);
    this.#sockets.set(session.flow, session.heldIn);
  }

  /** Takes a socket of the flow that is next. */
  take(): Socket | undefined {
    for (const [flow, sockets] of this.#sockets) {
      this.#sockets.delete(flow);
      const socket = first(sockets);
      if (socket === undefined) continue; // all of them have gone
      sockets.delete(socket);
      socket.data.heldIn = undefined;
      if (sockets.size > 0) this.#sockets.set(flow, sockets);
      return socket;
    }
    return undefined;
  }
}

/**
 * The turns of the event loop. In each one the relay reads all sockets that have something, and a frame is handled as it is read
 * if its socket's bucket has a token and its flow has credit. Else the frame waits in the socket's queue, and the socket is
 * paused, so that the sender's system holds back the rest. As long as something waits, one turn follows the other; each begins
 * with what waits: flows in rotation, each for its share of the turn's work (deficit round robin). With nothing waiting, a
 * turn may end with a rest.
 */
class Turns {
  /** Units of work done so far. Frames out add what they deliver. */
  work = 0;
  /** Frames delivered so far, of those that are small enough to leave together with others. */
  deliveries = 0;
  readonly #config: Config;
  readonly #relay: Relay;
  #turn = 0;
  /** What this turn has read. */
  #frames = 0;
  #isUnderWay = false;
  #begunAt = 0;
  /** The time (clock) by which this turn goes: its beginning, or when tokens were last handed out in it. */
  #now = 0;
  /** The work that one flow may do in this turn. */
  #share = TURN_WORK;
  /** `work` when this turn has done TURN_WORK. */
  #fullAt = TURN_WORK;
  /** Flows that asked for credit in this turn. */
  #flows = 0;
  /** Whether this turn had its one frame that is larger than a share. */
  #hadLarge = false;
  /** Whether a frame of this turn took far longer than was counted for it. */
  #hadDear = false;
  /** The flow whose large frame waits for the next turn, because this one had its large frame. */
  #largeNext: Flow | undefined;
  /** The flow that the frame in hand is charged to. */
  #payer: Flow | undefined;
  /** `work` when somebody was last charged. */
  #billedAt = 0;
  /** When that was (clock time), if the frame in hand is timed. */
  #timedFrom: number | undefined;
  /** The most units of work that its time from then on may count as. */
  #mostTimed = 0;
  /** Flows that are behind, in rotation. */
  readonly #behind = new Set<Flow>();
  /** Sockets whose bucket was empty. */
  readonly #empty = new Set<Socket>();
  readonly #held = new Held();
  /** How many of them the next turn reads on from: one after a turn in which a flow was held, and then twice as many with each turn. */
  #readFrom = TURN_SOCKETS;
  #cancelRefill: (() => void) | undefined;
  readonly #rest: Rest;

  constructor(relay: Relay) {
    this.#config = relay.config;
    this.#relay = relay;
    this.#rest = new Rest(relay.config, () => {
      capReached(relay, "cpu");
      this.#compileLess();
    });
  }

  /** The time (clock) by which this turn goes; one begins if none is under way. A look at the clock for each frame would cost more. */
  now(): number {
    this.#wake();
    return this.#now;
  }

  /** Takes a frame that was read: handles it, or lets it wait. */
  received(socket: Socket, frame: string | Buffer): void {
    const session = socket.data;
    this.#takeIn(socket);
    if (session.queue !== undefined) {
      session.queue.push(frame);
      if (session.queue.length % LOOK_FRAMES === 0) this.#relay.memory.look(); // many small frames are large in memory
      return;
    }
    const { flow } = session;
    if (!flow.isBehind && this.#mayHandle(flow, frame)) this.#handle(socket, frame, flow);
    else this.#wait(socket, frame, flow);
  }

  /** Takes a control frame that costs a token: a ping, or a pong that nobody asked for. */
  receivedPing(socket: Socket): void {
    this.#takeIn(socket);
    this.#takeToken(socket);
  }

  /**
   * Whether a room can take a joiner now. Either it is the room's turn: then its outbox has been sent. Or nothing of it waits, and
   * it has credit. In both cases its members have been told who left, so that no joiner hears of it.
   */
  canTakeJoiner(flow: Flow): boolean {
    return flow === this.#payer || (!flow.isBehind && this.#hasCredit(flow));
  }

  /** Counts the system calls of a room's first broadcast in a turn; later ones share them. */
  countCalls(flow: Flow, receivers: number): void {
    if (flow.calledIn === this.#turn) return;
    flow.calledIn = this.#turn;
    this.work += CALL_WORK * receivers;
  }

  /** Charges what is done from now on to a flow, or to nobody. @returns who has paid until now */
  payFrom(flow: Flow | undefined): Flow | undefined {
    this.#bill();
    const before = this.#payer;
    this.#payer = flow;
    return before;
  }

  /**
   * Charges what the frame in hand has cost so far: what was counted, or its time if that is more. Its time counts only as far as its
   * length can explain, so that nobody pays for a pause of the machine.
   */
  #bill(): void {
    if (this.#timedFrom !== undefined) {
      const now = this.#config.clock.now();
      const timed = Math.min(this.#mostTimed, (now - this.#timedFrom) * WORK_PER_MS);
      const uncounted = this.#billedAt + timed - this.work;
      this.work += Math.max(0, uncounted);
      this.#hadDear ||= uncounted > LEAST_SHARE;
      this.#timedFrom = now;
      this.#mostTimed -= timed;
    }
    if (this.#payer !== undefined) this.#payer.credit -= this.work - this.#billedAt;
    this.#billedAt = this.work;
  }

  /** Tells a room's members who left. The room pays for it, and not the flow of the frame in hand; without credit it waits. */
  farewell(room: Room, message: ServerMessage): void {
    const { flow } = room;
    this.#wake();
    if (flow.outbox.length > 0 || !this.#hasCredit(flow)) return this.publishLater(room, frameOf(message));
    const payer = this.payFrom(flow);
    announce(room, message);
    this.payFrom(payer);
  }

  /** Sends a frame to a room's members when it is the room's turn, before anything else is handled for the room. */
  publishLater(room: Room, frame: string, except?: Socket): void {
    const isLarge = frame.length * room.connected.size > LARGE_BYTES;
    const remaining = isLarge ? [...room.connected.values()].filter((socket) => socket !== except) : undefined;
    if (isLarge) room.published += Buffer.byteLength(frame);
    room.flow.outbox.push({ frame, except, remaining });
    this.#behind.add(room.flow);
    this.#wake();
  }

  /** Reads no more from these sockets. */
  hold(sockets: Iterable<Socket>): void {
    for (const socket of sockets) {
      if (socket.data.queue !== undefined) this.#endPeek(socket);
      else {
        this.#pause(socket);
        this.#held.add(socket);
      }
    }
  }

  /** Reads on from so many that are held: one of each flow in rotation. */
  release(most: number): void {
    for (let n = 0; n < most; n++) {
      const socket = this.#held.take();
      if (socket === undefined) return;
      this.#goOn(socket);
    }
  }

  /** Begins a turn, which reads on from some that are held. */
  readOn(): void {
    if (this.isHolding) this.#wake();
  }

  get isHolding(): boolean {
    return !this.#held.isEmpty;
  }

  /** Lets go of a room that is over. Sockets that waited to join it wait for their own flow instead, and are told so then. */
  disband(flow: Flow): void {
    flow.outbox.length = 0;
    this.#behind.delete(flow);
    for (const socket of flow.waiting) this.#enqueue(socket, socket.data.flow);
    flow.waiting.clear();
  }

  /** Forgets the frames of a socket that wait, and all that waits for it. */
  discard(socket: Socket): void {
    const session = socket.data;
    session.queue = undefined;
    session.waitsFor?.waiting.delete(socket);
    session.waitsFor = undefined;
    session.goodbye?.cancel();
    session.goodbye = undefined;
    this.#relay.leaving.delete(socket);
    this.#empty.delete(socket);
    session.heldIn?.delete(socket);
  }

  /**
   * Lets the frames that wait be handled before a socket that closed properly is gone.
   * @param leave what ends it: called at once if nothing waits, else after the last frame, or after GOODBYE_MS
   */
  sayGoodbye(socket: Socket, leave: () => void): void {
    const session = socket.data;
    if (session.queue === undefined || session.queue.length === 0) return leave();
    this.#relay.leaving.add(socket);
    session.goodbye = { leave, cancel: this.#config.clock.after(GOODBYE_MS, leave) };
  }

  /**
   * Counts what is read. Once a turn has read TURN_FRAMES, a flow that brings its FLOW_FRAMES-th frame or a later one is held: none of
   * its sockets is read from, until a later turn reads on from a few. So nobody keeps the others waiting by sending much.
   */
  #takeIn(socket: Socket): void {
    this.#wake();
    this.#endPeek(socket); // something came
    const { flow, home } = socket.data;
    if (flow.readIn !== this.#turn) {
      flow.readIn = this.#turn;
      flow.frames = 0;
    }
    flow.frames++;
    if (++this.#frames < TURN_FRAMES || flow.frames < FLOW_FRAMES) return;
    flow.frames = -Infinity; // held once in a turn is enough
    this.#readFrom = 1;
    this.hold((flow.room?.connected.values() ?? home.sockets.values()).filter(({ data }) => data.flow === flow));
  }

  #takeToken(socket: Socket): void {
    const session = socket.data;
    const now = this.now();
    session.bucket.take(now);
    if (session.queue !== undefined || !session.bucket.isEmpty(now) || socket.readyState !== WebSocket.OPEN) return;
    this.#pause(socket);
    this.#waitForToken(socket);
    capReached(this.#relay, "messages per second");
  }

  /** Begins a turn, unless one is under way. */
  #wake(): void {
    if (!this.#isUnderWay) this.#begin(this.#config.clock.now());
  }

  #begin(now: number): void {
    this.#turn++;
    this.#frames = 0;
    this.#isUnderWay = true;
    this.#begunAt = now;
    this.#now = now;
    this.#hadLarge = false;
    this.#hadDear = false;
    this.#largeNext = undefined;
    this.#share = Math.max(LEAST_SHARE, TURN_WORK / Math.max(1, this.#flows, this.#behind.size));
    this.#flows = 0;
    this.#fullAt = this.work + TURN_WORK;
    setImmediate(() => this.#end());
  }

  /** Ends a turn, when all that had arrived is read. If something waits, the next turn begins at once, with what waits. */
  #end(): void {
    this.#relay.memory.lookIfMuchWasSent();
    const now = this.#config.clock.now();
    this.#isUnderWay = false;
    const canReadOn = this.isHolding && !this.#relay.memory.isFalling;
    if (this.#behind.size === 0 && !canReadOn) return this.#rest.after(this.#begunAt, now, this.deliveries);
    this.#begin(now);
    if (canReadOn) this.release(this.#readFrom);
    this.#readFrom = Math.min(TURN_SOCKETS, 2 * this.#readFrom);
    for (const flow of [...this.#behind]) {
      if (this.work >= this.#fullAt) break;
      this.#serve(flow);
      if (flow === this.#largeNext) continue; // it keeps its place for the next turn's large frame
      this.#behind.delete(flow);
      if (flow.isBehind) this.#behind.add(flow);
    }
  }

  /** Handles what waits for a flow, for its share. */
  #serve(flow: Flow): void {
    for (;;) {
      if (flow.room !== undefined) this.#sendOutbox(flow.room);
      if (flow.outbox.length > 0) return;
      const socket = first(flow.waiting);
      const [frame] = socket?.data.queue ?? [];
      if (socket === undefined || frame === undefined || !this.#mayHandle(flow, frame)) return;
      flow.waiting.delete(socket);
      socket.data.waitsFor = undefined;
      socket.data.queue?.shift();
      this.#handle(socket, frame, flow);
      this.#goOn(socket);
    }
  }

  /** Sends what a room's members are to get first. A large frame waits while memory that was freed is still falling. */
  #sendOutbox(room: Room): void {
    const { flow } = room;
    this.payFrom(flow);
    while (this.#hasCredit(flow)) {
      const [broadcast] = flow.outbox;
      if (broadcast === undefined || (broadcast.remaining !== undefined && this.#relay.memory.isFalling)) break;
      const { frame, except, remaining } = broadcast;
      const socket = remaining?.pop();
      if (socket?.data.slot?.room === room) write(socket, frame);
      if (remaining === undefined) publishNow(room, frame, except);
      if (remaining === undefined || remaining.length === 0) flow.outbox.shift();
      this.#bill();
    }
    this.payFrom(undefined);
  }

  /**
   * Whether a flow may do work in this turn. The first question in a turn adds the shares since the last one to its credit. Shares
   * go by how many flows had something in the turn before. If many more have something now, their shares add up to too much: so
   * once the turn has done TURN_WORK, a flow may do LEAST_SHARE in it, and no more.
   */
  #hasCredit(flow: Flow): boolean {
    if (flow.turn !== this.#turn) {
      flow.credit = Math.min(this.#share, flow.credit + this.#share * (this.#turn - flow.turn));
      flow.turn = this.#turn;
      this.#flows++;
    }
    return flow.credit > (this.work < this.#fullAt ? 0 : this.#share - LEAST_SHARE);
  }

  /**
   * Whether a flow has credit for a frame. One that may cost more than a share is let through once in a turn. Once a frame of
   * this turn has taken far longer than was counted for it, and the turn is full, other long ones wait for the next.
   */
  #mayHandle(flow: Flow, frame: string | Buffer): boolean {
    if (!this.#hasCredit(flow)) return false;
    if (this.#hadDear && this.work >= this.#fullAt && frame.length / PARSE_BYTES > LEAST_SHARE) return false; // they may be dear, too
    const receivers = flow.room?.connected.size ?? 1;
    if (1 + receivers * (1 + frame.length / WORK_BYTES) <= this.#share) return true;
    if (this.#hadLarge) {
      this.#largeNext = flow;
      return false;
    }
    this.#hadLarge = true;
    return true;
  }

  #handle(socket: Socket, frame: string | Buffer, flow: Flow): void {
    let waitsFor: Flow | undefined;
    this.payFrom(flow);
    this.work++;
    if (frame.length >= TIMED_BYTES) {
      this.#timedFrom = this.#config.clock.now();
      this.#mostTimed = frame.length / PARSE_BYTES;
    }
    try {
      waitsFor = dispatch(socket, frame);
    } catch (error) {
      crashed(socket, error);
    }
    this.payFrom(undefined);
    this.#timedFrom = undefined;
    if (waitsFor !== undefined) return this.#wait(socket, frame, waitsFor);
    this.#takeToken(socket);
  }

  /** Lets a frame wait, at the head of its socket's queue. */
  #wait(socket: Socket, frame: string | Buffer, flow: Flow): void {
    if (socket.data.queue === undefined) this.#pause(socket);
    socket.data.queue?.unshift(frame);
    this.#enqueue(socket, flow);
  }

  #pause(socket: Socket): void {
    const session = socket.data;
    session.queue = [];
    session.peeks = 0;
    session.isPeeking = false;
    socket.pause();
    this.#relay.pausedTotal++;
  }

  #enqueue(socket: Socket, flow: Flow): void {
    socket.data.waitsFor = flow;
    flow.waiting.add(socket);
    this.#behind.add(flow);
    this.#wake();
  }

  /** What is next for a paused socket that had a frame handled, has a token again, or is held no longer. */
  #goOn(socket: Socket): void {
    const session = socket.data;
    const now = this.now();
    const { queue, goodbye } = session;
    if (queue === undefined || session.waitsFor !== undefined) return; // it ended, or waits for the room that it joins
    this.#peek(socket);
    if (queue.length === 0 && goodbye !== undefined) goodbye.leave();
    else if (session.bucket.isEmpty(now)) this.#waitForToken(socket);
    else if (queue.length > 0) this.#enqueue(socket, session.flow);
    else {
      session.queue = undefined;
      heard(socket, now);
      socket.resume();
    }
  }

  #waitForToken(socket: Socket): void {
    this.#empty.add(socket);
    this.#cancelRefill ??= this.#config.clock.after(REFILL_MS, () => this.#refill());
  }

  #refill(): void {
    this.#cancelRefill = undefined;
    this.#wake();
    this.#now = this.#config.clock.now();
    const waiting = [...this.#empty];
    this.#empty.clear();
    for (const socket of waiting) this.#goOn(socket);
  }

  /**
   * Looks whether a paused socket was reset: reads from it until something comes, PEEKS times at most, and only if bytes to it are
   * unsent. If a send of ours met the reset, only a read still tells of it. (A FIN of somebody who takes nothing is taken for a
   * reset, too.)
   */
  #peek(socket: Socket): void {
    const session = socket.data;
    if (session.isPeeking || session.peeks === PEEKS || session.goodbye !== undefined) return;
    if (socket.getBufferedAmount() === 0 || this.#relay.memory.isShort) return;
    session.peeks++;
    session.isPeeking = true;
    socket.resume();
  }

  #endPeek(socket: Socket): void {
    const session = socket.data;
    if (!session.isPeeking || session.queue === undefined) return;
    session.isPeeking = false;
    socket.pause();
  }

  /**
   * Keeps Bun's last compiler from what runs for each frame. It saves a full core some percent. But a machine that withholds CPU has
   * to compile with the little that it grants, and meanwhile the relay stands still. This is for good, and for every relay of the
   * process: Bun can't take it back.
   */
  #compileLess(): void {
    const { send, ping } = MESSAGES;
    const { take, isEmpty } = Bucket.prototype;
    withoutFTL([received, heard, dispatch, perform, isMessageType, send.parse, send.handle, ping.parse, ping.handle]);
    withoutFTL([parseUsualSend, indexBetween, isJson, isPlainJson, isParsed, isDigit, isSpace]);
    withoutFTL([memberText, skipBetween, skipValue, parseTargets, isIndex, isWhole]);
    withoutFTL([publish, publishNow, write, delivered, messageFrame, first, take, isEmpty]);
    withoutFTL([this.now, this.received, this.countCalls, this.publishLater, this.#wake, this.#takeIn, this.#takeToken]);
    withoutFTL([this.#begin, this.#end, this.#hasCredit, this.#mayHandle, this.#handle, this.payFrom, this.#bill]);
    withoutFTL([this.#wait, this.#pause, this.#enqueue, this.#serve, this.#goOn, this.#peek, this.#endPeek]);
    withoutFTL([this.#sendOutbox, this.#rest.after, this.#config.clock.now]);
  }
}

/**
 * The rests of a relay that is short of CPU. At the end of a turn it blocks for a moment, so that more frames are there to be
 * read, and to be sent, together: that saves most of what waking up for each one costs.
 *
 * A relay that is busy rests a little. It rests for longer if the machine withholds CPU: small ones let a process run for a few
 * milliseconds in each period, and then it stands still until the next. Then timers are late although the process has hardly
 * worked. What it used until then is what the machine grants, and from there on the rest is such that clearly less is used.
 * After some calm seconds the relay uses more and more, until it stands still again or doesn't rest any more.
 */
class Rest {
  readonly #config: Config;
  /** How long frames gather because CPU is withheld. */
  #ms = 0;
  #isBusy = false;
  /** Whether it looks each CPU_LOOK_MS: as long as there are turns, so that a quiet relay sleeps on. */
  #isLooking = false;
  #hadTurn = false;
  /** `Turns.deliveries` at the end of the last turn. */
  #deliveries = 0;
  /** Clock time, CPU time and deliveries at the last look. */
  #last = { at: 0, cpu: 0, deliveries: 0 };
  /** Share of a core that is used, averaged over USED_MS. */
  #used = 0;
  /** Share of a core that the machine grants; undefined: no limit is known. */
  #granted: number | undefined;
  /** Clock time and CPU time when CPU was withheld last. */
  #withheld = { at: -Infinity, cpu: 0 };
  #patienceMs = PATIENCE_MS;
  readonly #onWithheld: () => void;

  /** @param onWithheld called when it turns out that the machine withholds CPU */
  constructor(config: Config, onWithheld: () => void) {
    this.#config = config;
    this.#onWithheld = onWithheld;
  }

  /** Rests after a turn, if there is reason to. @param deliveries so far */
  after(begunAt: number, now: number, deliveries: number): void {
    const { clock } = this.#config;
    this.#hadTurn = true;
    this.#deliveries = deliveries;
    if (!this.#isLooking) {
      this.#measure(now);
      this.#lookLater(now);
    }
    const lasted = now - begunAt;
    const busyMs = this.#isBusy && lasted < LONG_TURN_MS ? REST_MS : 0;
    const ms = Math.max(0, busyMs, this.#ms - lasted);
    if (ms > 0) clock.rest(ms);
    if (this.#granted === undefined) return;
    const woke = clock.now();
    const late = woke - begunAt - ms;
    if (late > KNOWN_WITHHELD_MS) this.#adapt(woke, late);
  }

  #lookLater(now: number): void {
    this.#isLooking = true;
    this.#hadTurn = false;
    const due = now + CPU_LOOK_MS;
    this.#config.clock.after(CPU_LOOK_MS, () => {
      const now = this.#config.clock.now();
      this.#adapt(now, now - due - this.#ms);
      if (this.#hadTurn) this.#lookLater(now);
      else this.#isLooking = false;
    });
  }

  /** Looks at what was done since the last look. @returns the share of a core that was used */
  #measure(now: number): number {
    const last = this.#last;
    this.#last = { at: now, cpu: this.#config.cpuMs(), deliveries: this.#deliveries };
    const ms = now - last.at;
    if (ms === 0) return 1;
    const share = (this.#last.cpu - last.cpu) / ms;
    this.#isBusy = this.#deliveries - last.deliveries > ms * REST_ABOVE;
    this.#used += (share - this.#used) * Math.min(1, ms / USED_MS);
    return share;
  }

  /** Sets the rest by the use of CPU, and by how much later than due something happened. */
  #adapt(now: number, late: number): void {
    const since = now - this.#last.at;
    const withheld = late * (1 - this.#measure(now));
    if (withheld > (this.#granted === undefined ? WITHHELD_MS : KNOWN_WITHHELD_MS)) this.#standStill(now);
    else if (this.#granted !== undefined) this.#follow(this.#granted, now, since);
  }

  /** The machine has withheld CPU. */
  #standStill(now: number): void {
    const { cpu } = this.#last;
    const since = now - this.#withheld.at;
    if (since < CPU_LOOK_MS) return; // it was noticed already
    const between = since < AGAIN_MS ? (cpu - this.#withheld.cpu) / since : undefined;
    this.#withheld = { at: now, cpu };
    const isAtLimit = this.#granted !== undefined && this.#used > AT_LIMIT * this.#granted;
    if (between === undefined && !isAtLimit) return;
    if (since > this.#patienceMs) this.#patienceMs = Math.min(MOST_PATIENCE_MS, 2 * this.#patienceMs);
    if (this.#granted === undefined) this.#onWithheld();
    this.#granted = Math.max(between ?? 0, this.#used);
    this.#ms = Math.min(LONGEST_REST_MS, Math.max(WITHHELD_REST_MS, REST_GROWTH * this.#ms));
  }

  /** Makes the rest longer or shorter, so that the use of CPU becomes the wanted part of what is granted. */
  #follow(granted: number, now: number, since: number): void {
    const trial = Math.max(0, now - this.#withheld.at - this.#patienceMs) / TRIAL_MS;
    const wanted = (USED_PART + (1 - USED_PART) * trial ** 2) * granted;
    const ms = Math.max(1, this.#ms) * (this.#used / wanted) ** (since / SETTLE_MS);
    this.#ms = ms <= 1 ? 0 : Math.min(LONGEST_REST_MS, ms);
    this.#granted = Math.max(granted, this.#used);
    if (this.#ms > 0 || trial < 2) return;
    this.#granted = undefined; // there is no limit any more, or it is far away
    this.#patienceMs = PATIENCE_MS;
  }
}

// ---- Liveness: sockets come and go, dead ones are found, an exception ends one -------------------------------

function opened(socket: Socket): void {
  const session = socket.data;
  const { relay } = session;
  const { clock, maxConnections } = relay.config;
  relay.sockets.add(socket);
  session.home = addressOf(relay, session.address);
  session.home.sockets.add(socket);
  session.flow = session.home.flow;
  session.serial = ++relay.lastSerial;
  session.origin = useOrigin(relay, session.originName);
  session.heardAt = clock.now();
  if (relay.stage.name === "ended") return hangUp(socket, CloseCode.RESTARTING, "restarting");
  relay.cancelIdle();
  relay.connectionsTotal++;
  session.origin.connections++;
  relay.memory.lookIfManyOpened();
  if (relay.memory.isShort) return turnAway(socket, "memory");
  if (maxConnections !== 0 && relay.sockets.size > maxConnections) {
    const victim = first(relay.roomless) ?? socket;
    turnAway(victim, "connections");
    if (victim === socket) return;
  }
  relay.roomless.add(socket);
}

function turnAway(socket: Socket, cap: Cap): void {
  const { relay } = socket.data;
  capReached(relay, cap);
  relay.errors.capacity++;
  hangUp(socket, CloseCode.SERVER_FULL, "server full");
}

function heard(socket: Socket, now: number): void {
  const session = socket.data;
  session.heardAt = now;
  session.unanswered = 0;
  if (session.slot !== undefined) session.heardBytes = session.slot.room.published;
}

function received(socket: Socket, frame: string | Buffer): void {
  const { relay } = socket.data;
  heard(socket, relay.turns.now());
  relay.messagesIn++;
  relay.bytesIn += Buffer.byteLength(frame);
  relay.turns.received(socket, frame);
}

/** A ping from the other side. Bun answers it; that costs a frame. */
function pinged(socket: Socket): void {
  const { turns } = socket.data.relay;
  heard(socket, turns.now());
  turns.receivedPing(socket);
}

function ponged(socket: Socket): void {
  const { relay, unanswered } = socket.data;
  heard(socket, relay.config.clock.now()); // an answer makes no turn: a quiet relay sleeps on
  if (unanswered === 0) relay.turns.receivedPing(socket);
}

/** A socket is closed. If the other side did so properly, what it had sent before is handled first. */
function closed(socket: Socket, code: number): void {
  const { relay, home } = socket.data;
  relay.sockets.delete(socket);
  relay.roomless.delete(socket);
  home.sockets.delete(socket);
  releaseAddress(relay, home);
  if (code === NO_CLOSE_FRAME) gone(socket, code);
  else relay.turns.sayGoodbye(socket, () => gone(socket, code));
  watchIdle(relay);
}

function gone(socket: Socket, code: number): void {
  const { relay, slot, heardBytes, cut } = socket.data;
  relay.turns.discard(socket);
  if (slot === undefined) return;
  const { maxBufferedBytes } = relay.config;
  // Bun reports a cut for backpressure like any loss. Who wasn't heard from while a whole buffer was published was too slow.
  const wasTooSlow = maxBufferedBytes !== 0 && slot.room.published - heardBytes >= maxBufferedBytes;
  if (code !== NO_CLOSE_FRAME) return depart(socket, slot, "left");
  if (wasTooSlow && !cut) capReached(relay, "buffered bytes");
  depart(socket, slot, wasTooSlow || cut ? "slow" : "lost");
}

/**
 * Pings who has been quiet, and cuts who answered nothing for two sweeps: a dead phone sends no FIN. That is done in steps, so that
 * ten thousand pings hold nobody up. Forgets misses whose minute is over, and codes that were nowhere.
 */
function sweep(relay: Relay): void {
  const { clock } = relay.config;
  const sockets = [...relay.sockets];
  const size = Math.max(SWEEP_STEP_SOCKETS, Math.ceil(sockets.length / SWEEP_STEPS));
  const step = (from: number): void => {
    const now = clock.now();
    for (const socket of sockets.slice(from, from + size)) if (relay.sockets.has(socket)) pingOrCut(socket, now);
    if (from + size < sockets.length) clock.after(SWEEP_STEP_MS, () => step(from + size));
  };
  step(0);
  relay.lookUpMisses.sweep();
  relay.socketMisses.sweep();
  relay.searches.sweep();
}

function pingOrCut(socket: Socket, now: number): void {
  const session = socket.data;
  if (session.queue !== undefined || now - session.heardAt < QUIET_MS) return;
  if (session.unanswered === 0) socket.ping();
  if (session.unanswered === 2) socket.terminate();
  session.unanswered++;
}

function crashed(socket: Socket, error: unknown): void {
  const { relay, goodbye } = socket.data;
  reportException(relay, error);
  hangUp(socket, CloseCode.INTERNAL_ERROR, "internal error");
  goodbye?.leave(); // it has closed already: no close event will end it
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

/** Runs something every `ms` until the relay has ended. */
function repeat(relay: Relay, ms: number, run: () => void): void {
  relay.config.clock.after(ms, () => {
    if (relay.stage.name === "ended") return;
    try {
      run();
    } finally {
      repeat(relay, ms, run);
    }
  });
}

// ---- Memory: one bound for the whole process --------------------------------------------------------------

/**
 * Keeps the process below its limit of memory. Messages that are still arriving raise no event, and only the memory of the whole
 * process shows them. So it looks at that again before one core could have filled what is left. Above the limit it cuts what
 * covers the excess, and waits for the effect before it cuts for the same excess again. Meanwhile it doesn't read from
 * sockets that sent no whole message for QUIET_HELD_MS, except in small rooms and from addresses with few.
 */
class Memory {
  /** Memory is above the limit: newcomers are turned away. */
  isShort = false;
  /** Bytes that may still be sent before it looks again. Frames out take off what they deliver. */
  unlooked = Infinity;
  readonly #relay: Relay;
  /** What the process needs by itself. */
  readonly #base: number;
  #lastUsed = 0;
  /** What was cut, and the time (clock) until which that may still be in the figure. */
  #cuts: { bytes: number; until: number }[] = [];
  #collectedAt = -Infinity;
  /** When sockets were last held because memory was short (clock time). */
  #heldAt = -Infinity;
  #lookAtSockets = Infinity;
  #cancelNext = () => {};

  constructor(relay: Relay) {
    this.#relay = relay;
    this.#base = this.used();
  }

  /** Bytes that the process occupies; as before, if the system doesn't say: that takes a descriptor, and all may be in use. */
  used(): number {
    try {
      this.#lastUsed = this.#relay.config.memory();
    } catch {
      // Descriptors come back.
    }
    return this.#lastUsed;
  }

  /** Looks if the frames sent since the last look could have filled a good part of what was left then. */
  lookIfMuchWasSent(): void {
    if (this.unlooked < 0) this.look();
  }

  /** Looks if so many sockets are open that unfinished messages on all of them could fill what was left at the last look. */
  lookIfManyOpened(): void {
    if (this.#relay.sockets.size >= this.#lookAtSockets) this.look();
  }

  /** Whether something was cut that may still be in the figure. */
  get isFalling(): boolean {
    return this.#cuts.length > 0;
  }

  /** Looks at memory: cuts what is above the limit, holds sockets or reads on from them, and sets when to look again. */
  look(): void {
    const { maxMemoryBytes: limit, maxMessageBytes, clock } = this.#relay.config;
    if (limit === 0 || this.#relay.stage.name === "ended") return;
    const now = clock.now();
    let used = this.used();
    if (used > limit && now >= this.#collectedAt + EFFECT_MS) {
      this.#collectedAt = now;
      Bun.gc(true); // garbage is nobody's
      used = this.used();
    }
    this.isShort = used > limit;
    this.unlooked = Math.max(LOOK_LEAST_BYTES, (limit - used) / 4);
    const fit = maxMessageBytes === 0 ? 0 : (limit - used) / Math.max(maxMessageBytes, SOCKET_BYTES);
    this.#lookAtSockets = Math.max(this.#relay.sockets.size + LOOK_SOCKETS, fit);
    const freed = this.#cuts.reduce((sum, { bytes, until }) => sum + (until > now ? bytes : 0), 0);
    const excess = used - limit - freed;
    if (excess > 0) this.#cuts.push({ bytes: this.#cut(excess, used), until: now + EFFECT_MS });
    this.#cuts = this.#cuts.filter(({ bytes, until }) => bytes > 0 && until > now);
    const { turns } = this.#relay;
    if (this.isShort && this.isFalling) {
      turns.hold(this.#quietSockets(turns.now() - QUIET_HELD_MS));
      this.#heldAt = now;
    } else if (now < this.#heldAt + RELEASE_MS)
      turns.release(maxMessageBytes === 0 ? Infinity : Math.max(LOOK_SOCKETS, (limit - used) / maxMessageBytes));
    else turns.readOn();
    this.#cancelNext();
    this.#cancelNext = clock.after(this.#nextIn(limit - used), () => this.look());
  }

  /** The sockets that weren't heard since then (clock time), but for those of small rooms and of addresses with few. */
  #quietSockets(since: number): Iterable<Socket> {
    return this.#relay.sockets.values().filter(({ data: { heardAt, flow, home } }) => {
      const sockets = flow.room?.connected.size ?? home.sockets.size;
      return heardAt <= since && sockets > LOOK_SOCKETS;
    });
  }

  /** In how many ms to look again: sooner than one core can fill what is left, if the sockets that are open can hold so much. */
  #nextIn(left: number): number {
    const { maxMessageBytes } = this.#relay.config;
    if (this.isFalling || this.#relay.turns.isHolding || left <= 0) return LOOK_LEAST_MS;
    if (maxMessageBytes !== 0 && this.#relay.sockets.size * maxMessageBytes < left) return LOOK_MOST_MS;
    return Math.min(LOOK_MOST_MS, Math.max(LOOK_LEAST_MS, left / FILL_BYTES_PER_MS));
  }

  /** Cuts until an excess is covered. @returns how many bytes that should free */
  #cut(excess: number, used: number): number {
    capReached(this.#relay, "memory");
    let freed = 0;
    for (const { bytes, end } of this.#victims(() => used - freed)) {
      freed += bytes;
      end();
      if (freed >= excess) break;
    }
    return freed;
  }

  /**
   * What may go, in the order in which it does. Each is to be ended before the next is asked for.
   * @param used bytes that are left when those before have gone
   */
  *#victims(used: () => number): Generator<{ bytes: number; end(): void }> {
    const relay = this.#relay;
    const cut = (socket: Socket, bytes: number) => ({
      bytes,
      end() {
        socket.data.cut = true;
        socket.terminate();
      },
    });
    for (const { data } of [...relay.leaving]) {
      const bytes = data.queue?.reduce((sum, frame) => sum + FRAME_BYTES + frame.length, 0) ?? 0;
      yield { bytes, end: () => data.goodbye?.leave() };
    }
    for (;;) {
      const room = nearestToEnd(relay);
      if (room === undefined) break;
      const bytes = ROOM_BYTES + (room.state?.length ?? 0) + SLOT_BYTES * room.known.size;
      yield { bytes, end: () => dropRoom(room) };
    }
    const unsent = [...relay.sockets].map((socket) => ({ socket, bytes: socket.getBufferedAmount() }));
    for (const { socket, bytes } of unsent.sort((a, b) => b.bytes - a.bytes)) if (bytes > UNSENT_BYTES) yield cut(socket, bytes);
    /** What a socket holds on average by the memory of the process: unfinished messages show nowhere else. */
    const average = () => Math.max(SOCKET_BYTES, (used() - this.#base) / Math.max(1, relay.sockets.size));
    for (const socket of [...relay.roomless]) yield cut(socket, average());
    const { maxMessageBytes } = relay.config;
    const queued = relay.sockets.values().reduce((sum, { data }) => sum + FRAME_BYTES * (data.queue?.length ?? 0), 0);
    while (relay.sockets.size > 0) {
      // If the average is more than a member can hold, the rest isn't the members': it is still falling, or the process's own.
      if (maxMessageBytes !== 0 && average() > 2 * maxMessageBytes + queued / relay.sockets.size) return;
      const [most] = [...relay.addresses.values()].sort((a, b) => b.sockets.size - a.sockets.size);
      for (const socket of [...(most?.sockets ?? [])]) yield cut(socket, average());
    }
  }
}

// ---- Misses: guessing codes is bounded by address --------------------------------------------------------

/**
 * What an address counts as: an IPv6 address as its /56, an IPv4-mapped one as IPv4; undefined if the text is no address. Some
 * proxies write a port behind it.
 */
export function addressKey(text: string): string | undefined {
  const [, bracketed, dotted] = /^\s*(?:\[([^\]]*)\]|([\d.]+))(?::\d+)?\s*$/.exec(text) ?? [];
  const address = (bracketed ?? dotted ?? text.trim()).replace(/%.*$/, "");
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
  const [a = 0, b = 0, c = 0, d = 0] = groups;
  return `${[a, b, c, d & 0xff00].map((group) => group.toString(16)).join(":")}::/56`;
}

/** The codes and claims that weren't there, by the address that asked for them. */
class Misses {
  readonly #config: Config;
  /** In the order of their ends. */
  readonly #minutes = new Map<string, { count: number; readonly ends: number }>();

  constructor(config: Config) {
    this.#config = config;
  }

  /**
   * Whether an address has used up its minute. Then it finds only rooms in which somebody from it sits, and joins only those, or
   * with a clientId that the room knows.
   */
  isOver(address: string): boolean {
    const { clock, maxMissesPerMinute: most } = this.#config;
    const minute = this.#minutes.get(address);
    return most !== 0 && minute !== undefined && minute.count >= most && minute.ends > clock.now();
  }

  add(address: string): void {
    const now = this.#config.clock.now();
    const minute = this.#minutes.get(address);
    if (minute !== undefined && minute.ends > now) return void minute.count++;
    this.#minutes.delete(address); // it is the last in the order now
    this.#minutes.set(address, { count: 1, ends: now + MISS_WINDOW_MS });
    if (this.#minutes.size > ADDRESSES) dropFirst(this.#minutes);
  }

  /** Forgets minutes that are over. */
  sweep(): void {
    const now = this.#config.clock.now();
    for (const [address, { ends }] of this.#minutes) {
      if (ends > now) break;
      this.#minutes.delete(address);
    }
  }
}

// ---- Routing: which machine answers ------------------------------------------------------------------------

/** A request, as `route` sees it. */
export type Incoming = {
  /** The request's path. */
  path: string;
  /** Its query with the `?`, or empty. */
  query: string;
  /** Whether it asks for a WebSocket. */
  upgrade: boolean;
  /** It was sent on to here. */
  replayed: boolean;
  /** It was sent on from here, and came back. */
  failed: boolean;
  /** A sibling asks. */
  probe: boolean;
};

/** Where a request is answered. */
export type Route = "here" | { redirect: string } | Target | { searchSiblings: string };

/** What follows `/room/` in a path, as it stands there. */
const lookedUp = (path: string): string | undefined => /^\/room\/([^/]+)$/.exec(path)?.[1];

/** The room that a path asks for: `/room/CODE`, and `/CODE` if such codes are routed. */
function codeIn(path: string, cluster: Cluster | undefined): string | undefined {
  const code = path.slice(1);
  return lookedUp(path) ?? (cluster?.regionOf(code) === undefined ? undefined : code);
}

/** A part of a query that is called `instance`, each letter plain or percent-encoded. To parse a long query whole takes 3 ms. */
const PIN = /^(?:i|%69)(?:n|%6[eE])(?:s|%73)(?:t|%74)(?:a|%61)(?:n|%6[eE])(?:c|%63)(?:e|%65)(?:=|$)/;
const partsOf = (query: string): string[] => query.slice(1).split("&");

/** Percent-encodes what can't stand in a header. Bun does so itself, but not if the Host header is nonsense. */
const headerSafe = (text: string): string => text.toWellFormed().replace(/[^\x21-\x7e]/gu, encodeURIComponent);

/** The machine that a query pins, if it can be one. */
function pinIn(query: string, cluster: Cluster | undefined): string | undefined {
  const pin = new URLSearchParams(partsOf(query).find((part) => PIN.test(part))).get("instance");
  return pin !== null && cluster?.isMachine(pin) ? pin : undefined;
}

/**
 * Decides which machine answers. Headers that a client can forge only ever suppress a replay.
 * @param hasRoom whether this machine has the room of a code
 */
export function route(
  { path, query, upgrade, replayed, failed, probe }: Incoming,
  { cluster, instance }: Pick<Config, "cluster" | "instance">,
  hasRoom: (code: string) => boolean,
): Route {
  if (cluster === undefined || probe) return "here";
  const pin = pinIn(query, cluster);
  if (pin !== undefined && pin !== instance) {
    if (!replayed) return { instance: pin };
    if (upgrade) return "here"; // its join says what is wrong
    const rest = partsOf(query).filter((part) => !PIN.test(part));
    const target = path.replace(/^[/\\]+/, "/"); // `//host` would lead to another site
    return { redirect: headerSafe(rest.length > 0 ? `${target}?${rest.join("&")}` : target) };
  }
  if (path === "/health" || path === "/metrics") return "here";
  const code = codeIn(path, cluster);
  const region = code === undefined ? undefined : cluster.regionOf(code);
  if (code === undefined || region === undefined || failed || hasRoom(code)) return "here";
  if (region === cluster.region) return { searchSiblings: code };
  return replayed ? "here" : { region };
}

/** The form of a machine's id on Fly.io. */
const MACHINE_ID = /^[\w-]{1,64}$/;
/** The form of a peer's id. */
const PEER_ID = /^[\w.-]{1,64}$/;

/** Fly.io: a header in the answer makes its proxy send the request on. */
export function flyCluster(region: string | undefined, siblings: Siblings): Cluster {
  return {
    region: region ?? "",
    regionOf: (code) => (region === undefined ? undefined : regionOf(code)),
    isMachine: (id) => MACHINE_ID.test(id),
    replayedHeader: "fly-replay-src",
    failedHeader: "fly-replay-failed",
    replay(target) {
      const [[kind, name] = ["", ""]] = Object.entries(target);
      return reply(409, "", { "fly-replay": `${kind}=${name};timeout=5s;fallback=force_self` });
    },
    siblings,
    triesNext: false,
  };
}

/** Peers behind nginx, which are one region: a header in the answer makes nginx send the request to the peer that it names. */
export function nginxCluster(ids: ReadonlySet<string>, siblings: Siblings): Cluster {
  return {
    region: "",
    regionOf: (code) => (isCode(code) ? "" : undefined),
    isMachine: (id) => ids.has(id),
    replayedHeader: "x-relay-src",
    failedHeader: "x-relay-failed",
    // Without a content type and the like, which nginx would keep beside the peer's own.
    replay: (target) =>
      new Response(null, {
        headers: { ...EVERY_ANSWER, "X-Accel-Redirect": `/@relay/${"instance" in target ? target.instance : ""}` },
      }),
    siblings,
    triesNext: true,
  };
}

/** Sends a request on to where it belongs. */
function sendOn(relay: Relay, cluster: Cluster, outcome: (typeof REPLAYS)[number], target: Target): Response {
  relay.replays[outcome]++;
  return cluster.replay(target);
}

/** Why a search is aborted whose time is over. */
const LATE = "late";

/** Searches for rooms among the siblings. */
class Searches {
  readonly #relay: Relay;
  readonly #running = new Map<string, { readonly address: string; readonly result: Promise<string | undefined> }>();
  /** Codes that every sibling said it doesn't have, and until when that is believed (clock time). */
  readonly #nowhere = new Map<string, number>();
  #probes = 0;
  /** Probes that wait for one of the PROBES_AT_ONCE to end. */
  readonly #waiting = new Set<() => void>();

  constructor(relay: Relay) {
    this.#relay = relay;
  }

  /**
   * Looks for a room: all siblings are asked at once, and the first that has it ends the search.
   * @param address who wants to know
   * @returns the sibling's id, undefined if none said yes within SEARCH_MS, or "busy" if too many searches run
   */
  find(code: string, address: string, siblings: Siblings): Promise<string | undefined> | "busy" {
    const running = this.#running.get(code);
    if (running !== undefined) return running.result;
    if ((this.#nowhere.get(code) ?? 0) > this.#relay.config.clock.now()) return Promise.resolve(undefined);
    const own = this.#running.values().reduce((n, search) => n + (search.address === address ? 1 : 0), 0);
    if (this.#running.size >= SEARCHES || own >= SEARCHES_PER_ADDRESS) {
      capReached(this.#relay, "searches");
      return "busy";
    }
    const result = this.#search(code, siblings).finally(() => this.#running.delete(code));
    this.#running.set(code, { address, result });
    return result;
  }

  /** Forgets what isn't believed any more. */
  sweep(): void {
    const now = this.#relay.config.clock.now();
    for (const [code, until] of this.#nowhere) if (until <= now) this.#nowhere.delete(code);
  }

  async #search(code: string, siblings: Siblings): Promise<string | undefined> {
    const { clock } = this.#relay.config;
    const abort = new AbortController();
    const { promise: found, resolve: finish } = Promise.withResolvers<string | undefined>();
    let isNowhere = false;
    const askAll = async () => {
      const ids = await siblings.list(abort.signal);
      const answers = await Promise.all(ids.map((id) => this.#probe(siblings, id, code, abort.signal, finish)));
      isNowhere = answers.every((has) => has === false);
      finish(undefined);
    };
    const cancelLate = clock.after(SEARCH_MS, () => {
      abort.abort(LATE);
      finish(undefined);
    });
    askAll().catch(() => finish(undefined)); // without DNS there are only local rooms
    const id = await found;
    cancelLate();
    abort.abort();
    if (id === undefined && isNowhere) {
      this.#nowhere.delete(code);
      this.#nowhere.set(copyOf(code), clock.now() + NOWHERE_MS);
      if (this.#nowhere.size > NOWHERE_CODES) dropFirst(this.#nowhere);
    }
    return id;
  }

  /** Asks one sibling, when it is this request's turn. @returns undefined if it didn't say, or the search is over */
  async #probe(siblings: Siblings, id: string, code: string, signal: AbortSignal, finish: (id: string) => void) {
    if (this.#probes >= PROBES_AT_ONCE) await this.#place(signal);
    if (signal.aborted) return undefined;
    this.#probes++;
    const has = await orAborted(siblings.has(id, code, signal), signal).catch(() => undefined); // look-ups of names can't be aborted
    this.#probes--;
    const next = first(this.#waiting);
    if (next !== undefined) {
      this.#waiting.delete(next);
      next();
    }
    if (signal.aborted && signal.reason !== LATE) return undefined; // another sibling has it
    this.#relay.probes[has === undefined ? "failed" : has ? "found" : "missing"]++;
    if (has) finish(id);
    return has;
  }

  /** Waits until another probe has ended, or the search has. */
  #place(signal: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      this.#waiting.add(resolve);
      const giveUp = () => {
        if (this.#waiting.delete(resolve)) resolve();
      };
      signal.addEventListener("abort", giveUp, { once: true });
    });
  }
}

/** What a promise comes to, unless the signal comes first. @throws the signal's reason if it does */
function orAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  const { promise: aborted, reject } = Promise.withResolvers<never>();
  signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  return Promise.race([promise, aborted]);
}

/** Asks a sibling that has been found at an address. @throws if it doesn't say whether it has the room */
async function askAt(host: string, port: string | number, code: string, signal: AbortSignal): Promise<boolean> {
  const answer = await fetch(`http://${isIP(host) === 6 ? `[${host}]` : host}:${port}/room/${code}`, {
    headers: { "X-Party-Probe": "1" },
    redirect: "manual",
    proxy: false, // siblings are near, whatever HTTP_PROXY says
    keepalive: false, // a pooled connection that died would be tried twice
    signal,
  });
  await answer.body?.cancel();
  if (answer.status !== 200 && answer.status !== 404) throw new Error(`answered ${answer.status}`);
  return answer.status === 200;
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
      const [address = ""] = await lookUp(signal, (resolver) => resolver.resolve6(`${id}.vm.${app}.internal`));
      return askAt(address, port, code, signal);
    },
  };
}

/** Reads `<id> <region>,<id> <region>`. DNS cuts a text after 255 bytes, wherever that is: such a piece goes on in the next. */
export function parseMachines(texts: readonly string[]): { id: string; region: string }[] {
  const whole = texts.map((text) => (Buffer.byteLength(text) === 255 ? text : `${text},`)).join("");
  return whole.split(",").flatMap((entry) => {
    const [id, region] = entry.trim().split(" ");
    return id !== undefined && region !== undefined && MACHINE_ID.test(id) ? [{ id, region }] : [];
  });
}

/** The siblings as the operator lists them. @param template where one is asked: a host and port with `{id}` in it */
function peerSiblings(ids: ReadonlySet<string>, template: string, self: string): Siblings {
  const others = [...ids].filter((id) => id !== self);
  /** Look-ups by name that run: one at most for each peer, however long DNS hangs. */
  const lookUps = new Map<string, Promise<string[]>>();
  /** The addresses of a name: looked up as they are needed, because a peer may move. */
  const addressesOf = (name: string): Promise<string[]> => {
    let lookUp = lookUps.get(name);
    if (lookUp === undefined) {
      lookUp = Bun.dns
        .lookup(name, { backend: "c-ares" }) // it doesn't hang on the thread pool of `fetch`
        .then((found) => found.map(({ address }) => address))
        .finally(() => lookUps.delete(name));
      lookUps.set(name, lookUp);
    }
    return lookUp;
  };
  return {
    list: () => Promise.resolve(others),
    async has(id, code, signal) {
      const { hostname, port } = new URL(`http://${template.replaceAll("{id}", id)}`);
      const name = hostname.replace(/^\[|\]$/g, "");
      const addresses = isIP(name) === 0 ? await addressesOf(name) : [name];
      for (const address of addresses) {
        const has = await askAt(address, port || 80, code, signal).catch(() => undefined); // it may listen at one of them only
        if (has !== undefined) return has;
      }
      throw new Error(`${name} doesn't say`);
    },
  };
}

// ---- Metrics: one row a series ---------------------------------------------------------------------------

type Sample = [labels: Record<string, string>, value: number];
type Metric = [type: "gauge" | "counter", name: string, help: string, read: (relay: Relay) => number | Sample[]];

const by = (label: string, counts: Record<string, number>): Sample[] =>
  Object.entries(counts).map(([key, value]) => [{ [label]: key }, value]);

const OTHER_ORIGINS = "__other__";

/** The origins with the most of `key`; what `total` has beyond them is summed, so that nothing is lost of it. */
function byOrigin(relay: Relay, key: Exclude<keyof Origin, "name">, total: number): Sample[] {
  const cut = new Map<string, { count: number; connections: number }>(); // those that are cut to the same text are one
  for (const origin of relay.origins.values()) {
    const name = origin.name.slice(0, ORIGIN_SHOWN_LENGTH);
    if (name === OTHER_ORIGINS) continue; // somebody sent just that
    const { count, connections } = cut.get(name) ?? { count: 0, connections: 0 };
    cut.set(name, { count: count + origin[key], connections: connections + origin.connections });
  }
  const shown = [...cut].sort(([, a], [, b]) => b.count - a.count || b.connections - a.connections).slice(0, ORIGINS_SHOWN);
  const rest = total - shown.reduce((sum, [, { count }]) => sum + count, 0);
  const samples = shown.map(([origin, { count }]): Sample => [{ origin }, count]);
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
  ["counter", "party_sockets_disconnects_total", "Members gone by reason; slow (cut for backpressure or memory) is best effort",
    (relay) => by("reason", relay.disconnects)],
  ["counter", "party_sockets_replays_total", "Requests sent on: to a pinned instance, a region, a sibling; stale: a pin whose machine is gone; failed: came back",
    (relay) => by("outcome", relay.replays)],
  ["counter", "party_sockets_probes_total", "Siblings asked for a room, by what they answered",
    (relay) => by("outcome", relay.probes)],
  ["counter", "party_sockets_paused_total", "Times that a socket was paused: it sent too fast, its room or address had its share, or memory was short",
    (relay) => relay.pausedTotal],
  ["gauge", "party_sockets_draining", "1 after a stop signal",
    (relay) => (relay.stage.name === "serving" ? 0 : 1)],
  ["gauge", "party_sockets_event_loop_lag_seconds", `Worst delay of a timer in the past ${(LAG_MS * LAG_SAMPLES) / 1000} s`,
    (relay) => Math.max(0, ...relay.lag) / 1000],
  ["gauge", "process_resident_memory_bytes", "Memory that the process occupies",
    (relay) => relay.memory.used()],
  ["gauge", "process_heap_used_bytes", "JavaScript heap in use",
    () => heapSize()],
  ["gauge", "process_uptime_seconds", "Seconds since the relay started",
    (relay) => (relay.config.clock.now() - relay.startedAt) / 1000],
];

/** The text of a scrape; an older one if that is young enough. */
function metricsText(relay: Relay): string {
  const { clock, metricsMs } = relay.config;
  const now = clock.now();
  if (now >= relay.metricsText.until) relay.metricsText = { text: makeMetricsText(relay), until: now + metricsMs };
  return relay.metricsText.text;
}

function makeMetricsText(relay: Relay): string {
  const { instance, region } = relay.config;
  const common = { instance: instance || "local", region: region.toUpperCase() || "local", version: VERSION };
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

/** The headers of every answer. It closes its connection: who pipelines requests gets one answered. */
const EVERY_ANSWER = {
  "Access-Control-Allow-Origin": "*",
  "Access-Control-Expose-Headers": "X-Instance-Id",
  Connection: "close",
};

function reply(status: number, body: string | object, headers: Record<string, string> = {}): Response {
  const isText = typeof body === "string";
  return new Response(isText ? body : JSON.stringify(body), {
    status,
    headers: {
      ...EVERY_ANSWER,
      "Content-Type": isText ? "text/plain; charset=utf-8" : "application/json",
      "Cache-Control": "no-store",
      ...headers,
    },
  });
}

/** The address that a request comes from, as misses count it; and whether a proxy named it. */
function readAddress(relay: Relay, request: Request, server: Server<Session>): { address: string; isNamed: boolean } {
  const { addressHeader, log } = relay.config;
  const peer = server.requestIP(request)?.address ?? "";
  const named = addressHeader === undefined ? undefined : request.headers.get(addressHeader)?.split(",").at(-1);
  if (addressHeader === undefined && !relay.hasSeenForwarded && request.headers.has("x-forwarded-for")) {
    relay.hasSeenForwarded = true;
    log("address header ignored", { header: "X-Forwarded-For", hint: "behind a proxy, set ADDRESS_HEADER" });
  }
  return { address: knownKey(relay, named ?? peer) ?? knownKey(relay, peer) ?? peer, isNamed: named !== undefined };
}

/** `addressKey`, with the last result kept: a party that arrives from one address asks for the same. Saves 8 % of connecting. */
function knownKey(relay: Relay, text: string): string | undefined {
  if (relay.lastAddress.text !== text) relay.lastAddress = { text, key: addressKey(text) };
  return relay.lastAddress.key;
}

/** Answers one HTTP request, or sends it on to where the room is; undefined if it became a WebSocket. */
function answer(relay: Relay, request: Request, server: Server<Session>): Answer | Promise<Answer> {
  const { method, headers } = request;
  if (method === "OPTIONS") {
    const preflight = { "Access-Control-Allow-Methods": METHODS, "Access-Control-Allow-Headers": "*" };
    return reply(204, "", { ...preflight, "Access-Control-Max-Age": "86400", Allow: METHODS });
  }
  if (method !== "GET" && method !== "HEAD") return reply(405, { error: "Method not allowed" }, { Allow: METHODS });

  const { cluster } = relay.config;
  const { address, isNamed } = readAddress(relay, request, server);
  const upgrade = method === "GET" && headers.get("upgrade")?.toLowerCase() === "websocket";
  // Without a cluster nothing is routed, and the URL needn't be read.
  if (upgrade && cluster === undefined) return takeUpgrade(relay, request, server, address, undefined);
  // Cut out by hand, because the host before it may be anything that a client sends.
  const [, path = "/", query = ""] = /^(?:https?:\/\/[^/?]*)?([^?]*)(.*)$/i.exec(request.url) ?? [];
  const probe = cluster !== undefined && !isNamed && headers.get("x-party-probe") === "1";
  const failed = cluster !== undefined && headers.has(cluster.failedHeader);
  const replayed = failed || (cluster !== undefined && headers.has(cluster.replayedHeader));
  if (failed) relay.replays.failed++;

  const decision = route({ path, query, upgrade, replayed, failed, probe }, relay.config, (code) => relay.rooms.has(code));
  const code = codeIn(path, cluster);
  /** The code that an upgrade's path names; undefined if it has not the form of one (`/room/x`), or codes aren't routed here. */
  const wanted = code === undefined || cluster?.regionOf(code) === undefined ? undefined : code;
  const here = () =>
    upgrade
      ? takeUpgrade(relay, request, server, address, probe ? undefined : wanted)
      : serve(relay, path, code, probe ? undefined : address);
  if (cluster === undefined || decision === "here") {
    // A socket that asks for no room and no machine is as well off on another one.
    const sendsAway = cluster?.triesNext === true && relay.stage.name === "draining";
    if (upgrade && sendsAway && wanted === undefined && pinIn(query, cluster) === undefined)
      return reply(503, { error: "Draining" });
    return here();
  }
  if ("redirect" in decision) {
    relay.replays.stale++;
    return reply(302, "", { Location: decision.redirect });
  }
  if ("instance" in decision) return sendOn(relay, cluster, "instance", decision);
  if ("region" in decision) return sendOn(relay, cluster, "region", decision);
  const misses = upgrade ? relay.socketMisses : relay.lookUpMisses;
  if (misses.isOver(address)) return here();
  const found = relay.searches.find(decision.searchSiblings, address, cluster.siblings);
  if (found === "busy") {
    misses.add(address);
    return reply(503, { error: "Too many searches" }, { "Retry-After": "1" });
  }
  return found.then((id) => (id === undefined ? here() : sendOn(relay, cluster, "sibling", { instance: id })));
}

/**
 * Answers a plain request on this machine.
 * @param code the room that it asks for
 * @param address whose miss it is; undefined if misses don't count
 */
function serve(relay: Relay, path: string, code: string | undefined, address: string | undefined): Response {
  if (path === "/health") return reply(200, { status: "ok" });
  if (path === "/metrics") return reply(200, metricsText(relay), { "Content-Type": "text/plain; version=0.0.4; charset=utf-8" });
  const { dashboardUrl, instance } = relay.config;
  const room = code === undefined ? undefined : relay.rooms.get(code);
  if (code !== undefined && address !== undefined) {
    if (relay.lookUpMisses.isOver(address) && !(room && sitsIn(room, address))) return tooManyAttempts(relay);
    if (room === undefined) relay.lookUpMisses.add(address);
  }
  if (lookedUp(path) !== undefined) return roomAnswer(room, instance);
  if (dashboardUrl !== undefined) return reply(302, "", { Location: dashboardUrl });
  return reply(200, `rooms: ${relay.rooms.size}\nclients: ${relay.clients}\n`);
}

function tooManyAttempts(relay: Relay): Response {
  capReached(relay, "misses");
  relay.errors.too_many_attempts++;
  const headers = { "X-Instance-Id": relay.config.instance, "Retry-After": String(MISS_WINDOW_MS / 1000) };
  return reply(429, { error: REFUSALS.too_many_attempts }, headers);
}

function roomAnswer(room: Room | undefined, instance: string): Response {
  const headers = { "X-Instance-Id": instance };
  if (room === undefined) return reply(404, { error: REFUSALS.room_not_found }, headers);
  const { connected, maxClients, origin, locked, url } = room;
  return reply(200, { clients: connected.size, maxClients, origin: origin.name, locked: locked || undefined, url }, headers);
}

/** Makes a request a WebSocket. @param code the room that its path asks for, if such paths are routed */
function takeUpgrade(relay: Relay, request: Request, server: Server<Session>, address: string, code: string | undefined): Answer {
  const origin = request.headers.get("origin");
  const { allowedOrigins } = relay.config;
  // Refused or not: it was searched for.
  if (code !== undefined && !relay.rooms.has(code)) relay.socketMisses.add(address);
  if (origin !== null && allowedOrigins !== undefined && !allowedOrigins.has(origin.toLowerCase()))
    return reply(403, { error: "Origin not allowed" });
  if (request.headers.get("sec-websocket-version") !== WEBSOCKET_VERSION) {
    const wanted = { "Sec-WebSocket-Version": WEBSOCKET_VERSION, Upgrade: "websocket" };
    return reply(426, { error: "Unsupported WebSocket version" }, wanted); // Bun's own lacks the CORS headers
  }
  if ((request.headers.get("sec-websocket-protocol")?.length ?? 0) > PROTOCOLS_LENGTH)
    return reply(400, { error: "Sec-WebSocket-Protocol is too long" });
  const name = origin ? copyOf(origin.slice(0, ORIGIN_LENGTH)) : "unknown";
  if (server.upgrade(request, { data: new Session(relay, address, name) })) return undefined;
  return reply(400, { error: "Not a WebSocket handshake" });
}

// ---- Stopping --------------------------------------------------------------------------------------------

/** Begins a drain. Ends at once if it is draining already, or has no rooms. */
function drain(relay: Relay): void {
  const { clock, drainSeconds, log } = relay.config;
  if (relay.stage.name !== "serving") return end(relay, "drained");
  const begun = clock.now();
  const seconds = relay.rooms.size === 0 ? 0 : drainSeconds;
  const ends = begun + seconds * 1000;
  relay.stage = { name: "draining", ends };
  relay.cancelIdle();
  log("drain begins", { rooms: relay.rooms.size, clients: relay.clients, seconds });
  for (const socket of relay.sockets) tellDraining(socket);
  if (seconds === 0) return end(relay, "drained");
  const closingMs = Math.min(CLOSING_SECONDS, drainSeconds / 2) * 1000;
  clock.after(ends - closingMs - begun, () => closeEvenly(relay, ends - closingMs, closingMs));
}

/** Tells a socket how long a drain will still last, if there is one. */
function tellDraining(socket: Socket): void {
  const { stage, config } = socket.data.relay;
  if (stage.name !== "draining") return;
  const left = Math.max(0, stage.ends - config.clock.now());
  say(socket, { type: "draining", seconds: Math.ceil(left / 1000) });
}

/** Closes rooms one after another, so that their members don't all come back together; empty ones linger to the end. */
function closeEvenly(relay: Relay, begins: number, ms: number): void {
  const { clock } = relay.config;
  const rooms = [...relay.rooms.values()].filter((room) => room.connected.size > 0);
  let closed = 0;
  const step = () => {
    const passed = clock.now() - begins;
    for (const due = Math.floor((rooms.length * passed) / ms); closed < due && closed < rooms.length; closed++) {
      const room = rooms[closed];
      if (room !== undefined && room.connected.size > 0) closeRoom(room, "shutdown"); // an empty one lingers to the end
    }
    if (passed >= ms) end(relay, "drained");
    else if (relay.stage.name !== "ended") clock.after(CLOSING_STEP_MS, step);
  };
  step();
}

/** Closes what is left and stops listening; `ended` resolves once close frames had time to leave. */
function end(relay: Relay, how: "idle" | "drained"): void {
  if (relay.stage.name === "ended") return;
  relay.stage = { name: "ended" };
  const { clock, log } = relay.config;
  for (const room of [...relay.rooms.values()]) closeRoom(room, "shutdown");
  const roomless = relay.sockets.size;
  for (const socket of [...relay.sockets]) hangUp(socket, CloseCode.RESTARTING, "restarting");
  log(how === "idle" ? "idle" : "drain ends", { members: relay.disconnects.shutdown, roomless });
  void relay.server.stop();
  clock.after(Math.max(0, relay.flushedAt - clock.now()), () => relay.ended.resolve(how));
}

/** Ends a process that nobody has used for IDLE_EXIT_SECONDS: for platforms that start it again on demand. */
function watchIdle(relay: Relay): void {
  const { clock, idleExitSeconds } = relay.config;
  relay.cancelIdle();
  if (idleExitSeconds === 0 || relay.stage.name !== "serving") return;
  if (relay.sockets.size > 0 || relay.rooms.size > 0) return;
  relay.cancelIdle = clock.after(idleExitSeconds * 1000, () => end(relay, "idle"));
}

// ---- Start -----------------------------------------------------------------------------------------------

/** A relay that runs. */
export type RelayHandle = {
  /** Where it listens, `http://localhost:PORT`, or at its `host`. */
  readonly url: string;
  readonly port: number;
  /** Resolves when the relay has stopped: `idle` for lack of use, else `drained`. */
  readonly ended: Promise<"idle" | "drained">;
  /** Stops as on SIGTERM; called again, at once. @returns `ended` */
  drain(): Promise<"idle" | "drained">;
  /** Logs and counts an exception that no handler caught. */
  report(error: unknown): void;
  /** Stops at once, without waiting for anybody. */
  [Symbol.asyncDispose](): Promise<void>;
};

/**
 * Starts a relay. It shares no state with another one in the same process.
 * @param options what isn't named has its default
 * @throws ConfigError if it can't listen on the port
 */
export function startRelay(options: Partial<Config> = {}): RelayHandle {
  const config = { ...DEFAULTS, ...options };
  const relay = new Relay(config);
  relay.server = listen(relay);
  withoutFTL(runOnceAMember());
  relay.memory.look();
  repeat(relay, SWEEP_MS, () => sweep(relay));
  watchLag(relay);
  watchIdle(relay);
  warnOfDescriptors(config);
  const port = relay.server.port ?? config.port;
  const { promise: ended } = relay.ended;
  return {
    url: `http://${config.host === undefined ? "localhost" : isIP(config.host) === 6 ? `[${config.host}]` : config.host}:${port}`,
    port,
    ended,
    drain() {
      drain(relay);
      return ended;
    },
    report: (error) => reportException(relay, error),
    async [Symbol.asyncDispose]() {
      relay.stage = { name: "ended" }; // no room lingers
      await relay.server.stop(true);
      relay.ended.resolve("drained");
    },
  };
}

function listen(relay: Relay): Server<Session> {
  const { config } = relay;
  const options: Bun.Serve.Options<Session> = {
    port: config.port,
    ...(config.host === undefined ? {} : { hostname: config.host }), // else IPv6 and IPv4, as Fly.io's private network needs
    development: false, // an error page would show the source
    maxRequestBodySize: Number.MAX_SAFE_INTEGER, // no body is read; Bun's own 413 lacks the CORS headers
    reusePort: false, // which `development: false` turns on: a second relay would take half of the connections
    fetch: (request, server) => answer(relay, request, server),
    error(error) {
      reportException(relay, error);
      return reply(500, { error: "Internal error" });
    },
    websocket: {
      maxPayloadLength: config.maxMessageBytes || LARGEST_LIMIT,
      backpressureLimit: config.maxBufferedBytes,
      closeOnBackpressureLimit: true, // rather than drop frames in silence
      idleTimeout: 0, // every send would restart it; `sweep` does this
      sendPings: false,
      open: opened,
      message: received,
      ping: pinged,
      pong: ponged,
      close: closed,
      error: (error, socket) => crashed(socket, error),
    },
  };
  try {
    return Bun.serve(options);
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    const reason = code === "EADDRINUSE" ? "is in use: set PORT to another" : `can't be listened on: ${message}`;
    const where = config.host === undefined ? "" : ` of HOST ${config.host}`;
    throw new ConfigError([`Port ${config.port}${where} ${reason}`], config.log);
  }
}

/** Says in the log if the system gives this process fewer descriptors than the sockets that it may have. */
function warnOfDescriptors({ maxConnections, log }: Config): void {
  let limits: string;
  try {
    limits = readFileSync("/proc/self/limits", "utf8");
  } catch {
    return; // only Linux tells
  }
  const descriptors = Number(/^Max open files\s+(\d+)/m.exec(limits)?.[1]);
  const needed = maxConnections + DESCRIPTORS_BESIDE;
  if (maxConnections !== 0 && descriptors < needed)
    log("few descriptors", { limit: descriptors, needed, hint: "raise `ulimit -n`, or lower MAX_CONNECTIONS" });
}

/** Of what runs once for each member, that for which Bun's last compiler took 20 ms when the seven thousandth had connected. */
function runOnceAMember(): ((...args: never[]) => unknown)[] {
  const { canTakeJoiner, discard } = Turns.prototype;
  const { join } = MESSAGES;
  return [
    ...[knownKey, opened, addressOf, useOrigin, parseObject, join.parse, Misses.prototype.isOver, canTakeJoiner, addSlot],
    ...[unremember, settle, Memory.prototype.lookIfManyOpened, discard, releaseAddress, watchIdle],
  ];
}

/** Keeps Bun's last compiler (FTL) from functions, for good. It compiles once more what has run some seven thousand times. */
function withoutFTL(functions: readonly ((...args: never[]) => unknown)[]): void {
  for (const each of functions) noFTL(each as () => void);
}

/** The limits that differ from their defaults. */
function changedLimits(config: Config): Record<string, number> {
  return Object.fromEntries(LIMIT_NAMES.filter((name) => config[name] !== LIMITS[name]).map((name) => [name, config[name]]));
}

async function main(): Promise<void> {
  try {
    const config = configFromEnv(process.env);
    const relay = startRelay(config);
    process.on("uncaughtException", relay.report);
    process.on("unhandledRejection", relay.report);
    for (const signal of ["SIGTERM", "SIGINT", "SIGHUP"]) process.on(signal, relay.drain);
    const labels = { instance: config.instance || "local", region: config.region || "local" };
    config.log("listening", { url: relay.url, version: VERSION, port: relay.port, ...labels, ...changedLimits(config) });
    await relay.ended;
    process.exit(0);
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    error.log("start refused", { reason: error.message });
    console.error(error.message); // a line a fault; in the log all are on one
    process.exit(1);
  }
}

if (import.meta.main) await main();
