/**
 * The limits, as clients meet them at real sockets: slow members, floods, dead peers, caps, guessed codes, stopping. The relay
 * is a process of its own where its memory or its end matters. About 2 s.
 */
import { describe, expect, test } from "bun:test";
import { Client, type Frame } from "./shared/client.ts";
import { vitals } from "./shared/metrics.ts";
import { RelayProcess } from "./shared/processes.ts";
import { TestClock, testRelay } from "./shared/relay.ts";
import { clientFrame, handshake, RawSocket } from "./shared/sockets.ts";

/** A raw socket that sits in a room. */
async function sits(url: string, room: string, clientId: string): Promise<RawSocket> {
  const raw = await RawSocket.open(url);
  raw.send({ type: "join", clientId, room });
  const { type } = await raw.next();
  if (type !== "joined") throw new Error(`join was answered by ${type}`);
  return raw;
}

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

describe("a flooder", () => {
  const RATE = 100;
  const FLOOD = 700;
  const TICK_MS = 50;

  async function scene() {
    const clock = new TestClock();
    const relay = testRelay({ clock, maxMessagesPerSecond: RATE });
    const peer = await Client.open(relay.url);
    const room = await peer.create();
    const flooder = await sits(relay.url, room, "flooder");
    await peer.soFar();
    return { clock, relay, peer, room, flooder, [Symbol.asyncDispose]: () => relay[Symbol.asyncDispose]() };
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
    const timers = at.clock.pending;
    at.flooder.send(...numbered(burst + 30));
    for (const _ of upTo(burst)) await at.peer.next();
    expect(at.clock.pending).toBe(timers + 1);
    at.flooder.end();
    const frames: Frame[] = [];
    for (let n = 0; n < 20 && frames.at(-1)?.type !== "peer_left"; n++) {
      at.clock.advance(TICK_MS);
      frames.push(...(await at.peer.soFar()));
    }
    expect(dataOf(frames)).toEqual(upTo(burst + 30).slice(burst));
    expect(frames.at(-1)).toEqual({ type: "peer_left", index: 1 });
    at.clock.advance(TICK_MS);
    expect(at.clock.pending).toBe(timers);
    expect(await vitals(at.relay.url)).toMatchObject({ rooms: 1, clients: 1 });
  });

  test("that resets while it is paused is noticed at once, and what it had said arrives", async () => {
    await using at = await scene();
    const timers = at.clock.pending;
    at.flooder.send(...numbered(burst + 30));
    for (const _ of upTo(burst)) await at.peer.next();
    at.flooder.reset();
    for (const data of upTo(burst + 30).slice(burst)) expect(await at.peer.next()).toMatchObject({ data });
    expect(await at.peer.next()).toEqual({ type: "peer_left", index: 1 });
    at.clock.advance(TICK_MS);
    expect(at.clock.pending).toBe(timers);
  });

  test("that resets while it is paused is not heard beyond what ended its socket", async () => {
    await using at = await scene();
    const pings = upTo(2 * RATE).map((t) => ({ type: "ping", t })); // what comes after them waits
    const host = await RawSocket.open(at.relay.url);
    host.send({ type: "create", clientId: "host", maxClients: 2 });
    const { room } = await host.next();
    const guest = await Client.open(at.relay.url);
    await guest.join(room, "guest");
    host.send(...pings, { type: "close_room" }, { type: "create", clientId: "host", maxClients: 2, linger: 300 });
    while ((await host.next()).t !== pings.length - 2);
    host.reset();
    expect(await guest.closed).toEqual({ code: 4001, reason: "room closed" });
    expect(await vitals(at.relay.url)).toMatchObject({ rooms: 1, clients: 2 });
  });

  test("that is kicked while it is paused is not heard any more", async () => {
    await using at = await scene();
    const timers = at.clock.pending;
    const other = await Client.open(at.relay.url);
    const join = { type: "join", clientId: "x", room: await other.create() };
    at.flooder.send(...numbered(burst + 30), join);
    for (const _ of upTo(burst)) await at.peer.next();
    expect(await at.peer.ask({ type: "kick", index: 1 })).toEqual({ type: "peer_left", index: 1, reason: "kicked" });
    at.clock.advance(10_000);
    expect(await at.peer.soFar()).toEqual([]);
    expect(await other.soFar()).toEqual([]);
    expect(at.clock.pending).toBe(timers);
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

describe("a dead peer", () => {
  test("is cut within 20 s, also where somebody sends every 100 ms", async () => {
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

describe("a cap", () => {
  test("closes the socket of a message over the limit with 1009, and takes one at the limit", async () => {
    await using relay = testRelay({ maxMessageBytes: 1_000 });
    const host = await Client.open(relay.url);
    const guest = await Client.open(relay.url);
    await guest.join(await host.create(), "guest");
    await host.next();
    const frame = '{"type":"send","data":""}';
    const full = frame.replace('""', `"${"x".repeat(1_000 - frame.length)}"`);
    guest.send(full);
    expect((await host.next()).data).toHaveLength(1_000 - frame.length);
    guest.send(full.replace("x", "xx"));
    expect(await guest.closed).toMatchObject({ code: 1009 });
    expect(await host.next()).toEqual({ type: "peer_left", index: 1 });
  });

  test("is none at 0: messages of any size, sockets and rooms of any number, any rate, any guesses", async () => {
    const none = { maxMessageBytes: 0, maxBufferedBytes: 0, maxClientsPerRoom: 0, maxRooms: 0, maxConnections: 0 };
    await using relay = testRelay({ ...none, maxMessagesPerSecond: 0, maxMissesPerMinute: 0, clock: new TestClock() });
    const host = await Client.open(relay.url);
    const guest = await Client.open(relay.url);
    await guest.join(await host.create(1_000_000), "guest");
    await host.next();
    guest.send({ type: "send", data: "x".repeat(3_000_000) });
    expect((await host.next()).data).toHaveLength(3_000_000);
    for (const data of upTo(1_000)) guest.send({ type: "send", data });
    for (const data of upTo(1_000)) expect((await host.next()).data).toBe(data);
    const guesser = await Client.open(relay.url);
    for (const _ of upTo(300)) expect(await guesser.join("111111", "x")).toMatchObject({ code: "room_not_found" });
  });

  test("refuses an upgrade of another origin with 403", async () => {
    await using relay = testRelay({ allowedOrigins: new Set(["https://game.example"]) });
    const answer = async (Origin?: string) => {
      const raw = await RawSocket.connect(relay.url);
      raw.write(handshake("/", { Origin }));
      return (await raw.head()).split(" ")[1];
    };
    expect(await answer("https://game.example")).toBe("101");
    expect(await answer("HTTPS://Game.example")).toBe("101");
    expect(await answer()).toBe("101");
    for (const origin of ["https://game.example.evil.example", "http://game.example", "null", "https://game.example:444"])
      expect(await answer(origin)).toBe("403");
  });

  test("on sockets closes the one that has been roomless longest, then the newcomer", async () => {
    await using relay = testRelay({ maxConnections: 3 });
    const full = { code: 1013, reason: "server full" };
    const player = await Client.open(relay.url);
    await player.create();
    const other = await Client.open(relay.url);
    const roomless = await Client.open(relay.url);
    await other.create();
    await other.ask({ type: "leave" }); // roomless from now on
    const third = await Client.open(relay.url);
    expect(await roomless.closed).toEqual(full);
    const fourth = await Client.open(relay.url);
    expect(await other.closed).toEqual(full);
    await third.create();
    await fourth.create();
    const newcomer = await Client.open(relay.url);
    expect(await newcomer.closed).toEqual(full);
    for (const client of [player, third, fourth]) expect(await client.soFar()).toEqual([]);
  });

  test("on rooms lets the lingering one go that is nearest its end, and refuses where all are live", async () => {
    await using relay = testRelay({ maxRooms: 3, clock: new TestClock() });
    const rooms: string[] = [];
    for (const linger of [200, 100, 150]) {
      const host = await Client.open(relay.url);
      rooms.push(await host.create(8, "host", { linger }));
      await host.close();
    }
    const status = () => Promise.all(rooms.map(async (room) => (await fetch(`${relay.url}/room/${room}`)).status));
    const hosts: Client[] = [];
    for (const left of [
      [200, 404, 200],
      [200, 404, 404],
      [404, 404, 404],
    ]) {
      const host = await Client.open(relay.url);
      await host.create();
      hosts.push(host);
      expect(await status()).toEqual(left);
    }
    const late = await Client.open(relay.url);
    const create = { type: "create", clientId: "late", maxClients: 2 } as const;
    expect(await late.ask(create)).toEqual({ type: "error", message: "Server full", code: "capacity" });
    await hosts[0]?.close();
    expect(await late.ask(create)).toMatchObject({ type: "created" });
  });
});

describe("guessing codes", () => {
  const LIMIT = 5;
  const guess = "111111";

  async function scene() {
    const clock = new TestClock();
    const relay = testRelay({ clock, maxMissesPerMinute: LIMIT, addressHeader: "X-Forwarded-For" });
    const from = (address: string) => ({ "X-Forwarded-For": address });
    const host = await Client.open(relay.url, from("192.0.2.9"));
    const room = await host.create();
    const look = async (address: string, code = guess) =>
      (await fetch(`${relay.url}/room/${code}`, { headers: from(address) })).status;
    const misses = async (address: string, times: number) => {
      for (const _ of upTo(times)) await look(address);
    };
    const join = async (address: string, code: string, clientId: string) => {
      const client = await Client.open(relay.url, from(address));
      return { answer: await client.join(code, clientId), client };
    };
    const minute = async () => {
      for (const _ of upTo(12)) {
        clock.advance(5_000);
        await host.soFar(); // pings are answered meanwhile, or the host is dead
      }
    };
    return { relay, room, host, look, misses, join, minute, [Symbol.asyncDispose]: () => relay[Symbol.asyncDispose]() };
  }

  test("over the limit is 429 and 1008, while rooms that are there are found", async () => {
    await using at = await scene();
    for (const _ of upTo(LIMIT)) expect(await at.look("192.0.2.1")).toBe(404);
    expect(await at.look("192.0.2.1")).toBe(429);
    expect(await at.look("192.0.2.1", at.room)).toBe(200);
    const { answer, client } = await at.join("192.0.2.1", guess, "x");
    expect(answer).toEqual({ type: "error", message: "Too many attempts", code: "too_many_attempts" });
    expect(await client.closed).toMatchObject({ code: 1008 });
    expect((await at.join("192.0.2.1", at.room, "new")).answer).toMatchObject({ type: "joined" });
    await at.minute();
    expect(await at.look("192.0.2.1")).toBe(404);
  });

  test("ten times over the limit finds nothing any more, but lets known players back in", async () => {
    await using at = await scene();
    const { client: player } = await at.join("192.0.2.1", at.room, "known");
    await player.close();
    await at.misses("192.0.2.1", 10 * LIMIT);
    expect(await at.look("192.0.2.1", at.room)).toBe(200);
    await at.misses("192.0.2.1", 1);
    expect(await at.look("192.0.2.1", at.room)).toBe(429);
    const { answer, client } = await at.join("192.0.2.1", at.room, "new");
    expect(answer).toMatchObject({ code: "too_many_attempts" });
    expect(await client.closed).toMatchObject({ code: 1008 });
    expect((await at.join("192.0.2.1", at.room, "known")).answer).toMatchObject({ type: "joined", resumed: true });
    expect(await at.look("192.0.2.2", at.room)).toBe(200);
    await at.minute();
    expect(await at.look("192.0.2.1", at.room)).toBe(200);
  });

  test("counts by the last entry of the address header", async () => {
    await using at = await scene();
    for (const i of upTo(LIMIT)) await at.look(`10.0.0.${i}, 192.0.2.1`); // only the proxy's own entry is to be believed
    expect(await at.look("10.0.0.99, 192.0.2.1")).toBe(429);
    expect(await at.look("192.0.2.1, 10.0.0.99")).toBe(404);
  });

  test("counts an IPv6 address as its /64, and a mapped one as IPv4", async () => {
    await using at = await scene();
    for (const i of upTo(LIMIT)) await at.look(`2001:db8:1:2:${i}::${i}`);
    expect(await at.look("2001:DB8:1:2:ffff:ffff:ffff:ffff")).toBe(429);
    expect(await at.look("2001:db8:1:3::1")).toBe(404);
    await at.misses("::ffff:192.0.2.1", LIMIT);
    expect(await at.look("192.0.2.1")).toBe(429);
    expect(await at.look("::ffff:c000:201")).toBe(429);
    expect(await at.look("::ffff:192.0.2.2")).toBe(404);
  });
});

describe("stopping", () => {
  const RESTARTING = { code: 1012, reason: "restarting" };

  test.concurrent("ends at once without rooms, and says why to who is there", async () => {
    for (const signal of ["SIGTERM", "SIGINT"] as const) {
      await using child = await RelayProcess.start({ DRAIN_SECONDS: "60" });
      const roomless = await Client.open(child.url);
      child.signal(signal);
      expect(await roomless.closed).toEqual(RESTARTING);
      expect(await child.exited).toBe(0);
    }
  });

  test.concurrent("lets rooms go on for a while, takes connections but no new room, and ends with 0", async () => {
    await using child = await RelayProcess.start({ DRAIN_SECONDS: "1" });
    const host = await Client.open(child.url);
    const room = await host.create(8, "host", { linger: 300 });
    const roomless = await Client.open(child.url);
    child.signal("SIGTERM");
    for (const client of [host, roomless]) expect(await client.next()).toEqual({ type: "draining", seconds: 1 });
    const late = await Client.open(child.url);
    expect(await late.ask({ type: "create", clientId: "late", maxClients: 2 })).toMatchObject({ code: "draining" });
    expect(await late.join(room, "late")).toMatchObject({ type: "joined", index: 1 });
    expect(await late.next()).toMatchObject({ type: "draining" });
    expect(await host.next()).toEqual({ type: "peer_joined", index: 1 });
    late.send({ type: "send", data: "still here" });
    expect(await host.next()).toMatchObject({ data: "still here" });
    expect((await fetch(`${child.url}/health`)).status).toBe(200);
    for (const client of [host, late, roomless]) expect(await client.closed).toEqual(RESTARTING);
    expect(await child.exited).toBe(0);
  });

  test.concurrent("ends when the last room does, however long the drain may last", async () => {
    await using child = await RelayProcess.start({ DRAIN_SECONDS: "60" });
    const host = await Client.open(child.url);
    await host.create(8, "host", { linger: 300 });
    child.signal("SIGTERM");
    expect(await host.next()).toEqual({ type: "draining", seconds: 60 });
    await host.close();
    expect(await child.exited).toBe(0);
  });

  test.concurrent("ends at once at a second signal, or where the drain lasts no time", async () => {
    for (const [DRAIN_SECONDS, ...signals] of [
      ["60", "SIGTERM", "SIGINT"],
      ["0", "SIGINT"],
    ] as const) {
      await using child = await RelayProcess.start({ DRAIN_SECONDS });
      const members: Client[] = [];
      for (const _ of upTo(50)) {
        const host = await Client.open(child.url);
        const guest = await Client.open(child.url);
        await guest.join(await host.create(), "guest");
        members.push(host, guest);
      }
      const [first, second] = signals;
      child.signal(first);
      if (second !== undefined) {
        await Promise.all(members.map((member) => member.soFar()));
        child.signal(second);
      }
      for (const member of members) expect(await member.closed).toEqual(RESTARTING);
      expect(await child.exited).toBe(0);
    }
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

  test("closes rooms one after another in the last half of a short drain", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock, drainSeconds: 8 });
    const rooms: Client[][] = [];
    for (const _ of upTo(8)) {
      const host = await Client.open(relay.url);
      const guest = await Client.open(relay.url);
      await guest.join(await host.create(), "guest");
      rooms.push([host, guest]);
    }
    const roomless = await Client.open(relay.url);
    const ended = relay.drain();
    clock.advance(4_000);
    for (const [closed, members] of rooms.entries()) {
      expect(await vitals(relay.url)).toMatchObject({ rooms: 8 - closed, clients: 16 - 2 * closed });
      clock.advance(500 + (closed === 0 ? 20 : 0)); // a step of the closing may be due just after
      for (const member of members) expect(await member.closed).toEqual(RESTARTING);
    }
    expect(await roomless.closed).toEqual(RESTARTING);
    clock.advance(1_000);
    expect(await ended).toBe("drained");
  });
});
