/**
 * A client for a party-sockets relay that never gives up, for you to copy into your game. It keeps its slot
 * through reloads, sleep and lost networks:
 *     const party = connect({ url: "wss://relay.example", room: "K7bQx2" });
 *     party.on("message", ({ from, data }) => draw(from, data));
 *     party.on("status", ({ state, reason }) => show(state, reason));
 *     party.send({ x: 1, y: 2 });
 * Data comes from peers: check its shape, and show it as text, never as HTML.
 */
import type { ClientMessage, CloseCode, ErrorCode, ServerMessage } from "../../server.ts";

const PING_MS = 5_000; // between an answer and the next ping
const SILENT_MS = 4_000; // nothing heard for this long after a ping: the socket is half-open
const OPEN_MS = 10_000; // for TCP, TLS, the upgrade and the answer to join
const BACKOFF_MS = 500; // doubles with each attempt, until a connection has held for PING_MS
const BACKOFF_MAX_MS = 15_000;
const QUEUE = 10; // commands kept while away; more would be stale by the time they arrive

type Code = (typeof CloseCode)[keyof typeof CloseCode];
const LOST = 1006; // what a browser calls a connection that ended without a close frame
const REPLACED = 4000 satisfies Code;
const TERMINAL: readonly (number | string)[] = [REPLACED, 4001, 4002] satisfies Code[];
/** Shortest and longest wait in ms where the relay asks for patience, by close code or code of a refusal. */
const PATIENCE: Record<number | string, [min: number, max: number]> = {
  1008: [30_000, 35_000], // too many attempts from this address
  1012: [500, 3_000], // restarting: not every client in the same instant
  1013: [5_000, 6_000], // server full
  capacity: [5_000, 6_000],
  draining: [5_000, 6_000],
} satisfies Partial<Record<Code | ErrorCode, [number, number]>>;

type Message<T> = Extract<ClientMessage, { type: T }>;
/** What a member may send; entering a room is the client's own business. */
export type Command = Exclude<ClientMessage, { type: "create" | "join" }>;
export type Status = {
  /** In the room; on the way there; until the next try; for good. */
  state: "open" | "connecting" | "waiting" | "closed";
  /** What ended the last connection: a close code and its reason, or a refusal's code and message. */
  code?: number | string;
  reason?: string;
  retryMs?: number; // until the next try, while waiting
};
/** Every message of the relay by its type, and two of the client's own. */
export type Events = { [M in ServerMessage as M["type"]]: M } & { status: Status; latency: { ms: number } };
export type Options = {
  /** The relay: ws, wss, http or https. */
  url: string;
  /** Code of the room to join; where absent, the one that storage remembers. */
  room?: string;
  /** Opens a room instead. After a reload, the one that was opened is joined again while it lives. */
  create?: Omit<Message<"create">, "type" | "clientId">;
  /** Proves that the slot is its own; where absent, random and kept in storage. */
  clientId?: string;
  /** By default `sessionStorage`: every tab is a player. With `localStorage` a browser is one: its newest tab. */
  storage?: Pick<Storage, "getItem" | "setItem">;
  /** Where sockets, timers and the rest come from; tests pass their own. */
  env?: typeof globalThis;
};
export type Party = ReturnType<typeof connect>;
type Saved = { clientId: string; room?: string; instance?: string; created?: boolean };

/** Enters a room and stays in it. Throws where there is no room to enter, or `url` is none. */
export function connect({ url, room, create, clientId, storage, env = globalThis }: Options) {
  const { Math, performance, setTimeout, clearTimeout, document, window } = env;
  const key = `party:${url}`;
  const saved: Saved = { clientId: randomId(), ...load(), ...(clientId && { clientId }) };
  if (room ? room !== saved.room : create && !saved.created) enter(room);
  if (!saved.room && !create) throw new Error("There is no room to join");

  const listeners = new Map<string, Set<(event: any) => void>>();
  const queue: Command[] = [];
  const ended = new AbortController(); // its signal ends what listens to the page
  let status: Status = { state: "connecting" };
  let socket: WebSocket | undefined;
  let timer: ReturnType<typeof setTimeout> | undefined; // this state's: give up, ping or try again
  let attempts = 0;
  let pinged = false;

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
  function emit<T extends keyof Events>(type: T, event: Events[T]): void {
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
    transmit(room ? { type: "join", clientId, room } : { ...create!, type: "create", clientId });
  }
  function receive(message: ServerMessage): void {
    if (message.type === "error" && status.state === "connecting") return refused(message);
    if (pinged) after(SILENT_MS, silent); // a relay that is still busy with this socket's backlog lives
    if (message.type === "created") entered(message.room, message.instance, true);
    if (message.type === "joined") entered(message.room, saved.instance, saved.created);
    if (message.type === "pong") {
      pinged = false;
      after(PING_MS, () => ((attempts = 0), ping()));
      emit("latency", { ms: performance.now() - (message.t ?? 0) });
    }
    emit(message.type, message as never);
    if (message.type === "left") end("left", "left the room");
  }
  function entered(...place: Parameters<typeof enter>): void {
    enter(...place);
    queue.splice(0).forEach(transmit);
    ping();
    become({ state: "open" });
  }
  function refused({ code, message }: { code: ErrorCode; message: string }): void {
    if (code === "too_many_attempts") return; // 1008 follows
    if (code in PATIENCE) return lost(code, message);
    if (code !== "room_not_found" || !create || !saved.room) return end(code, message);
    enter();
    queue.length = 0; // it was meant for those who were in that room
    knock();
  }
  function ping(): void {
    transmit({ type: "ping", t: performance.now() });
    pinged = true;
    after(SILENT_MS, silent);
  }
  function drop(): void {
    clearTimeout(timer);
    socket?.close();
    socket = undefined; // not waited for: a dead one may take minutes to say that it closed
  }
  function lost(code: number | string, reason: string): void {
    if (TERMINAL.includes(code)) return end(code, reason);
    drop();
    const backoff = Math.min(BACKOFF_MAX_MS, BACKOFF_MS * 2 ** attempts++);
    const [min, max] = PATIENCE[code] ?? [backoff / 2, backoff];
    const retryMs = min + Math.random() * (max - min);
    after(retryMs, open);
    become({ state: "waiting", code, reason, retryMs });
  }
  function end(code: number | string, reason: string): void {
    drop();
    ended.abort();
    if (code !== REPLACED && code !== "closed") enter(); // with those two the slot is still this client's
    become({ state: "closed", code, reason });
  }
  /** Finds out how things are, at once: the device may have slept or changed networks. */
  function wake(): void {
    if (status.state === "open") ping();
    else if (status.state === "waiting" && !(status.code! in PATIENCE)) open();
  }
  /** @returns whether it is on its way or kept until the room is back; false where it is dropped */
  function command(message: Command): boolean {
    if (status.state === "open" && socket?.readyState === 1) transmit(message);
    else if (status.state !== "closed" && queue.length < QUEUE) queue.push(message);
    else return false;
    return true;
  }
  /** To everyone else, to the slots in `to`, or with `echo` to everyone in the same order. @returns as `command` */
  const send = (data: unknown, options?: Pick<Message<"send">, "to" | "echo">): boolean =>
    command({ ...options, type: "send", data });
  /** @returns what ends the subscription */
  function on<T extends keyof Events>(type: T, listener: (event: Events[T]) => void): () => void {
    listeners.set(type, (listeners.get(type) ?? new Set()).add(listener));
    return () => void listeners.get(type)?.delete(listener);
  }
  /** Hangs up; the slot stays this client's. The command `leave` gives up the place as well. */
  const close = (): void => end("closed", "closed here");
  document?.addEventListener("visibilitychange", wake, ended);
  for (const event of ["online", "pageshow"]) window?.addEventListener(event, wake, ended);
  window?.addEventListener("pagehide", () => lost(LOST, "the page is hidden"), ended); // or a cached page keeps its socket
  open();
  return { on, send, command, wake, close, status: () => status };
}

/** `crypto.randomUUID` is missing where the page came over plain http, as in a home's Wi-Fi. */
const randomId = (): string => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16)).join("");
