/**
 * A client for a party-sockets relay that never gives up, in one file for you to copy into your game. It keeps its
 * slot through reloads, sleep and lost networks:
 *     const party = connect<FromHost, FromGuest>({ url: "wss://relay.example", room: "K7bQx2" });
 *     party.on("message", ({ from, data }) => draw(from, data));
 *     party.on("status", ({ state, reason }) => show(state, reason));
 *     party.send({ x: 1, y: 2 }, { to: 0 });
 * Data comes from peers, and nobody checks that it is of your types: check its shape, and show it as text, never as HTML.
 */

/** What a client may send. */
export type ClientMessage =
  | { type: "create"; clientId: string; maxClients: number; linger?: number; hostGrace?: number; migrate?: boolean; url?: string }
  | { type: "join"; clientId: string; room: string; claim?: string }
  | { type: "send"; data: unknown; to?: number | number[]; echo?: boolean }
  | { type: "set_state"; data: unknown }
  | { type: "close_room" }
  | { type: "set_room"; locked?: boolean; maxClients?: number }
  | { type: "kick"; index: number }
  | { type: "set_host"; index: number }
  | { type: "offer_slot"; index?: number }
  | { type: "leave" }
  | { type: "ping"; t?: number };
/** What the relay sends. */
export type ServerMessage<Data = unknown> =
  | { type: "created"; room: string; instance: string; region: string; index: 0; url?: string }
  | { type: "joined"; room: string; index: number; peers: number[]; host?: number; resumed?: true; locked?: true; url?: string }
  | { type: "peer_joined"; index: number; resumed?: true }
  | { type: "peer_left"; index: number; reason?: "left" | "kicked" }
  | { type: "message"; from: number; data: Data }
  | { type: "state"; data: unknown }
  | { type: "room"; locked: boolean; maxClients: number }
  | { type: "host"; index: number }
  | { type: "slot_offer"; index: number; token: string }
  | { type: "left"; room: string }
  | { type: "pong"; t?: number; now: number }
  | { type: "draining"; seconds: number }
  | { type: "error"; message: string; code: ErrorCode; missing?: number[] };
/** Why the relay refused something. */
export type ErrorCode =
  | ("bad_json" | "bad_request" | "unknown_type" | "already_in_room" | "not_in_room" | "not_host" | "state_too_large")
  | ("room_not_found" | "room_full" | "room_locked" | "kicked" | "claim_not_found" | "peer_not_found" | "peer_away")
  | ("draining" | "capacity" | "too_many_attempts");
/** With what the relay closes a socket. */
export const CloseCode = {
  TOO_MANY_ATTEMPTS: 1008,
  INTERNAL_ERROR: 1011,
  RESTARTING: 1012,
  SERVER_FULL: 1013,
  REPLACED: 4000,
  ROOM_CLOSED: 4001,
  KICKED: 4002,
} as const;

type Message<T> = Extract<ClientMessage, { type: T }>;
/** What a member may send; entering a room is the client's own business. */
export type Command = Exclude<ClientMessage, { type: "create" | "join" }>;
export type Status = {
  /** In the room; on the way there; until the next try; for good. */
  state: "open" | "connecting" | "waiting" | "closed";
  /** What ended the last connection: a close code and its reason, or a refusal's code and message. */
  code?: number | ErrorCode | "left" | "closed";
  reason?: string;
  retryMs?: number; // until the next try, while waiting
};
/** A slot that this client has seen: `away` until its player comes back. Who left or was kicked is no member. */
export type Member = { index: number; away: boolean; me: boolean; host: boolean };
/** Every message of the relay by its type, and the client's own. */
export type Events<Incoming = unknown> = { [M in ServerMessage<Incoming> as M["type"]]: M } & {
  status: Status;
  latency: { ms: number };
  members: Member[]; // whenever one changes
  dropped: Command; // too old by the time that the room was back
  answer: { from: number; id: string; data: unknown; error: string | undefined }; // which `ask` waits for
};
/** What the promises of this client reject with. */
export type Failure = Error & { code: Code | "deadline" | "failed" | "not_sent" };
type Code = NonNullable<Status["code"]>;
export type Options = {
  /** The relay: ws, wss, http or https. */
  url: string;
  /** Code of the room to join; where absent, the one that storage remembers. */
  room?: string | undefined;
  /** Opens a room instead. After a reload, the one that was opened is joined again while it lives. */
  create?: Omit<Message<"create">, "type" | "clientId"> | undefined;
  /** The token of an offer: takes over its slot in `room`, for a person who goes on with this device. */
  claim?: string | undefined;
  /** How old what is sent while away may become, in ms: 5,000 by default, 0 where nothing is kept. */
  keepMs?: number | undefined;
  /** Proves that the slot is its own; where absent, random and kept in storage. */
  clientId?: string | undefined;
  /** By default `sessionStorage`: every tab is a player. With `localStorage` a browser is one: its newest tab. */
  storage?: Pick<Storage, "getItem" | "setItem"> | undefined;
  /** Where sockets, timers and the rest come from; tests pass their own. */
  env?: typeof globalThis | undefined;
};
export type SendOptions = { to?: number | number[] | undefined; echo?: boolean | undefined; keepMs?: number | undefined };
export type Party<Incoming = unknown, Outgoing = unknown> = ReturnType<typeof connect<Incoming, Outgoing>>;
type Saved = { clientId: string; room?: string; instance?: string; created?: boolean };

const PING_MS = 5_000; // between an answer and the next ping
const SILENT_MS = 4_000; // nothing heard for this long after a ping: the socket is half-open
const OPEN_MS = 10_000; // for TCP, TLS, the upgrade and the answer to join
const BACKOFF_MS = 500; // doubles with each attempt, until a connection has held for PING_MS
const BACKOFF_MAX_MS = 15_000;
const ANSWER_MS = 5_000; // for another member, or the relay, to answer
const KEEP_MS = 5_000; // what is older when the room is back is stale
const QUEUE = 10; // commands kept while away
const LOST = 1006; // what a browser calls a connection that ended without a close frame
const TERMINAL: readonly unknown[] = [CloseCode.REPLACED, CloseCode.ROOM_CLOSED, CloseCode.KICKED];
/** Shortest and longest wait in ms where the relay asks for patience, by close code or code of a refusal. */
const PATIENCE: Partial<Record<string | number, [min: number, max: number]>> = {
  [CloseCode.TOO_MANY_ATTEMPTS]: [30_000, 35_000],
  [CloseCode.RESTARTING]: [500, 3_000], // not every client in the same instant
  [CloseCode.SERVER_FULL]: [5_000, 6_000],
  capacity: [5_000, 6_000],
  draining: [5_000, 6_000],
};

/** Enters a room and stays in it. Throws where there is no room to enter, or `url` is none. */
export function connect<Incoming = unknown, Outgoing = unknown>(options: Options) {
  const { url, room, create, claim, env = globalThis } = options;
  const { Date, Math, performance, setTimeout, clearTimeout, document, window } = env;
  let { storage } = options;
  const key = `party:${url}`;
  const saved: Saved = { clientId: randomId(), ...load(), ...(options.clientId && { clientId: options.clientId }) };
  if (room ? room !== saved.room : create && !saved.created) enter(room);
  if (!saved.room && !create) throw new Error("There is no room to join");

  const listeners = new Map<string, Set<(event: any) => void>>();
  const slots = new Map<number, boolean>(); // those that were seen, and whether they are connected
  const ended = new AbortController(); // its signal ends what listens to the page
  let answerer: (data: Incoming, from: number) => unknown = () => Promise.reject(new Error("Nobody answers"));
  let queue: { message: Command; until: number }[] = [];
  let status: Status = { state: "connecting" };
  let socket: WebSocket | undefined;
  let timer: ReturnType<typeof setTimeout> | undefined; // this state's: give up, ping or try again
  let attempts = 0;
  let pinged: number | undefined; // when, while the answer is out
  let me: number | undefined;
  let host = 0;
  let clock = { ms: Infinity, offset: Date.now() - performance.now() };
  let offered: Promise<unknown> | undefined;

  function load(): Partial<Saved> {
    try {
      return JSON.parse((storage ??= env.sessionStorage)?.getItem(key) ?? "{}");
    } catch {
      return {}; // a browser that blocks site data: the slot lasts as long as the page
    }
  }
  /** Remembers the room that this slot is in; without one, forgets it. */
  function enter(room?: string, instance?: string, created?: boolean): void {
    Object.assign(saved, { room, instance, created });
    storage?.setItem(key, JSON.stringify(saved));
  }
  function emit<T extends keyof Events>(type: T, event: Events<Incoming>[T]): void {
    listeners.get(type)?.forEach((listener) => listener(event));
  }
  const become = (next: Status): void => emit("status", (status = next));
  const transmit = (message: ClientMessage): void => socket?.send(JSON.stringify(message));
  const silent = (): void => lost(LOST, "no answer");
  function after(ms: number, run: () => void): void {
    clearTimeout(timer);
    timer = setTimeout(run, ms);
  }
  function open(): void {
    const address = new URL(url.replace(/^http/, "ws")); // code and instance lead to the machine with the room
    if (saved.room) address.pathname = `${address.pathname.replace(/\/$/, "")}/${saved.room}`;
    if (saved.instance) address.searchParams.set("instance", saved.instance);
    const opening = (socket = new env.WebSocket(address));
    const current = (run: (event: any) => void) => (event: unknown) => socket === opening && run(event);
    opening.onopen = current(knock);
    opening.onmessage = current((event) => receive(JSON.parse(event.data)));
    opening.onclose = current((event) => lost(event.code, event.reason));
    after(OPEN_MS, silent);
    become({ ...status, state: "connecting" });
  }
  function knock(): void {
    const { clientId, room } = saved;
    if (room) transmit({ type: "join", clientId, room, ...(claim && { claim }) });
    else transmit({ ...create!, type: "create", clientId });
  }
  function receive(message: ServerMessage<Incoming>): void {
    if (message.type === "error" && status.state === "connecting") return refused(message);
    if (pinged !== undefined) after(SILENT_MS, silent); // a relay that is still busy with this socket's backlog lives
    if (message.type === "message" && converse(message.from, message.data)) return;
    const changed = track(message);
    if (message.type === "created") entered(message.room, message.instance, true);
    if (message.type === "joined") entered(message.room, saved.instance, saved.created);
    if (message.type === "pong") ponged(message);
    emit(message.type, message as never);
    if (changed) emit("members", members());
    if (message.type === "left") end("left", "left the room");
  }
  /** Follows who is in the room. @returns whether that changed */
  function track(message: ServerMessage<Incoming>): boolean {
    if (message.type === "created" || message.type === "joined") {
      if (message.type === "created") slots.clear(); // another room
      slots.forEach((_, index) => slots.set(index, false));
      for (const index of "peers" in message ? message.peers : []) slots.set(index, true);
      slots.set((me = message.index), true);
      host = ("host" in message && message.host) || 0;
    } else if (message.type === "peer_joined") slots.set(message.index, true);
    else if (message.type === "peer_left" && message.reason) slots.delete(message.index);
    else if (message.type === "peer_left") slots.set(message.index, false);
    else if (message.type === "host") host = message.index;
    else return false;
    return true;
  }
  function entered(...place: Parameters<typeof enter>): void {
    enter(...place);
    discard(Date.now());
    queue.splice(0).forEach(({ message }) => transmit(message));
    ping();
    become({ state: "open" });
  }
  function refused({ code, message }: Events["error"]): void {
    if (code === "too_many_attempts") return; // 1008 follows
    if (code in PATIENCE) return lost(code, message);
    if (code !== "room_not_found" || !create || !saved.room) return end(code, message);
    enter();
    discard(Infinity); // it was meant for those who were in that room
    knock();
  }
  /** Drops what may be sent until `ms` and no later. */
  function discard(ms: number): void {
    const stale = queue.filter(({ until }) => until <= ms);
    queue = queue.filter(({ until }) => until > ms);
    stale.forEach(({ message }) => emit("dropped", message));
  }
  function ping(): void {
    pinged = performance.now();
    transmit({ type: "ping", t: pinged });
    after(SILENT_MS, silent);
  }
  function ponged({ t, now }: Events["pong"]): void {
    if (pinged === undefined || t !== pinged) return; // the app's own, or overtaken
    const ms = performance.now() - pinged;
    const offset = now + ms / 2 - performance.now();
    // Half of the round trip is all that it can be off: the shortest is best, until a clock that jumped proves it wrong.
    if (ms < clock.ms || Math.abs(offset - clock.offset) > (ms + clock.ms) / 2 + 1) clock = { ms, offset };
    pinged = undefined;
    after(PING_MS, () => ((attempts = 0), ping()));
    emit("latency", { ms });
  }
  function drop(): void {
    clearTimeout(timer);
    socket?.close();
    socket = pinged = undefined; // not waited for: a dead one may take minutes to say that it closed
  }
  function lost(code: Code, reason: string): void {
    if (TERMINAL.includes(code)) return end(code, reason);
    drop();
    const backoff = Math.min(BACKOFF_MAX_MS, BACKOFF_MS * 2 ** attempts++);
    const [min, max] = PATIENCE[code] ?? [backoff / 2, backoff];
    const retryMs = min + Math.random() * (max - min);
    after(retryMs, open);
    become({ state: "waiting", code, reason, retryMs });
  }
  function end(code: Code, reason: string): void {
    drop();
    ended.abort();
    if (code !== CloseCode.REPLACED && code !== "closed") enter(); // with those two the slot is still this client's
    become({ state: "closed", code, reason });
    discard(Infinity);
  }
  /** The page says that there is no connection; what brings it back wakes this client. */
  function interrupt(reason: string): void {
    if (status.state !== "waiting") lost(LOST, reason);
  }
  /** Finds out how things are, at once: the device may have slept or changed networks. */
  function wake(): void {
    if (status.state === "open") ping();
    else if (status.state === "waiting" && !(status.code! in PATIENCE)) open();
  }
  /** Sends a message of any kind. @returns as `send` */
  function command(message: Command, keepMs = options.keepMs ?? KEEP_MS): boolean {
    if (status.state === "open" && socket?.readyState === 1) return (transmit(message), true);
    discard(Date.now());
    if (status.state === "closed" || keepMs <= 0 || queue.length >= QUEUE) return false;
    queue.push({ message, until: Date.now() + keepMs });
    return true;
  }
  /**
   * To everyone else, to the slots in `to`, or with `echo` to everyone in the same order.
   * @returns whether it is on its way, or kept for `keepMs` until the room is back
   */
  function send(data: Outgoing, options?: SendOptions): boolean {
    return transfer(data, options);
  }
  function transfer(data: unknown, { to, echo, keepMs }: SendOptions = {}): boolean {
    // The relay is fastest where members come in this order.
    return command({ type: "send", ...(to !== undefined && { to }), data, ...(echo && { echo }) }, keepMs);
  }
  /**
   * Asks another member. Rejects at the deadline, and at once if that member is away or fails to answer. Questions and
   * answers travel as the data of plain sends: `{"party:ask": id, data}`, `{"party:answer": id, data or error}`.
   */
  async function ask<Answer = unknown>(to: number, data: Outgoing, { deadlineMs = ANSWER_MS } = {}): Promise<Answer> {
    const id = randomId();
    if (status.state === "open" && !slots.get(to)) throw failure("peer_away", "That member is away");
    if (!transfer({ "party:ask": id, data }, { to, keepMs: deadlineMs })) throw failure("not_sent", "Not sent");
    const answer = await once("answer", (answer) => answer.id === id && answer.from === to, deadlineMs);
    if (answer.error !== undefined) throw failure("failed", answer.error);
    return answer.data as Answer;
  }
  /** Takes questions and answers out of the messages. @returns whether it was one */
  function converse(from: number, message: any): boolean {
    const { "party:ask": question, "party:answer": id, data, error } = message ?? {};
    if (typeof question === "string") void reply(from, question, data);
    else if (typeof id === "string") emit("answer", { from, id, data, error });
    else return false;
    return true;
  }
  async function reply(to: number, id: string, question: Incoming): Promise<void> {
    try {
      transfer({ "party:answer": id, data: await answerer(question, to) }, { to });
    } catch (error) {
      transfer({ "party:answer": id, error: `${(error as Error).message}` }, { to });
    }
  }
  /** A token with which another device takes over this slot; for the host, any slot. It is good once, and for 300 s. */
  function offer(index = me): Promise<Events["slot_offer"]> {
    const next = () => {
      command({ type: "offer_slot", ...(index !== undefined && { index }) });
      return once("slot_offer", (offer) => offer.index === index, ANSWER_MS);
    };
    const offering = offered ? offered.then(next, next) : next(); // a newer one would end it
    offered = offering;
    return offering;
  }
  /** The slots that were seen, ascending. */
  function members(): Member[] {
    const known = [...slots].sort(([a], [b]) => a - b);
    return known.map(([index, here]) => ({ index, away: !here, me: index === me, host: index === host }));
  }
  /** @returns what ends the subscription */
  function on<T extends keyof Events>(type: T, listener: (event: Events<Incoming>[T]) => void): () => void {
    listeners.set(type, (listeners.get(type) ?? new Set()).add(listener));
    return () => void listeners.get(type)?.delete(listener);
  }
  type Wanted<T extends keyof Events> = (event: Events<Incoming>[T]) => boolean;
  /** The next event that is wanted. Rejects with a `Failure` at the deadline, and when this client is out for good. */
  async function once<T extends keyof Events>(type: T, wanted: Wanted<T> = () => true, deadlineMs?: number) {
    const offs: (() => void)[] = [];
    const event = new Promise<Events<Incoming>[T]>((resolve, reject) => {
      const closed = ({ state, code, reason }: Status) => state === "closed" && reject(failure(code!, reason!));
      offs.push(
        on(type, (event) => wanted(event) && resolve(event)),
        on("status", closed),
      );
      if (deadlineMs !== undefined) setTimeout(() => reject(failure("deadline", "No answer in time")), deadlineMs);
      closed(status);
    });
    return event.finally(() => offs.forEach((off) => off()));
  }
  document?.addEventListener("visibilitychange", () => document.visibilityState !== "hidden" && wake(), ended);
  for (const event of ["online", "pageshow"]) window?.addEventListener(event, wake, ended);
  window?.addEventListener("offline", () => interrupt("the browser is offline"), ended);
  window?.addEventListener("pagehide", () => interrupt("the page is hidden"), ended); // or a cached page keeps its socket
  const ready = once("status", ({ state }) => state === "open");
  ready.catch(() => {}); // who doesn't wait for it hears of it by `status`
  open();
  return {
    ...{ on, once, send, command, ask, offer, members, wake },
    /** In the room for the first time. Rejects with a `Failure`, mostly the refusal. */
    ready,
    answer: (next: typeof answerer): void => void (answerer = next),
    status: () => status,
    room: () => saved.room,
    me: () => me,
    host: () => host,
    now: () => performance.now() + clock.offset,
    close: () => end("closed", "closed here"),
  };
}

const failure = (code: Failure["code"], message: string): Failure => Object.assign(new Error(message), { code });
/** `crypto.randomUUID` is missing where the page came over plain http, as in a home's Wi-Fi. */
const randomId = (): string => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16)).join("");
