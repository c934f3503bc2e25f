/**
 * A client for a party-sockets relay, to copy into your game. It keeps its slot through reloads, sleep and lost networks:
 *     const party = connect<FromHost, FromGuest>({ url: "wss://relay.example", room: "K7bQx2" });
 *     party.on("message", ({ from, data }) => draw(from, data));
 *     party.send({ x: 1, y: 2 }, { to: 0 });
 * Data comes from peers, and nobody checks that it is of your types: check its shape, and show it as text, never as HTML.
 */

/** What a client may send. */
export type ClientMessage =
  | { type: "create"; clientId: string; maxClients: number; linger?: number; hostGrace?: number; migrate?: boolean; url?: string }
  | { type: "join"; clientId: string; room: string; claim?: string }
  | ({ type: "send"; data: unknown; to?: number | number[]; echo?: boolean } | { type: "leave" } | { type: "ping"; t?: number })
  | ({ type: "set_state"; data: unknown } | { type: "set_room"; locked?: boolean; maxClients?: number } | { type: "close_room" })
  | ({ type: "kick"; index: number } | { type: "set_host"; index: number } | { type: "offer_slot"; index?: number });
/** What the relay sends. */
export type ServerMessage<Data = unknown> =
  | { type: "created"; room: string; instance: string; region: string; index: 0; url?: string }
  | { type: "joined"; room: string; index: number; peers: number[]; host?: number; resumed?: true; locked?: true; url?: string }
  | ({ type: "peer_joined"; index: number; resumed?: true } | { type: "peer_left"; index: number; reason?: "left" | "kicked" })
  | ({ type: "message"; from: number; data: Data } | { type: "state"; data: unknown })
  | ({ type: "room"; locked: boolean; maxClients: number } | { type: "host"; index: number } | { type: "left"; room: string })
  | ({ type: "slot_offer"; index: number; token: string } | { type: "draining"; seconds: number })
  | ({ type: "pong"; t?: number; now: number } | { type: "error"; message: string; code: ErrorCode; missing?: number[] });
/** Why the relay refused something. */
export type ErrorCode =
  | ("bad_json" | "bad_request" | "unknown_type" | "already_in_room" | "not_in_room" | "not_host" | "state_too_large")
  | ("room_not_found" | "room_full" | "room_locked" | "kicked" | "claim_not_found" | "peer_not_found" | "peer_away")
  | ("draining" | "capacity" | "too_many_attempts");
const OVER = { REPLACED: 4000, ROOM_CLOSED: 4001, KICKED: 4002 } as const;
/** With what the relay closes a socket. What is `OVER` isn't tried again. */
export const CloseCode = { ...OVER, TOO_MANY_ATTEMPTS: 1008, INTERNAL_ERROR: 1011, RESTARTING: 1012, SERVER_FULL: 1013 } as const;
/** What a member may send; entering a room is the client's own business. */
export type Command = Exclude<ClientMessage, { type: "create" | "join" }>;
/** How it stands with the room: in it; on the way there; until the next try; out for good. */
export type Status = {
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
  ask: { from: number; id: string; data: Incoming }; // for `answer`
  answer: { from: number; id: string; data: unknown }; // for `ask`
};
/** What the promises of this client reject with. */
export type Failure = Error & { code: NonNullable<Status["code"]> | "deadline" };
type SendOptions = { to?: number | number[] | undefined; echo?: boolean | undefined; keepMs?: number | undefined };
/** What `connect` needs: `url`, and `room`, `create` or a storage that remembers a room. */
export type Options = {
  /** The relay: ws, wss, http or https. */
  url: string;
  /** Code of the room to join; if absent, the one that storage remembers. */
  room?: string | undefined;
  /** Opens a room instead. After a reload, the one that was opened is joined again while it lives. */
  create?: Omit<Extract<ClientMessage, { type: "create" }>, "type" | "clientId"> | undefined;
  /** The token of an offer: takes over its slot in `room`, for a person who goes on with this device. */
  claim?: string | undefined;
  /** How old what is sent while away may become, in ms: 5,000 by default; 0 keeps nothing. */
  keepMs?: number | undefined;
  /** Proves that the slot is its own; if absent, random and kept in storage. */
  clientId?: string | undefined;
  /** By default `sessionStorage`: every tab is a player. With `localStorage` a browser is one: its newest tab. */
  storage?: Pick<Storage, "getItem" | "setItem"> | undefined;
  /** Where sockets, timers and the rest come from; tests pass their own. */
  env?: typeof globalThis | undefined;
};
/** A member's way into its room, as `connect` gives it. */
export type Party<Incoming = any, Outgoing = any> = ReturnType<typeof connect<Incoming, Outgoing>>;

const PING_MS = 5_000; // between an answer and the next ping
const SILENT_MS = 4_000; // nothing heard for this long after a ping: the socket is half-open
const OPEN_MS = 10_000; // for TCP, TLS, the upgrade and the answer to join
const BACKOFF_MS = { first: 500, most: 15_000 }; // doubles with each attempt, until a connection has held for PING_MS
const ANSWER_MS = 5_000; // for another member to answer
const QUEUE = 10; // commands kept while away
const TALK = "party-sockets"; // questions and answers are plain sends of {"party-sockets": "ask" or "answer", id, data}
const LOST = 1006; // what a browser calls a connection that ended without a close frame
/** Shortest and longest wait in ms if the relay asks for patience, by close code or code of a refusal. */
const PATIENCE: Record<string | number, [number, number] | undefined> = {
  [CloseCode.TOO_MANY_ATTEMPTS]: [30_000, 35_000],
  [CloseCode.RESTARTING]: [500, 3_000], // not every client in the same instant
  [CloseCode.SERVER_FULL]: [5_000, 6_000],
  capacity: [5_000, 6_000],
  draining: [5_000, 6_000],
};

/** Enters a room and stays in it. Throws if there is no room to enter, or `url` is none. */
export function connect<Incoming = unknown, Outgoing = unknown>(options: Options) {
  const { url, create, claim, keepMs: keptMs = 5_000, env = globalThis } = options;
  const { Date, Math, performance, setTimeout, clearTimeout, document, window } = env;
  let { storage } = options;
  const key = `party:${url}`;
  const saved: { clientId: string; room?: string; instance?: string; created?: boolean } = { clientId: randomId() };
  try {
    Object.assign(saved, JSON.parse((storage ??= env.sessionStorage)?.getItem(key) ?? "{}"));
  } catch {} // a browser that blocks site data: the slot lasts as long as the page
  if (options.clientId) saved.clientId = options.clientId;
  if (options.room ? options.room !== saved.room : create && !saved.created) enter(options.room);
  if (!saved.room && !create) throw new Error("There is no room to join");

  const listeners = new Map<string, Set<(event: any) => void>>();
  const slots = new Map<number, boolean>(); // those that were seen, and whether they are connected
  const ended = new AbortController(); // its signal ends what listens to the page
  let queue: { message: Command; until: number }[] = [];
  let status: Status = { state: "connecting" };
  let socket: WebSocket | undefined;
  let timer: ReturnType<typeof setTimeout> | undefined; // this state's: give up, ping or try again
  let attempts = 0;
  let pinged: number | undefined; // when, while the answer is out
  let me: number | undefined;
  let host = 0;
  let clock = { ms: Infinity, offset: Date.now() - performance.now() }; // the relay's, ahead of the page's
  /** Remembers the room that this slot is in; without one, forgets it. */
  function enter(room?: string, instance?: string, created?: boolean): void {
    Object.assign(saved, { room, instance, created });
    storage?.setItem(key, JSON.stringify(saved));
  }
  const emit = <T extends keyof Events>(type: T, event: Events<Incoming>[T]) =>
    new Set(listeners.get(type)).forEach((listener) => listener(event)); // not those that it adds
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
    transmit(room ? { type: "join", clientId, room, ...(claim && { claim }) } : { ...create!, type: "create", clientId });
  }
  function receive(message: ServerMessage<Incoming>): void {
    if (message.type === "error" && status.state === "connecting") return refused(message);
    if (pinged !== undefined) after(SILENT_MS, silent); // a relay that is still busy with this socket's backlog lives
    const { from, data }: any = message;
    if (from !== undefined && ["ask", "answer"].includes(data?.[TALK])) return emit(data[TALK], { ...data, from });
    if (message.type === "created" || message.type === "joined") entered(message);
    if (message.type === "peer_joined" || message.type === "peer_left") slots.set(message.index, message.type === "peer_joined");
    if (message.type === "peer_left" && message.reason) slots.delete(message.index);
    if (message.type === "host") host = message.index;
    if (message.type === "pong") ponged(message);
    emit(message.type, message as never);
    if ("index" in message) emit("members", members()); // what names a slot may have changed it
    if (message.type === "left") end("left", "left the room");
  }
  type Entered = { room: string; index: number; instance?: string; peers?: number[]; host?: number };
  function entered({ room, index, instance = saved.instance, peers, host: named = 0 }: Entered): void {
    enter(room, instance, !peers || saved.created);
    if (!peers) slots.clear(); // the room is new
    slots.forEach((_, slot) => slots.set(slot, false));
    [index, ...(peers ?? [])].forEach((slot) => slots.set(slot, true));
    [me, host] = [index, named];
    for (const { message, until } of queue.splice(0)) if (Date.now() < until) transmit(message);
    ping();
    become({ state: "open" });
  }
  function refused({ code, message }: Events["error"]): void {
    if (code === "too_many_attempts") return; // 1008 follows
    if (code in PATIENCE) return lost(code, message);
    if (code !== "room_not_found" || !create || !saved.room) return end(code, message);
    enter();
    queue = []; // it was meant for those who were in that room
    knock();
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
  function lost(code: NonNullable<Status["code"]>, reason: string): void {
    if (Object.values<unknown>(OVER).includes(code)) return end(code, reason);
    drop();
    const backoff = Math.min(BACKOFF_MS.most, BACKOFF_MS.first * 2 ** attempts++);
    const [min, max] = PATIENCE[code] ?? [backoff / 2, backoff];
    const retryMs = min + Math.random() * (max - min);
    after(retryMs, open);
    become({ state: "waiting", code, reason, retryMs });
  }
  function end(code: NonNullable<Status["code"]>, reason: string): void {
    drop();
    ended.abort();
    if (code !== CloseCode.REPLACED && code !== "closed") enter(); // with those two the slot is still this client's
    become({ state: "closed", code, reason });
  }
  /** Finds out how things are, at once: the device may have slept or changed networks. */
  function wake(): void {
    if (status.state === "open") ping();
    else if (status.state === "waiting" && !(status.code! in PATIENCE)) open();
  }
  const interrupt = ({ type }: Event) => status.state !== "waiting" && lost(LOST, type); // what brings it back wakes it
  /** Any message. @returns whether it is on its way or kept, for `keepMs`, until the room is back; false if it is dropped */
  function command(message: Command, keepMs = keptMs): boolean {
    queue = queue.filter(({ until }) => Date.now() < until);
    if (status.state === "open" && socket?.readyState === 1) transmit(message);
    else if (status.state !== "closed" && keepMs > 0 && queue.length < QUEUE) queue.push({ message, until: Date.now() + keepMs });
    else return false;
    return true;
  }
  /** To everyone else, to the slots in `to`, or with `echo` to everyone in the same order. @returns as `command` */
  function send(data: Outgoing, { to, echo, keepMs }: SendOptions = {}): boolean {
    // The relay reads them fastest in this order.
    return command({ type: "send", ...(to !== undefined && { to }), data, ...(echo && { echo }) }, keepMs);
  }
  /** Asks a member, who has to `answer`. Rejects at the deadline, and at once if that member is away. */
  async function ask<Answer = unknown>(to: number, data: Outgoing, { deadlineMs = ANSWER_MS } = {}): Promise<Answer> {
    if (status.state === "open" && slots.get(to) === false) throw failure("peer_away", "That member is away");
    const id = randomId();
    send({ [TALK]: "ask", id, data } as Outgoing, { to, keepMs: deadlineMs });
    return (await once("answer", (answer) => answer.id === id && answer.from === to, deadlineMs)).data as Answer;
  }
  /** Answers what others ask, with what `answerer` gives or resolves to. @returns what ends that */
  function answer(answerer: (data: Incoming, from: number) => unknown): () => void {
    return on("ask", async ({ from: to, id, data }) => {
      send({ [TALK]: "answer", id, data: await answerer(data, to) } as Outgoing, { to });
    });
  }
  /** A token with which another device takes over this slot; for the host, any slot. A newer one replaces it. */
  function offer(index?: number): Promise<Events["slot_offer"]> {
    command({ type: "offer_slot", ...(index !== undefined && { index }) });
    return once("slot_offer", (offer) => offer.index === (index ?? me), ANSWER_MS);
  }
  /** The slots that were seen, ascending. */
  function members(): Member[] {
    const known = [...slots].map(([index, here]) => ({ index, away: !here, me: index === me, host: index === host }));
    return known.sort((a, b) => a.index - b.index);
  }
  /** @returns what ends the subscription */
  function on<T extends keyof Events>(type: T, listener: (event: Events<Incoming>[T]) => void): () => void {
    listeners.set(type, (listeners.get(type) ?? new Set()).add(listener));
    return () => void listeners.get(type)?.delete(listener);
  }
  /** The next event that is wanted. Rejects with a `Failure` at the deadline, and when this client is out for good. */
  function once<T extends keyof Events>(type: T, wanted = (_: Events<Incoming>[T]) => true, deadlineMs?: number) {
    const offs: (() => void)[] = [];
    const event = new Promise<Events<Incoming>[T]>((resolve, reject) => {
      const closed = ({ state, code, reason }: Status) => state === "closed" && reject(failure(code!, reason!));
      offs.push(on(type, (event) => wanted(event) && resolve(event)));
      offs.push(on("status", closed));
      if (deadlineMs !== undefined) setTimeout(() => reject(failure("deadline", "No answer in time")), deadlineMs);
      closed(status);
    });
    return event.finally(() => offs.forEach((off) => off()));
  }
  document?.addEventListener("visibilitychange", () => document.visibilityState !== "hidden" && wake(), ended);
  for (const event of ["online", "pageshow"]) window?.addEventListener(event, wake, ended);
  for (const event of ["offline", "pagehide"]) window?.addEventListener(event, interrupt, ended);
  const ready = once("status", ({ state }) => state === "open");
  ready.catch(() => {}); // who doesn't wait for it hears of it by `status`
  open();
  return {
    /** In the room for the first time. Rejects with a `Failure`, mostly the refusal. */
    ready,
    ...{ on, once, send, command, ask, answer, offer, members, wake },
    status: () => status,
    room: () => saved.room,
    me: () => me,
    host: () => host,
    /** The relay's time in ms since 1970, which is everybody's. */
    now: () => performance.now() + clock.offset,
    close: () => end("closed", "closed here"),
  };
}

const failure = (code: Failure["code"], message: string): Failure => Object.assign(new Error(message), { code });
/** `crypto.randomUUID` is missing if the page came over plain http, as in a home's Wi-Fi. */
const randomId = (): string => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16)).join("");
