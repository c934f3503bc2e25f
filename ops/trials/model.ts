/**
 * A model test of the relay: random steps against a real one, every frame compared with what a plain model expects.
 *
 *     bun run ops/trials/model.ts --seed 7 --steps 20000
 *
 * The model is written from the README's tables of messages and shares no code with the relay. Reading order: Model
 * (what must happen), Frames (what clients write), Run (how both are driven and compared).
 */
import { badUsage, readFlags } from "../shared/flags.ts";
import { Random } from "../shared/random.ts";
import { Client } from "../shared/client.ts";
import type { RelayHandle } from "../../server.ts";
import { TestClock, testRelay } from "../shared/relay.ts";

// ---------------------------------------------------------------------------------------------------------
// Model
// ---------------------------------------------------------------------------------------------------------

/** The limits and labels of the relay under test; small, so that they are reached. */
const CONFIG = {
  instance: "m/1", // needs percent-encoding in a URL
  region: "xyz",
  maxClientsPerRoom: 9,
  maxRooms: 5,
  maxMessagesPerSecond: 0, // a burst must not be paused
  maxMissesPerMinute: 4,
  knownPerRoom: 3,
  knownInAll: 4,
  drainSeconds: 60,
  addressHeader: "X-Forwarded-For",
};

/** What an operator may have set for all rooms; the seed picks. */
type Defaults = { defaultLingerSeconds: number; defaultHostGraceSeconds: number };

const CLIENT_ID_LENGTH = 128;
const STATE_BYTES = 16384;
const URL_BYTES = 512;
const TARGETS = 64;
const ORIGIN_LENGTH = 256;
const OFFER_MS = 300_000;
const MINUTE_MS = 60_000;

/** A message ending in this stands for any message that starts so: the rest is the relay's to word. */
const ELLIPSIS = "…";

/** The code of each refusal whose code isn't `bad_request` or `not_host`. */
const CODES: Record<string, string> = {
  "Invalid JSON": "bad_json",
  "Unknown message type": "unknown_type",
  "Already in a room": "already_in_room",
  "Not in a room": "not_in_room",
  "Room not found": "room_not_found",
  "Room is full": "room_full",
  "Room is locked": "room_locked",
  "Kicked from room": "kicked",
  "Claim not found": "claim_not_found",
  "Target peer not found": "peer_not_found",
  "Too many attempts": "too_many_attempts",
  "State too large": "state_too_large",
  "Server draining": "draining",
  "Server full": "capacity",
};

/** A frame that must come: an object, or the exact text if a client's `data` is in it. */
type Expected = string | ({ type: string } & Record<string, unknown>);

/** A frame that a client sends, and the text of its last `data`, if it has one. */
type Sent = { text: string | Uint8Array<ArrayBuffer>; data?: string };

/** One socket as the model sees it. */
class Twin {
  expected: Expected[] = [];
  /** How the relay must have closed it. */
  closed: { code: number; reason: string } | undefined;
  slot: Slot | undefined;
  constructor(
    readonly origin: string,
    /** What its address counts as. */
    readonly address: string,
  ) {}
}

class Slot {
  twin: Twin | undefined;
  barred = false;
  /** Its token, if a client that is still there saw it. */
  offer: { token: string | undefined; until: number } | undefined;
  /** When it became vacant, or the room had another host: a number that grows. */
  vacantSince = 0;
  constructor(
    readonly room: Room,
    readonly index: number,
    public clientId: string,
  ) {}

  /** Whether it may be forgotten. */
  get absent(): boolean {
    return this.twin === undefined && this.index !== this.room.host;
  }
}

class Room {
  /** Those that are remembered, at their index. */
  readonly slots: Slot[] = [];
  /** How many there have been. */
  issued = 0;
  host = 0;
  locked = false;
  state: string | undefined;
  /** When a room without members ends. */
  lingersUntil: number | undefined;
  /** When the host's absence has consequences. */
  graceUntil: number | undefined;
  /** When the one that runs of these two countdowns began: a number that grows. */
  countdownBegan = 0;
  constructor(
    readonly code: string,
    readonly origin: string,
    /** The address of who created it. */
    readonly address: string,
    readonly linger: number,
    /** 0: none. */
    readonly hostGrace: number,
    readonly migrate: boolean,
    readonly url: string | undefined,
    public maxClients: number,
  ) {}

  /** When its countdown is over. */
  get due(): number {
    return this.lingersUntil ?? this.graceUntil ?? Infinity;
  }

  get connected(): Slot[] {
    return this.slots.filter((slot) => slot.twin !== undefined);
  }

  get remembered(): Slot[] {
    return this.slots.flatMap((slot) => slot);
  }

  add(clientId: string): Slot {
    const slot = new Slot(this, this.issued++, clientId);
    this.slots[slot.index] = slot;
    return slot;
  }

  of(clientId: string): Slot | undefined {
    return this.remembered.find((slot) => slot.clientId === clientId);
  }
}

type Fields = Map<string, unknown>;
/** The message of a refusal, with its code if that isn't the usual one; or nothing. */
type Outcome = string | { message: string; code: string } | undefined;

/** The codes and claims that weren't there, by address. */
class Misses {
  readonly #minutes = new Map<string, { count: number; ends: number }>();

  over(address: string, now: number): boolean {
    const minute = this.#minutes.get(address);
    return minute !== undefined && now < minute.ends && minute.count >= CONFIG.maxMissesPerMinute;
  }

  add(address: string, now: number): void {
    const minute = this.#minutes.get(address);
    if (minute !== undefined && now < minute.ends) minute.count++;
    else this.#minutes.set(address, { count: 1, ends: now + MINUTE_MS });
  }

  get ends(): number[] {
    return [...this.#minutes.values()].map(({ ends }) => ends);
  }
}

/** What a relay does by the specification: time and frames go in, expectations pile up at each socket. */
class Model {
  readonly rooms = new Map<string, Room>();
  readonly twins = new Set<Twin>();
  now: number;
  drainEnds: number | undefined;
  /** Frames that the relay must have read and written. */
  read = 0;
  written = 0;
  /** Refusals by code, joins by kind, and members that went, by reason. */
  readonly errors = new Map<string, number>();
  readonly joins = new Map<string, number>();
  readonly gone = new Map<string, number>();
  /** The codes that the relay has drawn, for the rooms that are to be created; and the tokens, for offers. */
  codes: string[] = [];
  tokens: string[] = [];
  readonly #lookUpMisses = new Misses();
  readonly #socketMisses = new Misses();
  /** How many absent slots there are in the rooms that an address has created; first the one whose number changed longest ago. */
  readonly #absent = new Map<string, number>();
  /** Slots that went to another clientId. */
  claimed = 0;
  /** Slots that were forgotten for their number: in one room, and in all. */
  readonly forgotten = { inRoom: 0, inAll: 0 };
  #departures = 0;
  #countdowns = 0;

  constructor(
    now: number,
    readonly defaults: Defaults,
  ) {
    this.now = now;
  }

  get clients(): number {
    return [...this.rooms.values()].reduce((sum, room) => sum + room.connected.length, 0);
  }

  /** The times at which a room ends or changes its host, or an address may guess again, if nothing else happens. */
  get deadlines(): number[] {
    const misses = [...this.#lookUpMisses.ends, ...this.#socketMisses.ends];
    return [...[...this.rooms.values()].flatMap((room) => room.lingersUntil ?? room.graceUntil ?? []), ...misses];
  }

  /** The times at which offers end. */
  get offerEnds(): number[] {
    return [...this.rooms.values()].flatMap(({ slots }) => slots.flatMap(({ offer }) => offer?.until ?? []));
  }

  open(originHeader: string | undefined, address: string): Twin {
    const twin = new Twin(originHeader?.slice(0, ORIGIN_LENGTH) ?? "unknown", address);
    this.twins.add(twin);
    return twin;
  }

  /** The client closed the socket, or it was lost. */
  lose(twin: Twin): void {
    this.#countAbsent();
    this.twins.delete(twin);
    if (twin.slot !== undefined) this.#depart(twin.slot);
    this.#endIfDrained();
  }

  handle(twin: Twin, { text, data }: Sent): void {
    if (twin.closed !== undefined) return;
    this.#countAbsent();
    this.read++;
    const fields = typeof text === "string" ? parse(text) : undefined;
    const refusal = fields === undefined ? "Invalid JSON" : this.#act(twin, fields, data ?? "");
    if (refusal !== undefined) this.#refuse(twin, refusalFrame(refusal));
    if (refusal === "Too many attempts") this.#close(twin, 1008, "too many attempts");
    this.#endIfDrained();
  }

  advance(ms: number): void {
    this.now += ms;
    const due = [...this.rooms.values()].filter((room) => room.due <= this.now);
    for (const room of due.sort((a, b) => a.due - b.due || a.countdownBegan - b.countdownBegan)) {
      this.#countAbsent();
      if (room.lingersUntil !== undefined) this.rooms.delete(room.code);
      else if (room.migrate) this.#setHost(room, room.connected[0]!.index);
      else this.#closeRoom(room, 4001, "room closed");
    }
    if (this.drainEnds !== undefined && this.drainEnds <= this.now)
      for (const room of this.rooms.values()) this.#closeRoom(room, 1012, "restarting");
    this.#endIfDrained();
  }

  drain(): void {
    this.drainEnds = this.now + (this.rooms.size === 0 ? 0 : CONFIG.drainSeconds * 1000);
    for (const twin of this.twins) this.#tellDraining(twin);
    this.#endIfDrained();
  }

  /** What `GET /room/:code` answers: status and body. */
  lookUp(code: string, address: string): { status: number; body: object } {
    const room = this.rooms.get(code);
    if (this.#lookUpMisses.over(address, this.now) && !this.#sits(address, room))
      return { status: 429, body: { error: "Too many attempts" } };
    if (room === undefined) {
      this.#lookUpMisses.add(address, this.now);
      return { status: 404, body: { error: "Room not found" } };
    }
    const { maxClients, origin, url } = room;
    const body = { clients: room.connected.length, maxClients, origin, locked: room.locked || undefined, url };
    return { status: 200, body };
  }

  /** Whether a member from this address is in a room. */
  #sits(address: string, room: Room | undefined): boolean {
    return room?.connected.some(({ twin }) => twin?.address === address) ?? false;
  }

  #refuse(twin: Twin, frame: ReturnType<typeof refusalFrame> & { missing?: number[] }): void {
    count(this.errors, frame.code);
    this.#tell(twin, frame);
  }

  #tell(twin: Twin, frame: Expected): void {
    this.written++;
    twin.expected.push(frame);
  }

  #tellAll(room: Room, frame: Expected, except?: Slot): void {
    for (const slot of room.connected) if (slot !== except) this.#tell(slot.twin!, frame);
  }

  #tellDraining(twin: Twin): void {
    if (this.drainEnds === undefined) return;
    this.#tell(twin, { type: "draining", seconds: Math.ceil((this.drainEnds - this.now) / 1000) });
  }

  #close(twin: Twin, code: number, reason: string): void {
    twin.closed = { code, reason };
    this.twins.delete(twin);
    if (twin.slot === undefined) return;
    this.#vacate(twin.slot);
    count(this.gone, { 1012: "shutdown", 4000: "replaced", 4001: "room_closed", 4002: "kicked" }[code] ?? "?");
  }

  /** A slot's socket is gone from it. */
  #vacate(slot: Slot): void {
    if (slot.twin !== undefined) slot.twin.slot = undefined;
    slot.twin = undefined;
    slot.vacantSince = ++this.#departures;
  }

  /** Too many absent players: who is gone longest is forgotten. */
  #forget(room: Room): void {
    const drop = (slots: Slot[]) => {
      const slot = slots.reduce((a, b) => (a.vacantSince <= b.vacantSince ? a : b));
      delete slot.room.slots[slot.index];
      this.#countAbsent();
    };
    this.#countAbsent();
    const absent = room.slots.filter((slot) => slot.absent);
    if (absent.length > CONFIG.knownPerRoom) {
      drop(absent);
      this.forgotten.inRoom++;
    }
    if ([...this.#absent.values()].reduce((sum, each) => sum + each, 0) <= CONFIG.knownInAll) return;
    // Of addresses that have equally many, the room's own counts first, then the one that has had so many for longest.
    const own: [string, number] = [room.address, this.#absent.get(room.address) ?? 0];
    const [most] = [own, ...this.#absent].reduce((most, each) => (each[1] > most[1] ? each : most));
    const rooms = [...this.rooms.values()].filter(({ address }) => address === most);
    drop(rooms.flatMap(({ slots }) => slots.filter((slot) => slot.absent)));
    this.forgotten.inAll++;
  }

  #countAbsent(): void {
    const counts = new Map<string, number>([...this.#absent.keys()].map((address) => [address, 0]));
    for (const { address, slots } of this.rooms.values())
      counts.set(address, (counts.get(address) ?? 0) + slots.filter((slot) => slot.absent).length);
    for (const [address, count] of counts) {
      if (this.#absent.get(address) === count) continue;
      this.#absent.delete(address);
      if (count > 0) this.#absent.set(address, count);
    }
  }

  #closeRoom(room: Room, code: number, reason: string): void {
    this.rooms.delete(room.code);
    for (const slot of room.connected) this.#close(slot.twin!, code, reason);
  }

  #endIfDrained(): void {
    if (this.drainEnds === undefined || this.rooms.size > 0) return;
    for (const twin of this.twins) this.#close(twin, 1012, "restarting");
  }

  #sit(twin: Twin, slot: Slot): void {
    twin.slot = slot;
    slot.twin = twin;
    slot.room.lingersUntil = undefined;
    this.#watchHost(slot.room);
  }

  #depart(slot: Slot, reason?: "left" | "kicked"): void {
    const { room, index } = slot;
    if (reason !== "kicked") {
      this.#vacate(slot);
      count(this.gone, "left");
    }
    this.#forget(room);
    this.#tellAll(room, { type: "peer_left", index, reason });
    this.#watchHost(room);
    if (room.connected.length > 0) return;
    if (room.linger === 0 || reason === "left") return void this.rooms.delete(room.code);
    room.lingersUntil = this.now + room.linger * 1000;
    room.countdownBegan = ++this.#countdowns;
  }

  /** The grace runs while the host's slot is vacant and others are connected. */
  #watchHost(room: Room): void {
    const missed = room.connected.length > 0 && room.slots[room.host]?.twin === undefined;
    if (!missed || room.hostGrace === 0) room.graceUntil = undefined;
    else if (room.graceUntil === undefined) {
      room.graceUntil = this.now + room.hostGrace * 1000;
      room.countdownBegan = ++this.#countdowns;
    }
  }

  #setHost(room: Room, index: number): void {
    const former = room.slots[room.host];
    if (former !== undefined && former.twin === undefined) former.vacantSince = ++this.#departures;
    room.host = index;
    this.#forget(room);
    this.#tellAll(room, { type: "host", index });
    this.#watchHost(room);
  }

  #act(twin: Twin, fields: Fields, data: string): Outcome {
    const type = fields.get("type");
    switch (type) {
      case "create":
        return this.#create(twin, fields);
      case "join":
        return this.#join(twin, fields);
      case "ping": {
        const t = fields.get("t");
        this.#tell(twin, { type: "pong", t: Number.isFinite(t) ? t : undefined, now: this.now });
        return;
      }
      case "send":
      case "leave":
      case "offer_slot":
        if (twin.slot === undefined) return "Not in a room";
        if (type === "offer_slot") return this.#offer(twin.slot, fields);
        return type === "leave" ? this.#leave(twin.slot) : this.#send(twin.slot, fields, data);
      case "set_state":
      case "close_room":
      case "set_room":
      case "kick":
      case "set_host":
        if (twin.slot === undefined) return "Not in a room";
        return this.#hostAct(type, twin.slot, fields, data);
      default:
        return "Unknown message type";
    }
  }

  #create(twin: Twin, fields: Fields): Outcome {
    const { defaultLingerSeconds, defaultHostGraceSeconds } = this.defaults;
    const fault = clientIdFault(fields) ?? maxClientsFault(fields) ?? optionsFault(fields, defaultHostGraceSeconds);
    if (fault !== undefined) return fault;
    if (twin.slot !== undefined) return "Already in a room";
    if (this.drainEnds !== undefined) return "Server draining";
    if (this.rooms.size >= CONFIG.maxRooms) {
      const [most] = this.lingering();
      const [next] = (most ?? []).sort((a, b) => a.lingersUntil! - b.lingersUntil!);
      if (next === undefined) return "Server full";
      this.rooms.delete(next.code);
    }
    const code = this.codes.shift() ?? "(no code)";
    const template = fields.get("url") as string | undefined;
    const room = new Room(
      code,
      twin.origin,
      twin.address,
      (fields.get("linger") as number | undefined) ?? defaultLingerSeconds,
      (fields.get("hostGrace") as number | undefined) ?? defaultHostGraceSeconds,
      fields.get("migrate") === true,
      template === undefined ? undefined : fillUrl(template, code),
      fields.get("maxClients") as number,
    );
    this.rooms.set(code, room);
    this.#sit(twin, room.add(fields.get("clientId") as string));
    const { instance, region } = CONFIG;
    this.#tell(twin, { type: "created", room: code, instance, region, index: 0, url: room.url });
    return;
  }

  /** Lingering rooms by the address that created them, the most first. */
  lingering(): Room[][] {
    const byAddress = Map.groupBy(this.rooms.values(), (room) => (room.lingersUntil === undefined ? "" : room.address));
    byAddress.delete("");
    return [...byAddress.values()].sort((a, b) => b.length - a.length);
  }

  #join(twin: Twin, fields: Fields): Outcome {
    const code = fields.get("room");
    const fault = clientIdFault(fields) ?? (typeof code !== "string" || code === "" ? "room is required" : undefined);
    if (fault !== undefined) return fault;
    const claim = fields.get("claim");
    if (fields.has("claim") && typeof claim !== "string") return "claim must be a string";
    if (twin.slot !== undefined) return "Already in a room";
    const room = this.rooms.get(code as string);
    const clientId = fields.get("clientId") as string;
    const { address } = twin;
    let slot = room?.of(clientId);
    if (slot === undefined && this.#socketMisses.over(address, this.now) && !this.#sits(address, room))
      return "Too many attempts";
    if (room === undefined) {
      this.#socketMisses.add(address, this.now);
      return "Room not found";
    }
    if (slot === undefined && claim !== undefined) {
      slot = room.remembered.find(({ barred, offer }) => !barred && offer?.token === claim && this.now < offer.until);
      if (slot === undefined) {
        this.#socketMisses.add(address, this.now);
        return "Claim not found";
      }
    }
    const old = slot?.twin;
    if (slot?.barred) return "Kicked from room";
    if (slot === undefined && room.locked) return "Room is locked";
    if (old === undefined && room.connected.length >= room.maxClients) return "Room is full";

    if (slot !== undefined && slot.clientId !== clientId) {
      slot.clientId = clientId;
      slot.offer = undefined;
      this.claimed++;
    }
    const resumed = (slot !== undefined && old === undefined) || undefined;
    count(this.joins, old !== undefined ? "replaced" : resumed ? "resumed" : "new");
    if (old !== undefined) this.#close(old, 4000, "replaced");
    slot ??= room.add(clientId);
    const { index } = slot;
    if (old === undefined) this.#tellAll(room, { type: "peer_joined", index, resumed });
    this.#sit(twin, slot);
    const peers = room.connected.filter((other) => other !== slot).map((other) => other.index);
    const host = room.host === 0 ? undefined : room.host;
    const locked = room.locked || undefined;
    this.#tell(twin, { type: "joined", room: room.code, index, peers, host, resumed, locked, url: room.url });
    if (room.state !== undefined) this.#tell(twin, stateFrame(room.state));
    this.#tellDraining(twin);
    return;
  }

  #leave(slot: Slot): Outcome {
    this.#tell(slot.twin!, { type: "left", room: slot.room.code });
    this.#depart(slot, "left");
    return;
  }

  #offer(own: Slot, fields: Fields): Outcome {
    const { room } = own;
    const index = fields.has("index") ? fields.get("index") : own.index;
    if (index !== own.index && own.index !== room.host) return "Only the host can offer another's slot";
    const slot = typeof index === "number" ? room.slots[index] : undefined;
    if (slot === undefined || slot.barred) return "Target peer not found";
    const token = this.tokens.shift();
    slot.offer = { token, until: this.now + OFFER_MS };
    this.#tell(own.twin!, { type: "slot_offer", index: slot.index, token });
    return;
  }

  #send({ room, index, twin }: Slot, fields: Fields, data: string): Outcome {
    if (!fields.has("data")) return "data is required";
    const frame = `{"type":"message","from":${index},"data":${data}}`;
    if (!fields.has("to")) {
      const echo = fields.get("echo") === true;
      this.#tellAll(room, frame, echo ? undefined : room.slots[index]);
      return;
    }
    const to = fields.get("to");
    const targets = new Set<unknown>(Array.isArray(to) ? to : [to]);
    if (targets.size === 0 || targets.size > TARGETS) return "Target peer not found";
    if (![...targets].every((target) => Number.isInteger(target) && (target as number) >= 0)) return "Target peer not found";
    const indices = ([...targets] as number[]).sort((a, b) => a - b);
    const missing = indices.filter((target) => room.slots[target]?.twin === undefined);
    for (const target of indices) {
      const member = room.slots[target]?.twin;
      if (member !== undefined) this.#tell(member, frame);
    }
    if (missing.length === 0) return;
    if (!Array.isArray(to)) {
      const isAway = room.slots[to as number]?.barred === false;
      return isAway ? { message: "Target peer not found", code: "peer_away" } : "Target peer not found";
    }
    this.#refuse(twin!, { ...refusalFrame("Target peer not found"), missing });
    return;
  }

  #hostAct(type: string, slot: Slot, fields: Fields, data: string): Outcome {
    const { room } = slot;
    if (slot.index !== room.host) {
      if (type === "set_state") return "Only the host can set state";
      if (type === "close_room") return "Only the host can close the room";
      return `Only the host can ${ELLIPSIS}`;
    }
    const index = fields.get("index");
    const target = typeof index === "number" ? room.slots[index] : undefined;
    switch (type) {
      case "set_state":
        if (!fields.has("data")) return "State data is required";
        if (new TextEncoder().encode(data).length > STATE_BYTES) return "State too large";
        room.state = data;
        this.#tellAll(room, stateFrame(data), slot);
        return;
      case "close_room":
        this.#closeRoom(room, 4001, "room closed");
        return;
      case "set_room": {
        const locked = fields.get("locked");
        if (fields.has("locked") && typeof locked !== "boolean") return "locked must be true or false";
        const fault = fields.has("maxClients") ? maxClientsFault(fields) : undefined;
        if (fault !== undefined) return fault;
        if (fields.has("locked")) room.locked = locked as boolean;
        if (fields.has("maxClients")) room.maxClients = fields.get("maxClients") as number;
        this.#tellAll(room, { type: "room", locked: room.locked, maxClients: room.maxClients });
        return;
      }
      case "kick": {
        if (!isWholeFrom(index, 0, room.issued - 1)) return "Target peer not found";
        if (target === undefined) return; // forgotten
        if (target === slot) return "Cannot kick yourself";
        target.barred = true;
        const { twin } = target;
        if (twin === undefined) return;
        this.#close(twin, 4002, "kicked");
        this.#depart(target, "kicked");
        return;
      }
      default: // set_host
        if (target?.twin === undefined) return "Target peer not found";
        if (target !== slot) this.#setHost(room, target.index);
        return;
    }
  }
}

function parse(text: string): Fields | undefined {
  try {
    const value: unknown = JSON.parse(text);
    if (typeof value !== "object" || value === null || Array.isArray(value)) return undefined;
    return new Map(Object.entries(value));
  } catch {
    return undefined;
  }
}

function count(counts: Map<string, number>, key: string): void {
  counts.set(key, (counts.get(key) ?? 0) + 1);
}

function refusalFrame(refusal: NonNullable<Outcome>): { type: string; message: string; code: string } {
  if (typeof refusal === "object") return { type: "error", ...refusal };
  const message = refusal;
  const hostOnly = message.startsWith("Only the host can");
  return { type: "error", message, code: CODES[message] ?? (hostOnly ? "not_host" : "bad_request") };
}

const stateFrame = (data: string): string => `{"type":"state","data":${data}}`;

const isWholeFrom = (value: unknown, least: number, most: number): boolean =>
  Number.isInteger(value) && (value as number) >= least && (value as number) <= most;

function clientIdFault(fields: Fields): string | undefined {
  const clientId = fields.get("clientId");
  if (typeof clientId !== "string" || clientId === "") return "clientId is required";
  return clientId.length > CLIENT_ID_LENGTH ? "clientId is too long" : undefined;
}

function maxClientsFault(fields: Fields): string | undefined {
  const maxClients = fields.get("maxClients");
  if (!isWholeFrom(maxClients, 1, Infinity)) return "maxClients must be a positive number";
  const { maxClientsPerRoom: most } = CONFIG;
  return (maxClients as number) > most ? `maxClients must be at most ${most}` : undefined;
}

function optionsFault(fields: Fields, defaultGrace: number): string | undefined {
  if (fields.has("linger") && !isWholeFrom(fields.get("linger"), 0, 300)) return "linger must be a whole number from 0 to 300";
  if (fields.has("hostGrace") && !isWholeFrom(fields.get("hostGrace"), 0, 3600))
    return "hostGrace must be a whole number from 0 to 3600";
  if (fields.has("migrate") && typeof fields.get("migrate") !== "boolean") return "migrate must be true or false";
  const grace = (fields.get("hostGrace") as number | undefined) ?? defaultGrace;
  if (fields.get("migrate") === true && grace === 0) return "migrate needs hostGrace";
  const url = fields.get("url");
  const fits = typeof url === "string" && new TextEncoder().encode(url).length <= URL_BYTES;
  if (fields.has("url") && !(fits && fillUrl(url, "AbCd12") !== undefined)) return `url${ELLIPSIS}`;
  return undefined;
}

function fillUrl(template: string, code: string): string | undefined {
  const filled = template
    .replaceAll("{room}", encodeURIComponent(code))
    .replaceAll("{instance}", encodeURIComponent(CONFIG.instance));
  const url = /[{}]/.test(filled) ? null : URL.parse(filled);
  return url?.protocol === "https:" ? url.href : undefined;
}

// ---------------------------------------------------------------------------------------------------------
// Frames: what clients write, well-formed and not
// ---------------------------------------------------------------------------------------------------------

/** A member's name and the JSON text of its value. */
type Member = [name: string, text: string];

const SPACES = ["", "", " ", "\n", "\t", "\r\n", "   "];
const ODD_NUMBERS = "0 -0 1 -1 9007199254740993 123456789012345678901234567890 1e400 -1E+400 1e-400 0.10 1.0 2E0 1e5".split(" ");
const ODD_STRINGS = [
  '""',
  '"\\u0041\\/\\b\\f"',
  '"\\ud800"',
  '"\\ud83c\\udf89 🎉 é"',
  '"\\\\"',
  '"\\\\\\""',
  '"}"',
  '"]}"',
  '"{\\"type\\":\\"send\\"}"',
  '"\\",\\"to\\":0"',
  '",\\"to\\":1"',
  '"\u2028\u2029\u007f\ufeff"',
  '"\\u0000"',
];
const ODD_VALUES = [
  "null",
  "true",
  "false",
  '{"a":1,"to":0}',
  '{"type":"left","from":3,"from":4}',
  '{"__proto__":{"x":1}}',
  "[[[[[[[[[]]]]]]]]]",
  '{ "b" : 1 , "a" : [ 1 ,2 ]\n}',
  '{"\\u0061":1,"a":2,"a":3}',
];

/** Any JSON value as text, odd spellings first. */
function jsonText(dice: Random, depth = 3): string {
  const kinds = { number: 4, string: 4, value: 4, array: depth, object: depth, long: 0.1, deep: 0.05 };
  switch (dice.weighted(kinds)) {
    case "number":
      return dice.pick(ODD_NUMBERS);
    case "string":
      return dice.pick(ODD_STRINGS);
    case "value":
      return dice.pick(ODD_VALUES);
    case "long":
      return `"${dice.pick(["x", "é", "\\n", "\\u00e9"]).repeat(1 + dice.below(8000))}"`;
    case "deep": {
      const levels = 1 + dice.below(20_000);
      return "[".repeat(levels) + "]".repeat(levels);
    }
    case "array": {
      const items = Array.from({ length: dice.below(4) }, () => padded(dice, jsonText(dice, depth - 1)));
      return `[${items.join(",") || dice.pick(SPACES)}]`;
    }
    case "object": {
      const members = Array.from({ length: dice.below(4) }, () => {
        const name = padded(dice, dice.pick([...ODD_STRINGS, '"to"', '"data"', '"type"', '"a"']));
        return `${name}:${padded(dice, jsonText(dice, depth - 1))}`;
      });
      return `{${members.join(",") || dice.pick(SPACES)}}`;
    }
  }
}

const padded = (dice: Random, text: string): string => dice.pick(SPACES) + text + dice.pick(SPACES);

/** A JSON string with some of its characters escaped that needn't be. */
function escaped(dice: Random, value: string): string {
  const unit = (c: string) =>
    dice.chance(0.2) ? `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}` : JSON.stringify(c).slice(1, -1);
  return `"${value.split("").map(unit).join("")}"`;
}

/** A JSON text of exactly so many bytes in UTF-8. */
const textOfBytes = (bytes: number): string => `"${"é".repeat((bytes - 2) >> 1)}${bytes % 2 === 0 ? "" : "x"}"`;

/**
 * A frame with these members: mostly as `JSON.stringify` writes it, else in any order, with white space, escaped names,
 * unknown members, and earlier members of the same name that don't count.
 */
function spell(dice: Random, members: Member[]): Sent {
  const data = members.find(([name]) => name === "data")?.[1];
  if (dice.chance(0.6)) return { text: `{${members.map(([name, text]) => `"${name}":${text}`).join(",")}}`, data };
  const written = [...members];
  if (dice.chance(0.7)) written.sort(() => dice.next() - 0.5);
  if (dice.chance(0.3))
    for (const name of ["from", "x", "__proto__", "toString", "Data", "type "])
      if (dice.chance(0.3)) written.splice(dice.below(written.length + 1), 0, [name, jsonText(dice, 1)]);
  if (dice.chance(0.3)) {
    const [name] = dice.pick(members);
    const at = written.findIndex((member) => member[0] === name);
    written.splice(dice.below(at + 1), 0, [name, jsonText(dice, 1)]);
  }
  const names = dice.chance(0.3) ? (name: string) => escaped(dice, name) : JSON.stringify;
  const pad = dice.chance(0.5) ? (text: string) => padded(dice, text) : (text: string) => text;
  const text = pad(`{${written.map(([name, value]) => `${pad(names(name))}:${pad(value)}`).join(",")}}`);
  return { text, data };
}

const INVALID = [
  "",
  " ",
  "null",
  "5",
  '"send"',
  "[]",
  '[{"type":"leave"}]',
  "{",
  "{'type':'leave'}",
  "{type:1}",
  '{"type":"leave"},',
  '{"type":"leave"}{"type":"leave"}',
  '\ufeff{"type":"leave"}',
  '{"type":"send","data":}',
  '{"type":"send","data": }',
  '{"type":"send","data":1,}',
  '{"type":"send","data":1}}',
  '{"type":"send","data":1 2}',
  '{"type":"send","data":01}',
  '{"type":"send","data":NaN}',
  '{"type":"send","data":"\n"}',
  '{"type":"send","data":"\\x41"}',
  '{"type":"send","data":1},"from":5',
  '{"type":"send","data":1,"to":01}',
  '{"type":"send","data":1,"to":0',
  '{"type":"send","data":"a,"to":0}',
  '{"type":"send","data":{,"to":0}',
  '{"type":"send","to":0,"data":,"to":0}',
  '{"type":"send","data":1\u00a0}',
  '{"type":"send","data":/**/1}',
];

const UNKNOWN_TYPES = [
  ...['""', '"SEND"', '"send "', '"send\\u0000"', '"toString"', '"__proto__"', '"constructor"', '"message"'],
  ...["null", "5", '["send"]', "{}", "true"],
];

const GOOD_URLS = [
  "https://pad.example/{room}",
  "https://pad.example/?r={room}&m={instance}",
  "https://PAD.example:443/a b/../{room}#{room}",
  "HTTPS://{room}.pad.example/é/{instance}",
  `https://pad.example/${"é".repeat(246)}`, // 512 bytes
];
const BAD_URLS = [
  "http://pad.example/{room}",
  "javascript:alert(1)",
  "//pad.example/{room}",
  "pad.example/{room}",
  "",
  "{room}",
  "https://pad.example/{code}",
  "https://pad.example/{room",
  "https://pad.example/}",
  "https://pad.example/{{room}}",
  "https://",
  "https://pad.example:99999/",
  `https://pad.example/${"é".repeat(246)}x`,
].map((url) => JSON.stringify(url));

const CLIENT_IDS = ["a", "b", "c", "d", 'é 🎉 "q" \\ \0', "x".repeat(CLIENT_ID_LENGTH), "\ud800", "\ud801"];
const TOO_LONG = `"${"x".repeat(CLIENT_ID_LENGTH + 1)}"`;
const BAD_CLIENT_IDS = [TOO_LONG, '""', "null", "5", '["a"]', TOO_LONG, undefined];
const BAD_MAX_CLIENTS = ["10", "10", "0", "-1", "1.5", '"3"', "null", "true", "1e400", "1e300", "10", "[]"];
const BAD_ROOMS = ['""', "null", "5", "[]", undefined];
const BAD_INDICES = ["-1", "1.5", '"0"', "null", "true", "[0]", "99", "{}", undefined];
const LINGERS = ["0", "1", "2", "5", "5.0", "20", "60", "299", "300"];
const GRACES = ["0", "1", "2", "5", "2e1", "20", "3600"];
const BAD_CLAIMS = ["null", "5", "[]", '""', '"x"', `"${"A".repeat(22)}"`];
const NOT_BOOLEAN = ["null", "0", '"true"', "[]"];
const BAD_TARGETS = [
  ...["-1", "0.5", '"0"', '""', "null", "true", "{}", "1e400", "99", "12345678901"],
  ...["[]", "[[0]]", "[-1]", "[0,null]", '["0"]', "[0,1.5]", "[0,1e400]"],
  JSON.stringify(Array.from({ length: TARGETS + 1 }, (_, i) => i)),
];

const HOST_MESSAGES = { set_state: 7, close_room: 1, set_room: 6, kick: 5, set_host: 3 };

/** Writes frames that fit what the model knows: mostly to the point, now and then wrong. */
class Writer {
  #fresh = 0;
  /** Codes of rooms that were there once. */
  readonly codes: string[] = [];
  /** Tokens that were offered once. */
  readonly tokens: string[] = [];

  constructor(
    readonly dice: Random,
    readonly model: Model,
  ) {}

  /** Some frames that one socket sends at once. */
  batch(twin: Twin, mayCreate: boolean): Sent[] {
    const { dice } = this;
    let room = twin.slot?.room;
    let index = twin.slot?.index;
    return Array.from({ length: dice.chance(0.7) ? 1 : 2 + dice.below(4) }, () => {
      const type = this.#type(room, index, mayCreate);
      if (type === "garbage") return this.#garbage();
      const sent = this.#message(type, room, index);
      if (type === "leave") room = index = undefined;
      if (type === "create" || type === "join") room ??= dice.pick([...this.model.rooms.values(), undefined]);
      return sent;
    });
  }

  #type(room: Room | undefined, index: number | undefined, mayCreate: boolean): string {
    const { dice } = this;
    const roomless = room === undefined;
    const host = roomless ? 3 : index === room.host ? 30 : 9;
    const type = dice.weighted({
      ping: 3,
      garbage: 5,
      create: !mayCreate || this.#tied() ? 0 : roomless ? 30 : 3,
      join: roomless ? 70 : 1,
      send: roomless ? 3 : 45,
      leave: roomless ? 1 : 2,
      offer_slot: roomless ? 1 : 6,
      host,
    });
    if (type !== "host") return type;
    return index === room?.host ? dice.weighted(HOST_MESSAGES) : dice.pick(Object.keys(HOST_MESSAGES));
  }

  /** If two rooms would go at the same time, or two addresses have as many that linger, either may make place for a new one. */
  #tied(): boolean {
    const lingering = this.model.lingering();
    const times = lingering.flat().map((room) => room.lingersUntil);
    return new Set(times).size < times.length || (lingering.length > 1 && lingering[0]?.length === lingering[1]?.length);
  }

  #message(type: string, room: Room | undefined, index: number | undefined): Sent {
    return spell(this.dice, [["type", `"${type}"`], ...this.#members(type, room, index)]);
  }

  #members(type: string, room: Room | undefined, own: number | undefined): Member[] {
    const { dice } = this;
    const wrong = dice.chance(0.12);
    switch (type) {
      case "create":
        return this.#create();
      case "join":
        return this.#join();
      case "send": {
        const members: Member[] = dice.chance(0.03) ? [] : [["data", jsonText(dice)]];
        const to = dice.weighted({ all: 55, one: 25, several: 12, wrong: 8 });
        if (to === "one") members.push(["to", numberText(dice, this.#index(room))]);
        if (to === "wrong") members.push(["to", dice.pick(BAD_TARGETS)]);
        if (to === "several") {
          const targets = Array.from({ length: 1 + dice.below(5) }, () => numberText(dice, this.#index(room)));
          if (dice.chance(0.1)) targets.push(...Array.from({ length: TARGETS }, (_, i) => `${i % 50}`));
          members.push(["to", `[${targets.join(",")}]`]);
        }
        if (dice.chance(0.2)) members.push(["echo", dice.chance(0.7) ? "true" : dice.pick(["false", "1", '"true"', "null"])]);
        if (dice.chance(0.3)) members.reverse();
        return members;
      }
      case "set_state": {
        if (wrong) return [];
        const data = dice.chance(0.3) ? textOfBytes(STATE_BYTES + dice.below(3) - 1) : jsonText(dice);
        return [["data", data]];
      }
      case "set_room": {
        const members: Member[] = [];
        if (dice.chance(0.6)) members.push(["locked", wrong ? dice.pick(NOT_BOOLEAN) : `${dice.chance(0.25)}`]);
        if (dice.chance(0.6)) members.push(["maxClients", this.#maxClients()]);
        return members;
      }
      case "kick":
      case "set_host": {
        const index = dice.chance(0.05) ? own : this.#index(room);
        const text = wrong ? dice.pick(BAD_INDICES) : numberText(dice, index ?? 0);
        return text === undefined ? [] : [["index", text]];
      }
      case "offer_slot": {
        if (dice.chance(0.5)) return [];
        const index = dice.chance(0.2) ? own : this.#index(room);
        const text = wrong ? dice.pick(BAD_INDICES) : numberText(dice, index ?? 0);
        return text === undefined ? [] : [["index", text]];
      }
      case "ping":
        return dice.chance(0.5) ? [["t", dice.pick([...ODD_NUMBERS, '"1"', "null", "[]"])]] : [];
      default:
        return [];
    }
  }

  #create(): Member[] {
    const { dice } = this;
    const members: Member[] = [];
    const clientId = this.#clientId(undefined);
    if (clientId !== undefined) members.push(["clientId", clientId]);
    if (!dice.chance(0.03)) members.push(["maxClients", this.#maxClients()]);
    const wrong = () => dice.chance(0.1);
    if (dice.chance(0.6)) members.push(["linger", wrong() ? dice.pick(["-1", "301", "1.5", "null", '"5"']) : dice.pick(LINGERS)]);
    if (dice.chance(0.45))
      members.push(["hostGrace", wrong() ? dice.pick(["-1", "3601", "1.5", "null", "true"]) : dice.pick(GRACES)]);
    if (dice.chance(0.4)) members.push(["migrate", wrong() ? dice.pick(NOT_BOOLEAN) : `${dice.chance(0.8)}`]);
    if (dice.chance(0.3)) members.push(["url", dice.chance(0.2) ? dice.pick(BAD_URLS) : JSON.stringify(dice.pick(GOOD_URLS))]);
    return members;
  }

  #join(): Member[] {
    const { dice } = this;
    const room = dice.pick([...this.model.rooms.values(), undefined]);
    const members: Member[] = [];
    const clientId = this.#clientId(room);
    if (clientId !== undefined) members.push(["clientId", clientId]);
    const code = JSON.stringify(this.code(room));
    const text = dice.chance(0.04) ? dice.pick(BAD_ROOMS) : code;
    if (text !== undefined) members.push(["room", text]);
    if (dice.chance(0.3)) members.push(["claim", this.#claim(room)]);
    return members;
  }

  /** An offer's token, mostly one that is open. */
  #claim(room: Room | undefined): string {
    const { dice } = this;
    const open = room?.slots.flatMap(({ offer }) => offer?.token ?? []) ?? [];
    if (open.length > 0 && dice.chance(0.8)) return JSON.stringify(dice.pick(open));
    const old = this.tokens.slice(-6);
    return old.length > 0 && dice.chance(0.6) ? JSON.stringify(dice.pick(old)) : dice.pick(BAD_CLAIMS);
  }

  /** A room's code; without a room, one that names none, or perhaps a room that is gone. */
  code(room: Room | undefined): string {
    const { dice } = this;
    if (room !== undefined && dice.chance(0.95)) return room.code;
    return dice.pick([...this.codes.slice(-5), "zzzzzz", "0OIl00", ` ${room?.code}`, `${room?.code}1`, "é", "../x"]);
  }

  #clientId(room: Room | undefined): string | undefined {
    const { dice } = this;
    if (dice.chance(0.05)) return dice.pick(BAD_CLIENT_IDS);
    if (dice.chance(0.15)) return `"fresh ${this.#fresh++}"`;
    const known = room?.remembered.map((slot) => slot.clientId) ?? [];
    const clientId = known.length > 0 && dice.chance(0.4) ? dice.pick(known) : dice.pick(CLIENT_IDS);
    return dice.chance(0.1) ? escaped(dice, clientId) : JSON.stringify(clientId);
  }

  #maxClients(): string {
    const { dice } = this;
    return dice.chance(0.06) ? dice.pick(BAD_MAX_CLIENTS) : numberText(dice, dice.pick([1, 2, 3, 4, 5, 6, 9, 9]));
  }

  /** A slot of the room, mostly a connected one; now and then one that was never issued. */
  #index(room: Room | undefined): number {
    const { dice } = this;
    const connected = room?.connected ?? [];
    if (connected.length > 0 && dice.chance(0.7)) return dice.pick(connected).index;
    return dice.below((room?.issued ?? 0) + 1);
  }

  #garbage(): Sent {
    const { dice } = this;
    switch (dice.weighted({ invalid: 5, unknown: 2, binary: 1, damaged: 4 })) {
      case "invalid":
        return { text: dice.pick(INVALID) };
      case "unknown":
        return spell(dice, dice.chance(0.1) ? [["to", "0"]] : [["type", dice.pick(UNKNOWN_TYPES)]]);
      case "binary":
        return { text: new TextEncoder().encode(dice.pick(['{"type":"leave"}', "", "\0\xff"])) };
      case "damaged": {
        const text = String(this.#message("send", undefined, undefined).text);
        const at = dice.below(text.length);
        const damaged = text.slice(0, at) + dice.pick(["", "}", ",", '"', "\\", "\x01"]) + text.slice(at + 1);
        return { text: parse(damaged) === undefined ? damaged : "{" };
      }
    }
  }
}

/** A number as clients may spell it. */
function numberText(dice: Random, n: number): string {
  if (dice.chance(0.8)) return `${n}`;
  return dice.pick([`${n}.0`, `${n}e0`, n === 0 ? "-0" : `${n * 10}e-1`]);
}

// ---------------------------------------------------------------------------------------------------------
// Run
// ---------------------------------------------------------------------------------------------------------

const SOCKETS = 18;
const DRAIN_STEPS = 0.03; // the part of the steps that comes after a stop signal
const CLOSING_MS = 5_000; // the end of a drain, in which the order of the rooms is the relay's choice
const CHUNK_MS = 5_000; // less than a relay's tick for dead peers: the sockets are heard in each
const PATIENCE_MS = 5_000; // for an answer that comes in microseconds, or never
const HISTORY = 12; // steps that a failure shows
const SHOWN = 300; // characters of a frame that a failure shows

/** What the address header may say, and what that counts as. */
const ADDRESSES = [
  ["192.0.2.1", "a"],
  ["::ffff:192.0.2.1", "a"],
  ["198.51.100.7, 192.0.2.2", "b"],
  ["2001:db8:0:ff01::1", "c"],
  ["2001:DB8::ffAA:0:0:0:2", "c"],
  ["2001:db8:0:fe01::1", "d"],
] as const;

const ORIGINS = [undefined, "https://a.example", "https://b.example:8443", `https://${"x".repeat(300)}.example`];

/** What a run of the model test met. */
export type Tally = {
  /** Frames compared. */
  frames: number;
  /** Frames compared by type, refusals by message, closes by code. */
  seen: Map<string, number>;
};

/** What to run. */
export type RunOptions = {
  /** A whole number that decides all choices. */
  seed: number;
  /** Steps: one socket's frames, one socket more or less, or some time passing. */
  steps: number;
  /** Called after each step, with how many there were. */
  progress?: (step: number, tally: Tally) => void;
};

/** A client and what the model says of it. */
type Link = { name: string; client: Client; twin: Twin };
type Got = { texts: string[]; closed?: { code: number; reason: string } };

/**
 * Plays random steps against a fresh relay and compares all that its clients see with the model.
 * @throws if they differ; the message says how to repeat it, the last steps, and what was expected and seen
 */
export async function runModel(options: RunOptions): Promise<Tally> {
  const run = new Run(options);
  try {
    await run.play();
  } finally {
    await run.relay[Symbol.asyncDispose]();
  }
  return run.tally;
}

class Run {
  readonly clock = new TestClock();
  readonly relay: RelayHandle;
  readonly model: Model;
  readonly dice: Random;
  readonly writer: Writer;
  readonly tally: Tally = { frames: 0, seen: new Map() };
  readonly #links: Link[] = [];
  readonly #history: string[] = [];
  #step = 0;
  #opened = 0;
  #mark = 0;

  constructor(readonly options: RunOptions) {
    this.dice = new Random(options.seed);
    const defaults = { defaultLingerSeconds: this.dice.pick([0, 4]), defaultHostGraceSeconds: this.dice.pick([0, 6]) };
    this.relay = testRelay({ ...CONFIG, ...defaults, clock: this.clock });
    this.model = new Model(this.clock.now(), defaults);
    this.writer = new Writer(this.dice, this.model);
  }

  async play(): Promise<void> {
    const { steps, progress } = this.options;
    const drainAt = Math.floor(steps * (1 - DRAIN_STEPS));
    while (++this.#step <= steps && !this.#over) {
      if (this.#step === drainAt) await this.#drain();
      else await this.#act();
      progress?.(this.#step, this.tally);
    }
    if (!this.#over) await this.#outlast();
    await this.#sync(this.#links);
    const { claimed, forgotten } = this.model;
    const noted = { claimed, "forgotten in a room": forgotten.inRoom, "forgotten in all rooms": forgotten.inAll };
    for (const [label, times] of Object.entries(noted)) if (times > 0) this.tally.seen.set(label, times);
    let ended = false;
    void this.relay.ended.then(() => (ended = true));
    await this.#until("the relay to end", async () => {
      this.clock.advance(CLOSING_MS);
      await new Promise(setImmediate);
      return ended || undefined;
    });
  }

  /** Whether the relay has no more to do. */
  get #over(): boolean {
    return this.model.drainEnds !== undefined && this.model.rooms.size === 0;
  }

  // ---- steps

  async #act(): Promise<void> {
    const link = this.#actor();
    if (link === undefined) return this.#open();
    const { length } = this.#links;
    switch (
      this.dice.weighted({
        open: length >= SOCKETS ? 0 : length < SOCKETS / 2 ? 16 : 6,
        frames: 70,
        close: this.model.drainEnds === undefined ? 3 : 6,
        terminate: 1.5,
        abandon: this.model.drainEnds === undefined ? 2.5 : 0,
        advance: 8,
        look: 4,
      })
    ) {
      case "open":
        return this.#open();
      case "frames": {
        return this.#frames(link, this.writer.batch(link.twin, true));
      }
      case "close": {
        const together = this.dice.chance(0.4) ? this.#mates(link) : [];
        for (const each of [link, ...together]) if (this.#links.includes(each)) await this.#close(each);
        return this.#over ? undefined : this.#look();
      }
      case "terminate":
        return this.#terminate(link);
      case "abandon": {
        // Of the rooms that linger then, several addresses have some.
        const lingers = ({ twin }: Link) => (twin.slot?.room.linger ?? 0) > 20;
        const [first] = [link, ...this.#links].filter(lingers);
        for (const each of first === undefined ? [] : [...this.#mates(first), first])
          if (this.#links.includes(each)) await this.#close(each);
        return;
      }
      case "advance":
        return this.#advance(this.#time());
      case "look":
        return this.#look();
    }
  }

  /** A socket to act with; hosts more often, for they can do more. */
  #actor(): Link | undefined {
    const hosts = this.#links.filter(({ twin: { slot } }) => slot !== undefined && slot.index === slot.room.host);
    return this.dice.pick(hosts.length > 0 && this.dice.chance(0.3) ? hosts : this.#links);
  }

  async #open(): Promise<void> {
    const origin = this.dice.pick(ORIGINS);
    const [header, address] = this.dice.pick(this.dice.chance(0.4) ? ADDRESSES.slice(0, 2) : ADDRESSES); // most from one
    const name = `#${++this.#opened}`;
    this.#note(`${name} opens, from ${address}`);
    const headers = { "X-Forwarded-For": header, ...(origin === undefined ? {} : { Origin: origin }) };
    const client = await this.#patiently("an upgrade", Client.open(this.relay.url, headers));
    this.#links.push({ name, client, twin: this.model.open(origin, address) });
  }

  /** One socket sends some frames at once. */
  async #frames(link: Link, batch: Sent[]): Promise<void> {
    const mates = this.#mates(link);
    const ping = this.#ping();
    this.#noteFrames(link, batch);
    for (const { text } of [...batch, ping]) link.client.send(text);
    const got = await this.#read(link, ping);
    this.model.codes = got.texts.flatMap((text) => (text.startsWith('{"type":"created"') ? roomIn(text) : []));
    this.model.tokens = got.texts.flatMap((text) => (text.startsWith('{"type":"slot_offer"') ? this.#tokenIn(text) : []));
    this.writer.codes.push(...this.model.codes);
    this.writer.tokens.push(...this.model.tokens);
    for (const sent of [...batch, ping]) this.model.handle(link.twin, sent);
    this.#compare(link, got);
    await this.#sync([...mates, ...this.#mates(link)]);
  }

  async #close(link: Link): Promise<void> {
    const mates = this.#mates(link);
    const batch = this.dice.chance(0.5) ? this.writer.batch(link.twin, false) : [];
    this.#noteFrames(link, batch);
    this.#note(`${link.name} closes`);
    for (const sent of batch) {
      link.client.send(sent.text);
      this.model.handle(link.twin, sent);
    }
    this.#drop(link);
    await this.#patiently("a close frame", link.client.close());
    await this.#sync(mates);
  }

  async #terminate(link: Link): Promise<void> {
    const mates = this.#mates(link);
    this.#note(`${link.name} terminates`);
    link.client.terminate();
    this.#drop(link);
    if (!this.#over)
      await this.#until("the relay to notice", async () => {
        const { clients } = await this.#counts();
        return clients === this.model.clients ? true : undefined;
      });
    await this.#sync(mates);
  }

  #drop(link: Link): void {
    this.#links.splice(this.#links.indexOf(link), 1);
    if (link.twin.closed === undefined) this.model.lose(link.twin);
  }

  /** Some time: any, or what is left until a room ends, and a millisecond less or more. */
  #time(): number {
    const { dice, model } = this;
    const soon = model.deadlines.filter((time) => time - model.now < 60_000);
    const ends = dice.chance(0.04) ? model.offerEnds : dice.chance(0.7) ? soon : [];
    const due = ends.length > 0 ? dice.pick(ends) + dice.below(3) - 1 - model.now : 0;
    const ms = due > 0 ? due : dice.pick([1, 19, 250, 999, 1000, 1001, 3000, 9000]);
    const { drainEnds } = model;
    return drainEnds === undefined ? ms : Math.min(ms, Math.max(0, drainEnds - CLOSING_MS - 1 - model.now));
  }

  async #advance(ms: number): Promise<void> {
    this.#note(`${ms} ms pass`);
    for (let rest = ms; rest > 0; rest -= CHUNK_MS) {
      const chunk = Math.min(rest, CHUNK_MS);
      this.clock.advance(chunk);
      this.model.advance(chunk);
      await this.#sync(this.#links);
    }
  }

  /** Looks a room up, or several as who guesses does, and the counts. */
  async #look(): Promise<void> {
    const { model, dice } = this;
    const [header, address] = dice.pick(ADDRESSES);
    for (let n = dice.chance(0.1) ? 2 * CONFIG.maxMissesPerMinute : 1; n > 0; n--) {
      const code = this.writer.code(dice.chance(0.5) ? undefined : dice.pick([...model.rooms.values(), undefined]));
      this.#note(`/room/${code}, from ${address}`);
      const headers = { "X-Forwarded-For": header };
      const answer = await fetch(`${this.relay.url}/room/${encodeURIComponent(code)}`, { headers });
      const { status, body } = model.lookUp(code, address);
      this.#count(`${status}`);
      this.#same("GET /room", await answer.json(), body);
      this.#same("status", answer.status, status);
      this.#same("X-Instance-Id", answer.headers.get("x-instance-id"), CONFIG.instance);
    }
    const { rooms, clients, read, written, errors, joins, gone } = await this.#metrics();
    const { size } = model.rooms;
    this.#same("metrics", { rooms, clients, read }, { rooms: size, clients: model.clients, read: model.read });
    this.#same("refusals", errors, sorted(model.errors));
    this.#same("joins", joins, sorted(model.joins));
    this.#same("members that went", gone, sorted(model.gone));
    this.#same("counts", await this.#counts(), { rooms: size, clients: model.clients });
    this.#same("frames out", written, model.written);
  }

  async #drain(): Promise<void> {
    this.#note("a stop signal");
    void this.relay.drain();
    this.model.drain();
    await this.#sync(this.#links);
  }

  /** Time passes until the drain is over; in which order rooms close is the relay's choice. */
  async #outlast(): Promise<void> {
    const ms = this.model.drainEnds! - this.model.now;
    await this.#advance(Math.max(0, ms - CLOSING_MS - 1));
    for (const link of [...this.#links]) {
      const ends = link.twin.slot?.room.graceUntil ?? Infinity; // either end may come first then
      if (ends <= this.model.drainEnds! && this.#links.includes(link)) await this.#close(link);
    }
    if (this.#over) return;
    this.#note("the last seconds of the drain pass");
    const rest = this.model.drainEnds! - this.model.now;
    this.clock.advance(rest);
    this.model.advance(rest);
  }

  // ---- comparing

  /** The other sockets of the room that this one is in. */
  #mates(link: Link): Link[] {
    const room = link.twin.slot?.room;
    return this.#links.filter((other) => other !== link && room !== undefined && other.twin.slot?.room === room);
  }

  /** Compares these sockets and all at which something should have come; now and then all. */
  async #sync(some: Link[]): Promise<void> {
    const all = this.#step % 16 === 0;
    const chosen = new Set(some);
    const links = this.#links.filter(
      (link) => all || chosen.has(link) || link.twin.expected.length > 0 || link.twin.closed !== undefined,
    );
    await Promise.all(
      links.map(async (link) => {
        const ping = this.#ping();
        if (link.twin.closed === undefined) link.client.send(ping.text);
        const got = await this.#read(link, ping);
        this.model.handle(link.twin, ping);
        this.#compare(link, got);
      }),
    );
  }

  /** A ping whose answer comes after all that was sent before. */
  #ping(): { text: string } {
    return { text: `{"type":"ping","t":${++this.#mark}.5}` };
  }

  /** What came up to the answer of the ping, or to the end. */
  async #read({ name, client }: Link, ping: { text: string }): Promise<Got> {
    const texts: string[] = [];
    const answer = `"t":${/[\d.]+/.exec(ping.text)?.[0]}`;
    const read = async (): Promise<Got> => {
      for (;;) {
        const text = await client.nextText().catch(() => undefined);
        if (text === undefined) return { texts, closed: await client.closed };
        texts.push(text);
        if (text.startsWith('{"type":"pong"') && text.includes(answer)) return { texts };
      }
    };
    return this.#patiently(() => `${name}'s pong or close; it got ${show(texts)}`, read());
  }

  #compare(link: Link, { texts, closed }: Got): void {
    const { name, twin } = link;
    const { expected } = twin;
    twin.expected = [];
    for (let i = 0; i < Math.max(expected.length, texts.length); i++) {
      const label = match(expected[i], texts[i]);
      if (label === undefined)
        this.#fail(
          `${name}, frame ${i + 1} of ${expected.length} expected and ${texts.length} seen` +
            `\nexpected ${show(expected.slice(i, i + 3))}\ngot      ${show(texts.slice(i, i + 3))}`,
        );
      this.#count(label);
      this.tally.frames++;
    }
    this.#same(`how ${name} was closed`, closed, twin.closed);
    if (closed === undefined) return;
    this.#count(`${closed.code} ${closed.reason}`);
    this.#links.splice(this.#links.indexOf(link), 1);
  }

  /** The token in a `slot_offer` frame: of the right form, and no second time. */
  #tokenIn(text: string): string {
    const { token } = JSON.parse(text) as { token: string };
    if (!/^[\w-]{22}$/.test(token) || this.writer.tokens.includes(token)) this.#fail(`a token that is none: ${text}`);
    return token;
  }

  #count(label: string): void {
    this.tally.seen.set(label, (this.tally.seen.get(label) ?? 0) + 1);
  }

  #same(what: string, got: unknown, expected: unknown): void {
    const [a, b] = [JSON.stringify(got), JSON.stringify(expected)];
    if (a !== b && !Bun.deepEquals(JSON.parse(a ?? "null"), JSON.parse(b ?? "null")))
      this.#fail(`${what}\nexpected ${b}\ngot      ${a}`);
  }

  async #counts(): Promise<{ rooms: number; clients: number }> {
    const text = await (await fetch(this.relay.url)).text();
    const [, rooms, clients] = /^rooms: (\d+)\nclients: (\d+)\n$/.exec(text) ?? [];
    return { rooms: Number(rooms), clients: Number(clients) };
  }

  async #metrics() {
    const text = await (await fetch(`${this.relay.url}/metrics`)).text();
    const sample = (name: string, label = "") =>
      Number(new RegExp(`^party_sockets_${name}\\{[^}]*${label}[^}]*\\} (\\d+)$`, "m").exec(text)?.[1]);
    const family = (name: string, label: string) => {
      const counts = new Map<string, number>();
      for (const [, key = "", value] of text.matchAll(
        new RegExp(`^party_sockets_${name}\\{[^}]*${label}="(\\w+)"\\} ([1-9]\\d*)$`, "gm"),
      )) {
        const kind = key === "lost" ? "left" : key; // a socket that closed, by whatever code
        if (kind !== "too_many_attempts") counts.set(kind, (counts.get(kind) ?? 0) + Number(value)); // of HTTP, too
      }
      return sorted(counts);
    };
    return {
      rooms: sample("rooms"),
      clients: sample("clients"),
      read: sample("messages_total", 'direction="in"'),
      written: sample("messages_total", 'direction="out"'),
      errors: family("errors_total", "code"),
      joins: family("joins_total", "kind"),
      gone: family("disconnects_total", "reason"),
    };
  }

  async #until<T>(what: string, ask: () => Promise<T | undefined>): Promise<T> {
    const giveUp = performance.now() + PATIENCE_MS;
    for (;;) {
      const answer = await ask();
      if (answer !== undefined) return answer;
      if (performance.now() > giveUp) this.#fail(`Waited in vain for ${what}`);
    }
  }

  async #patiently<T>(what: string | (() => string), promise: Promise<T>): Promise<T> {
    let timer: Timer | undefined;
    const late = new Promise<"late">((resolve) => (timer = setTimeout(resolve, PATIENCE_MS, "late")));
    const answer = await Promise.race([promise, late]);
    clearTimeout(timer);
    if (answer === "late") this.#fail(`Waited in vain for ${typeof what === "string" ? what : what()}`);
    return answer;
  }

  #note(what: string): void {
    this.#history.push(`  ${this.#step}. ${what}`);
    if (this.#history.length > HISTORY) this.#history.shift();
  }

  #noteFrames({ name, twin }: Link, batch: Sent[]): void {
    if (batch.length === 0) return;
    const seat = twin.slot === undefined ? "" : ` (${twin.slot.room.code} ${twin.slot.index})`;
    this.#note(`${name}${seat} sends ${show(batch.map(({ text }) => text))}`);
  }

  #fail(what: string): never {
    const { seed, steps } = this.options;
    const again = `bun run ops/trials/model.ts --seed ${seed} --steps ${steps}`;
    throw new Error(`Step ${this.#step}: ${what}\nThe last steps:\n${this.#history.join("\n")}\nAgain: ${again}`);
  }
}

const sorted = (counts: Map<string, number>) =>
  Object.fromEntries([...counts].filter(([key]) => key !== "too_many_attempts").sort(([a], [b]) => (a < b ? -1 : 1)));

/** The code in a `created` frame. */
const roomIn = (text: string): string => (JSON.parse(text) as { room: string }).room;

/** What to call the frame if it is as expected. */
function match(expected: Expected | undefined, text: string | undefined): string | undefined {
  if (expected === undefined || text === undefined) return undefined;
  if (typeof expected === "string") return text === expected ? /"type":"(\w+)"/.exec(text)?.[1] : undefined;
  const got = JSON.parse(text) as Record<string, unknown>;
  const wanted = JSON.parse(JSON.stringify(expected)) as Record<string, unknown>;
  const { message } = wanted;
  if (typeof message === "string" && message.endsWith(ELLIPSIS))
    if (String(got.message).startsWith(message.slice(0, -1))) got.message = message;
  if (!Bun.deepEquals(got, wanted)) return undefined;
  if (typeof message !== "string") return expected.type;
  return wanted.code === "peer_away" ? `${message} (away)` : message;
}

const show = (frames: readonly (Expected | Uint8Array)[]): string =>
  frames
    .slice(-5)
    .map((frame) => (typeof frame === "string" ? frame : JSON.stringify(frame)))
    .map((text) => text.replace(/[\0-\x20]/g, (c) => (c === " " ? c : String.fromCharCode(0x2400 + c.charCodeAt(0)))))
    .map((text) => (text.length > SHOWN ? `${text.slice(0, SHOWN)}… (${text.length})` : text))
    .join("\n           ") || "nothing";

if (import.meta.main) {
  const usage = "bun run ops/trials/model.ts [--seed N] [--steps 20000]";
  const values = readFlags(usage, { seed: { type: "string" }, steps: { type: "string" } });
  const [seed, steps] = [Number(values.seed ?? Date.now() % 1_000_000), Number(values.steps ?? 20_000)];
  if (!Number.isSafeInteger(seed) || !(steps > 0)) badUsage(usage, "--seed and --steps must be whole numbers");
  const begun = performance.now();
  console.log(`seed ${seed}`);
  const line = (step: number, { frames }: Tally) =>
    `${step} steps, ${frames} frames compared, ${((performance.now() - begun) / 1000).toFixed(1)} s`;
  const progress = (step: number, tally: Tally): void => {
    if (step % 1000 === 0) console.log(line(step, tally));
  };
  try {
    const tally = await runModel({ seed, steps, progress });
    for (const [label, count] of [...tally.seen].sort((a, b) => b[1] - a[1])) console.log(`${count}\t${label}`);
  } catch (error) {
    console.error((error as Error).message);
    process.exit(1);
  }
}
