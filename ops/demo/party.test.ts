import { describe, expect, test } from "bun:test";
import type { ServerMessage } from "../../server.ts";
import { testRelay } from "../shared/testing.ts";
import { connect, type Events, type Options, type Party, type Status } from "./party.ts";
import { spawnRelay } from "./testing.ts";

/** A socket whose other end is the test. */
class ScriptedSocket {
  readyState = 0;
  readonly sent: any[] = [];
  onopen?: () => void;
  onmessage?: (event: { data: string }) => void;
  onclose?: (event: { code: number; reason: string }) => void;

  constructor(readonly url: string) {}

  send(frame: string): void {
    this.sent.push(JSON.parse(frame));
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
  readonly document = new EventTarget();
  readonly window = new EventTarget();
  random = 0;
  #now = 0;
  #timers = new Map<number, { at: number; run: () => void }>();
  #lastTimer = 0;

  readonly env = {
    WebSocket: ((world) =>
      class extends ScriptedSocket {
        constructor(url: URL) {
          super(url.href);
          world.sockets.push(this);
        }
      })(this),
    Math: Object.create(Math, { random: { value: () => this.random } }),
    Date: { now: () => EPOCH + this.#now },
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

  test("joins the room that it was in where none is named, and throws without any", () => {
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

  test("works where the browser blocks storage", () => {
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

  test.each(["visibilitychange", "online"])("tries at once on %s", (event) => {
    const { world } = joinedWorld();
    world.socket.end(1006);
    (event === "online" ? world.window : world.document).dispatchEvent(new Event(event));
    expect(world.sockets).toHaveLength(2);
    (event === "online" ? world.window : world.document).dispatchEvent(new Event(event));
    expect(world.sockets).toHaveLength(2); // it is on its way
  });

  test("hangs up when the page is put away, and comes back with the page", () => {
    const { world } = joinedWorld();
    world.window.dispatchEvent(new Event("pagehide"));
    expect(world.socket.readyState).toBe(2);
    world.window.dispatchEvent(new Event("pageshow"));
    expect(world.sockets).toHaveLength(2);
  });

  test.each([1008, 1012, 1013])("doesn't hurry where the relay closed with %d", (code) => {
    const { world } = joinedWorld();
    world.socket.end(code);
    world.window.dispatchEvent(new Event("online"));
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
    world.document.dispatchEvent(new Event("visibilitychange"));
    for (const event of ["online", "pagehide", "pageshow"]) world.window.dispatchEvent(new Event(event));
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

  test("the room is remembered after 4000, where another tab has the slot, and forgotten after 4001 and 4002", () => {
    for (const code of [4000, 4001, 4002]) {
      const { world } = joinedWorld();
      world.socket.end(code);
      if (code === 4000) world.connect({});
      else expect(() => world.connect({})).toThrow("no room");
    }
  });
});

describe("refusals", () => {
  test.each(["room_not_found", "room_full", "room_locked", "kicked", "bad_request"] as const)(
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

  test("a refusal in the room is an event, and ends nothing", () => {
    const { world, party } = joinedWorld();
    const codes: string[] = [];
    party.on("error", ({ code }) => codes.push(code));
    world.socket.refuse("not_host");
    expect(codes).toEqual(["not_host"]);
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
    world.document.dispatchEvent(new Event("visibilitychange"));
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
  function next<T extends keyof Events>(
    party: Party,
    type: T,
    wanted: (event: Events[T]) => boolean = () => true,
  ): Promise<Events[T]> {
    return new Promise((resolve) => {
      const off = party.on(type, (event) => {
        if (!wanted(event)) return;
        off();
        resolve(event);
      });
    });
  }
  const ended = (party: Party) => next(party, "status", ({ state }) => state === "closed");

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
      let relay = await spawnRelay();
      try {
        const host = connect({ url: relay.url, create: { maxClients: 4 }, env: machine().env });
        const { room } = await next(host, "created");
        const guest = connect({ url: relay.url, room, env: machine().env });
        await next(guest, "joined");
        const draining = signal === "SIGTERM" ? next(guest, "draining") : undefined;
        const away = next(guest, "status", ({ state }) => state === "waiting");
        const gone = ended(guest);
        const recreated = next(host, "created");
        await relay.stop(signal);
        await draining;
        expect((await away).code).toBe(signal === "SIGTERM" ? 1012 : 1006);
        relay = await spawnRelay(relay.port);
        const { room: newRoom } = await recreated;
        expect(newRoom).not.toBe(room);
        expect(await gone).toMatchObject({ code: "room_not_found" });
        const again = connect({ url: relay.url, room: newRoom, env: machine().env });
        expect(await next(again, "joined")).toMatchObject({ room: newRoom, index: 1 });
        again.close();
        host.close();
      } finally {
        await relay[Symbol.asyncDispose]();
      }
    },
  );
});
