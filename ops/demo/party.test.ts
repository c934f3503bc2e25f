import { describe, expect, test } from "bun:test";
import * as relay from "../../server.ts";
import { RelayProcess } from "../shared/processes.ts";
import { testRelay } from "../shared/relay.ts";
import { PATIENCE_MS } from "../shared/wait.ts";
import * as client from "./party.ts";
import { connect, type Events, type Member, type Options, type Party, type ServerMessage, type Status } from "./party.ts";

/** Whether two types are the same, down to what is optional. */
type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false;

describe("types", () => {
  test("are the relay's", () => {
    const same: [
      Same<client.ClientMessage, relay.ClientMessage>,
      Same<client.ServerMessage, relay.ServerMessage>,
      Same<client.ErrorCode, relay.ErrorCode>,
      Same<typeof client.CloseCode, typeof relay.CloseCode>,
    ] = [true, true, true, true]; // the type checker says which one isn't
    expect(same).not.toContain(false);
    expect(client.CloseCode).toEqual(relay.CloseCode);
  });

  test("of one's own messages hold for what comes, goes, is asked and answered", () => {
    type FromGuest = { press: string } | { name: string };
    type FromHost = { score: number };
    const use = (guest: Party<FromHost, FromGuest>, host: Party<FromGuest, FromHost>) => {
      guest.on("message", ({ data }) => data.score.toFixed());
      guest.send({ press: "a" }, { to: 0 });
      // @ts-expect-error guests don't send scores
      guest.send({ score: 1 });
      // @ts-expect-error hosts get no scores
      host.on("message", ({ data }) => data.score);
      host.answer((data) => ("name" in data ? data.name : data.press));
      // @ts-expect-error nor are they asked for any
      void guest.ask<string>(0, { score: 1 });
      void guest.ask<string>(0, { name: "Ann" }).then((answer) => answer.length);
    };
    const anyParty: (party: Party) => void = () => {};
    const typed: (party: Party<FromHost, FromGuest>) => void = anyParty;
    expect([use, typed]).toHaveLength(2); // the type checker is the test
  });
});

/** A socket whose other end is the test. */
class ScriptedSocket {
  readyState = 0;
  readonly frames: string[] = [];
  onopen?: () => void;
  onmessage?: (event: { data: string }) => void;
  onclose?: (event: { code: number; reason: string }) => void;

  constructor(readonly url: string) {}

  send(frame: string): void {
    this.frames.push(frame);
  }
  close(): void {
    this.readyState = 2;
  }
  accept(): void {
    this.readyState = 1;
    this.onopen?.();
  }
  say(message: ServerMessage): void {
    this.onmessage?.({ data: JSON.stringify(message) });
  }
  refuse(code: Extract<ServerMessage, { type: "error" }>["code"]): void {
    this.say({ type: "error", message: code, code });
  }
  end(code: number, reason = ""): void {
    this.readyState = 3;
    this.onclose?.({ code, reason });
  }
  get sent(): any[] {
    return this.frames.map((frame) => JSON.parse(frame));
  }
  /** What was sent, but for pings. */
  get said(): any[] {
    return this.sent.filter((message) => message.type !== "ping");
  }
}

class TestStorage {
  readonly items = new Map<string, string>();
  getItem(key: string): string | null {
    return this.items.get(key) ?? null;
  }
  setItem(key: string, value: string): void {
    this.items.set(key, value);
  }
}

/** A browser's globals, whose time the test moves. */
class World {
  readonly sockets: ScriptedSocket[] = [];
  readonly sessionStorage = new TestStorage();
  readonly document = Object.assign(new EventTarget(), { visibilityState: "visible" });
  readonly window = new EventTarget();
  random = 0;
  #now = 0;
  #timers = new Map<number, { at: number; run: () => void }>();
  #lastTimer = 0;
  #slept = 0;

  readonly env = {
    WebSocket: ((world) =>
      class extends ScriptedSocket {
        constructor(url: URL) {
          super(url.href);
          world.sockets.push(this);
        }
      })(this),
    Math: Object.create(Math, { random: { value: () => this.random } }),
    Date: { now: () => EPOCH + this.#now + this.#slept },
    performance: { now: () => this.#now },
    setTimeout: (run: () => void, ms: number) => {
      this.#timers.set(++this.#lastTimer, { at: this.#now + ms, run });
      return this.#lastTimer;
    },
    clearTimeout: (timer: number) => this.#timers.delete(timer),
    document: this.document,
    window: this.window,
    sessionStorage: this.sessionStorage,
  } as unknown as typeof globalThis;

  /** Passes time as it does for a device that sleeps: only the time of day goes on. */
  sleep(ms: number): void {
    this.#slept += ms;
  }
  /** Milliseconds since the test began. */
  get now(): number {
    return this.#now;
  }
  /** As the browser says it, to its window or its document. */
  say(event: "online" | "offline" | "pagehide" | "pageshow" | "visible" | "hidden"): void {
    const isVisibility = event === "visible" || event === "hidden";
    if (isVisibility) this.document.visibilityState = event;
    const target = isVisibility ? this.document : this.window;
    target.dispatchEvent(new Event(isVisibility ? "visibilitychange" : event));
  }
  /** The latest socket is taken, and in the room. */
  enter(message: ServerMessage = joined()): void {
    this.socket.accept();
    this.socket.say(message);
  }
  /** The socket of the latest connection. */
  get socket(): ScriptedSocket {
    return this.sockets.at(-1)!;
  }
  /** As the relay does, at once. @param now what its clock says */
  answerPing(now = EPOCH): void {
    this.socket.say({ type: "pong", t: this.socket.sent.findLast(({ type }) => type === "ping").t, now });
  }
  connect(options: Partial<Options> = { room: CODE }): Party {
    return connect({ url: "wss://relay.example", env: this.env, ...options });
  }
  advance(ms: number): void {
    const until = this.#now + ms;
    for (;;) {
      const due = [...this.#timers].filter(([, { at }]) => at <= until).sort((a, b) => a[1].at - b[1].at)[0];
      if (!due) break;
      this.#timers.delete(due[0]);
      this.#now = due[1].at;
      due[1].run();
    }
    this.#now = until;
  }
  /** How long until it connects again, in ms. */
  wait(): number {
    const count = this.sockets.length;
    const start = this.#now;
    while (this.sockets.length === count && this.#now - start < 60_000) this.advance(50);
    return this.#now - start;
  }
}

const EPOCH = 1_700_000_000_000; // what this page takes for the time when a test begins
const CODE = "K7bQx2";
const joined = (index = 1, room = CODE): ServerMessage => ({ type: "joined", room, index, peers: [0] });
const created = (room = CODE): ServerMessage => ({
  type: "created",
  room,
  instance: "d8911",
  region: "fra",
  index: 0,
});

function joinedWorld(): { world: World; party: Party; clientId: string } {
  const world = new World();
  const party = world.connect();
  world.socket.accept();
  world.socket.say(joined());
  return { world, party, clientId: world.socket.sent[0].clientId };
}

describe("entering a room", () => {
  test("joins with a clientId of its own, at the room's address", () => {
    const { world, party, clientId } = joinedWorld();
    expect(world.socket.url).toBe(`wss://relay.example/${CODE}`);
    expect(world.socket.said).toEqual([{ type: "join", clientId: expect.any(String), room: CODE }]);
    expect(clientId.length).toBeGreaterThan(16);
    expect(party.status()).toEqual({ state: "open" });
  });

  test("gives each new tab another clientId", () => {
    expect(joinedWorld().clientId).not.toBe(joinedWorld().clientId);
  });

  test("creates a room with the fields given, and after a reload joins it on the machine that has it", () => {
    const world = new World();
    const create = { maxClients: 8, linger: 60 };
    world.connect({ create });
    expect(world.socket.url).toBe("wss://relay.example/");
    world.socket.accept();
    const { clientId } = world.socket.sent[0];
    expect(world.socket.sent).toEqual([{ type: "create", clientId, maxClients: 8, linger: 60 }]);
    world.socket.say(created());

    world.connect({ create });
    expect(world.socket.url).toBe(`wss://relay.example/${CODE}?instance=d8911`);
    world.socket.accept();
    expect(world.socket.sent).toEqual([{ type: "join", clientId, room: CODE }]);
    world.socket.say(joined(0));
    for (const options of [{ create }, { room: CODE }]) {
      world.connect(options);
      expect(world.socket.url).toBe(`wss://relay.example/${CODE}?instance=d8911`);
    }
  });

  test("keeps the clientId for another room, but not the machine of the last", () => {
    const world = new World();
    world.connect({ create: { maxClients: 8 } });
    world.socket.accept();
    const { clientId } = world.socket.sent[0];
    world.socket.say(created());
    world.connect({ room: "Zz9zz9" });
    expect(world.socket.url).toBe("wss://relay.example/Zz9zz9");
    world.socket.accept();
    expect(world.socket.sent[0]).toEqual({ type: "join", clientId, room: "Zz9zz9" });
  });

  test("creates a room of its own in a tab that was a guest", () => {
    const { world } = joinedWorld();
    world.connect({ create: { maxClients: 8 } });
    world.socket.accept();
    expect(world.socket.sent[0].type).toBe("create");
  });

  test("joins the room that it was in if none is named, and throws without any", () => {
    const { world } = joinedWorld();
    world.connect({});
    expect(world.socket.url).toEndWith(`/${CODE}`);
    expect(() => new World().connect({})).toThrow("no room");
  });

  test("takes http addresses, with a path and a query of their own", () => {
    const world = new World();
    world.connect({ url: "https://games.example/relay/?key=1", room: CODE });
    expect(world.socket.url).toBe(`wss://games.example/relay/${CODE}?key=1`);
  });

  test("works if the browser blocks storage", () => {
    const world = new World();
    Object.defineProperty(world.env, "sessionStorage", {
      get() {
        throw new Error("SecurityError");
      },
    });
    world.connect();
    world.socket.accept();
    world.socket.say(joined());
    world.socket.end(1006);
    world.wait();
    world.socket.accept();
    expect(world.socket.sent[0]).toEqual(world.sockets[0]!.sent[0]);
  });

  test("takes a clientId that the game names", () => {
    const world = new World();
    world.connect({ room: CODE, clientId: "account-7" });
    world.socket.accept();
    expect(world.socket.sent[0].clientId).toBe("account-7");
  });
});

describe("events", () => {
  test("gives each message to the listeners of its type, until they unsubscribe", () => {
    const { world, party } = joinedWorld();
    const seen: Events["message"][] = [];
    const off = party.on("message", (message) => seen.push(message));
    world.socket.say({ type: "message", from: 2, data: { x: 1 } });
    world.socket.say({ type: "peer_joined", index: 3 });
    off();
    world.socket.say({ type: "message", from: 2, data: 2 });
    expect(seen).toEqual([{ type: "message", from: 2, data: { x: 1 } }]);
  });

  test("is in the room before it says so, so that a listener can send", () => {
    const world = new World();
    const party = world.connect();
    party.on("joined", () => party.send("hello", { to: 0 }));
    world.socket.accept();
    world.socket.say(joined());
    expect(world.socket.said[1]).toEqual({ type: "send", data: "hello", to: 0 });
  });

  test("leaves for good with the command leave", () => {
    const { world, party } = joinedWorld();
    party.command({ type: "leave" });
    world.socket.say({ type: "left", room: CODE });
    expect(party.status()).toMatchObject({ state: "closed", code: "left" });
    expect(() => world.connect({})).toThrow("no room");
  });

  test("keeps its slot when it is closed", () => {
    const { world, party } = joinedWorld();
    party.close();
    expect(party.status().state).toBe("closed");
    world.connect({});
    expect(world.sockets).toHaveLength(2);
  });
  test("of questions and answers name who sent them, whatever that one writes", () => {
    const { world, party } = joinedWorld();
    const seen: number[] = [];
    for (const type of ["ask", "answer"] as const) {
      party.on(type, ({ from }) => seen.push(from));
      world.socket.say({ type: "message", from: 2, data: { "party-sockets": type, id: "x", from: 0, data: 1 } });
    }
    expect(seen).toEqual([2, 2]);
  });
});

describe("after a loss", () => {
  test("comes back with the same clientId", () => {
    const { world, clientId } = joinedWorld();
    world.socket.end(1006);
    world.wait();
    world.socket.accept();
    expect(world.socket.said).toEqual([{ type: "join", clientId, room: CODE }]);
  });

  test.each([
    { random: 0, waits: [250, 500, 1000, 2000, 4000, 7500, 7500] },
    { random: 1, waits: [500, 1000, 2000, 4000, 8000, 15_000, 15_000] },
  ])("waits longer each time, with jitter: $waits", ({ random, waits }) => {
    const { world, party } = joinedWorld();
    const expected: number[] = [...waits];
    world.random = random;
    const status: Status[] = [];
    party.on("status", (next) => next.state === "waiting" && status.push(next));
    const waited = waits.map(() => {
      world.socket.end(1006);
      return world.wait();
    });
    expect(waited).toEqual(expected);
    expect(status.map(({ retryMs }) => retryMs)).toEqual(expected);
  });

  test("forgets how long it waited only when a connection has held", () => {
    const { world } = joinedWorld();
    const lose = () => {
      world.socket.end(1006);
      const waited = world.wait();
      world.socket.accept();
      world.socket.say(joined());
      return waited;
    };
    expect([lose(), lose(), lose()]).toEqual([250, 500, 1000]);
    world.answerPing();
    world.advance(5000);
    expect(lose()).toBe(250);
  });

  test.each(["visible", "online"] as const)("tries at once on %s", (event) => {
    const { world } = joinedWorld();
    world.socket.end(1006);
    world.say(event);
    expect(world.sockets).toHaveLength(2);
    world.say(event);
    expect(world.sockets).toHaveLength(2); // it is on its way
  });

  test("hangs up when the page is put away, and comes back with the page", () => {
    const { world } = joinedWorld();
    world.say("pagehide");
    expect(world.socket.readyState).toBe(2);
    world.say("hidden"); // as browsers go on when a tab is closed
    expect(world.sockets).toHaveLength(1);
    world.say("pageshow");
    expect(world.sockets).toHaveLength(2);
  });

  test("stays in the room while the page is hidden", () => {
    const { world, party } = joinedWorld();
    const { length } = world.socket.sent;
    world.say("hidden");
    expect(party.status().state).toBe("open");
    expect(world.socket.sent).toHaveLength(length);
  });

  test("believes the browser that it is offline, and comes back when it is online", () => {
    const { world, party } = joinedWorld();
    world.say("offline");
    expect(party.status()).toMatchObject({ state: "waiting", code: 1006, reason: "offline" });
    expect(world.socket.readyState).toBe(2);
    world.say("online");
    expect(world.sockets).toHaveLength(2);
    world.say("offline"); // on its way
    expect(party.status().state).toBe("waiting");
  });

  test("tries on while the browser says that it is offline: the relay may be nearer than the internet", () => {
    const { world } = joinedWorld();
    world.say("offline");
    expect(world.wait()).toBe(250);
  });

  test.each([1008, 1012, 1013])("doesn't hurry if the relay closed with %d", (code) => {
    const { world } = joinedWorld();
    world.socket.end(code);
    for (const event of ["offline", "online", "visible", "pageshow"] as const) world.say(event);
    expect(world.sockets).toHaveLength(1);
  });

  test("gives up a connection that never opens", () => {
    const { world } = joinedWorld();
    world.socket.end(1006);
    world.wait();
    expect(world.wait()).toBe(10_500); // ten seconds, and the second back-off
  });
});

describe("close codes", () => {
  test.each([4000, 4001, 4002])("%d is final", (code) => {
    const { world, party } = joinedWorld();
    world.socket.end(code, "for good");
    for (const event of ["visible", "online", "offline", "pagehide", "pageshow"] as const) world.say(event);
    world.wait();
    expect(world.sockets).toHaveLength(1);
    expect(party.status()).toEqual({ state: "closed", code, reason: "for good" });
    expect(party.send("x")).toBe(false);
  });

  test.each([
    [1008, 30_000, 35_000],
    [1012, 500, 3_000],
    [1013, 5_000, 6_000],
    [1009, 250, 500],
    [1011, 250, 500],
  ])("%d waits for %d to %d ms", (code, min, max) => {
    for (const random of [0, 1]) {
      const { world, party } = joinedWorld();
      world.random = random;
      world.socket.end(code);
      expect(party.status()).toMatchObject({ state: "waiting", code });
      expect(world.wait()).toBe(random ? max : min);
    }
  });

  test("the room is remembered after 4000, as another tab has the slot, and forgotten after 4001 and 4002", () => {
    for (const code of [4000, 4001, 4002]) {
      const { world } = joinedWorld();
      world.socket.end(code);
      if (code === 4000) world.connect({});
      else expect(() => world.connect({})).toThrow("no room");
    }
  });
});

describe("refusals", () => {
  test.each(["room_not_found", "room_full", "room_locked", "kicked", "claim_not_found", "bad_request"] as const)(
    "%s is final for a guest",
    (code) => {
      const world = new World();
      const party = world.connect();
      world.socket.accept();
      world.socket.refuse(code);
      world.wait();
      expect(world.sockets).toHaveLength(1);
      expect(party.status()).toEqual({ state: "closed", code, reason: code });
      expect(world.socket.readyState).toBe(2);
    },
  );

  test.each(["capacity", "draining"] as const)("%s is tried again after 5 s", (code) => {
    const world = new World();
    world.connect({ create: { maxClients: 8 } });
    world.socket.accept();
    world.socket.refuse(code);
    expect(world.wait()).toBe(5000);
    world.socket.accept();
    expect(world.socket.sent[0].type).toBe("create");
  });

  test("after too many attempts it waits for the close, and then 30 s", () => {
    const world = new World();
    world.connect();
    world.socket.accept();
    world.socket.refuse("too_many_attempts");
    expect(world.sockets).toHaveLength(1);
    world.socket.end(1008);
    expect(world.wait()).toBe(30_000);
  });

  test("a creator whose room is gone opens another, and drops what was meant for the old one", () => {
    const world = new World();
    const party = world.connect({ create: { maxClients: 8 } });
    world.socket.accept();
    world.socket.say(created());
    world.socket.end(1006);
    party.command({ type: "kick", index: 3 });
    world.wait();
    world.socket.accept();
    world.socket.refuse("room_not_found");
    world.socket.say(created("Zz9zz9"));
    expect(world.socket.said.map(({ type, room }) => [type, room])).toEqual([
      ["join", CODE],
      ["create", undefined],
    ]);
    world.socket.end(1006);
    world.wait();
    expect(world.socket.url).toContain("/Zz9zz9");
  });

  test.each(["not_host", "peer_away", "peer_not_found"] as const)("%s in the room is an event, and ends nothing", (refusal) => {
    const { world, party } = joinedWorld();
    const codes: string[] = [];
    party.on("error", ({ code }) => codes.push(code));
    world.socket.refuse(refusal);
    expect(codes).toEqual([refusal]);
    expect(party.status().state).toBe("open");
  });
});

describe("half-open sockets", () => {
  test("asks for a sign of life every 5 s, and gives the latency", () => {
    const { world, party } = joinedWorld();
    const latencies: number[] = [];
    party.on("latency", ({ ms }) => latencies.push(ms));
    for (let i = 0; i < 3; i++) {
      world.advance(40);
      world.answerPing();
      world.advance(5000);
    }
    expect(latencies).toEqual([40, 40, 40]);
    expect(world.socket.sent.filter(({ type }) => type === "ping")).toHaveLength(4);
  });

  test("drops a socket that gives none for 4 s, whatever that socket says later", () => {
    const { world, party } = joinedWorld();
    const [dead] = world.sockets;
    world.advance(4000);
    expect(party.status()).toMatchObject({ state: "waiting", code: 1006 });
    world.wait();
    world.socket.accept();
    world.socket.say(joined());
    dead!.end(4000, "replaced");
    dead!.say({ type: "error", message: "late", code: "kicked" });
    expect(party.status()).toEqual({ state: "open" });
  });

  test("keeps a socket on which anything else arrives: the answer may be far back in a queue", () => {
    const { world, party } = joinedWorld();
    for (let i = 0; i < 5; i++) {
      world.advance(3000);
      world.socket.say({ type: "message", from: 0, data: i });
    }
    expect(party.status().state).toBe("open");
  });

  test("asks at once when the page wakes", () => {
    const { world, party } = joinedWorld();
    world.answerPing();
    world.say("visible");
    world.advance(4000);
    expect(party.status().state).toBe("waiting");
  });
});

describe("messages sent while away", () => {
  test("the first ten go out in order after the join, the eleventh is refused", () => {
    const { world, party } = joinedWorld();
    world.socket.end(1006);
    const kept = Array.from({ length: 11 }, (_, i) => party.send(i));
    expect(kept).toEqual([...Array(10).fill(true), false]);
    world.wait();
    world.socket.accept();
    expect(world.socket.said).toHaveLength(1);
    world.socket.say(joined());
    expect(world.socket.said.slice(1).map(({ data }) => data)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    expect(party.send("now")).toBe(true);
    expect(world.socket.said.at(-1)).toEqual({ type: "send", data: "now" });
  });

  test("a socket that is closing counts as away", () => {
    const { world, party } = joinedWorld();
    world.socket.readyState = 2;
    party.send("kept");
    expect(world.socket.said).toHaveLength(1);
    world.socket.end(1006);
    world.wait();
    world.socket.accept();
    world.socket.say(joined());
    expect(world.socket.said[1]).toEqual({ type: "send", data: "kept" });
  });
});

describe("the age of what is sent while away", () => {
  /** What arrives of that when the room is back after half a minute. */
  function afterAWhile(options: Partial<Options>, send: (party: Party) => void): unknown[] {
    const world = new World();
    const party = world.connect({ room: CODE, ...options });
    world.enter();
    world.socket.end(1008);
    send(party);
    expect(world.wait()).toBe(30_000);
    world.enter();
    return world.socket.said.slice(1).map(({ data }) => data);
  }

  test("taps of 30 s ago don't arrive", () => {
    const taps = (party: Party) => [1, 2, 3].forEach((tap) => party.send(tap));
    expect(afterAWhile({}, taps)).toEqual([]);
    expect(afterAWhile({ keepMs: 31_000 }, taps)).toEqual([1, 2, 3]);
  });

  test("is each message's own, if it has one", () => {
    const mixed = (party: Party) => {
      party.send("tap");
      party.send("name", { keepMs: Infinity });
      party.command({ type: "send", data: "long" }, 60_000);
      expect(party.send("now or never", { keepMs: 0 })).toBe(false);
    };
    expect(afterAWhile({}, mixed)).toEqual(["name", "long"]);
    expect(afterAWhile({ keepMs: 0 }, mixed)).toEqual(["name", "long"]);
  });

  test("is 5 s by default", () => {
    const world = new World();
    const party = world.connect();
    party.send("stale");
    world.advance(4_000);
    party.send("fresh");
    world.advance(1_000);
    world.enter();
    expect(world.socket.said.slice(1)).toEqual([{ type: "send", data: "fresh" }]);
  });

  test("makes room for newer ones", () => {
    const world = new World();
    const party = world.connect();
    for (let i = 0; i < 11; i++) party.send("stale");
    world.advance(5_000);
    expect(party.send("fresh")).toBe(true);
  });

  test("goes by the time of day, as a device that sleeps stops the other clock", () => {
    const world = new World();
    const party = world.connect();
    party.send("stale");
    world.sleep(40_000);
    world.enter();
    expect(world.socket.said).toHaveLength(1);
  });
});

test("sends in the order that the relay reads fastest: type, to, data", () => {
  const { world, party } = joinedWorld();
  const frames = () => world.socket.frames.filter((frame) => frame.includes('"send"'));
  party.send({ x: 1 });
  party.send({ x: 1 }, { to: 2 });
  party.send("all", { echo: true });
  party.send("some", { to: [1, 2], echo: undefined });
  expect(frames()).toEqual([
    '{"type":"send","data":{"x":1}}',
    '{"type":"send","to":2,"data":{"x":1}}',
    '{"type":"send","data":"all","echo":true}',
    '{"type":"send","to":[1,2],"data":"some"}',
  ]);
});

describe("members", () => {
  /** `1me 4away`: what is known of each. */
  const shown = (members: Member[]): string =>
    members.map(({ index, away, me, host }) => `${index}${away ? "away" : ""}${me ? "me" : ""}${host ? "host" : ""}`).join(" ");

  test("are those who are there and those who are away, with oneself and the host marked", () => {
    const { world, party } = joinedWorld();
    const seen: string[] = [];
    party.on("members", (members) => seen.push(shown(members)));
    expect(shown(party.members())).toBe("0host 1me");
    world.socket.say({ type: "peer_joined", index: 4 });
    world.socket.say({ type: "peer_joined", index: 2 });
    world.socket.say({ type: "peer_left", index: 2 });
    world.socket.say({ type: "peer_joined", index: 2, resumed: true });
    world.socket.say({ type: "peer_left", index: 4, reason: "left" });
    world.socket.say({ type: "host", index: 2 });
    world.socket.say({ type: "peer_left", index: 0, reason: "kicked" });
    expect(seen).toEqual([
      "0host 1me 4",
      "0host 1me 2 4",
      "0host 1me 2away 4",
      "0host 1me 2 4",
      "0host 1me 2",
      "0 1me 2host",
      "1me 2host",
    ]);
    expect([party.me(), party.host(), party.room()]).toEqual([1, 2, CODE]);
  });

  test("are known to a listener of the message that changes them", () => {
    const { world, party } = joinedWorld();
    let seen = "";
    party.on("peer_left", () => (seen = shown(party.members())));
    world.socket.say({ type: "peer_left", index: 0 });
    expect(seen).toBe("0awayhost 1me");
  });

  test("who went while this client was away are away, who came are there, and the host may be another", () => {
    const { world, party } = joinedWorld();
    world.socket.say({ type: "peer_joined", index: 2 });
    world.socket.end(1006);
    world.wait();
    world.enter({ type: "joined", room: CODE, index: 1, peers: [2, 3], host: 3 });
    expect(shown(party.members())).toBe("0away 1me 2 3host");
  });

  test("of a room that is gone are forgotten with it", () => {
    const world = new World();
    const party = world.connect({ create: { maxClients: 8 } });
    world.enter(created());
    world.socket.say({ type: "peer_joined", index: 1 });
    world.socket.end(1006);
    world.wait();
    world.socket.accept();
    world.socket.refuse("room_not_found");
    world.socket.say(created("Zz9zz9"));
    expect(shown(party.members())).toBe("0mehost");
  });
});

describe("ready and once", () => {
  test("ready resolves in the room", async () => {
    const { party } = joinedWorld();
    await party.ready;
    expect(party.me()).toBe(1);
  });

  test("ready rejects with the refusal", async () => {
    const world = new World();
    const { ready } = world.connect();
    world.socket.accept();
    world.socket.refuse("room_full");
    expect(await ready.catch(({ code, message }) => [code, message])).toEqual(["room_full", "room_full"]);
  });

  test("once gives the next event that is wanted, and listens no longer", async () => {
    const { world, party } = joinedWorld();
    let looked = 0;
    const wanted = party.once("message", ({ from }) => ++looked > 0 && from === 3);
    for (const from of [2, 3, 4]) world.socket.say({ type: "message", from, data: from });
    expect(await wanted).toEqual({ type: "message", from: 3, data: 3 });
    world.socket.say({ type: "message", from: 2, data: 2 });
    expect(looked).toBe(3); // the third came before it could stop
  });

  test("once rejects at its deadline, and when the client is out for good, also if that was before", async () => {
    const { world, party } = joinedWorld();
    const failures = [party.once("state", undefined, 500), party.once("state")];
    world.advance(500);
    world.socket.end(4002, "kicked");
    failures.push(party.once("state"));
    const codes = await Promise.all(failures.map((failure) => failure.catch(({ code }) => code)));
    expect(codes).toEqual(["deadline", 4002, 4002]);
  });

  test("a listener that another one adds waits for the next event", () => {
    const { world, party } = joinedWorld();
    const seen: unknown[] = [];
    const off = party.on("message", () => {
      off();
      party.on("message", ({ data }) => seen.push(data));
    });
    for (const data of [1, 2]) world.socket.say({ type: "message", from: 0, data });
    expect(seen).toEqual([2]);
  });
});

describe("the relay's clock", () => {
  /** A ping and its answer, `ms` apart, with the relay's clock in the middle of it ahead by `ahead`. */
  function pong(world: World, ms: number, ahead: number): void {
    world.say("visible"); // which pings
    world.advance(ms);
    world.answerPing(EPOCH + world.now - ms / 2 + ahead);
  }

  test("is this device's until the first answer, then the relay's", () => {
    const { world, party } = joinedWorld();
    expect(party.now()).toBe(EPOCH + world.now);
    pong(world, 40, 5_000);
    expect(party.now()).toBe(EPOCH + world.now + 5_000);
    world.advance(1_234);
    expect(party.now()).toBe(EPOCH + world.now + 5_000);
  });

  test("is taken from the shortest round trip: a long one may be lopsided", () => {
    const { world, party } = joinedWorld();
    pong(world, 40, 5_000);
    pong(world, 400, 5_150);
    expect(party.now()).toBe(EPOCH + world.now + 5_000);
    pong(world, 20, 4_995);
    expect(party.now()).toBe(EPOCH + world.now + 4_995);
  });

  test("is found anew when it can't be right any more: this device slept, or the relay is another", () => {
    const { world, party } = joinedWorld();
    pong(world, 40, 5_000);
    pong(world, 80, 65_000);
    expect(party.now()).toBe(EPOCH + world.now + 65_000);
  });

  test("isn't confused by pings of the game's own", () => {
    const { world, party } = joinedWorld();
    const latencies: number[] = [];
    party.on("latency", ({ ms }) => latencies.push(ms));
    world.socket.say({ type: "pong", t: -1, now: 0 });
    world.socket.say({ type: "pong", now: 0 });
    expect(party.now()).toBe(EPOCH + world.now);
    pong(world, 30, 0);
    world.socket.say({ type: "pong", now: 0 });
    expect(latencies).toEqual([30]);
  });
});

describe("with a relay", () => {
  /** Bun's globals, a chance that always takes the shortest wait, and sockets that the test can cut. */
  function machine() {
    const sockets: (WebSocket & { terminate(): void })[] = [];
    class Cuttable extends WebSocket {
      constructor(url: URL) {
        super(url);
        sockets.push(this as never);
      }
    }
    const window = new EventTarget();
    const env = {
      ...{ WebSocket: Cuttable, Math: Object.create(Math, { random: { value: () => 0 } }), Date, window },
      ...{ performance, setTimeout, clearTimeout, sessionStorage: new TestStorage() },
    } as unknown as typeof globalThis;
    return { env, window, cut: () => sockets.at(-1)!.terminate() };
  }
  const next = <T extends keyof Events>(party: Party, type: T, wanted?: (event: Events[T]) => boolean) =>
    party.once(type, wanted, PATIENCE_MS) as Promise<Events[T]>;
  const ended = (party: Party) => next(party, "status", ({ state }) => state === "closed");
  /** Clients that are in one room, the host first. */
  async function company(relay: { url: string }, size: number): Promise<Party[]> {
    const host = connect({ url: relay.url, create: { maxClients: size + 2 }, env: machine().env });
    await host.ready;
    const guests: Party[] = [];
    for (const _ of Array(size - 1)) {
      const heard = next(host, "peer_joined");
      const guest = connect({ url: relay.url, room: host.room(), env: machine().env });
      await Promise.all([heard, guest.ready]);
      guests.push(guest);
    }
    return [host, ...guests];
  }

  test("gets its slot back after a cut, and what it said meanwhile arrives", async () => {
    await using relay = testRelay();
    const host = connect({ url: relay.url, create: { maxClients: 4 }, env: machine().env });
    const { room } = await next(host, "created");
    const device = machine();
    const guest = connect({ url: relay.url, room, env: device.env });
    expect(await next(guest, "joined")).toMatchObject({ index: 1, peers: [0] });
    const left = next(host, "peer_left");
    const away = next(guest, "status", ({ state }) => state === "waiting");
    device.cut();
    await Promise.all([away, left]);
    const message = next(host, "message");
    const back = next(host, "peer_joined");
    guest.send("while away");
    expect(await back).toEqual({ type: "peer_joined", index: 1, resumed: true });
    expect(await message).toEqual({ type: "message", from: 1, data: "while away" });
    host.close();
    guest.close();
  });

  test("of two tabs with one identity the newer has the slot, and the older stays away", async () => {
    await using relay = testRelay();
    const browser = machine();
    const host = connect({ url: relay.url, create: { maxClients: 4 }, env: browser.env });
    const { room } = await next(host, "created");
    const tab = { url: relay.url, room, storage: new TestStorage(), env: browser.env };
    const older = connect(tab);
    await next(older, "joined");
    const gone = ended(older);
    const newer = connect(tab);
    expect(await next(newer, "joined")).toMatchObject({ index: 1 });
    expect(await gone).toMatchObject({ code: 4000 });
    browser.window.dispatchEvent(new Event("online"));
    await next(newer, "latency");
    expect(older.status().state).toBe("closed");
    expect(newer.status().state).toBe("open");
    host.close();
    newer.close();
  });

  test.each(["SIGKILL", "SIGTERM"] as const)(
    "outlives a relay that is stopped with %s and started again: a new room, and guests know that theirs is gone",
    async (signal) => {
      await using relay = await RelayProcess.start();
      const [host, guest] = (await company(relay, 2)) as [Party, Party];
      const room = host.room();
      const away = next(guest, "status", ({ state }) => state === "waiting");
      const gone = ended(guest);
      const recreated = next(host, "created");
      if (signal === "SIGTERM") {
        const draining = next(guest, "draining");
        relay.signal(signal);
        await draining;
      }
      await relay.stop(signal); // a second one ends the drain
      expect((await away).code).toBe(signal === "SIGTERM" ? 1012 : 1006);
      await using _again = await RelayProcess.start({ PORT: String(relay.port) });
      const { room: newRoom } = await recreated;
      expect(newRoom).not.toBe(room as string);
      expect(await gone).toMatchObject({ code: "room_not_found" });
      const again = connect({ url: relay.url, room: newRoom, env: machine().env });
      expect(await next(again, "joined")).toMatchObject({ room: newRoom, index: 1 });
      again.close();
      host.close();
    },
  );

  test("asks a member, and the others don't hear of it", async () => {
    await using relay = testRelay();
    const [host, ann, bob] = (await company(relay, 3)) as [Party, Party, Party];
    const heard: unknown[] = [];
    for (const party of [host, ann, bob]) party.on("message", ({ data }) => heard.push(data));
    host.answer(async (question, from) => ({ question, from }));
    bob.answer(() => "bob");
    expect(await ann.ask<unknown>(0, { which: "door" })).toEqual({ question: { which: "door" }, from: 1 });
    expect(await bob.ask<unknown>(2, "oneself")).toBe("bob");
    expect(await ann.ask<unknown>(2, null)).toBe("bob");
    expect(heard).toEqual([]);
    for (const party of [host, ann, bob]) party.close();
  });

  test("gives each question its own answer, whatever their order", async () => {
    await using relay = testRelay();
    const [host, guest] = (await company(relay, 2)) as [Party, Party];
    const second = Promise.withResolvers<void>();
    host.answer(async (question) => {
      if (question === 2) second.resolve();
      await second.promise;
      await (question === 1 && next(host, "pong")); // after the other one's answer
      return question;
    });
    const answers = Promise.all([1, 2].map((question) => guest.ask<unknown>(0, question)));
    await second.promise;
    host.wake(); // which pings
    expect(await answers).toEqual([1, 2]);
    for (const party of [host, guest]) party.close();
  });

  test("takes an answer from nobody but the one who was asked", async () => {
    await using relay = testRelay();
    const [host, ann, bob] = (await company(relay, 3)) as [Party, Party, Party];
    const asked = next(host, "ask");
    const answer = ann.ask<unknown>(0, "?");
    const { id } = await asked;
    const forged = next(ann, "answer", ({ from }) => from === 2);
    bob.send({ "party-sockets": "answer", id, data: "forged" }, { to: 1 });
    await forged;
    host.send({ "party-sockets": "answer", id, data: "true" }, { to: 1 });
    expect(await answer).toBe("true");
    for (const party of [host, ann, bob]) party.close();
  });

  test("an answer that doesn't come ends at the deadline, and nobody waits for who is away", async () => {
    await using relay = testRelay();
    const [host, guest] = (await company(relay, 2)) as [Party, Party];
    const code = (answer: Promise<unknown>) => answer.catch((failure) => failure.code);
    expect(await code(host.ask(1, "anybody?", { deadlineMs: 50 }))).toBe("deadline");
    const left = next(host, "peer_left");
    guest.close();
    await left;
    expect(await code(host.ask(1, "anybody?"))).toBe("peer_away");
    host.close();
    expect(await code(host.ask(0, "anybody?"))).toBe("closed");
  });

  test("goes on with another device by an offer, and the first one is out", async () => {
    await using relay = testRelay();
    const [host, phone] = (await company(relay, 2)) as [Party, Party];
    const gone = ended(phone);
    const { index, token } = await phone.offer();
    expect(index).toBe(1);
    const tablet = connect({ url: relay.url, room: phone.room(), claim: token, env: machine().env });
    await tablet.ready;
    expect(tablet.me()).toBe(1);
    expect(await gone).toMatchObject({ code: 4000 });
    expect(host.members().map((member) => member.index)).toEqual([0, 1]);
    const offered = await host.offer(1);
    expect(offered.index).toBe(1);
    const late = connect({ url: relay.url, room: phone.room(), claim: token, env: machine().env });
    expect(await late.ready.catch(({ code }) => code)).toBe("claim_not_found");
    for (const party of [host, tablet]) party.close();
  });

  test("hears that a target is away, and stays", async () => {
    await using relay = testRelay();
    const [host, guest] = (await company(relay, 2)) as [Party, Party];
    const left = next(host, "peer_left");
    guest.close();
    await left;
    const refusal = next(host, "error");
    host.send("tap", { to: 1 });
    expect(await refusal).toMatchObject({ code: "peer_away" });
    expect(host.status().state).toBe("open");
    host.close();
  });

  test("takes the relay's clock from its answers", async () => {
    const clock = { ...relay.systemClock, epoch: () => Date.now() + 3_600_000 };
    await using ahead = testRelay({ clock });
    const [host] = (await company(ahead, 1)) as [Party];
    const { ms } = await next(host, "latency");
    expect(Math.abs(host.now() - Date.now() - 3_600_000)).toBeLessThanOrEqual(ms / 2 + 2);
    host.close();
  });
});
