/**
 * Short forms of the siege. They say nothing of milliseconds: who is heard first, that nothing is lost, and who is cut.
 * About 9 s.
 */
import { describe, expect, test } from "bun:test";
import { flyCluster, type Siblings } from "../../server.ts";
import { Client } from "../shared/client.ts";
import { readMetric } from "../shared/metrics.ts";
import { RelayProcess } from "../shared/processes.ts";
import { TestClock, testRelay } from "../shared/relay.ts";
import { clientFrame, RawSocket } from "../shared/sockets.ts";
import { until, within } from "../shared/wait.ts";
import { BURST, crowd, flood, HONEST, many, Member, STRANGER, watchOrder } from "./siege/crowd.ts";
import { memoryOf } from "./siege/memory.ts";

const MEBI = 1024 * 1024;

/** Two who play: each message of the one is heard by the other. */
async function couple(url: string, headers: Record<string, string> = {}): Promise<{ host: Client; guest: Client; room: string }> {
  const [host, guest] = [await Client.open(url, headers), await Client.open(url, headers)];
  const room = await host.create();
  await guest.join(room, "guest");
  await host.next();
  return { host, guest, room };
}

/** Joins a crowd's room, and only listens. */
async function listen(url: string, members: Member[]): Promise<Member> {
  const listener = await Member.sit(url, { type: "join", clientId: "listener", room: members[0]?.room });
  const met = () => members.every(({ frames }) => frames.count === 1);
  await until("everybody to hear of the listener", met);
  for (const { frames } of members) frames.count = 0;
  return listener;
}

/** What a member has been sent of its room before a ping that is sent now is answered. */
async function heardBefore(member: Member): Promise<number> {
  const { onText } = member.frames;
  let heard: number | undefined;
  const before = member.frames.count;
  let since = 0;
  member.frames.onText = (payload) => {
    if (payload.includes('"pong"')) {
      heard ??= before + since;
      member.frames.count--;
    } else {
      since++;
      onText?.(payload);
    }
  };
  member.raw.send({ type: "ping" });
  return until("a pong", () => heard);
}

/** Ends their sockets with the test: one that reads nothing doesn't notice that the relay has gone. */
function ending(members: Member[]): Disposable {
  return { [Symbol.dispose]: () => members.forEach(({ raw }) => raw.reset()) };
}

describe("while a room floods", () => {
  const SIZE = 40;
  const to = Array.from({ length: SIZE + 1 }, (_, i) => i);
  const FEW = 100; // each goes to every member by itself, which is slow
  const targeted = Buffer.concat(
    Array.from({ length: FEW }, (_, data) => clientFrame(JSON.stringify({ type: "send", to, data }))),
  );

  test.each([
    ["to everybody", flood(BURST), BURST, SIZE - 1],
    ["to lists of members", targeted, FEW, SIZE],
  ])(
    "%s, another room's message comes before it is through, and nothing is lost",
    async (_, bytes, frames, senders) => {
      await using relay = testRelay();
      const flooders = await crowd(relay.url, SIZE);
      const listener = await listen(relay.url, flooders);
      const faults = watchOrder(listener);
      const { host, guest } = await couple(relay.url);
      for (const { raw } of flooders) raw.write(bytes);
      host.send({ type: "send", data: "me, too" });
      expect(await guest.next()).toMatchObject({ data: "me, too" });
      expect(await heardBefore(listener)).toBeLessThan(SIZE * frames);
      const heard = () => flooders.map((flooder) => flooder.frames.count);
      const all = () => listener.frames.count >= SIZE * frames && heard().every((count) => count >= senders * frames);
      await until("everybody to have heard everything", all);
      expect(listener.frames.count).toBe(SIZE * frames);
      expect(heard()).toEqual(Array(SIZE).fill(senders * frames));
      expect(faults).toEqual([]);
    },
    30_000,
  );

  test("and many others wake with it, a room that says little doesn't wait until each has done what one alone may do", async () => {
    const ROOMS = 30;
    const ALONE = 6_000; // deliveries that a room alone may make in a turn at most: the relay's TURN_WORK
    const LEAST = 500; // and one of many: its LEAST_SHARE
    await using relay = testRelay();
    const flooders = (await many(ROOMS, () => crowd(relay.url, SIZE / 2))).flat();
    const { host, guest } = await couple(relay.url);
    const sent = async () => (await readMetric(relay.url, "party_sockets_messages_total")).out ?? NaN;
    const before = await sent();
    for (const { raw } of flooders) raw.write(flood(100));
    host.send({ type: "send", data: "me, too" });
    expect(await guest.next()).toMatchObject({ data: "me, too" });
    expect((await sent()) - before).toBeLessThan(2 * (ALONE + ROOMS * LEAST));
  });

  test("a room with one sender is through with its own burst first", async () => {
    await using relay = testRelay();
    const flooders = await crowd(relay.url, SIZE);
    const listener = await listen(relay.url, flooders);
    const [one, other] = (await crowd(relay.url, 2)) as [Member, Member];
    for (const { raw } of flooders) raw.write(flood(BURST));
    one.raw.write(flood(BURST));
    await until("the small room's burst", () => other.frames.count === BURST);
    expect(await heardBefore(listener)).toBeLessThan(SIZE * BURST);
  });

  test("its members are heard by turns, one frame of each", async () => {
    await using relay = testRelay();
    const flooders = await crowd(relay.url, SIZE);
    const listener = await listen(relay.url, flooders);
    const last = new Map<number, number>();
    let apart = 0;
    listener.frames.onText = (payload) => {
      const { from, data } = JSON.parse(payload.toString());
      last.set(from, data);
      if (last.size === SIZE) apart = Math.max(apart, Math.max(...last.values()) - Math.min(...last.values()));
    };
    for (const { raw } of flooders) raw.write(flood(BURST));
    await until("everything", () => listener.frames.count === SIZE * BURST);
    expect(apart).toBeLessThan(BURST / 2);
  });

  test("who joins hears of nobody who went before, and of everybody who goes after", async () => {
    await using relay = testRelay();
    const crowded = await crowd(relay.url, 200);
    const [witness, ...others] = crowded as [Member, ...Member[]];
    const left: number[] = [];
    witness.frames.onText = (payload) => {
      const { type, index } = JSON.parse(payload.toString());
      if (type === "peer_left") left.push(index);
    };
    const joiner = await Client.open(relay.url);
    for (const { raw } of others) raw.reset();
    const { peers } = await joiner.join(witness.room, "joiner");
    await until("all to have left", () => left.length === others.length);
    expect(left.toSorted((a, b) => a - b)).toEqual(others.map(({ index }) => index).toSorted((a, b) => a - b));
    const heard = (await joiner.soFar()).map(({ index }) => index);
    expect(heard.toSorted((a, b) => a - b)).toEqual(peers.slice(1));
  });
});

describe("rooms that share the relay", () => {
  /** Nothing limits anybody but the turns: no bucket, no memory; and the clock stands still, so that no time is rested. */
  const sharing = () => testRelay({ clock: new TestClock(), maxMessagesPerSecond: 0, maxMemoryBytes: 0, maxBufferedBytes: 0 });

  /** Numbered messages to slot 1, of which a turn has few: each is a system call. */
  const toGuest = (frames: number) =>
    Buffer.concat(Array.from({ length: frames }, (_, data) => clientFrame(JSON.stringify({ type: "send", to: 1, data }))));

  test("are heard in rotation, even if a turn hasn't shares for all of them", async () => {
    const FRAMES = 4_000;
    await using relay = sharing();
    const rooms = (await many(16, () => crowd(relay.url, 2))) as [Member, Member][];
    const heard = () => rooms.map(([, guest]) => guest.frames.count);
    let whenOneWasThrough: number[] | undefined;
    for (const [, { frames }] of rooms)
      frames.onText = () => {
        if (frames.count === FRAMES) whenOneWasThrough ??= heard();
      };
    for (const [host] of rooms) host.raw.write(toGuest(FRAMES));
    const counts = await until("a room to be through", () => whenOneWasThrough);
    expect(Math.min(...counts)).toBeGreaterThan(FRAMES / 2);
    await until("all to be through", () => heard().every((count) => count >= FRAMES));
    expect(heard()).toEqual(rooms.map(() => FRAMES));
  });

  test("wait for their next message as long as the last one was dear", async () => {
    const [SIZE, DEAR, FRAMES] = [200, 8, 6_000];
    await using relay = sharing();
    const [sender, listener] = (await crowd(relay.url, SIZE)) as [Member, Member];
    const rooms = (await many(12, () => crowd(relay.url, 2))) as [Member, Member][];
    const fewest = () => Math.min(...rooms.map(([, guest]) => guest.frames.count));
    const between = { first: NaN, last: NaN };
    listener.frames.onText = () => {
      if (listener.frames.count === 1) between.first = fewest();
      if (listener.frames.count === DEAR) between.last = fewest();
    };
    const [[, guest]] = rooms as [[Member, Member]];
    guest.frames.onText = () => {
      if (guest.frames.count === 500) sender.raw.write(flood(DEAR)); // everybody is behind now
    };
    for (const [host] of rooms) host.raw.write(toGuest(FRAMES));
    await until("the dear messages", () => listener.frames.count === DEAR);
    // A message to 199 members costs what some 170 to one do, so each of the other rooms is heard that often meanwhile.
    expect(between.last).toBeLessThan(FRAMES);
    expect((between.last - between.first) / (DEAR - 1)).toBeGreaterThan(110);
  });

  test("are heard before many large messages that were whole before theirs", async () => {
    const ROOMS = 16;
    await using relay = testRelay({ maxMessageBytes: MEBI, maxBufferedBytes: 0, maxMemoryBytes: 0, clock: new TestClock() });
    const begun = new Set<number>();
    const rooms = await many(ROOMS, async (i) => {
      const host = await RawSocket.open(relay.url);
      host.send({ type: "create", clientId: "host", maxClients: 3 });
      const { room } = await host.next();
      const guests = await many(2, (n) => Member.sit(relay.url, { type: "join", clientId: `guest ${n}`, room }));
      const large = JSON.stringify({ type: "send", data: "x".repeat(600_000) });
      host.write(Buffer.concat([clientFrame(large, { fin: false }), clientFrame("", { opcode: 9 })]));
      for (let frame = await host.nextFrame(); frame?.opcode !== 10; frame = await host.nextFrame()); // all but its end is there
      return { host, guests, i };
    });
    const { host, guest } = await couple(relay.url);
    for (const { guests } of rooms) guests[0]?.raw.send({ type: "ping" });
    await until("a turn with all rooms", () => rooms.every(({ guests }) => (guests[0]?.frames.count ?? 0) > 0));
    for (const { guests, i } of rooms) for (const { raw } of guests) raw.skim(() => begun.add(i));
    begun.clear();
    const heard = guest.next().then((frame) => ({ frame, before: begun.size }));
    for (const room of rooms) room.host.write(clientFrame("", { opcode: 0 }));
    host.send({ type: "send", data: "me, too" });
    const { frame, before } = await within(heard, "the small message");
    expect(frame).toMatchObject({ data: "me, too" });
    expect(before).toBeLessThan(ROOMS / 2);
    await until("the large messages", () => begun.size === ROOMS);
  });

  test("are heard before the joins of strangers who can't come in", async () => {
    const [SOCKETS, JOINS, MESSAGES] = [500, 80, 20];
    await using relay = sharing();
    const { host, guest, room } = await couple(relay.url);
    await host.ask({ type: "set_room", locked: true });
    await guest.next();
    const strangers = await many(SOCKETS, () => Member.open(relay.url));
    const answers = () => strangers.reduce((sum, { frames }) => sum + frames.count, 0);
    const join = clientFrame(JSON.stringify({ type: "join", clientId: "stranger", room }));
    for (const { raw } of strangers) raw.write(Buffer.concat(Array<Buffer>(JOINS).fill(join)));
    const untilBusy = async () => {
      while (answers() < 10_000) await new Promise((resolve) => setImmediate(resolve));
    };
    await within(untilBusy(), "a part of the refusals");
    const before = answers();
    for (let n = 0; n < MESSAGES; n++) host.send({ type: "send", data: n });
    for (let n = 0; n < MESSAGES; n++) expect(await guest.next()).toMatchObject({ data: n });
    // It would be MESSAGES * SOCKETS, if each stranger had a turn between two messages.
    expect(answers() - before).toBeLessThan((MESSAGES * SOCKETS) / 4);
    await until("all refusals", () => answers() === SOCKETS * JOINS);
  });

  test("leave a request over HTTP its turn before all pings that many sockets had sent before it are read", async () => {
    const [SOCKETS, PINGS] = [30, 20_000];
    await using relay = sharing();
    let pongs = 0;
    const pings = Buffer.concat(Array.from({ length: PINGS }, () => clientFrame("", { opcode: 9 })));
    const flooders = await many(SOCKETS, () => RawSocket.open(relay.url));
    for (const flooder of flooders) flooder.skim(({ length }) => (pongs += length / 2));
    const asker = await RawSocket.connect(relay.url);
    const answered = asker.head().then((head) => ({ head, before: pongs }));
    for (const flooder of flooders) flooder.write(pings);
    asker.write("GET /health HTTP/1.1\r\nHost: relay\r\n\r\n");
    const { head, before } = await within(answered, "the answer");
    expect(head).toStartWith("HTTP/1.1 200 OK");
    expect(before).toBeLessThan((SOCKETS * PINGS) / 2);
    await until("all pongs", () => pongs === SOCKETS * PINGS);
  });

  test("are read before all pings that somebody's many sockets had sent before, and while more come", async () => {
    const [SOCKETS, PINGS] = [30, 20_000];
    await using relay = sharing();
    const pings = Buffer.concat(Array.from({ length: PINGS }, () => clientFrame("", { opcode: 9 })));
    const flooders = await many(SOCKETS, () => RawSocket.open(relay.url));
    let pongs = 0;
    let isOver = false;
    for (const flooder of flooders) {
      let own = 0;
      flooder.skim(({ length }) => {
        pongs += length / 2;
        own += length / 2;
        if (own > 0 && own % PINGS === 0 && !isOver) flooder.write(pings);
      });
    }
    const { host, guest } = await couple(relay.url);
    const heard = guest.next().then((frame) => ({ frame, before: pongs }));
    for (const flooder of flooders) flooder.write(pings);
    host.send({ type: "send", data: "me, too" });
    const { frame, before } = await within(heard, "the message");
    isOver = true;
    expect(frame).toMatchObject({ data: "me, too" });
    expect(before).toBeLessThan((SOCKETS * PINGS) / 2);
  });
});

describe("a relay that is short of memory", () => {
  const BOUND = 112 * MEBI;
  const env = { MAX_MEMORY_BYTES: String(BOUND), ADDRESS_HEADER: "X-Forwarded-For" };

  async function scene() {
    const relay = await RelayProcess.start(env);
    const { host, guest } = await couple(relay.url, HONEST);
    let sent = 0;
    return {
      relay,
      url: relay.url,
      before: memoryOf(relay.pid)?.now ?? NaN,
      /** The honest couple plays: each message arrives, in order. */
      async play() {
        host.send({ type: "send", data: ++sent });
        expect(await within(guest.next(), "an honest message")).toMatchObject({ data: sent });
      },
      /** Memory is what it was, and newcomers are welcome. */
      async recovers() {
        await until("memory to come back", () => (memoryOf(relay.pid)?.now ?? 0) < this.before + 48 * MEBI);
        await until("newcomers to be welcome", async () => {
          const newcomer = await Client.open(relay.url, HONEST);
          newcomer.send({ type: "create", clientId: "n", maxClients: 2 });
          const answer = await newcomer.next().catch(() => undefined);
          return answer?.type === "created";
        });
        await this.play();
      },
      [Symbol.asyncDispose]: () => relay[Symbol.asyncDispose](),
    };
  }

  test("cuts who holds unfinished messages, and nobody else", async () => {
    await using at = await scene();
    const silent = await many(10, () => Member.sit(at.url, { type: "create", clientId: "a", maxClients: 2 }));
    const holders = await many(600, () => Member.open(at.url));
    using _ = ending([...silent, ...holders]);
    const part = clientFrame(Buffer.alloc(254 * 1024, "x"), { fin: false });
    for (const { raw } of holders) raw.write(part);
    await until("some to be cut", () => holders.some(({ isGone }) => isGone));
    await at.play();
    for (const { raw } of holders) raw.reset();
    await at.recovers();
    expect(silent.filter(({ isGone }) => isGone)).toEqual([]);
  }, 30_000);

  test("cuts members that let much wait for them, and nobody who reads", async () => {
    await using at = await scene();
    const [sender, reader, ...others] = (await crowd(at.url, 150)) as [Member, Member, ...Member[]];
    using _ = ending([sender, reader, ...others]);
    for (const { raw } of others) raw.pause();
    const frames = 30;
    const left: number[] = [];
    const got: number[] = [];
    reader.frames.onText = (payload) => {
      const { type, index, data } = JSON.parse(payload.toString());
      if (type === "peer_left") left.push(index);
      if (type === "message") got.push(data[0]);
    };
    sender.raw.write(flood(frames, "x".repeat(200_000)));
    await until("the reader to hear everything", () => got.length === frames);
    await at.play();
    await until("the others to be cut", () => left.length === others.length);
    expect(got).toEqual(Array.from({ length: frames }, (_, n) => n));
    expect([sender.isGone, reader.isGone]).toEqual([false, false]);
    expect(memoryOf(at.relay.pid)?.peak).toBeLessThan(2 * BOUND);
    await at.recovers();
  }, 30_000);
});

test("a stranger's hundred rooms full of absent players make no other room forget its own", async () => {
  await using relay = testRelay({ addressHeader: "X-Forwarded-For", maxMessagesPerSecond: 0, knownInAll: 1_000 });
  const { url } = relay;
  const host = await Client.open(url, HONEST);
  const room = await host.create();
  const come = async (clientId: string) => (await Client.open(url, HONEST)).join(room, clientId);
  const away = async (clientId: string): Promise<void> => {
    const guest = await Client.open(url, HONEST);
    await guest.join(room, clientId);
    await guest.close();
  };
  await away("player");
  await away("villain");
  host.send({ type: "kick", index: 2 });
  host.send({ type: "set_room", locked: true });
  await host.soFar();

  const ROOMS = 105; // 1,260 visits: 260 more than all rooms of this relay remember together
  const VISITS = 12;
  const holders = await many(ROOMS, () => Member.sit(url, { type: "create", clientId: "holder", maxClients: 1000 }));
  const visitors = await many(ROOMS, () => Member.open(url));
  visitors.forEach(({ raw }, i) => {
    const code = (holders[i] as Member).room;
    const frames = Array.from({ length: VISITS }, (_, n) => [
      clientFrame(`{"type":"join","clientId":"${n}","room":"${code}"}`),
      clientFrame('{"type":"leave"}'),
    ]);
    raw.write(Buffer.concat(frames.flat()));
  });
  await until("1,260 visits", () => visitors.every(({ frames }) => frames.count === 2 * VISITS));

  expect(await come("player")).toMatchObject({ type: "joined", index: 1, resumed: true });
  expect(await come("villain")).toMatchObject({ code: "kicked" });
  expect(await come("nobody")).toMatchObject({ code: "room_locked" });
});

describe("on Fly.io, an address that guesses", () => {
  /** Two siblings: the one has what ends with `z`, the other is silent. */
  function siblings() {
    const searched = new Set<string>();
    const double: Siblings = {
      list: () => Promise.resolve(["silent", "b"]),
      has(id, code, signal) {
        searched.add(code);
        if (id === "b" && code.endsWith("z")) return Promise.resolve(true);
        return new Promise((_, reject) => signal.addEventListener("abort", () => reject(new Error("aborted"))));
      },
    };
    const config = { cluster: flyCluster("fra", double), codeRegion: "fra", addressHeader: "X-Forwarded-For" };
    return { searched, config };
  }
  const look = async (url: string, code: string, address: string): Promise<number> => {
    const headers = { "X-Forwarded-For": address };
    return (await fetch(`${url}/room/${code}`, { headers, redirect: "manual", keepalive: false })).status;
  };
  const LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYabcdefghi";
  /** Another code of the same region. */
  const another = (code: string, n: number, last = "A") => code.slice(0, 3) + LETTERS[n >> 5] + LETTERS[n & 31] + last;

  test("is locked out for what it was refused, too, and finds no room then; others do", async () => {
    const clock = new TestClock();
    const { searched, config } = siblings();
    await using relay = testRelay({ ...config, clock, maxMissesPerMinute: 20 });
    const planted = await (await Client.open(relay.url, HONEST)).create();
    const searches = Promise.all(Array.from({ length: 8 }, (_, n) => look(relay.url, another(planted, n), "203.0.113.7")));
    searches.catch(() => {}); // if this fails before they are awaited
    await until("eight searches", () => searched.size === 8);
    const refused: number[] = [];
    for (let n = 8; n < 40; n++) refused.push(await look(relay.url, another(planted, n), "203.0.113.7"));
    expect(refused).toEqual([...Array(20).fill(503), ...Array(12).fill(429)]);
    expect(await look(relay.url, planted, "203.0.113.7")).toBe(429);
    expect(await look(relay.url, planted, "198.51.100.1")).toBe(200);
    clock.advance(1_000);
    await searches;
  });

  test("leaves searches to others, however many of its /64s ask", async () => {
    const clock = new TestClock();
    const { searched, config } = siblings();
    await using relay = testRelay({ ...config, clock });
    const local = await (await Client.open(relay.url, HONEST)).create();
    const asked = Promise.all(Array.from({ length: 64 }, (_, n) => look(relay.url, another(local, n), `2001:db8:0:${n % 8}::1`)));
    asked.catch(() => {}); // as above
    await until("eight searches", () => searched.size === 8);
    expect(await look(relay.url, another(local, 64, "z"), "198.51.100.1")).toBe(409);
    clock.advance(1_000);
    const statuses = await asked;
    expect(statuses.filter((status) => status === 404)).toHaveLength(8);
    expect(statuses.filter((status) => status === 503)).toHaveLength(56);
  });
});

describe("GET /metrics", () => {
  test("is answered once a connection, whatever is pipelined behind", async () => {
    await using relay = testRelay();
    const raw = await RawSocket.connect(relay.url);
    raw.write("GET /metrics HTTP/1.1\r\nHost: relay\r\n\r\n".repeat(100));
    await within(raw.closed, "the connection to be closed");
    expect(raw.received.toString().match(/HTTP\/1\.1 200 /g)).toHaveLength(1);
  });

  test("shows at most 100 characters of an origin", async () => {
    await using relay = testRelay();
    await RawSocket.open(relay.url, "/", { ...STRANGER, Origin: "\\".repeat(250) });
    const text = await (await fetch(`${relay.url}/metrics`)).text();
    expect(text).toContain(`origin="${"\\\\".repeat(100)}"`);
    expect(text).not.toContain("\\\\".repeat(101));
  });

  test("is made at most once a second", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock, metricsMs: 1_000 });
    const scrape = async () => (await fetch(`${relay.url}/metrics`, { keepalive: false })).text();
    const before = await scrape();
    await (await Client.open(relay.url)).create();
    expect(await scrape()).toBe(before);
    clock.advance(1_000);
    expect(await scrape()).toMatch(/^party_sockets_rooms\{.*\} 1$/m);
  });
});
