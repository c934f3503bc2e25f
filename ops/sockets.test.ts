/**
 * What needs raw sockets, a process or time: slow members, floods, dead peers, odd HTTP, stopping. The relay is a process of
 * its own if its memory or its end matters. About 5 s.
 */
import { describe, expect, test } from "bun:test";
import { type ClientMessage, configFromEnv, nginxCluster, type Siblings } from "../server.ts";
import { Client, type Frame } from "./shared/client.ts";
import { readMetric, vitals } from "./shared/metrics.ts";
import { RelayProcess } from "./shared/processes.ts";
import { TestClock, testRelay } from "./shared/relay.ts";
import { clientFrame, handshake, RawSocket } from "./shared/sockets.ts";
import { until } from "./shared/wait.ts";

/** A raw socket that sits in a room. */
async function sits(url: string, room: string, clientId: string): Promise<RawSocket> {
  const raw = await RawSocket.open(url);
  raw.send({ type: "join", clientId, room });
  const { type } = await raw.next();
  if (type !== "joined") throw new Error(`join was answered by ${type}`);
  return raw;
}

/** A close frame with code 1000, as a page sends that hangs up. */
const farewell = () => clientFrame(Buffer.from([0x03, 0xe8]), { opcode: 8 });

/** Numbered messages of a flood. */
const numbered = (n: number) => Array.from({ length: n }, (_, data) => ({ type: "send", data }));
const upTo = (n: number) => Array.from({ length: n }, (_, i) => i);
const dataOf = (frames: Frame[]) => frames.filter(({ type }) => type === "message").map(({ data }) => data);

describe("a member that can't keep up", () => {
  const MESSAGES = 240;
  const WARM_UP = 80;
  const PAD = "x".repeat(250_000); // 60 MB in all
  const GROWTH = 32 * 1024 * 1024;

  test("is cut, costs the relay little memory, and the others lose nothing", async () => {
    await using child = await RelayProcess.start();
    const sender = await Client.open(child.url);
    const room = await sender.create(10);
    const fast = await Client.open(child.url);
    await fast.join(room, "fast");
    const left: number[] = [];
    let most = 0;
    const broadcast = async (messages: number) => {
      for (const n of upTo(messages)) {
        sender.send({ type: "send", data: { n, PAD } });
        let frame = await fast.next();
        for (; frame.type === "peer_left"; frame = await fast.next()) left.push(frame.index);
        expect(frame.data.n).toBe(n);
        expect(frame.data.PAD).toHaveLength(PAD.length);
        if (n % 10 === 9) most = Math.max(most, (await vitals(child.url)).rssBytes);
      }
    };
    await broadcast(WARM_UP); // the heap of a fresh process grows with any traffic
    const slow: RawSocket[] = [];
    for (const i of upTo(8)) slow.push(await sits(child.url, room, `slow ${i}`));
    await fast.soFar();
    for (const raw of slow) raw.pause();
    const { rssBytes: before } = await vitals(child.url);
    await broadcast(MESSAGES);
    expect(left.sort()).toEqual([2, 3, 4, 5, 6, 7, 8, 9]);
    expect(most - before).toBeLessThan(GROWTH);
    expect((await vitals(child.url)).clients).toBe(2);

    for (const raw of slow) {
      raw.resume();
      const numbers: number[] = [];
      for (let frame = await raw.nextFrame(); frame !== undefined; frame = await raw.nextFrame()) {
        expect(frame.opcode).not.toBe(8); // a browser sees 1006
        const message = JSON.parse(frame.payload.toString());
        if (message.type === "message") numbers.push(message.data.n);
      }
      expect(numbers).toEqual(upTo(numbers.length)); // the beginning of the stream, without a hole
      expect(numbers.length).toBeLessThan(MESSAGES);
    }
  }, 30_000);
});

test("of who joined with a large frame and left, the relay remembers little more than the clientId", async () => {
  await using child = await RelayProcess.start();
  const host = await Client.open(child.url);
  const room = await host.create(10);
  const guest = await Client.open(child.url);
  const pad = "x".repeat(250_000);
  const visit = async (clientId: string) => {
    await guest.ask({ type: "join", clientId, room, pad } as ClientMessage);
    await guest.ask({ type: "leave" });
  };
  for (const n of upTo(100)) await visit(`${n % 2} of two that come again and again`); // the heap of a fresh process grows
  const { rssBytes: before } = await vitals(child.url);
  for (const n of upTo(300)) await visit(`${n} of hundreds, ${n % 2 ? "as Latin-1" : "as Ω"}`); // 75 MB in all
  expect((await vitals(child.url)).rssBytes - before).toBeLessThan(25_000_000);
}, 30_000);

/** A clock by which whatever is timed takes 5 ms. */
class SlowClock extends TestClock {
  override now(): number {
    this.advance(5);
    return super.now();
  }
}

test("who asks to join by a frame that takes long to parse pays for that, and not the room", async () => {
  await using relay = testRelay({ clock: new SlowClock(), maxMessagesPerSecond: 0 });
  const host = await RawSocket.open(relay.url);
  host.send({ type: "create", clientId: "host", maxClients: 2 });
  const { room } = await host.next();
  const stranger = await RawSocket.open(relay.url);
  stranger.send({ type: "join", room, clientId: "stranger", pad: "x".repeat(60_000) } as ClientMessage); // 7,500 units of work
  host.send({ type: "send", data: "heard at once", echo: true });
  expect(await host.next()).toMatchObject({ type: "peer_joined" });
  expect(await host.next()).toMatchObject({ data: "heard at once" });
  expect(await readMetric(relay.url, "party_sockets_paused_total")).toEqual({ "": 0 });
});

test("frames that take long to handle count by their time, so that what follows waits for the next turn", async () => {
  for (const [clock, isHeld] of [
    [new TestClock(), false],
    [new SlowClock(), true],
  ] as const) {
    await using relay = testRelay({ clock, maxMessagesPerSecond: 0 });
    const raw = await RawSocket.open(relay.url);
    const frame = clientFrame(JSON.stringify({ type: "nonsense", pad: "x".repeat(9_000) }));
    raw.write(Buffer.concat(Array<Buffer>(7).fill(frame))); // six are 6,750 units of work, more than a turn does
    for (const _ of upTo(7)) expect(await raw.next()).toMatchObject({ code: "unknown_type" });
    expect(await readMetric(relay.url, "party_sockets_paused_total")).toEqual({ "": isHeld ? 1 : 0 });
  }
});

test("rooms go on if the system doesn't say how much memory is in use: all descriptors may be", async () => {
  let isKnown = true;
  const memory = () => {
    if (isKnown) return 1_000_000;
    throw new Error("EMFILE: too many open files");
  };
  await using relay = testRelay({ memory, maxMessagesPerSecond: 0 });
  const host = await Client.open(relay.url);
  const guest = await sits(relay.url, await host.create(), "guest");
  isKnown = false;
  const data = "x".repeat(200_000);
  for (const _ of upTo(100)) {
    host.send({ type: "send", data }); // 20 MB in all: a look at memory is due after 8
    expect(await guest.next()).toMatchObject({ data });
  }
  for (const message of numbered(8_000)) host.send(message as ClientMessage); // more than one turn's share
  for (const n of upTo(8_000)) expect((await guest.next()).data).toBe(n);
});

/** How many timers wait when there is nothing to do: those that look after a busy relay have ended. */
async function timersWhenQuiet(clock: TestClock): Promise<number> {
  for (let turn = 0; turn < 3; turn++) {
    await new Promise((resolve) => setImmediate(resolve));
    clock.advance(100);
  }
  return clock.pending;
}

describe("a flooder", () => {
  const RATE = 100;
  const FLOOD = 700;
  const TICK_MS = 50;
  const REFILL_MS = 50;

  async function scene() {
    const clock = new TestClock();
    const relay = testRelay({ clock, maxMessagesPerSecond: RATE });
    const peer = await Client.open(relay.url);
    const room = await peer.create();
    const timers = await timersWhenQuiet(clock);
    const flooder = await sits(relay.url, room, "flooder");
    await peer.soFar();
    return { clock, relay, peer, room, flooder, timers, [Symbol.asyncDispose]: () => relay[Symbol.asyncDispose]() };
  }
  const burst = 2 * RATE - 1; // the join took one

  test("is heard to the end and in order, at the rate that is allowed", async () => {
    await using at = await scene();
    at.flooder.send(...numbered(FLOOD));
    const got: unknown[] = [];
    while (got.length < burst) got.push((await at.peer.next()).data);
    expect(dataOf(await at.peer.soFar())).toEqual([]);
    let passed = 0;
    for (; got.length < FLOOD && passed < 10_000; passed += TICK_MS) {
      at.clock.advance(TICK_MS);
      got.push(...dataOf(await at.peer.soFar()));
    }
    expect(got).toEqual(upTo(FLOOD));
    expect(passed).toBeGreaterThanOrEqual((1000 * (FLOOD - burst)) / RATE);
    expect(passed).toBeLessThanOrEqual((1000 * (FLOOD - burst)) / RATE + 4 * TICK_MS);
    at.flooder.send({ type: "ping", t: 1 });
    at.clock.advance(TICK_MS);
    expect((await at.flooder.next()).type).toBe("pong");
  });

  test("delays nobody in another room", async () => {
    await using at = await scene();
    const other = await Client.open(at.relay.url);
    await other.create();
    at.flooder.send(...numbered(FLOOD));
    for (const _ of upTo(burst)) await at.peer.next();
    for (const data of upTo(50))
      // the clock stands still
      expect(await other.ask({ type: "send", data, echo: true })).toEqual({ type: "message", from: 0, data });
  });

  test("that says goodbye while it is paused is heard first, then forgotten", async () => {
    await using at = await scene();
    at.flooder.send(...numbered(burst + 30));
    for (const _ of upTo(burst)) await at.peer.next();
    at.flooder.end();
    const frames: Frame[] = [];
    for (let n = 0; n < 200 && frames.at(-1)?.type !== "peer_left"; n++) {
      at.clock.advance(TICK_MS);
      frames.push(...(await at.peer.soFar()));
    }
    expect(dataOf(frames)).toEqual(upTo(burst + 30).slice(burst));
    expect(frames.at(-1)).toEqual({ type: "peer_left", index: 1 });
    at.clock.advance(TICK_MS);
    expect(await timersWhenQuiet(at.clock)).toBe(at.timers);
    expect(await vitals(at.relay.url)).toMatchObject({ rooms: 1, clients: 1 });
  });

  const burstOf = (n: number) => Buffer.concat(numbered(n).map((message) => clientFrame(Buffer.from(JSON.stringify(message)))));

  test("that closes properly is heard to the end at the rate, and holds its place till then", async () => {
    await using at = await scene();
    at.flooder.write(Buffer.concat([burstOf(burst + 30), farewell()]));
    for (const data of upTo(burst)) expect(await at.peer.next()).toMatchObject({ data });
    expect(await at.peer.soFar()).toEqual([]);
    expect(await vitals(at.relay.url)).toMatchObject({ clients: 2 });
    const frames: Frame[] = [];
    let passed = 0;
    for (; passed < 5_000 && frames.at(-1)?.type !== "peer_left"; passed += TICK_MS) {
      at.clock.advance(TICK_MS);
      frames.push(...(await at.peer.soFar()));
    }
    expect(dataOf(frames)).toEqual(upTo(burst + 30).slice(burst));
    expect(frames.at(-1)).toEqual({ type: "peer_left", index: 1 });
    expect(passed).toBeGreaterThanOrEqual((1000 * 29) / RATE);
    expect(await vitals(at.relay.url)).toMatchObject({ clients: 1 });
  });

  test("that closes properly with more than five seconds' worth unsaid is gone after five", async () => {
    await using at = await scene();
    at.flooder.write(Buffer.concat([burstOf(burst + 600), farewell()]));
    for (const _ of upTo(burst)) await at.peer.next();
    await at.peer.soFar();
    const frames: Frame[] = [];
    let passed = 0;
    for (; passed < 7_000 && frames.at(-1)?.type !== "peer_left"; passed += TICK_MS) {
      at.clock.advance(TICK_MS);
      frames.push(...(await at.peer.soFar()));
    }
    expect(passed).toBe(5_000);
    const heard = dataOf(frames);
    expect(heard).toEqual(upTo(burst + heard.length).slice(burst));
    expect(heard.length).toBeLessThanOrEqual(5 * RATE + 1);
    expect(heard.length).toBeGreaterThan(4 * RATE);
  });

  test("that comes back while its last frames wait replaces itself, with the bucket that it left", async () => {
    await using at = await scene();
    at.flooder.write(Buffer.concat([burstOf(burst + 30), farewell()]));
    for (const _ of upTo(burst)) await at.peer.next();
    await at.peer.soFar();
    const again = await sits(at.relay.url, at.room, "flooder");
    again.send(...numbered(5));
    expect(await at.peer.soFar()).toEqual([]); // neither what waited, nor a fresh burst
    at.clock.advance(1000 / RATE + REFILL_MS);
    expect((await at.peer.next()).data).toBe(0);
  });

  test("that comes back while its last frames wait for their room's turn is heard to the end first", async () => {
    await using relay = testRelay({ maxMessagesPerSecond: 0 });
    const [peer, ...others] = await Promise.all(upTo(10).map(() => Client.open(relay.url)));
    const room = await peer!.create(16);
    for (const [i, other] of others.entries()) await other.join(room, `other ${i}`);
    const flooder = await sits(relay.url, room, "flooder");
    const again = await Client.open(relay.url);
    await peer!.soFar();
    flooder.write(Buffer.concat([burstOf(1_500), farewell()])); // as many as one read brings; half of them are more than a share
    expect(await again.join(room, "flooder")).toMatchObject({ index: 10, resumed: true });
    const frames = await peer!.soFar();
    expect(dataOf(frames)).toEqual(upTo(1_500));
    expect(frames.slice(-2)).toEqual([
      { type: "peer_left", index: 10 },
      { type: "peer_joined", index: 10, resumed: true },
    ]);
  });

  test("that resets while it is paused is noticed at once, and what waited is discarded", async () => {
    await using at = await scene();
    at.flooder.send(...numbered(burst + 30));
    for (const _ of upTo(burst)) await at.peer.next();
    at.flooder.reset();
    expect(await at.peer.next()).toEqual({ type: "peer_left", index: 1 });
    at.clock.advance(10_000);
    expect(await at.peer.soFar()).toEqual([]);
    expect(await timersWhenQuiet(at.clock)).toBe(at.timers);
  });

  test("that resets while it is paused is noticed, too, if a frame to it met the reset before the relay did", async () => {
    await using at = await scene();
    at.flooder.send(...numbered(burst + 30));
    for (const _ of upTo(burst)) await at.peer.next();
    at.flooder.reset();
    void at.relay.drain(); // says so to all sockets before it reads any
    expect(await at.peer.next()).toMatchObject({ type: "draining" });
    await at.peer.soFar();
    at.clock.advance(TICK_MS);
    let messages = 0;
    for (let { type } = await at.peer.next(); type !== "peer_left"; { type } = await at.peer.next()) messages++;
    expect(messages).toBeLessThanOrEqual((TICK_MS * RATE) / 1000); // what the rate allowed meanwhile
  });

  test("that creates a room and closes while it is paused keeps an idle relay from ending", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock, maxMessagesPerSecond: 1, idleExitSeconds: 10 });
    const screen = await RawSocket.open(relay.url);
    const create = { type: "create", clientId: "screen", maxClients: 2, linger: 300 };
    const frames = [{ type: "ping" }, { type: "ping" }, create].map((each) => clientFrame(JSON.stringify(each)));
    screen.write(Buffer.concat([...frames, farewell()])); // in one read: the create waits for a token
    await screen.closed;
    clock.advance(3_000);
    expect(await vitals(relay.url)).toMatchObject({ rooms: 1, clients: 0 });
    clock.advance(20_000);
    expect(await vitals(relay.url)).toMatchObject({ rooms: 1 });
  });

  test("that says goodbye while it is paused is not heard beyond what ends its socket", async () => {
    await using at = await scene();
    const pings = upTo(2 * RATE).map((t) => ({ type: "ping", t })); // what comes after them waits
    const host = await RawSocket.open(at.relay.url);
    host.send({ type: "create", clientId: "host", maxClients: 2 });
    const { room } = await host.next();
    const guest = await Client.open(at.relay.url);
    await guest.join(room, "guest");
    host.send(...pings, { type: "close_room" }, { type: "create", clientId: "host", maxClients: 2, linger: 300 });
    while ((await host.next()).t !== pings.length - 2);
    host.end();
    at.clock.advance(TICK_MS);
    expect(await guest.closed).toEqual({ code: 4001, reason: "room closed" });
    await host.closed;
    expect(await vitals(at.relay.url)).toMatchObject({ rooms: 1, clients: 2 });
  });

  /** Somebody whose `join`, and more, wait behind a burst of pings. */
  async function comes(url: string, room: string, clientId: string, more: Buffer[] = []): Promise<void> {
    const raw = await RawSocket.open(url);
    const messages = [...upTo(2 * RATE).map((t) => ({ type: "ping", t })), { type: "join", room, clientId }];
    raw.write(Buffer.concat([...messages.map((message) => clientFrame(JSON.stringify(message))), ...more]));
    while ((await raw.next()).t !== 2 * RATE - 2); // the last one that the burst has a token for
  }
  /** Somebody who has closed properly when the `join` and a message still wait. */
  const comesAndGoes = (url: string, room: string, clientId: string) =>
    comes(url, room, clientId, [clientFrame(JSON.stringify({ type: "send", data: "was here" })), farewell()]);

  test("that has closed properly before its join is handled takes the slot from an older socket, and is heard", async () => {
    await using at = await scene();
    const older = await Client.open(at.relay.url);
    expect(await older.join(at.room, "comes and goes")).toMatchObject({ index: 2 });
    await at.peer.next();
    await comesAndGoes(at.relay.url, at.room, "comes and goes");
    expect(await at.peer.soFar()).toEqual([]);
    at.clock.advance(TICK_MS);
    expect(await older.closed).toEqual({ code: 4000, reason: "replaced" });
    expect(await at.peer.next()).toEqual({ type: "message", from: 2, data: "was here" });
    expect(await at.peer.next()).toEqual({ type: "peer_left", index: 2 });
  });

  test("that has closed properly before its join is handled takes the slot from an older socket whose join waited, too", async () => {
    await using at = await scene();
    await comes(at.relay.url, at.room, "comes and goes");
    await comesAndGoes(at.relay.url, at.room, "comes and goes");
    at.clock.advance(TICK_MS);
    expect(await at.peer.next()).toEqual({ type: "peer_joined", index: 2 });
    expect(await at.peer.next()).toEqual({ type: "message", from: 2, data: "was here" });
    expect(await at.peer.next()).toEqual({ type: "peer_left", index: 2 });
  });

  test("that has closed properly before its join is handled takes no slot from a socket that opened after it", async () => {
    await using at = await scene();
    await comesAndGoes(at.relay.url, at.room, "comes and goes");
    const back = await Client.open(at.relay.url);
    expect(await back.join(at.room, "comes and goes")).toMatchObject({ index: 2 });
    await at.peer.next();
    at.clock.advance(TICK_MS);
    expect(await at.peer.soFar()).toEqual([]);
    back.send({ type: "send", data: "is here" });
    expect(await at.peer.next()).toEqual({ type: "message", from: 2, data: "is here" });
  });

  test("has no new burst for coming back, nor in another room", async () => {
    await using at = await scene();
    at.flooder.send(...numbered(burst));
    for (const _ of upTo(burst)) await at.peer.next();
    at.flooder.reset();
    await at.peer.next();
    const again = await sits(at.relay.url, at.room, "flooder");
    again.send({ type: "send", data: "again" });
    expect(await at.peer.soFar()).toEqual([{ type: "peer_joined", index: 1, resumed: true }]);
    at.clock.advance(100);
    expect(await at.peer.next()).toMatchObject({ data: "again" });
  });

  test("that is kicked while it is paused is not heard any more", async () => {
    await using at = await scene();
    const other = await Client.open(at.relay.url);
    const join = { type: "join", clientId: "x", room: await other.create() };
    at.flooder.send(...numbered(burst + 30), join);
    for (const _ of upTo(burst)) await at.peer.next();
    expect(await at.peer.ask({ type: "kick", index: 1 })).toEqual({ type: "peer_left", index: 1, reason: "kicked" });
    at.clock.advance(10_000);
    expect(await at.peer.soFar()).toEqual([]);
    expect(await other.soFar()).toEqual([]);
    expect(await timersWhenQuiet(at.clock)).toBe(at.timers);
  });
  test("has no new burst in another room", async () => {
    await using at = await scene();
    const other = await Client.open(at.relay.url);
    const room = await other.create();
    const move = [{ type: "leave" }, { type: "join", room, clientId: "flooder" }];
    at.flooder.send(...numbered(burst - move.length), ...move, { type: "send", data: "too early" });
    expect(await other.next()).toEqual({ type: "peer_joined", index: 1 });
    expect(await other.soFar()).toEqual([]);
    at.clock.advance(100);
    expect(await other.next()).toMatchObject({ data: "too early" });
  });

  test("has no new burst as another device that claims its slot", async () => {
    await using at = await scene();
    const { token } = await at.peer.ask({ type: "offer_slot", index: 1 });
    at.flooder.send(...numbered(burst));
    for (const _ of upTo(burst)) await at.peer.next();
    at.flooder.reset();
    expect(await at.peer.next()).toMatchObject({ type: "peer_left" });
    const device = await RawSocket.open(at.relay.url);
    device.send({ type: "join", room: at.room, clientId: "device", claim: token }, { type: "send", data: "too early" });
    expect(await at.peer.soFar()).toEqual([{ type: "peer_joined", index: 1, resumed: true }]);
    at.clock.advance(100);
    expect(await at.peer.next()).toMatchObject({ data: "too early" });
  });
});

describe("pings and pongs that nobody asked for", () => {
  const RATE = 10;
  for (const [what, opcode] of [
    ["pings", 9],
    ["pongs", 10],
  ] as const)
    test(`${what} count like messages: a flood of them is paused until its bucket refills`, async () => {
      const clock = new TestClock();
      await using relay = testRelay({ clock, maxMessagesPerSecond: RATE });
      const flooder = await RawSocket.open(relay.url);
      flooder.write(Buffer.concat(upTo(100).map(() => clientFrame(Buffer.alloc(0), { opcode }))));
      const other = await Client.open(relay.url);
      const room = await other.create();
      flooder.send({ type: "join", clientId: "flooder", room });
      clock.advance(((100 - 2 * RATE) * 1000) / RATE - 1_000); // all but the last second of the debt
      expect(await other.soFar()).toEqual([]);
      clock.advance(2_000);
      expect(await other.next()).toMatchObject({ type: "peer_joined" });
    });

  test("pings among messages cost their share and none of the messages", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock, maxMessagesPerSecond: RATE });
    const peer = await Client.open(relay.url);
    const flooder = await sits(relay.url, await peer.create(), "flooder");
    await peer.soFar();
    const ping = clientFrame(Buffer.alloc(0), { opcode: 9 });
    const sends = numbered(60).map((message) => clientFrame(Buffer.from(JSON.stringify(message))));
    flooder.write(Buffer.concat(sends.flatMap((send) => [send, ping])));
    const got: unknown[] = [];
    for (let passed = 0; passed < 11_000; passed += 500) {
      got.push(...dataOf(await peer.soFar()));
      clock.advance(500);
    }
    expect(got).toEqual(upTo(60));
  });

  test("a pong that was asked for costs nothing", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock, maxMessagesPerSecond: RATE });
    const host = await Client.open(relay.url);
    const room = await host.create();
    const phone = await sits(relay.url, room, "phone");
    await host.soFar();
    clock.advance(6_000);
    expect((await phone.nextFrame())?.opcode).toBe(9);
    for (const _ of upTo(2 * RATE)) phone.write(clientFrame(Buffer.alloc(0), { opcode: 10 })); // all but the first cost
    phone.send({ type: "send", data: 1 }, { type: "send", data: 2 });
    expect(await host.next()).toMatchObject({ data: 1 });
    expect(await host.soFar()).toEqual([]);
  });
});

describe("a relay that is short of memory", () => {
  const MIB = 1024 * 1024;
  /** A relay of 100 MiB that believes what `at.used` says of its memory. */
  async function scene() {
    const clock = new TestClock();
    const at = { used: 50 * MIB };
    const limits = { maxMemoryBytes: 100 * MIB, maxBufferedBytes: 64 * MIB, maxMessageBytes: 64 * MIB };
    const relay = testRelay({ clock, memory: () => at.used, addressHeader: "X-Forwarded-For", ...limits });
    const open = (address: string) => Client.open(relay.url, { "X-Forwarded-For": address });
    /** So much too much is noticed at the next look. */
    const exceed = (bytes: number) => {
      at.used = 100 * MIB + bytes;
      clock.advance(200); // less than the 0.3 s in which the figure is given time to fall
      at.used = 50 * MIB;
      clock.advance(500);
    };
    const host = await open("1.1.1.1");
    const room = await host.create();
    clock.advance(500); // from now on it looks as often as the sockets could fill what is left
    return { relay, clock, at, open, exceed, host, room, [Symbol.asyncDispose]: () => relay[Symbol.asyncDispose]() };
  }
  const LOST = { code: 1006, reason: expect.any(String) };

  test("lets lingering empty rooms go first, of the address that created the most", async () => {
    await using at = await scene();
    const blip = async (address: string) => {
      const client = await at.open(address);
      const room = await client.create(2, "x", { linger: 300 });
      await client.close();
      return room;
    };
    const [one, ...many] = [await blip("2.2.2.2"), await blip("3.3.3.3"), await blip("3.3.3.3"), await blip("3.3.3.3")];
    const roomless = await at.open("4.4.4.4");
    await roomless.soFar();
    at.exceed(100);
    const statuses = await Promise.all(
      [one, ...many, at.room].map(async (room) => (await fetch(`${at.relay.url}/room/${room}`)).status),
    );
    expect(statuses).toEqual([200, 404, 200, 200, 200]); // the nearest to its end
    expect(await roomless.soFar()).toEqual([]);
  });

  test("cuts frames that closed sockets left waiting before lingering rooms, and counts all their bytes", async () => {
    await using at = await scene();
    const screen = await at.open("2.2.2.2");
    const lingering = await screen.create(2, "x", { linger: 300 });
    await screen.close();
    const gone = await RawSocket.open(at.relay.url);
    const ping = clientFrame("", { opcode: 9 });
    gone.write(Buffer.concat([clientFrame(`"${"x".repeat(250_000)}`, { fin: false }), ping]));
    expect((await gone.nextFrame())?.opcode).toBe(10);
    const pings = Array<Buffer>(399).fill(ping); // the rest of the burst: what comes after them waits
    gone.write(Buffer.concat([...pings, clientFrame('"', { opcode: 0 }), farewell()]));
    await gone.closed;
    at.exceed(200_000);
    expect((await fetch(`${at.relay.url}/room/${lingering}`)).status).toBe(200);
  });

  test("then terminates sockets in no room, the longest so first, then members of the address with the most sockets", async () => {
    await using at = await scene();
    const [first, second] = [await at.open("2.2.2.2"), await at.open("2.2.2.2")];
    const crowd: Client[] = [];
    for (let i = 0; i < 5; i++) {
      const guest = await at.open("3.3.3.3");
      await guest.join(at.room, `guest ${i}`);
      crowd.push(guest);
    }
    at.exceed(1);
    expect(await first.closed).toEqual(LOST);
    expect(await second.soFar()).toEqual([]);
    at.exceed(1);
    expect(await second.closed).toEqual(LOST);
    await at.host.soFar();
    at.exceed(1);
    expect(await Promise.race(crowd.map((guest) => guest.closed))).toEqual(LOST);
    expect(await at.host.soFar()).toMatchObject([{ type: "peer_left" }]);
    expect((await (await fetch(`${at.relay.url}/metrics`)).text()).includes('reason="slow"} 1')).toBe(true);
  });

  test("terminates those with the most unsent bytes before anybody who reads", async () => {
    await using at = await scene();
    const roomless = await at.open("2.2.2.2");
    const reader = await at.open("2.2.2.2");
    await reader.join(at.room, "reader");
    const slow = await sits(at.relay.url, at.room, "slow");
    await at.host.soFar();
    slow.pause();
    for (let i = 0; i < 60; i++) at.host.send({ type: "send", data: "x".repeat(200_000) }); // more than the kernel keeps
    await at.host.soFar();
    for (let got = 0; got < 60;) if ((await reader.next()).type === "message") got++;
    at.exceed(1);
    expect(await at.host.soFar()).toEqual([{ type: "peer_left", index: 2 }]);
    for (const client of [roomless, reader])
      expect((await client.soFar()).filter(({ type }) => type !== "peer_left")).toEqual([]);
  });

  test("turns newcomers away with 1013 meanwhile, and waits for the effect before it cuts again", async () => {
    await using at = await scene();
    const roomless: Client[] = [];
    for (let i = 0; i < 3; i++) roomless.push(await at.open("2.2.2.2"));
    at.at.used = 101 * MIB;
    at.clock.advance(100);
    expect(await (await at.open("5.5.5.5")).closed).toEqual({ code: 1013, reason: "server full" });
    expect(await roomless[0]?.closed).toEqual(LOST);
    at.at.used = 50 * MIB;
    at.clock.advance(1_000);
    expect(await (await at.open("5.5.5.5")).create()).toHaveLength(6);
    for (const client of roomless.slice(1)) expect(await client.soFar()).toEqual([]);
  });
  test("terminates the one with the most unsent bytes first", async () => {
    await using at = await scene();
    const [less, more] = [await sits(at.relay.url, at.room, "less"), await sits(at.relay.url, at.room, "more")];
    await at.host.soFar();
    for (const raw of [less, more]) raw.pause();
    const data = "x".repeat(200_000);
    for (const _ of upTo(60)) at.host.send({ type: "send", data, to: [1, 2] }); // more than the kernel keeps
    for (const _ of upTo(20)) at.host.send({ type: "send", data, to: 2 });
    await at.host.soFar();
    at.exceed(1);
    expect(await at.host.soFar()).toEqual([{ type: "peer_left", index: 2 }]);
  });
});

describe("a dead peer", () => {
  test("is cut within 20 s, also if somebody sends every 100 ms", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock });
    const host = await Client.open(relay.url);
    const room = await host.create();
    for (const pause of [0, 4_000, 5_900]) {
      clock.advance(pause); // wherever in the tick it dies
      const dead = await sits(relay.url, room, `dead ${pause}`); // and never answers a ping
      await host.soFar();
      let seconds = 0;
      for (let frames: Frame[] = []; seconds < 30 && !frames.some(({ type }) => type === "peer_left"); seconds++) {
        for (const data of upTo(10)) {
          clock.advance(100);
          host.send({ type: "send", data });
        }
        frames = await host.soFar();
      }
      expect(seconds).toBeLessThanOrEqual(20);
      expect(seconds).toBeGreaterThan(12); // two sweeps are there to answer in
      await dead.closed;
    }
    expect(await vitals(relay.url)).toMatchObject({ rooms: 1, clients: 1 });
  });

  test("is cut, among hundreds of others; a sweep is done in parts, so that nobody waits for all of it", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock });
    const phones = await Promise.all(upTo(300).map(() => RawSocket.open(relay.url)));
    const other = await Client.open(relay.url);
    let [pings, cut] = [0, 0];
    for (const phone of phones) {
      phone.skim(({ length }) => (pings += length / 2));
      void phone.closed.then(() => cut++);
    }
    /** Lets `ms` pass, at whose end a sweep begins. */
    const sweepAfter = async (ms: number) => {
      clock.advance(ms - 1);
      await other.soFar(); // who isn't quiet isn't pinged
      clock.advance(1);
      await other.soFar();
    };
    await sweepAfter(6_000);
    await until("the first pings", () => pings >= 256);
    expect(pings).toBe(256);
    clock.advance(10);
    await until("the other pings", () => pings === 300);
    await sweepAfter(5_990);
    await sweepAfter(6_000);
    await until("a part to be cut", () => cut >= 256);
    expect(cut).toBe(256);
    clock.advance(10);
    await until("the others to be cut", () => cut === 300);
    expect(await other.soFar()).toEqual([]);
  });

  test("is not a phone that is idle but answers: it is pinged once in 6 s and stays", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock });
    const host = await Client.open(relay.url);
    const phone = await sits(relay.url, await host.create(), "phone");
    await host.soFar();
    const pings: number[] = [];
    void (async () => {
      for (let frame = await phone.nextFrame(); frame !== undefined; frame = await phone.nextFrame()) {
        if (frame.opcode !== 9) continue;
        pings.push(clock.now());
        phone.write(clientFrame(frame.payload, { opcode: 10 }));
      }
    })();
    for (const _ of upTo(120)) {
      clock.advance(1_000);
      expect(await host.soFar()).toEqual([]);
    }
    expect(pings.length).toBeGreaterThan(10);
    for (const [i, at] of pings.slice(1).entries()) expect(at - (pings[i] as number)).toBeGreaterThanOrEqual(6_000);
    phone.send({ type: "ping" });
    await host.soFar();
    expect(await vitals(relay.url)).toMatchObject({ clients: 2 });
  });
});

describe("an exception in a handler", () => {
  /** A relay whose `ping` fails from `breakPing` on, and what it has logged. */
  async function scene(maxMessagesPerSecond = 0) {
    const clock = new TestClock();
    const logged: object[] = [];
    const log = (event: string, fields: object) => event !== "few descriptors" && logged.push({ event, ...fields });
    const relay = testRelay({ clock, maxMessagesPerSecond, log });
    const peer = await Client.open(relay.url);
    const guest = await sits(relay.url, await peer.create(), "guest");
    await peer.next();
    const breakPing = () => {
      clock.epoch = () => {
        throw new TypeError("what a client sent");
      };
    };
    return { clock, logged, relay, peer, guest, breakPing, [Symbol.asyncDispose]: () => relay[Symbol.asyncDispose]() };
  }

  test("ends the socket that caused it with 1011, and the log says where it was, but not its message", async () => {
    await using at = await scene();
    at.breakPing();
    at.guest.send({ type: "ping" });
    const close = await at.guest.nextFrame();
    expect([close?.opcode, close?.payload.readUInt16BE(0)]).toEqual([8, 1011]);
    at.guest.end();
    expect(await at.peer.next()).toEqual({ type: "peer_left", index: 1 });
    expect(await vitals(at.relay.url)).toMatchObject({ clients: 1, internalErrors: 1 });
    expect(at.logged).toEqual([{ event: "exception", name: "TypeError", stack: expect.stringMatching(/^at .* < at /) }]);
    expect(JSON.stringify(at.logged)).not.toContain("what a client sent");
  });

  test("ends it, too, if that had closed before its frames were handled", async () => {
    await using at = await scene(2);
    at.guest.write(Buffer.concat([...upTo(6).map(() => clientFrame('{"type":"ping"}')), farewell()])); // some wait for a token
    await at.guest.closed;
    expect(await vitals(at.relay.url)).toMatchObject({ clients: 2 });
    at.breakPing();
    at.clock.advance(1_000);
    expect(await at.peer.next()).toEqual({ type: "peer_left", index: 1 });
    expect(await vitals(at.relay.url)).toMatchObject({ clients: 1, internalErrors: 1 });
  });
});

describe("HTTP that no browser sends", () => {
  /** Sends a request as it is, and reads the answer, or what there was of it when the relay closed. */
  async function answerTo(url: string, request: string): Promise<string> {
    const raw = await RawSocket.connect(url);
    raw.write(request);
    const head = await raw.head();
    raw.end();
    return head + raw.received.toString("latin1");
  }

  const requests = [
    "GET /room/% HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /room/%00%ff HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /room/__proto__ HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /room/constructor HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /room/zzzzzz HTTP/1.1\r\nHost: [\r\n\r\n",
    "GET /room/zzzzzz HTTP/1.1\r\nHost: a b\r\n\r\n",
    "GET /room/zzzzzz HTTP/1.1\r\nHost: \r\n\r\n",
    "GET /room/zzzzzz HTTP/1.1\r\nHost: x:99999\r\n\r\n",
    "GET //evil/room/zzzzzz HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET http://other/room/zzzzzz HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /?instance=%zz HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /room/zzzzzz HTTP/1.1\r\nHost: x\r\nOrigin: \xff\xfe\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: short\r\nSec-WebSocket-Version: 13\r\n\r\n",
    "CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "TRACE / HTTP/1.1\r\nHost: x\r\n\r\n",
  ];
  const alone: Siblings = { list: () => Promise.resolve([]), has: () => Promise.resolve(false) };
  const behindNginx = { cluster: nginxCluster(new Set(["me", "peer"]), alone), instance: "me" };
  for (const host of ["x", "[", "a b", ""])
    test(`behind nginx, a stale pin with a raw path and the host ${JSON.stringify(host)} is led to the path itself`, async () => {
      await using relay = testRelay(behindNginx);
      const answer = await answerTo(relay.url, `GET /中?instance=peer HTTP/1.1\r\nHost: ${host}\r\nX-Relay-Src: 1\r\n\r\n`);
      expect(answer).toStartWith("HTTP/1.1 302 ");
      expect(answer).toContain("\r\nLocation: /%E4%B8%AD\r\n");
    });

  for (const request of requests)
    test(`${JSON.stringify(request.slice(0, 60))} gets an answer that is neither a 500 nor HTML`, async () => {
      await using relay = testRelay();
      const answer = await answerTo(relay.url, request);
      expect(answer).toMatch(/^HTTP\/1.1 (200|4\d\d) /);
      expect(answer.toLowerCase()).not.toContain("<html");
      expect((await fetch(`${relay.url}/health`)).status).toBe(200);
    });

  for (const [what, request, status] of [
    [
      "an upgrade to a version that isn't there",
      "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 8\r\n\r\n",
      426,
    ],
    ["a body of 1 GB, which isn't waited for", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n", 405],
  ] as const)
    test(`${what} gets ${status}, readable across origins`, async () => {
      await using relay = testRelay();
      const answer = await answerTo(relay.url, request);
      expect(answer).toStartWith(`HTTP/1.1 ${status} `);
      expect(answer.toLowerCase()).toContain("\r\naccess-control-allow-origin: *\r\n");
      if (status === 426) expect(answer.toLowerCase()).toContain("\r\nsec-websocket-version: 13\r\n");
    });

  test("an upgrade that names protocols of more than 1,000 characters gets 400; of 1,000 it is taken, and they are repeated", async () => {
    await using relay = testRelay();
    const answer = (length: number) => answerTo(relay.url, handshake("/", { "Sec-WebSocket-Protocol": "p".repeat(length) }));
    const taken = await answer(1_000);
    expect(taken).toStartWith("HTTP/1.1 101 ");
    expect(taken).toContain("p".repeat(1_000));
    const refused = await answer(1_001);
    expect(refused).toStartWith("HTTP/1.1 400 ");
    expect(refused).not.toContain("ppp");
  });

  test("HEAD with the headers of an upgrade is answered as HEAD", async () => {
    await using relay = testRelay();
    const answer = await answerTo(
      relay.url,
      "HEAD /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    );
    expect(answer).toStartWith("HTTP/1.1 200 OK");
  });

  test("an upgrade from an origin that isn't allowed is refused with 403; from allowed ones, and without one, it is taken", async () => {
    const { allowedOrigins } = configFromEnv({
      ALLOWED_ORIGINS: "https://game.example, https://Quiz.example:443/,https://bücher.example,capacitor://localhost",
    });
    await using relay = testRelay({ allowedOrigins });
    const answer = async (Origin?: string) => (await answerTo(relay.url, handshake("/", { Origin }))).split(" ")[1];
    const apps = ["https://xn--bcher-kva.example", "capacitor://localhost"];
    for (const origin of ["https://game.example", "HTTPS://Game.example", "https://quiz.example", ...apps, undefined])
      expect([origin, await answer(origin)]).toEqual([origin, "101"]);
    for (const origin of ["https://game.example.evil.example", "http://game.example", "null", "https://game.example:444"])
      expect([origin, await answer(origin)]).toEqual([origin, "403"]);
  });
  test("a refused origin is told so readably across origins", async () => {
    await using relay = testRelay({ allowedOrigins: new Set(["https://game.example"]) });
    const answer = await answerTo(relay.url, handshake("/", { Origin: "https://other.example" }));
    expect(answer).toStartWith("HTTP/1.1 403 ");
    expect(answer.toLowerCase()).toContain("\r\naccess-control-allow-origin: *\r\n");
  });

  test("an upgrade is one in whatever case its header is written", async () => {
    await using relay = testRelay();
    for (const Upgrade of ["WebSocket", "WEBSOCKET"])
      expect(await answerTo(relay.url, handshake("/", { Upgrade }))).toStartWith("HTTP/1.1 101 ");
  });
});

describe("stopping", () => {
  const RESTARTING = { code: 1012, reason: "restarting" };

  for (const signal of ["SIGTERM", "SIGINT", "SIGHUP"] as const)
    test.concurrent(`${signal} lets rooms go on, ends with 0 when the last one does, and says why to who is there`, async () => {
      await using child = await RelayProcess.start({ DRAIN_SECONDS: "60" });
      const roomless = await Client.open(child.url);
      const host = await Client.open(child.url);
      await host.create();
      child.signal(signal);
      for (const client of [host, roomless]) expect(await client.next()).toEqual({ type: "draining", seconds: 60 });
      await host.close();
      expect(await roomless.closed).toEqual(RESTARTING);
      expect(await child.exited).toBe(0);
    });

  for (const [when, DRAIN_SECONDS, first, second] of [
    ["at a second signal", "60", "SIGTERM", "SIGINT"],
    ["when the drain is over", "1", "SIGTERM"],
    ["at once if the drain lasts no time", "0", "SIGINT"],
  ] as const)
    test.concurrent(`ends with 0 ${when}, and says why to everybody`, async () => {
      await using child = await RelayProcess.start({ DRAIN_SECONDS });
      const members: Client[] = [];
      for (const _ of upTo(50)) {
        const host = await Client.open(child.url);
        const guest = await Client.open(child.url);
        await guest.join(await host.create(), "guest");
        members.push(host, guest);
      }
      child.signal(first);
      if (second !== undefined) {
        await Promise.all(members.map((member) => member.soFar()));
        child.signal(second);
      }
      for (const member of members) expect(await member.closed).toEqual(RESTARTING);
      expect(await child.exited).toBe(0);
    });

  test.concurrent("reaches a member that is behind with its last frames and the close", async () => {
    await using child = await RelayProcess.start({ DRAIN_SECONDS: "0", MAX_MESSAGES_PER_SECOND: "0" });
    const behind = async (most: number) => {
      const host = await Client.open(child.url);
      const guest = await sits(child.url, await host.create(), "guest");
      await host.soFar();
      guest.pause();
      for (let sent = 0; sent < most; sent++) {
        host.send({ type: "send", data: "x".repeat(50_000) });
        if ((await host.soFar()).length > 0) return { host, guest, sent };
      }
      return { host, guest, sent: most };
    };
    const cut = await behind(10_000); // what the kernel and the relay hold together
    const { host, guest, sent } = await behind(cut.sent - 10); // the relay holds some, by its limit less than all of it
    expect(sent).toBe(cut.sent - 10);
    child.signal("SIGTERM");
    expect(await host.closed).toEqual(RESTARTING);
    guest.resume();
    let messages = 0;
    let frame = await guest.nextFrame();
    for (; frame?.opcode === 1; frame = await guest.nextFrame()) messages++;
    expect(messages).toBe(sent + 1); // and `draining`
    expect(frame?.payload.readUInt16BE(0)).toBe(RESTARTING.code);
    expect(await child.exited).toBe(0);
  });
});
